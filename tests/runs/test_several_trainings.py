"""Tokenizer, generator and TokenVerse learning on one, two and four processes: equal, also after kills and SIGTERM.

The three trainings run one after the other in the same processes, which saves most of the time.
"""

import dataclasses
import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from generator_run_tools import TOKENIZER, images_of, random_tokenizer, run_config, write_pictures
from PIL import Image
from safetensors.numpy import load_file
from several_tools import ended, launched, write_config
from tiny_pipeline import FLUX, SIDE, write_tiny_pipeline

from runtime_jax.config import to_dict

TRAIN = "mergevq_jax.cli train"
TRAININGS = {"learn": "tokenverse_jax.cli learn", "tokenizer": TRAIN, "generator": TRAIN}  # in this order
INTERVALS = {"log_every": 1, "checkpoint_every": 2, "preview_every": 3}
LOOP = {"duration": {"steps": 6}, "eval_every": 3, "min_free_bytes": 0, **INTERVALS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Configs, and the models and pictures that they name."""
    root = tmp_path_factory.mktemp("several")
    pictures = images_of(write_pictures(root / "pictures"))
    random_tokenizer().save_pretrained(root / "random")
    write_config(
        root / "tokenizer.py",
        {
            "model": to_dict(TOKENIZER),
            "losses": {"perceptual_weight": 0.0, "source_weight": 0.0},
            "discriminator": {"ndf": 8, "num_layers": 1},
            "merge_ratio": {"keeps": [10], "weights": [1.0]},
            "optimizer": {"learning_rate": 1e-3},
            "data": pictures,
            "evaluation": {"data": {**pictures, "shuffle": False, "random_crop": False}, "batches": 1},
            "loop": LOOP,
        },
    )
    config = run_config(
        root / "random", pictures, mesh={"data": 2, "fsdp": 2}, merge_ratio={"keeps": [10], "weights": [1.0]}
    )
    write_config(root / "generator.py", to_dict(config) | {"loop": LOOP})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)).save(root / "ball.png")
    write_config(
        root / "learn.py",
        {
            "model": str(write_tiny_pipeline(root / "flux", flux=dataclasses.replace(FLUX, num_single_layers=1))),
            "mesh": {"data": 1, "tensor": 4},
            "images": [{"path": str(root / "ball.png"), "captions": ["a ball on the beach"]}],
            "words": ["ball", "beach"],
            "size": 2 * SIDE,
            "learn": {
                "concept_mod": {"hidden": 8, "block_hidden": 8},
                "stage_1": {"steps": 5, "high_share": 0.9},
                "stage_2": {"steps": 1, "high_share": 0.1},
                "batch_size": 2,
                "optimizer": {"learning_rate": 1e-2},
                "isolation": {"captions": ["a dog", "a cat"], "template": "{left} {right}", "probability": 1.0},
            },
            "prompts": ["a ball and a hat"],
            "sampling": {"num_steps": 2},
            **INTERVALS,
        },
    )
    return root


def training(root, processes, folder, how="whole", at="0:0"):
    """All trainings, in the folder."""
    lines = []
    for name, command in TRAININGS.items():
        cache = f"--config.cache={folder / 'pool'}" if name == "learn" else ""
        lines.append(f"{command} --config {root / name}.py --workdir {folder / name} {cache}")
    return launched(processes, ["tests/hooked.py", how, at, *lines])


@pytest.fixture(scope="module")
def whole(root):
    """Uninterrupted runs: a folder for each number of processes."""
    for count in (1, 2, 4):
        code, _, err = ended(training(root, count, root / str(count)))
        assert code == 0, err
    return {count: root / str(count) for count in (1, 2, 4)}


def logged(folder):
    """Numbers by training and step, without times."""
    lines = {name: (folder / name / "metrics.jsonl").read_text().splitlines() for name in TRAININGS}
    return {
        f"{name} {number} {key}": value
        for name in TRAININGS
        for number, line in enumerate(lines[name])
        for key, value in json.loads(line).items()
        if not key.startswith("time/")
    }


def learned(folder):
    """Tensors by file and name."""
    files = ("tokenizer/tokenizer/model", "generator/generator/model", "learn/concept")
    return {
        f"{file} {name}": tensor for file in files for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def assert_equal(folder, other, *, bits):
    """Bit-equal, or losses within 1e-6 (measured: 2e-7), norms of gradients and parts of losses within 1e-4 (3e-5)."""
    ours, theirs = logged(folder), logged(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        tolerance = 0 if bits else 1e-6 if name.endswith("loss") else 1e-4
        np.testing.assert_allclose(value, theirs[name], rtol=tolerance, atol=tolerance / 10, err_msg=name)
    ours, theirs = learned(folder), learned(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=0 if bits else 1e-5, err_msg=name)  # 7e-7
    pictures = {path.relative_to(folder) for path in folder.glob("**/*.png")}
    assert pictures == {path.relative_to(other) for path in other.glob("**/*.png")} and len(pictures) == 2 + 3 * 2
    for picture in pictures:
        ours, theirs = (np.asarray(Image.open(path / picture), int) for path in (folder, other))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if bits else 1, err_msg=str(picture))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_equal_one(whole, processes):
    assert_equal(whole[processes], whole[1], bits=False)


@pytest.mark.slow
def test_kills_and_sigterm_change_nothing(root, whole, tmp_path):
    """Each attempt resumes the one before: bit-equal on as many processes, nearly so on others."""
    folder = tmp_path / "2"
    code, _, err = ended(training(root, 2, folder, "in-step", "0:5"))
    assert code == 75 and "process 1 of 2" in err and "was lost (SIGKILL)" in err, err
    run = training(root, 2, folder, "slowly", "1:0.5")
    while not (folder / "tokenizer/checkpoints/2").is_dir():
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    code, out, err = ended(run, timeout=30)
    assert code == 143 and f"own checkpoint {folder}/learn/checkpoints/4" in out, err
    step = re.search(r"stopped by SIGTERM after step ([2-5]); the same command goes on from there", out)[1]
    code, out, err = ended(training(root, 2, folder, "in-save", "2:4"))
    assert code == 75 and f"own checkpoint {folder}/tokenizer/checkpoints/{step}" in out, err
    assert re.search(rf"process 0 of 2 .* was lost.*resumes from {folder}/generator/checkpoints/2\n", err), err
    for count in (1, 2, 4):
        again = tmp_path / f"again-{count}"
        shutil.copytree(folder, again)
        code, out, err = ended(training(root, count, again))
        assert code == 0 and f"own checkpoint {again}/generator/checkpoints/2" in out, err
        assert_equal(again, whole[2], bits=count == 2)


def test_processes_with_different_configs_are_told(root, tmp_path):
    text = (root / "generator.py").read_text().removesuffix("))\n")
    seed = "int(os.environ['JAX_PROCESS_ID'])"
    (tmp_path / "config.py").write_text(f"import os\n{text}) | {{'seed': {seed}}})\n")
    command = ["-m", "mergevq_jax.cli", "train", "--config", str(tmp_path / "config.py"), "--workdir"]
    code, _, err = ended(launched(2, [*command, str(tmp_path / "run")]), timeout=60)
    assert code == 1 and "mergevq train: the config of process 1 is not that of process 0" in err, err
