"""Whole runs in a bucket: the same results as on a disk, also after a kill."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_run
from generator_run_tools import random_tokenizer, run_config, write_pictures
from PIL import Image
from run_tools import logged
from several_tools import ended, launched
from tiny_pipeline import FLUX, SIDE, write_tiny_pipeline

from mergevq_jax import cli
from mergevq_jax.generator.data import TokensConfig
from mergevq_jax.generator.run import train as train_generator
from mergevq_jax.tokens_folder import read_tokens
from mini_scenes import prepare
from runtime_jax.config import build, to_dict
from runtime_jax.data import DataConfig, SourceConfig, make_batches
from runtime_jax.data.folder import FolderSource
from runtime_jax.data.sources import TfdsSource
from runtime_jax.files import BucketError, buckets, local
from runtime_jax.training.checkpoint import Checkpointer
from tokenverse_jax import cli as tokenverse
from tokenverse_jax.commands.learn import LearnRunConfig, learn
from tokenverse_jax.concepts.bank import load_concepts
from tokenverse_jax.flux.pipeline import Pipeline

# A read that fails leaves futures in Orbax that nobody waits for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on the disk that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    toy_run.train(workdir, 20)
    return workdir


def assert_same_run(got, want) -> None:
    with np.load(local(got / "final.npz")) as a, np.load(want / "final.npz") as b:
        assert set(a.files) == set(b.files)
        for key in b.files:
            np.testing.assert_array_equal(a[key], b[key])
    assert logged(got) == logged(want)


def killed(workdir, how: str, when: int) -> None:
    command = [sys.executable, toy_run.__file__, str(workdir), how, str(when)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(("how", "when"), [("in-step", 16), ("in-save", 12)])
def test_a_killed_run_goes_on_bit_equal(bucket_folder, whole, capsys, caplog, how, when):
    workdir = bucket_folder / how
    killed(workdir, how, when)
    with Checkpointer(workdir, read_only=True) as checkpointer:
        newest = checkpointer.latest()
    found = {name.split("/")[1] for name in buckets.objects(workdir) if name.startswith("checkpoints/")}
    if how == "in-save":  # in a bucket, an unfinished checkpoint has its final name
        assert newest == 6 and found == {"6", "12"}
    toy_run.train(workdir, 20)
    assert f"origin: own checkpoint {workdir}/checkpoints/{newest}" in capsys.readouterr().out
    warned = f"passing over half-written checkpoint {workdir}/checkpoints/12" in caplog.text
    assert warned or how == "in-step"
    assert_same_run(workdir, whole)
    events = [name for name in buckets.objects(workdir) if name.startswith("tensorboard/events")]
    assert len(events) == 2 and all(buckets.objects(workdir)[name]["size"] > 500 for name in events)


def test_a_damaged_checkpoint_is_set_aside(bucket_folder, caplog):
    toy_run.train(bucket_folder, 12)
    data = [name for name in buckets.objects(bucket_folder) if name.startswith("checkpoints/12/state/")]
    for name in data:
        if "/d/" in name:
            buckets.remove(bucket_folder / name)
    toy_run.train(bucket_folder, 12)
    assert f"passing over damaged checkpoint {bucket_folder}/checkpoints/12" in caplog.text
    assert any(name.startswith("checkpoints/12.damaged/") for name in buckets.objects(bucket_folder))
    with Checkpointer(bucket_folder, read_only=True) as checkpointer:
        assert checkpointer.steps() == [6, 12]


def test_two_processes_write_one_bucket(bucket_folder, whole):
    """Process 0 dies while it saves; the run starts again by itself, and equals that of one process."""
    command = [toy_run.__file__, str(bucket_folder), "in-save-once", "12"]
    code, out, err = ended(launched(2, command, ["--restarts", "1"]))
    assert code == 0, err
    assert f"origin: own checkpoint {bucket_folder}/checkpoints/6" in out
    for mine, theirs in zip(logged(bucket_folder), logged(whole), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(np.isclose(mine[name], theirs[name], rtol=1e-6, atol=1e-6) for name in mine)


def put(folder: Path, target) -> str:
    """Copies a folder to a bucket; its URL."""
    for file in folder.rglob("*"):
        if file.is_file():
            buckets.upload(file, target / str(file.relative_to(folder)))
    return str(target)


def assert_same_files(got, want: Path, *names: str) -> None:
    for name in names:
        assert (got / name).read_bytes() == (want / name).read_bytes(), name


def test_tokens_a_generator_and_its_samples(bucket_folder, tmp_path, capsys):
    """`mergevq tokenize`, `train` and `sample` read and write the bucket only, and give what they give on a disk."""
    random_tokenizer().save_pretrained(bucket_folder / "tokenizer")
    random_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert_same_files(bucket_folder, tmp_path, "tokenizer/model.safetensors", "tokenizer/config.json")
    put(write_pictures(tmp_path / "pictures"), bucket_folder / "pictures")

    def run(root) -> None:
        command = ["tokenize", "--folder", root / "pictures", "--tokenizer", root / "tokenizer", "--keep", "10"]
        assert cli.main([*map(str, command), "--shard-size", "4", "--out", str(root / "tokens")]) == 0
        data = to_dict(TokensConfig(folders=(str(root / "tokens"),), batch_size=8))
        ratio = {"keeps": [10], "weights": [1.0]}
        config = run_config(str(root / "tokenizer"), data, steps=4, merge_ratio=ratio)
        assert train_generator(config, str(root / "run")).step == 4
        command = ["sample", "--model", root / "run" / "generator", "--num", "5", "--batch-size", "2"]
        assert cli.main([*map(str, command), "--out", str(root / "samples")]) == 0

    run(tmp_path)
    run(bucket_folder)
    for got, want in zip(read_tokens(bucket_folder / "tokens"), read_tokens(tmp_path / "tokens"), strict=True):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
    assert logged(bucket_folder / "run") == logged(tmp_path / "run")
    assert_same_files(bucket_folder, tmp_path, "run/generator/model.safetensors", "samples/samples.png")
    with np.load(local(bucket_folder / "samples" / "samples.npz")) as a, np.load(tmp_path / "samples/samples.npz") as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
    left = buckets.objects(bucket_folder)
    assert not [name for name in left if name.startswith("samples/parts/") or name.endswith((".lock", ".probe"))]
    assert not list(Path.cwd().glob("gs:*"))  # a URL that became a local folder


def test_a_folder_of_images(bucket_folder, tmp_path, caplog):
    """The same examples as on a disk; only a file that is no picture is replaced by the next."""
    pictures = write_pictures(tmp_path / "pictures")
    for name in ("even/0.png", "even/notes.txt", ".hidden/1.png"):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).write_bytes(b"no picture")
    (pictures / "odd" / "deeper").mkdir()
    shutil.copy(pictures / "odd" / "1.png", pictures / "odd" / "deeper" / "11.PNG")
    there = FolderSource(put(pictures, bucket_folder / "pictures"))
    here = FolderSource(str(pictures))
    assert (len(there), there.classes) == (len(here), here.classes) == (11, ["even", "odd"])
    for got, want in zip(map(there.__getitem__, range(11)), map(here.__getitem__, range(11)), strict=True):
        np.testing.assert_array_equal(got["image"], want["image"])
        assert got["label"] == want["label"] and len(got["skipped"]) == len(want["skipped"])
    assert there[0]["skipped"] == (f"{bucket_folder}/pictures/even/0.png",)
    with pytest.raises(ValueError, match="does not exist or is not a folder"):
        FolderSource(str(bucket_folder / "none"))


def test_a_bucket_that_cannot_be_reached_skips_no_image(bucket_folder, tmp_path, monkeypatch):
    source = FolderSource(put(write_pictures(tmp_path / "pictures"), bucket_folder / "pictures"))

    def fail(*_, **__):
        raise OSError("Cannot connect to host")

    monkeypatch.setattr(buckets._systems("gs"), "cat_file", fail)
    with pytest.raises(BucketError, match="cannot be reached"):
        source[0]


def test_workers_read_a_bucket(bucket_folder, tmp_path):
    url = put(write_pictures(tmp_path / "pictures"), bucket_folder / "pictures")
    config = DataConfig(image_size=8, batch_size=4, sources=(SourceConfig(kind="folder", path=url),), num_workers=1)
    here = dataclasses.replace(config, sources=(SourceConfig(kind="folder", path=str(tmp_path / "pictures")),))
    batches, expected = make_batches(config, 0), make_batches(here, 0)
    try:
        for _ in range(3):
            np.testing.assert_array_equal(next(batches)["image"], next(expected)["image"])
    finally:
        batches.close()
        expected.close()


def test_a_tfds_dataset(bucket_folder, tmp_path):
    name = prepare(tmp_path / "data", 32, train=6, validation=2, test=2)
    url = put(tmp_path / "data", bucket_folder / "data")
    there, here = TfdsSource(name, "train[2:]", url), TfdsSource(name, "train[2:]", str(tmp_path / "data"))
    assert len(there) == len(here) == 4 and there.classes == here.classes
    np.testing.assert_array_equal(there[3]["image"], here[3]["image"])
    with pytest.raises(ValueError, match=f"dataset 'mini_scenes/48' is not in '{url}'"):
        TfdsSource("mini_scenes/48", "train", url)
    with pytest.raises(ValueError, match="TFDS writes array_record files on a disk"):
        prepare(url, 32)


def test_concepts_are_learned_and_drawn(bucket_folder, tmp_path, capsys):
    """`tokenverse learn` and `generate`, with model, picture, workdir, concept file and images in the bucket."""
    model = write_tiny_pipeline(tmp_path / "model", flux=dataclasses.replace(FLUX, num_single_layers=1))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)).save(model / "ball.png")

    def run(root) -> None:
        fields = {
            "model": str(root / "model"),
            "images": [{"path": str(root / "model" / "ball.png"), "captions": ["a ball"]}],
            "words": ["ball"],
            "size": 2 * SIDE,
            "learn": {
                "concept_mod": {"hidden": 8, "block_hidden": 8},
                "stage_1": {"steps": 2, "high_share": 0.9},
                "stage_2": {"steps": 1, "high_share": 0.1},
                "batch_size": 2,
                "optimizer": {"learning_rate": 1e-2},
                "isolation": {"captions": ["a dog"], "template": "two {left} beside {right}"},
            },
            "cache": str(root / "pool"),
            "prompts": ["a ball and a hat"],
            "sampling": {"num_steps": 2},
            "log_every": 1,
        }
        assert learn(build(LearnRunConfig, fields), str(root / "run")).step == 3
        command = ["generate", "--model", root / "model", "--prompt", "a ball", "--num", "1", "--num-steps", "2"]
        command += ["--concept", f"ball={root}/run/concept.safetensors", "--out", root / "out"]
        assert tokenverse.main([*map(str, command), "--width", "8", "--height", "8"]) == 0

    put(model, bucket_folder / "model")
    run(tmp_path)
    run(bucket_folder)
    got, want = (load_concepts(root / "run" / "concept.safetensors") for root in (bucket_folder, tmp_path))
    assert got.base == str(bucket_folder / "model") and got.base_hash == want.base_hash
    np.testing.assert_array_equal(got.concepts[0].offset, want.concepts[0].offset)
    assert logged(bucket_folder / "run") == logged(tmp_path / "run")
    assert_same_files(bucket_folder, tmp_path, "out/0000.png", "out/overview.png")
    assert tokenverse.main(["bench", "--config", "tokenverse_bench", "--workdir", str(bucket_folder)]) == 1
    assert "a benchmark appends to its files, and needs a folder on a disk" in capsys.readouterr().err


def test_a_pipeline_is_written_to_a_bucket(bucket_folder, tmp_path):
    folder = write_tiny_pipeline(tmp_path / "model")
    Pipeline.from_pretrained(folder).save_pretrained(str(bucket_folder / "model"))
    again = tmp_path / "again"
    Pipeline.from_pretrained(folder).save_pretrained(again)
    names = sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    assert names == list(buckets.objects(bucket_folder / "model"))
    assert_same_files(bucket_folder / "model", again, *names)


def test_commands_say_in_one_line_what_is_wrong(bucket_folder, capsys):
    config = ["--config", "mergevq_tiny:demo", "--config.data.sources=[{'kind': 'photos'}]"]
    wrong = {
        (
            "train",
            *config,
            "--workdir",
            "gs://no-such-bucket/run",
        ): "mergevq train: gs://no-such-bucket/run: no such bucket",
        ("tokenize", "--folder", f"{bucket_folder}/none", "--out", f"{bucket_folder}/out"): (
            f"mergevq tokenize: image folder '{bucket_folder}/none' does not exist or is not a folder"
        ),
        ("sample", "--model", f"{bucket_folder}/none", "--out", f"{bucket_folder}/out"): (
            f"mergevq sample: {bucket_folder}/none: no such object or folder"
        ),
    }
    for command, message in wrong.items():
        assert cli.main(command) == 1
        assert capsys.readouterr().err.splitlines()[-1] == message
    assert buckets.objects(bucket_folder) == {}
    with pytest.raises(SystemExit):
        cli.main(["sample", "--out", "ftp://host/out"])
    assert "argument --out: ftp://host/out: ftp:// is not supported; allowed are gs://" in capsys.readouterr().err
    command = ["generate", "--prompt", "a ball", "--concept", f"ball={bucket_folder}/none.safetensors"]
    assert tokenverse.main([*command, "--out", f"{bucket_folder}/out"]) == 1
    assert f"{bucket_folder}/none.safetensors: no such concept file" in capsys.readouterr().err
