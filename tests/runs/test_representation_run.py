"""`mergevq evaluate representation` on folders of pictures: figures, what they don't depend on, kills, bad input."""

import json
import shutil

import jax
import numpy as np
import pytest
from generator_run_tools import TOKENIZER, random_tokenizer
from PIL import Image
from several_tools import ended, launched

from mergevq_jax import cli
from mergevq_jax.commands.evaluate import representation
from mergevq_jax.evaluate import parts
from mergevq_jax.evaluate.representation import probe
from runtime_jax.networks.dinov2 import DINOv2, DINOv2Config, save_dinov2
from runtime_jax.training import network

TEACHER = DINOv2Config(width=8, num_layers=1, num_heads=2, patch_size=4, image_size=8)
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    linear = {"epochs": 8, "batch_size": 8, "learning_rate": 3e-2}
    return ConfigDict({"knn": {"k": 3}, "linear": linear, "finetune": {**linear, "epochs": 2, "crop_area": (0.5, 1.0)}})
"""
COUNTS = {"train": 40, "test": 36}


def write_pictures(root, brighter: int) -> None:
    """Noise in two classes; the pictures of one are brighter."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            path = root / split / ("dark", "light")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 200, (8, 8, 3)) + brighter * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures that are hard to tell apart, a tokenizer and a teacher of random weights, and a config."""
    root = tmp_path_factory.mktemp("representation")
    write_pictures(root, 8)
    random_tokenizer().save_pretrained(root / "tokenizer")
    params = jax.jit(DINOv2(TEACHER).init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    save_dinov2(root / "teacher", TEACHER, params)
    (root / "config.py").write_text(CONFIG)
    return root


def command(root, out, *more: str) -> list[str]:
    words = ["evaluate", "representation", "--tokenizer", f"{root}/tokenizer", "--keep", "10", "16"]
    words += ["--folder", f"{root}/train", "--test-folder", f"{root}/test", "--config", f"{root}/config.py"]
    return [*words, "--seeds", "2", "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("out") / "whole"
    more = ["--teacher", f"{root}/teacher", "--tokens", "mean", "class"]
    assert cli.main(command(root, out, *more)) == 0
    return out


def figures(out) -> list[dict]:
    return json.loads((out / "results.json").read_text())["results"]


def assert_same(out, other) -> None:
    """But for an image near the border of two classes, which rounding can move."""
    means = [[(row["knn"]["mean"], row["linear"]["mean"]) for row in figures(folder)] for folder in (out, other)]
    np.testing.assert_allclose(*means, atol=1.5)
    assert len({mean for row in means[0] for mean in row}) > 2  # else they could not differ


def test_the_table_has_the_floor_and_the_baseline(root, whole, capsys):
    found = json.loads((whole / "results.json").read_text())
    names = [(row["name"].rpartition("/")[2], row["keep"], row["pooling"]) for row in found["results"]]
    kinds = [("tokenizer", 10), ("tokenizer", 16), ("teacher", None)]
    kinds += [("random weights, tokenizer", 16), ("random weights, DINOv2", None)]
    assert names == [(*kind, pooling) for kind in kinds for pooling in ("mean", "class")] + [
        ("pixels, 8 x 8", None, "pixels")
    ]
    pixels = found["results"][-1]
    assert 50 < pixels["linear"]["mean"] < 100 and found["chance"] == 50.0
    floor = found["results"][names.index(("random weights, tokenizer", 16, "mean"))]
    assert len(floor["knn"]["by_seed"]) == len(floor["linear"]["by_seed"]) == 2
    protocol = found["evaluation"]
    assert (protocol["train"]["count"], protocol["test"]["count"], found["shared_images"]) == (40, 36, 0)
    assert protocol["methods"]["linear"]["epochs"] == 8 and len({e["fingerprint"] for e in protocol["encoders"]}) == 7
    table = (whole / "summary.md").read_text()
    assert "± " in table and "36 test images" in table and "Always the commonest of 2 classes: 50.0 %" in table
    assert not (whole / "parts").exists()
    assert cli.main(command(root, whole, "--teacher", f"{root}/teacher", "--tokens", "mean", "class")) == 0
    assert "delete it to measure again" in capsys.readouterr().out
    assert cli.main(command(root, whole)) == 1
    assert "holds another evaluation" in capsys.readouterr().err


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory):
    """A run without a teacher and with the mean alone, to compare with."""
    out = tmp_path_factory.mktemp("out") / "plain"
    assert cli.main(command(root, out)) == 0
    return out


def test_batches_and_devices_change_no_figure(root, plain, tmp_path, monkeypatch):
    assert cli.main(command(root, tmp_path / "batches", "--batch-size", "5")) == 0
    assert_same(tmp_path / "batches", plain)
    make_mesh = network.make_mesh
    one = jax.devices()[:1]
    monkeypatch.setattr(representation, "make_mesh", lambda config, devices=None: make_mesh(config, one))
    monkeypatch.setattr(network, "make_mesh", lambda config: make_mesh(config, one))
    assert cli.main(command(root, tmp_path / "one")) == 0
    assert_same(tmp_path / "one", plain)


def test_a_killed_run_goes_on(root, plain, tmp_path, monkeypatch):
    """Once among the features, and once among the probes."""
    out, done = tmp_path / "killed", []
    measure, predict = parts.measure, probe.predict

    def killed_at(count, work):
        def run(*args, **options):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(work)
            return work(*args, **options)

        return run

    written: list[dict] = []
    for where, name, work in ((representation, "measure", measure), (probe, "predict", predict)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, killed_at(2, work))
            assert cli.main(command(root, out)) == 130
        assert (out / "parts" / "evaluation.json").is_file() and not (out / "results.json").exists()
        written.append({path: path.stat().st_mtime_ns for path in out.glob("parts/*/*.npz")})
        done.clear()
    first, second = written
    assert len(first) == 2 * 2 and len(second) == 5 * 2 * 2  # two parts of each set, for each encoder
    assert first.items() < second.items()  # none is written again
    assert list(out.glob("parts/probe-*/checkpoints"))
    assert cli.main(command(root, out)) == 0
    assert figures(out) == figures(plain)


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(root, tmp_path):
    more = ["--method", "knn", "linear", "finetune", "--seeds", "1", "--keep", "10"]
    for count in (1, 2):
        run = launched(count, ["-m", "mergevq_jax.cli", *command(root, tmp_path / str(count), *more)])
        code, _, err = ended(run, timeout=300)
        assert code == 0, err
    assert_same(tmp_path / "2", tmp_path / "1")
    tuned = [[row["finetune"]["mean"] for row in figures(tmp_path / n) if "finetune" in row] for n in ("1", "2")]
    np.testing.assert_allclose(*tuned, atol=3.0)


@pytest.mark.slow
def test_fine_tuning_learns(root, tmp_path):
    out = tmp_path / "tuned"
    write_pictures(tmp_path, 50)
    words = ["--folder", f"{tmp_path}/train", "--test-folder", f"{tmp_path}/test", "--seeds", "1"]
    assert cli.main(command(root, out, *words, "--method", "finetune", "--config.finetune.epochs=20")) == 0
    found = figures(out)
    assert all(row["finetune"]["mean"] > 80 for row in found[:-1]) and "finetune" not in found[-1]
    assert "| pixels, 8 x 8 | - | - | 192 | - |" in (out / "summary.md").read_text()


def test_images_of_both_sets_are_counted(root, tmp_path, capsys):
    shutil.copytree(root / "test", tmp_path / "test")
    shutil.copy(root / "train" / "dark" / "0.png", tmp_path / "test" / "dark" / "again.png")
    words = command(root, tmp_path / "out", "--test-folder", str(tmp_path / "test"), "--method", "knn")
    assert cli.main(words) == 0
    assert "1 of the test images are also training images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "17"], "17"),
        (["--keep", "10", "10"], "--keep 10 10: at least one, and each once"),
        (["--seeds", "0"], "--seeds 0"),
        (["--size", "8"], "--size 8: positive, and for teachers alone"),
        (["--test-folder", "ROOT/train"], "training and test images are the same"),
        (["--test-folder", "ROOT/train/dark"], "its images have no labels"),
        (["--test-folder", "ROOT/other"], "have classes of other names"),
        (["--config.linear.batch_size=12"], "linear.batch_size=12 is not a multiple of data=8"),
        (["--tokenizer", "ROOT/tokenizer"], "each once"),
        (["--config.linear.batch_size=41"], "40 training images don't fill a batch of 41"),
        (["--config.knn.k=41"], "k-NN: 41 neighbours, but 40 training images"),
        (["--config.linear.epoch=1"], "epoch"),
        (["--teacher", "ROOT/nothing"], "no such file or folder"),
        (["--test-split", "train"], "--test-split is of a dataset"),
    ],
)
def test_bad_input_is_one_line(root, tmp_path, capsys, more, message):
    other = root / "other" / "grey"
    if not other.exists():
        shutil.copytree(root / "test" / "dark", other)
        shutil.copytree(root / "test" / "light", root / "other" / "white")
    assert cli.main(command(root, tmp_path / "out", *[word.replace("ROOT", str(root)) for word in more])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mergevq evaluate representation: ") and message in line
    assert not list(tmp_path.rglob("*.npz"))


def test_teachers_have_no_k(capsys):
    assert cli.main(["evaluate", "representation", "--teacher", "x", "--keep", "9"]) == 1
    assert "--keep is of tokenizers" in capsys.readouterr().err


def test_sizes_must_agree(root, tmp_path, capsys):
    assert cli.main([*command(root, tmp_path / "out"), "--tokenizer", "tiny", "--keep", "16"]) == 1
    assert "sizes in pixels differ" in capsys.readouterr().err
    assert TOKENIZER.resolution == 8


def test_the_default_scenes_are_named_when_they_are_missing(tmp_path, capsys):
    assert cli.main(["evaluate", "representation", "--data-dir", "/no", "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "mergevq scenes --data-dir /no --probe; or in Python: mini_scenes.prepare_probe('/no')" in err
