"""`tokenverse evaluate`, from a folder to its report, on a random pipeline with two images and a task."""

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from golden_tools import parts
from PIL import Image
from several_tools import ended, launched
from tiny_pipeline import tiny_pipeline, write_clip_tokenizer, write_tiny_pipeline

from runtime_jax.mesh import make_mesh
from runtime_jax.weights import read_safetensors, write_safetensors
from tokenverse_jax import cli
from tokenverse_jax.concepts.bank import load_concepts
from tokenverse_jax.evaluate import similarity
from tokenverse_jax.evaluate.benchmark import read_benchmark
from tokenverse_jax.evaluate.draw import Job
from tokenverse_jax.evaluate.items import make_items
from tokenverse_jax.evaluate.samples import Samples
from tokenverse_jax.flux.pipeline import Pipeline

SIDE = 8
SETTINGS = {
    "size": SIDE,
    "learn.isolation": None,
    "learn.batch_size": 2,
    "learn.stage_1.steps": 1,
    "learn.stage_2.steps": 1,
    "learn.optimizer.warmup.steps": 0,
    "sampling.num_steps": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    """A dog and a ball, two prompts of each, and a task with both; the ball has a mask."""
    root = tmp_path_factory.mktemp("benchmark") / "data"
    own = {
        "live_subject/animal/00": ("dog", ["a dog and a hat", "a blue dog"], ["a dog", "the dog"]),
        "object/00": ("ball", ["a ball on the beach", "a cat, a ball"], ["a ball", "the ball"]),
    }
    rng, entries = np.random.default_rng(0), []
    for name, (subject, prompts, captions) in own.items():
        image, text = root / "images" / f"{name}.jpg", root / "captions" / f"{name}.txt"
        for path in (image, text):
            path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (SIDE + 2, SIDE, 3), np.uint8)).save(image)
        text.write_text("\n".join([subject, *prompts]))
        entries.append({"image": name, "captions": captions, "words": [{"word": subject}]})
    mask = np.zeros((SIDE + 2, SIDE), np.uint8)
    mask[2:5, 1:4] = 255
    Image.fromarray(mask).save(root / "ball.png")
    entries[1]["words"][0]["mask"] = "ball.png"
    concepts = [{"image": name, "word": subject} for name, (subject, *_) in own.items()]
    task = {"task": "composition", "prompt": "a dog and a ball", "concepts": concepts}
    (root / "tokenverse.json").write_text(json.dumps({"images": entries, "tasks": [task]}))
    return root


@pytest.fixture(autouse=True, scope="module")
def one_device():
    # Programs for one device take a fraction of the time to compile.
    with pytest.MonkeyPatch.context() as patch:
        name = "tokenverse_jax.commands.evaluate.make_mesh"
        patch.setattr(name, lambda config, devices: make_mesh(config, devices[:1]))
        yield


def run(model: Path, benchmark: Path, out: Path, *more: str, changes: Mapping[str, Any] = MappingProxyType({})) -> int:
    """The command; `changes`: of its config."""
    return cli.main([*line(model, benchmark, out, changes), *more])


def line(model: Path, benchmark: Path, out: Path, changes: Mapping[str, Any]) -> list[str]:
    values = SETTINGS | {"model": str(model)} | changes
    overrides = [f"--config.{name}={value!r}" for name, value in values.items()]
    own = ["--out", str(out), "--config", "configs/tokenverse_tiny.py", "--batch-size", "2"]
    return ["evaluate", str(benchmark), *own, *overrides]


@pytest.fixture(scope="module")
def done(model, benchmark, tmp_path_factory) -> Path:
    """The folder of a finished evaluation without scores."""
    out = tmp_path_factory.mktemp("done") / "out"
    assert run(model, benchmark, out, "--no-scores") == 0
    return out


NAMES = [
    *(f"live_subject_animal_00_dog/{i}_0" for i in range(2)),
    *(f"object_00_ball/{i}_0" for i in range(2)),
    *(f"composition_000_{i}_{word}/0_0" for i, word in enumerate(("dog", "ball"))),
]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_layout_is_that_of_the_official_scripts(done, benchmark):
    for kind, suffix in (("src_image", "jpg"), ("tgt_image", "jpg"), ("text", "txt")):
        found = {str(path.relative_to(done / kind)) for path in (done / kind).rglob("*.*")}
        assert found == {f"{name}.{suffix}" for name in NAMES}
    assert (done / "negative_prompt.txt").read_text() == ""
    assert (done / "text" / f"{NAMES[1]}.txt").read_text() == "a blue dog"
    dog, ball = (done / "tgt_image" / f"{name}.jpg" for name in NAMES[-2:])
    assert dog.read_bytes() == ball.read_bytes()
    assert Image.open(dog).size == (SIDE, SIDE)
    masked = np.asarray(Image.open(done / "src_image" / f"{NAMES[-1]}.jpg"))
    assert masked.shape == (SIDE + 2, SIDE, 3) and (masked[6:] > 235).all() and masked[2:5, 1:4].mean() < 200


def test_the_report(done, benchmark, model):
    results = json.loads((done / "results.json").read_text())
    assert results["counts"] == {
        "images": 2,
        "prompts": 5,
        "drawn": 5,
        "drawn_by_task": {"animal": 2, "object": 2, "composition": 1},
    }
    assert results["base_hash"] == Pipeline.from_pretrained(model).base_hash()
    assert results["benchmark_sha256"] == read_benchmark(benchmark).digest and results["sections"] == {}
    asked = [json.loads(line) for line in (done / "requests.jsonl").read_text().splitlines()]
    assert len(asked) == 4 * 2 + 3
    assert all((done / image).is_file() for one in asked for image in one["images"])
    assert [one["masked"] for one in asked if "masked" in one] == [False, False, True, True, False, True]
    assert Image.open(done / "images.png").size[1] > 3 * 128
    file = load_concepts(done / "concepts/object/00.safetensors")
    assert (file.base, file.caption, [concept.word for concept in file.concepts]) == (str(model), "a ball", ["ball"])


def test_a_run_resumes_bit_equal_and_redraws_only_what_is_missing(done, model, benchmark, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    whole = files(out)
    for name in (f"tgt_image/{NAMES[1]}.jpg", f"src_image/{NAMES[-2]}.jpg"):
        (out / name).unlink()
    kept = (out / "tgt_image" / f"{NAMES[3]}.jpg").stat().st_mtime_ns
    monkeypatch.setattr("tokenverse_jax.evaluate.concepts.learn_concepts", None)  # nothing is learned again
    assert run(model, benchmark, out, "--no-scores") == 0
    assert files(out) == whole
    assert (out / "tgt_image" / f"{NAMES[3]}.jpg").stat().st_mtime_ns == kept
    monkeypatch.setattr("tokenverse_jax.commands.evaluate.draw", None)  # nor drawn
    assert run(model, benchmark, out, "--no-scores") == 0


def test_a_signal_ends_a_run_after_its_batch(done, model, benchmark, tmp_path, capsys, monkeypatch):
    out, save = tmp_path / "out", Samples.save

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Samples, "save", save_and_stop)
    assert run(model, benchmark, out, "--no-scores") == 143
    assert "stopped by SIGTERM; the same command goes on from there" in capsys.readouterr().out
    assert len(list((out / "tgt_image").rglob("*.jpg"))) == 2 and not (out / "results.json").exists()
    monkeypatch.setattr(Samples, "save", save)
    assert run(model, benchmark, out, "--no-scores") == 0
    assert files(out) == files(done)


def test_concepts_of_another_run_and_none(done, model, benchmark, tmp_path):
    given = ["--concepts", str(done / "concepts"), "--no-scores"]
    assert run(model, benchmark, tmp_path / "same", *given) == 0
    assert not (tmp_path / "same" / "concepts").exists()
    drawn = {name: data for name, data in files(done).items() if "image/" in name}
    assert {name: files(tmp_path / "same")[name] for name in drawn} == drawn
    assert run(model, benchmark, tmp_path / "none", *given, "--strength", "0") == 0
    base = Pipeline.from_pretrained(model).generate(
        ["a blue dog"], examples=np.array([1]), height=SIDE, width=SIDE, num_steps=2, cfg_scale=2.5
    )
    own = np.asarray(Image.open(tmp_path / "none" / "tgt_image" / f"{NAMES[1]}.jpg")).astype(int)
    assert np.abs(own - np.asarray(base)[0]).max() < 40 and np.abs(own - np.asarray(base)[0]).mean() < 6  # JPEG


def test_answers_become_a_table(done, model, benchmark, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    asked = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    scores = [{"id": one["id"], "score": 4 if one["task"] == "animal" else 2, "content": "..."} for one in asked]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in scores))
    assert run(model, benchmark, out, "--no-scores", "--answers", str(tmp_path / "a.jsonl")) == 0
    table = capsys.readouterr().out
    assert "| animal | 1 | 1.000 ± inf | 1.000 ± inf | 1.000 ± inf |" in table
    assert "| all images | 2 | 0.750 ± 3.177 | 0.750 ± 3.177 | 0.562 ± 4.765 |" in table
    assert "| composition | 1 | 0.500 ± inf | 0.500 ± inf | 0.250 ± inf |" in table
    assert (out / "table.md").read_text() in table
    (section,) = json.loads((out / "results.json").read_text())["sections"].values()
    assert section["means"]["composition"]["CP·PF"] == {"mean": 0.25, "half_width": None, "units": 1}


@pytest.fixture(scope="module")
def networks(goldens, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the goldens' CLIP and DINO."""
    folders = []
    for name in ("clip", "dino"):
        folder = tmp_path_factory.mktemp("networks") / name
        folder.mkdir()
        tensors, metadata = read_safetensors(goldens / f"{name}.safetensors")
        (folder / "config.json").write_text(metadata["config"])
        write_safetensors(folder / "model.safetensors", parts(tensors, "param"), {})
        folders.append(folder)
    write_clip_tokenizer(folders[0] / "tokenizer")
    for path in (folders[0] / "tokenizer").iterdir():
        shutil.move(path, folders[0])
    return tuple(folders)


def test_similarities_of_clip_and_dino(done, model, benchmark, networks, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    clip, dino = networks
    assert run(model, benchmark, out, "--clip", str(clip), "--dino", str(dino)) == 0
    assert "| task | units | CLIP-I | CLIP-T | DINO |" in capsys.readouterr().out
    (section,) = json.loads((out / "results.json").read_text())["sections"].values()
    assert (
        section["protocol"]["CLIP"]["source"] == str(clip)
        and "256 pixels" in section["protocol"]["DINO"]["preparation"]
    )
    means = [found["mean"] for figures in section["means"].values() for found in figures.values()]
    assert len(means) == 4 * 3 and all(-1 <= mean <= 1 for mean in means)


def test_a_copy_of_the_reference_is_similar_to_it(benchmark, model, networks, tmp_path):
    read = read_benchmark(benchmark)
    items = make_items(read, Pipeline.from_pretrained(model, parts=[]).tokenizer_2)
    jobs = [Job(item, 0, item.number) for item in items if len(item.uses) == 1]
    samples = [Samples(tmp_path / name, read) for name in ("copies", "others")]
    for job in jobs:
        use = job.item.uses[0]
        samples[0].save(job.item, 0, read.reference(use.image, use.word))
        samples[1].save(job.item, 0, np.random.default_rng(job.example).integers(0, 256, (8, 8, 3), np.uint8))
    for network in (similarity.load_clip(networks[0]), similarity.load_dino_network(networks[1])):
        name = similarity.image_figure(network)
        same, other = (
            [figures[name] for figures in similarity.measure(network, jobs, read, folder)] for folder in samples
        )
        assert min(same) > 0.99 > max(other)
        # An image's features do not depend on its batch.
        alone = similarity.measure(network, jobs[2:3], read, samples[1])[0]
        np.testing.assert_allclose(alone[name], other[2], atol=1e-6)


BAD = [
    (["--num", "0"], {}, "--num 0, --batch-size 2: at least 1 is needed"),
    (["--no-scores", "--clip", "x"], {}, "--no-scores: leave out --clip and --dino"),
    (
        [],
        {},
        "mini_scenes' judge cannot score this benchmark (caption 'a dog and a hat': 'a dog a hat' is not",
    ),
    (["--clip", "nowhere"], {}, "nowhere: no such file or folder"),
    (
        ["--concepts", "nowhere", "--no-scores"],
        {},
        "nowhere: 2 of 2 concept files are missing: nowhere/live_sub",
    ),
    (["--answers", "nowhere.jsonl", "--no-scores"], {}, "nowhere.jsonl: no such file"),
    (["--no-scores"], {"size": 9}, "image size 9x9"),
    (["--no-scores"], {"words": ["dog"]}, "config.images, words and prompts: leave them empty"),
    (["--no-scores"], {"model": "nowhere"}, "nowhere: no such file or folder"),
]


@pytest.mark.parametrize(("more", "changes", "message"), BAD, ids=[bad[2][:30] for bad in BAD])
def test_refused_in_one_line_before_anything_is_loaded(
    model, benchmark, tmp_path, capsys, monkeypatch, more, changes, message
):
    monkeypatch.setattr("tokenverse_jax.commands.evaluate.Evaluation.make", None)
    assert run(model, benchmark, tmp_path / "out", *more, changes=changes) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and error.startswith("tokenverse evaluate: ")
    assert not (tmp_path / "out").exists()


def test_words_of_other_tokens_are_refused_together(model, benchmark, tmp_path, capsys):
    root = shutil.copytree(benchmark, tmp_path / "data")
    (root / "captions/object/00.txt").write_text("ball\na BALL\na BALL on the beach\n")
    assert run(model, root, tmp_path / "out", "--no-scores") == 1
    error = capsys.readouterr().err
    assert "2 of 5 prompts have a word in another number of tokens than the captions" in error
    assert error.count("object/00: 'ball' has") == 2 and len(error.splitlines()) == 1


def test_a_folder_of_other_settings_is_refused(done, model, benchmark, capsys):
    assert run(model, benchmark, done, "--no-scores", changes={"sampling.num_steps": 3}) == 1
    error = capsys.readouterr().err
    assert "holds images of other settings, run.sampling.num_steps: 2 -> 3: give the same ones to resume" in error


def test_concepts_of_another_base_are_refused(done, benchmark, tmp_path, capsys):
    tiny_pipeline(tmp_path / "other", seed=7).save_pretrained(tmp_path / "other")
    given = ["--concepts", str(done / "concepts"), "--no-scores"]
    assert run(tmp_path / "other", benchmark, tmp_path / "out", *given) == 1
    error = capsys.readouterr().err
    assert "directions mean nothing to another model" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "tgt_image").exists()


def test_recomputed_directions_need_their_network(done, model, benchmark, tmp_path, capsys):
    given = ["--concepts", str(done / "concepts"), "--no-scores", "--mode", "recomputed"]
    assert run(model, benchmark, tmp_path / "out", *given) == 1
    assert "holds no Concept-Mod, so its directions cannot be recomputed" in capsys.readouterr().err
    assert run(model, benchmark, tmp_path / "out", "--no-scores", "--mode", "recomputed") == 0
    assert load_concepts(tmp_path / "out/concepts/object/00.safetensors").params is not None


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(model, benchmark, tmp_path):
    isolation = {"captions": ["a hat", "a blue star"], "template": "{left} {right}"}
    changes = {"learn.isolation": isolation, "cache": str(tmp_path / "pool")}
    for processes in (1, 2):
        command = [*line(model, benchmark, tmp_path / str(processes), changes), "--no-scores"]
        code, out, err = ended(launched(processes, ["-m", "tokenverse_jax.cli", *command], devices=1))
        assert code == 0 and out.count("requests.jsonl are in") == 1, err
    assert files(tmp_path / "1") == files(tmp_path / "2")
