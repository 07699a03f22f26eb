"""The command line end to end on a folder of pictures: training, SIGKILL and resume, and bad input of all kinds."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from run_tools import logged
from safetensors.numpy import load_file

from mergevq_jax import cli
from mergevq_jax.evaluate.images import SourceImages
from mergevq_jax.tokenizer import report
from mergevq_jax.tokenizer.model import Tokenizer, load_tokenizer
from mergevq_jax.tokens_folder import read_tokens
from mini_scenes import example_scene, render_scene

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    data = {"image_size": 32, "batch_size": 4, "sources": [{"kind": "folder", "path": "PICTURES"}]}
    return ConfigDict({
        "seed": 3,
        "model": {
            "resolution": 32, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": [0, 0, 0], "num_att_blocks": 1,
            "num_heads": 1, "z_channels": 6, "keep": 48, "layer_scale": 0.5, "dist_head": None, "recovery": None,
        },
        "losses": {"perceptual_weight": 0.0, "source_weight": 0.0},
        "discriminator": {"ndf": 8, "num_layers": 1},
        "merge_ratio": {"keeps": [48], "weights": [1.0]},
        "optimizer": {"learning_rate": 1e-3},
        "data": data,
        "evaluation": {"data": {**data, "shuffle": False, "random_crop": False}, "batches": 1},
        "loop": {"duration": {"steps": 12}, "log_every": 1, "checkpoint_every": 3, "min_free_bytes": 0},
    })
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with pictures in two classes, and a config file beside it."""
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for number in range(10):
        path = root / "pictures" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(rng.integers(0, 255, (5, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)).save(path)
    (root / "config.py").write_text(textwrap.dedent(CONFIG).replace("PICTURES", str(root / "pictures")))
    return root


def command(folder: Path, workdir: str) -> list[str]:
    config = ["--config", str(folder / "config.py"), "--workdir", str(folder / workdir)]
    return [sys.executable, "-m", "mergevq_jax.cli", "train", *config]


ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[2] / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """The workdir of an uninterrupted run that saved only its final state."""
    arguments = [*command(folder, "whole"), "--config.loop.checkpoint_every=0"]
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def interrupt(folder: Path, workdir: str, when: str, number: signal.Signals) -> subprocess.CompletedProcess:
    """Starts the run and sends it a signal as soon as an entry of its checkpoints matches `when`."""
    process = subprocess.Popen(
        command(folder, workdir), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not any((folder / workdir / "checkpoints").glob(when)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_a_killed_run_resumes_bit_equal(folder, trained):
    """Killed while it writes the second checkpoint, interrupted after the third, then finished."""
    assert interrupt(folder, "killed", "6*", signal.SIGKILL).returncode == -signal.SIGKILL
    stopped = interrupt(folder, "killed", "9", signal.SIGTERM)
    again = subprocess.run(command(folder, "killed"), env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "own checkpoint" in stopped.stdout and "own checkpoint" in again.stdout
    if stopped.returncode:  # with only three steps to go, it can be too late to stop
        assert stopped.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM after step" in stopped.stdout
    assert logged(folder / "killed") == logged(trained)
    whole, resumed = (load_file(path / "tokenizer" / "model.safetensors") for path in (trained, folder / "killed"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)


def test_the_state_restores_on_eight_devices(folder, trained):
    from mergevq_jax.tokenizer import train as stage1
    from mergevq_jax.tokenizer.run import TrainConfig, load_frozen, make_program
    from runtime_jax import config as config_lib
    from runtime_jax.mesh import MeshConfig, make_mesh
    from runtime_jax.training.checkpoint import Checkpointer
    from runtime_jax.training.update import Optimizer

    config = config_lib.build(TrainConfig, config_lib.load(str(folder / "config.py")))
    optimizer = Optimizer.make(config.optimizer, total_steps=1000, batch_size=1)
    optimizers = stage1.Optimizers(optimizer, optimizer)
    step_config, frozen = load_frozen(config)
    states = []
    for shape, devices in ((MeshConfig(data=2, fsdp=2, tensor=2), 8), (MeshConfig(), 1)):
        mesh = make_mesh(shape, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            program = make_program(step_config, optimizers, mesh, frozen)
            with Checkpointer(trained, read_only=True) as checkpointer:
                states.append(jax.device_get(checkpointer.restore(program.abstract_state, 12)))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert states[0].step == 12


def test_tokens_on_disk_are_the_tokenizers(folder, trained, capsys):
    out = folder / "tokens"
    arguments = ["tokenize", "--tokenizer", str(trained / "tokenizer"), "--folder", str(folder / "pictures")]
    arguments += ["--out", str(out), "--batch-size", "4", "--shard-size", "6"]
    assert cli.main(arguments) == 0
    records = list(read_tokens(out))
    assert [int(record["index"]) for record in records] == list(range(10))
    assert {int(record["label"]) for record in records} == {0, 1}
    assert all(record["indices"].shape == (48,) and record["source_map"].shape == (64,) for record in records)
    assert all(record["indices"].min() >= 0 and record["indices"].max() < 2**6 for record in records)
    first = sorted(out.glob("*.array_record"))[0]
    before = first.stat().st_mtime_ns
    sorted(out.glob("*.array_record"))[1].unlink()  # as after an interruption
    assert cli.main(arguments) == 0
    assert first.stat().st_mtime_ns == before and len(list(read_tokens(out))) == 10
    assert cli.main([*arguments, "--keep", "40"]) == 1
    assert "other tokens" in capsys.readouterr().err


def test_reconstruct_takes_a_picture_of_any_size(folder, trained, capsys):
    picture = next((folder / "pictures").rglob("*.png"))
    arguments = ["reconstruct", str(picture), "--tokenizer", str(trained / "tokenizer"), "--out", str(folder / "pics")]
    assert cli.main([*arguments, "--keep", "60", "--size", "0"]) == 0
    assert Image.open(folder / "pics" / f"{picture.stem}_k60.png").size == (48, 40)
    assert cli.main([*arguments, "--keep", "50"]) == 0  # the training size, in whole tokens of 4 pixels
    assert Image.open(folder / "pics" / f"{picture.stem}_k50.png").size == (36, 32)
    assert (folder / "pics" / f"{picture.stem}_comparison.png").is_file()
    assert "dB" in capsys.readouterr().out


def test_reconstruct_refuses_what_would_be_lost_or_never_end(folder, tmp_path, capsys):
    picture = next((folder / "pictures").rglob("*.png"))
    twin = tmp_path / picture.name
    twin.write_bytes(picture.read_bytes())
    assert cli.main(["reconstruct", str(picture), str(twin)]) == 1
    assert "would overwrite each other" in capsys.readouterr().err
    assert cli.main(["reconstruct", str(picture), "--size", "400"]) == 1
    assert "at most 8192 are allowed: take a smaller --size" in capsys.readouterr().err


def test_reconstruct_takes_the_pictures_of_a_folder(folder, trained, tmp_path):
    arguments = ["reconstruct", str(folder / "pictures"), "--tokenizer", str(trained / "tokenizer"), "--keep", "50"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").rglob("*_k50.png"))) == 10
    assert (tmp_path / "out" / "class1" / "3_k50.png").is_file()
    one = ["reconstruct", str(folder / "pictures" / "class1" / "3.png"), *arguments[2:], "--out", str(tmp_path / "one")]
    assert cli.main(one) == 0
    same = (tmp_path / "out" / "class1" / "3_k50.png").read_bytes()
    assert (tmp_path / "one" / "3_k50.png").read_bytes() == same
    (tmp_path / "empty").mkdir()
    assert cli.main(["reconstruct", str(tmp_path / "empty")]) == 1


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Fails the test if weights or pixels are read."""

    def never(*_, **__):
        pytest.fail("something was loaded first")

    for name in ("mergevq_jax.model_folder.read_params", "mergevq_jax.commands.reconstruct.decode_image"):
        monkeypatch.setattr(name, never)


@pytest.mark.parametrize("size", ["400", "30000"])
def test_limits_are_checked_by_arithmetic(folder, capsys, nothing_is_loaded, size):
    picture = next((folder / "pictures").rglob("*.png"))
    assert cli.main(["reconstruct", str(picture), "--size", size]) == 1
    height, width = int(size), int(size) * 48 // 40
    raw = height // 4 * (width // 4)
    assert f"{width} x {height} pixels are {raw} raw tokens, at most 8192 are allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["reconstruct", "PICTURE", "--out"],
        ["tokenize", "--folder", "PICTURES", "--out"],
        ["evaluate", "reconstruction", "--out"],
        ["compare", "--row", "a", "b", "--out"],
        ["sample", "--out"],
        ["convert", "none.safetensors", "--preset", "tiny", "--out"],
        ["convert", "none.safetensors", "--stage", "2", "--preset", "tiny", "--out"],
        ["scenes", "--data-dir"],
        ["train", "--config", "CONFIG", "--workdir"],
    ],
)
def test_an_output_that_is_a_file_is_refused_first(folder, tmp_path, capsys, nothing_is_loaded, arguments):
    out = tmp_path / "file"
    out.touch()
    names = {
        "PICTURE": next((folder / "pictures").rglob("*.png")),
        "PICTURES": folder / "pictures",
        "CONFIG": folder / "config.py",
    }
    assert cli.main([str(names.get(argument, argument)) for argument in [*arguments, out]]) == 1
    error = capsys.readouterr().err
    assert f"{out}: cannot be written: Not a directory" in error and len(error.splitlines()) == 1


def test_a_second_training_in_one_workdir_is_refused_and_harms_nothing(folder, trained, tmp_path):
    """While the first run compiles, it holds the workdir and has written no checkpoint."""
    first = subprocess.Popen(command(folder, "twice"), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert "12 steps of 4 images, from step 0 (scratch)" in first.stdout.readline()
    assert first.stdout.readline() == "compiling the train step\n"
    second = subprocess.run(command(folder, "twice"), env=ENVIRONMENT, capture_output=True, text=True)
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1
    assert f"another run is writing there: cli.py train on host {os.uname().nodename}, process {first.pid}, since " in (
        second.stderr
    )
    first.communicate()
    assert first.returncode == 0 and logged(folder / "twice") == logged(trained)


def test_codes_of_features_that_are_not_finite_are_not_written(folder, trained, tmp_path, capsys):
    broken = Tokenizer.from_pretrained(trained / "tokenizer")
    broken.params["encoder"]["conv_out"]["bias"] = np.full(6, np.nan, np.float32)
    broken.save_pretrained(tmp_path / "broken")
    pictures = str(folder / "pictures")
    for arguments in (
        ["tokenize", "--folder", pictures, "--batch-size", "4", "--keep", "48"],
        ["reconstruct", pictures, "--keep", "50"],
    ):
        out = ["--tokenizer", str(tmp_path / "broken"), "--out", str(tmp_path / "out")]
        assert cli.main([*arguments, *out]) == 1
        assert "parameters that are not finite: tokenizer/encoder/conv_out/bias (6 of 6 v" in capsys.readouterr().err
        assert not list(tmp_path.rglob("*.array_record")) and not list(tmp_path.rglob("*.png"))


def test_a_missing_dataset_is_named_with_its_key(folder, tmp_path, capsys):
    source = "{'kind': 'tfds', 'name': 'mini_scenes/64', 'data_dir': '/no'}"
    arguments = ["train", "--config", str(folder / "config.py"), "--workdir", str(tmp_path / "run")]
    for key in ("data", "evaluation.data"):
        assert cli.main([*arguments, f"--config.{key}.sources=({source},)"]) == 1
        command = "mergevq scenes --data-dir /no --size 64; or in Python: mini_scenes.prepare('/no', size)"
        expected = f"train: {key}: dataset 'mini_scenes/64' is not in '/no'; run: {command}\n"
        assert capsys.readouterr().err.endswith(expected)


def test_a_closed_pipe_ends_quietly():
    """As with `| head`; argparse ignores closed pipes when it prints help."""
    for arguments, status in ((["inspect", "--preset", "tiny"], 128 + signal.SIGPIPE), (["--help"], 0)):
        program = subprocess.Popen(
            [sys.executable, "-m", "mergevq_jax.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        program.stdout.close()
        assert program.stderr.read() == b"" and program.wait() == status


def test_inspect_needs_no_weights(folder, capsys):
    assert cli.main(["inspect", "--preset", "gr-d64"]) == 0
    text = capsys.readouterr().out
    assert "62,6" in text and "83,3" in text and "GFLOP" in text
    aligned = ["--config.losses.alignment_weight=1.0", "--config.model.dist_head=layer3"]
    aligned += ["--config.teacher=facebook/dinov2-base", "--config.losses.alignment_size=56"]
    lpips = ["--config.losses.perceptual_weight=1.0"]
    assert cli.main(["inspect", "--config", str(folder / "config.py"), *aligned, *lpips]) == 0
    assert "| train step |" in capsys.readouterr().out


def test_errors_of_checkpoints_are_one_line(monkeypatch, capsys):
    from mergevq_jax.tokenizer import run
    from runtime_jax.training.checkpoint import CheckpointError

    def damaged(*_):
        raise CheckpointError("none of 2 checkpoints can be read")

    monkeypatch.setattr(run, "train", damaged)
    assert cli.main(["train", "--config", "configs/mergevq_tiny.py", "--workdir", "x"]) == 1
    assert capsys.readouterr().err == "mergevq train: none of 2 checkpoints can be read\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.keeep=3"], "keep"),
        (["--config.optimizer.learning_rate=fast"], "learning_rate"),
        (["--config.model.keep=65"], "cannot keep 65 of 64"),
        (["--config.merge_ratio.keeps=(20,)"], "each of which merges at most half"),
        (["--config.model.resolution=30"], "multiple of the downsampling"),
        (["--config.data.sources.0.path=/nowhere"], "/nowhere"),
        (
            ["--config.data.batch_size=6", "--config.accumulate=4"],
            "=6 must be a multiple of accumulate=4",
        ),
        (["--config.accumulate=0"], "must be a multiple of accumulate=0, at least 1"),
        (["--config.losses.perceptual_weight=1.0"], "lpips names no weights"),
        (["--config.init_from=/no/tokenizer"], "/no/tokenizer"),
        (
            [
                "--config.losses.alignment=label",
                "--config.losses.alignment_weight=1.0",
                "--config.losses.alignment_size=32",
                "--config.model.dist_head=layer3",
                "--config.model.num_classes=1",
            ],
            "has 2 classes, but model.num_classes is 1",
        ),
        (["--config.mesh.tensor=3"], "mesh"),
        (["--config.loop.min_free_bytes=1152921504606846976"], "disk full"),
    ],
)
def test_bad_config_is_one_line(folder, capsys, overrides, message):
    arguments = ["train", "--config", str(folder / "config.py"), "--workdir", str(folder / "bad")]
    assert cli.main([*arguments, *overrides]) == 1
    assert message in capsys.readouterr().err


def test_sources_whose_labels_would_mix_are_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "pictures" / "class0", tmp_path / "others" / "class2")
    shutil.copytree(folder / "pictures" / "class1", tmp_path / "others" / "class1")
    sources = [{"kind": "folder", "path": str(path)} for path in (folder / "pictures", tmp_path / "others")]
    losses = {"alignment": "label", "alignment_weight": 1.0, "alignment_size": 32}
    overrides = [f"--config.losses.{name}={value}" for name, value in losses.items()]
    overrides += ["--config.model.dist_head=layer3", f"--config.data.sources={tuple(sources)}"]
    arguments = ["train", "--config", str(folder / "config.py"), "--workdir", str(tmp_path / "run")]
    assert cli.main([*arguments, *overrides]) == 1
    assert f"'{tmp_path / 'others'}' and '{folder / 'pictures'}' have classes of other names" in capsys.readouterr().err


def test_another_architecture_is_refused(folder, trained, capsys):
    arguments = ["train", "--config", str(folder / "config.py"), "--workdir", str(trained)]
    mesh = ["--config.mesh.data=1", "--config.mesh.tensor=8"]  # this process has eight devices, the batch four images
    assert cli.main([*arguments, *mesh, "--config.model.z_channels=7"]) == 1
    assert "model.z_channels" in capsys.readouterr().err


def test_a_workdir_that_cannot_be_written(folder, capsys):
    (folder / "file").write_text("in the way")
    assert cli.main(["train", "--config", str(folder / "config.py"), "--workdir", str(folder / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reconstruct", "none.png"], "no such file"),
        (["reconstruct", "BROKEN"], "not a readable image"),
        (["reconstruct", "PICTURE", "--keep", "999"], "cannot keep 999"),
        (["reconstruct", "PICTURE", "--size", "2"], "--size 2 is too small for two tokens: at least 7 (0: as it is)"),
        (["reconstruct", "PICTURE", "--size", "6"], "--size 6 is too small for two tokens: at least 7 (0: as it is)"),
        (["reconstruct", "PICTURE", "--size", "-1"], "--size -1 is too small"),
        (["reconstruct", "PICTURE", "--tokenizer", "/no/where"], "/no/where"),
        (["evaluate", "reconstruction", "--data-dir", "/no/where"], "mergevq scenes --data-dir /no/where --size 64"),
        (["tokenize", "--folder", "/no/where", "--out", "x"], "/no/where"),
        (["tokenize", "--tfds", "mini_scenes/64_single", "--data-dir", "/no", "--out", "x"], "64 --single"),
        (["tokenize", "--out", "x"], "exactly one of --folder and --tfds"),
        (["inspect", "--preset", "huge"], "no preset 'huge'"),
        (["inspect"], "exactly one of --config and --preset"),
        (["train", "--config", "none.py", "--workdir", "x"], "none.py"),
        (
            ["train", "--config", "configs/tokenverse_tiny.py:star", "--workdir", "x"],
            "this is not a config of mergevq train (task='tokenizer'): 8 of 9 keys are unknown\nconfig.",
        ),
        (["reconstruct", "PICTURE", "--unknown"], "unknown argument"),
    ],
)
def test_bad_arguments_are_one_line(folder, capsys, arguments, message):
    (folder / "broken.png").write_bytes(b"not a picture")
    names = {"BROKEN": str(folder / "broken.png"), "PICTURE": str(next((folder / "pictures").rglob("*.png")))}
    assert cli.main([names.get(argument, argument) for argument in arguments]) == 1
    assert message in capsys.readouterr().err


def test_nan_in_training_stops_with_the_step(folder, trained):
    """One NaN among the weights makes every loss NaN."""
    broken = Tokenizer.from_pretrained(trained / "tokenizer")
    broken.params["decoder"]["conv_out"]["bias"] = np.full(3, np.nan, np.float32)
    broken.save_pretrained(folder / "broken_tokenizer")
    arguments = [*command(folder, "nan"), "--config.loop.max_nonfinite=2"]
    arguments.append(f"--config.init_from={folder / 'broken_tokenizer'}")
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not finite in 2 updates in a row" in done.stderr and "step" in done.stderr


def test_the_shipped_tokenizer_rebuilds_scenes_better_with_more_tokens():
    scenes = [render_scene(example_scene(0, "test", index)[0], 64).image for index in range(24)]
    results = report.measure(load_tokenizer("tiny"), np.stack(scenes), (64, 144, 256), batch_size=24)
    values = [result.psnr.mean for result in results]
    assert values == sorted(values) and values[0] > 22
    assert not any(result.usage.dead_bits for result in results)
    assert all(result.recovered_psnr.mean <= result.psnr.mean + 0.5 for result in results)


def test_the_shipped_tokenizer_rebuilds_a_photograph():
    source = SourceConfig(kind="photos", split="held_out", crop_scale=(0.3, 1.0))
    images = SourceImages(source, 64, 8, first=True).read(range(8))
    (result,) = report.measure(load_tokenizer("tiny"), images, (144,), batch_size=8)
    assert result.psnr.mean > 24
