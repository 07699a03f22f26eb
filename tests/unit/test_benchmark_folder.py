"""`tokenverse evaluate`'s parts: folders, items, requests and answers, tables, mini_scenes' judge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import write_t5_tokenizer

from mini_scenes import render_scene
from mini_scenes.judge import parse_caption
from runtime_jax.config import ConfigError
from tokenverse_jax.bench.cases import make_cases, make_images
from tokenverse_jax.evaluate import requests, scenes
from tokenverse_jax.evaluate.benchmark import read_benchmark
from tokenverse_jax.evaluate.draw import Job, make_batches
from tokenverse_jax.evaluate.example import TASKS, write_example
from tokenverse_jax.evaluate.items import Item, Use, make_items, units
from tokenverse_jax.evaluate.samples import Samples
from tokenverse_jax.evaluate.table import ALL, Record, markdown, summarize, to_json
from tokenverse_jax.flux.text import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer_2"
    write_t5_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def example(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "folder"
    write_example(folder)
    return folder


def write(root: Path, name: str, subject: str, *prompts: str) -> None:
    """An image of the benchmark and its captions."""
    image, text = (root / kind / f"{name}{suffix}" for kind, suffix in (("images", ".jpg"), ("captions", ".txt")))
    for path in (image, text):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), 120, np.uint8)).save(image)
    text.write_text("\n".join([subject, *prompts]) + "\n")


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder as DreamBench++ has it, without a file of ours."""
    root = tmp_path / "data"
    write(root, "live_subject/animal/00", "Ginger Cat", "a ginger cat on the beach", "a hat on a ginger cat")
    write(root, "object/07", "ball", "a ball and a dog", "two dogs and a ball")
    write(root, "style/00", "hat", "a dog, hat", "a toy, hat")
    return root


def test_a_folder_of_dreambench(published, tokenizer):
    benchmark = read_benchmark(published)
    assert list(benchmark.pictures) == ["live_subject/animal/00", "object/07", "style/00"]
    cat = benchmark.pictures["live_subject/animal/00"]
    assert (cat.category, cat.collection) == ("animal", "live_subject_animal_00_ginger_cat")
    assert [word.word for word in cat.words] == ["Ginger Cat"]
    assert cat.captions[0] == "a Ginger Cat" and all("a Ginger Cat" in caption for caption in cat.captions)
    items = make_items(benchmark, tokenizer)
    assert [item.number for item in items] == list(range(6))
    assert items[1].names == ("live_subject_animal_00_ginger_cat/1",)
    assert items[3].uses == (Use(image="object/07", word="ball", target="ball"),)
    assert [unit == units(items)[0] for unit in units(items)] == [True, True, False, False, False, False]
    digest = benchmark.digest
    assert read_benchmark(published).digest == digest
    (published / "captions/object/07.txt").write_text("ball\na ball\ntwo dogs and a ball\n")
    assert read_benchmark(published).digest != digest


def spoil(root: Path, how: str) -> None:
    extra = root / "tokenverse.json"
    entry = {"image": "object/07", "captions": ["a ball"], "words": [{"word": "ball"}]}
    if how == "no captions":
        (root / "captions/object/07.txt").unlink()
    elif how == "no image":
        (root / "images/object/07.jpg").unlink()
    elif how == "layout":
        shutil.move(root / "images", root / "pictures")
    elif how == "one line":
        (root / "captions/object/07.txt").write_text("ball\n")
    elif how == "no word":
        (root / "captions/object/07.txt").write_text("ball\na dog\nballs\n")
    elif how == "key":
        extra.write_text(json.dumps({"task": []}))
    elif how == "unknown image":
        extra.write_text(json.dumps({"images": [entry | {"image": "object/08"}]}))
    elif how == "mask":
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(root / "mask.png")
        extra.write_text(json.dumps({"images": [entry | {"words": [{"word": "ball", "mask": "mask.png"}]}]}))
    elif how == "dark mask":
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(root / "mask.png")
        extra.write_text(json.dumps({"images": [entry | {"words": [{"word": "ball", "mask": "mask.png"}]}]}))
    elif how == "task word":
        task = {"task": "composition", "prompt": "a ball", "concepts": [{"image": "object/07", "word": "star"}]}
        extra.write_text(json.dumps({"tasks": [task]}))
    elif how == "task name":
        task = {"task": "object", "prompt": "a ball", "concepts": [{"image": "object/07", "word": "ball"}]}
        extra.write_text(json.dumps({"tasks": [task]}))
    elif how == "top":
        shutil.move(root / "images/object/07.jpg", root / "images/07.jpg")
        shutil.move(root / "captions/object/07.txt", root / "captions/07.txt")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no captions", "1 of 3 lack captions: object/07"),
        ("no image", "1 of 3 lack an image: object/07"),
        (
            "layout",
            r"not in DreamBench\+\+'s layout, folders images/ and captions/ are needed; it holds captions",
        ),
        ("one line", "captions/object/07.txt: a subject and one or more prompts are needed"),
        (
            "no word",
            r"2 of 6 prompts contain none of the words .*: object/07 'a dog' \(words: ball\); object/07 'b",
        ),
        ("key", r"tokenverse.json.task: unknown .*tasks"),
        ("unknown image", "images that are not in images/: object/08"),
        ("mask", "mask.png: 8 x 8 pixels, but its image has another size"),
        ("dark mask", "mask.png: the mask is dark everywhere"),
        ("task word", "composition: no 'star' of 'object/07'; its words are ball"),
        ("task name", "the task 'object' is called like a category"),
        ("top", r"images/07.jpg: images are in a folder of their category"),
    ],
)
def test_a_folder_that_does_not_fit_is_an_error_of_one_line(published, tokenizer, how, message):
    spoil(published, how)
    with pytest.raises((ValueError, ConfigError), match=message) as caught:
        make_items(read_benchmark(published), tokenizer)
    assert len(str(caught.value).splitlines()) == 1


def test_a_reference_is_white_outside_of_its_mask(example):
    benchmark = read_benchmark(example)
    picture = benchmark.pictures["object/00"]
    masked, plain = benchmark.reference("object/00", picture.words[0].word), picture.pixels()
    mask = np.asarray(Image.open(example / picture.words[0].mask))[..., 0] > 127
    np.testing.assert_array_equal(masked[mask], plain[mask])
    assert (masked[~mask] == 255).all() and 0 < mask.mean() < 0.5
    np.testing.assert_array_equal(benchmark.reference("object/00", picture.words[2].word), plain)


def item(task: str, *images: str, number: int = 0) -> Item:
    uses = tuple(Use(image=image, word="ball", target="ball") for image in images)
    return Item(task=task, prompt="a ball", uses=uses, names=("x/0",) * len(images), number=number)


def test_items_that_share_images_are_one_unit():
    pairs = [item("full", "a", "b"), item("full", "c"), item("full", "c", "d"), item("full", "e"), item("object", "a")]
    first, second, third, fourth, other = units(pairs)
    assert second == third and len({first, second, fourth, other}) == 4
    joined = units([*pairs, item("full", "b", "d")])
    assert joined[0] == joined[1] == joined[2] == joined[5] != joined[3]


def test_batches_have_the_same_images_whatever_is_missing():
    items = [item("object", "a", number=i) for i in range(3)]
    batches = make_batches(items, 2, 4)
    assert [[job.example for job in batch] for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [(job.item.number, job.image) for job in batches[0]] == [(0, 0), (0, 1), (1, 0), (1, 1)]


# Requests and answers.


@pytest.fixture
def jobs(published, tokenizer):
    benchmark = read_benchmark(published)
    return benchmark, [Job(one, image, 0) for one in make_items(benchmark, tokenizer) for image in range(2)]


def test_requests_ask_for_cp_and_pf_of_every_image(jobs):
    benchmark, jobs = jobs
    asked = requests.make_requests(jobs, benchmark)
    assert len(asked) == 24 and len({one["id"] for one in asked}) == 24
    first, second = asked[:2]
    name = "live_subject_animal_00_ginger_cat/0_0"
    assert first["images"] == [f"src_image/{name}.jpg", f"tgt_image/{name}.jpg"] and not first["masked"]
    assert second["images"] == [f"tgt_image/{name}.jpg"] and second["prompt"] in second["instructions"]
    assert "'Ginger Cat'" in first["instructions"] and "style" not in first["instructions"]
    styles = [one["instructions"] for one in asked if one["task"] == "style" and one["kind"] == requests.CONCEPT]
    assert all("the style" in text and "'hat'" not in text for text in styles)


def answer_file(path: Path, answers: list) -> Path:
    path.write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))
    return path


def test_answers_are_means_of_repetitions_in_shares_of_four(jobs, tmp_path):
    benchmark, jobs = jobs
    asked = requests.make_requests(jobs, benchmark)
    files = [
        answer_file(tmp_path / f"{high}.jsonl", [{"id": one["id"], "score": high - (one["kind"] == requests.PROMPT)}
                                                 for one in asked[::-1]])
        for high in (4, 1)
    ]  # fmt: skip
    figures = requests.figures(requests.read_answers(files, jobs), jobs)
    assert figures == [{"CP": 2.5 / 4, "PF": 1.5 / 4}] * len(jobs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[2:],
            r"a.jsonl: 2 of 24 requests have no answer: cp/live_subject_animal_00_ginger_cat/0_0, ",
        ),
        (lambda rows: [rows[0] | {"score": 5}, *rows[1:]], "a.jsonl:1: score 5 of .*: a whole number from 0 to 4"),
        (lambda rows: [rows[0] | {"score": -1}, *rows[1:]], "a.jsonl:1: score -1"),
        (lambda rows: [rows[0] | {"score": 3.5}, *rows[1:]], "a.jsonl:1: score 3.5"),
        (lambda rows: [rows[0] | {"score": True}, *rows[1:]], "a.jsonl:1: score True"),
        (lambda rows: [*rows, rows[0]], "a.jsonl:25: a second answer to 'cp/live"),
        (lambda rows: [*rows, {"id": "cp/none", "score": 1}], "a.jsonl:25: there is no request 'cp/none'"),
        (lambda rows: [*rows, {"id": "cp/none"}], "a.jsonl:25: not an answer of the form"),
        (lambda rows: ["score"], "a.jsonl:1: not an answer of the form"),
    ],
)
def test_answers_that_do_not_fit_are_refused(jobs, tmp_path, change, message):
    benchmark, jobs = jobs
    rows = [{"id": one["id"], "score": 2} for one in requests.make_requests(jobs, benchmark)]
    with pytest.raises(ValueError, match=message):
        requests.read_answers([answer_file(tmp_path / "a.jsonl", change(rows))], jobs)


# Tables.


def records(prompts: int) -> list[Record]:
    rng = np.random.default_rng(0)
    own = [
        Record(task, unit, number, {"CP": float(rng.random()), "PF": float(rng.random())})
        for unit, task in enumerate(("animal", "animal", "object", "object", "object"))
        for number in range(prompts)
    ]
    return [*own, Record("full", 9, None, {"CP": 0.5, "PF": 0.8}), Record("full", 10, None, {"CP": 0.6, "PF": 0.8})]


def test_cp_pf_is_the_product_of_the_means():
    summary = summarize(records(2))
    assert list(summary) == ["animal", "object", ALL, "full"]
    for found in summary.values():
        np.testing.assert_allclose(found["CP·PF"].mean, found["CP"].mean * found["PF"].mean)
    assert summary[ALL]["CP"].count == 5
    values = [record.figures["CP"] for record in records(2) if record.prompt_number is not None]
    np.testing.assert_allclose(summary[ALL]["CP"].mean, np.mean(values))
    # With PF constant, its interval is that of CP, scaled.
    full = summary["full"]
    np.testing.assert_allclose(full["CP·PF"].half_width, 0.8 * full["CP"].half_width)
    assert "| full | 2 | 0.550 ± 0.635 | 0.800 ± 0.000 | 0.440 ± 0.508 |" in markdown("judge", summary)


def test_kinds_of_nine_prompts_are_rows():
    summary = summarize(records(9))
    assert list(summary)[2:] == [
        ALL,
        "prompts: photorealistic",
        "prompts: style transfer",
        "prompts: imaginative",
        "full",
    ]
    chosen = [record.figures["PF"] for record in records(9) if record.prompt_number in (7, 8)]
    np.testing.assert_allclose(summary["prompts: imaginative"]["PF"].mean, np.mean(chosen))


def test_an_unknown_interval_is_null_in_json():
    fields = to_json(summarize([Record("object", 0, 0, {"DINO": 0.25})]))
    assert fields == {"object": {"DINO": {"mean": 0.25, "half_width": None, "units": 1}}}
    assert "Infinity" not in json.dumps(fields)


# mini_scenes.


def test_the_judge_sees_concepts_in_true_scenes(example, tokenizer, tmp_path):
    benchmark = read_benchmark(example)
    items = [one for one in make_items(benchmark, tokenizer) if one.prompt_number is None]
    images = make_images(4, 0)
    cases = [case for case in make_cases(images, 0) if case.task in TASKS]
    assert [one.prompt for one in items] == [case.prompt for case in cases]
    scenes.check(items, 64)
    samples = [Samples(tmp_path / name, benchmark) for name in ("right", "wrong")]
    jobs = [Job(one, 0, one.number) for one in items]
    for case, other, one in zip(cases, cases[1:] + cases[:1], items, strict=True):
        for folder, scene in zip(samples, (case.scene, other.scene), strict=True):
            assert not folder.has(one, 0)
            folder.save(one, 0, render_scene(scene, 64).image)
            assert folder.has(one, 0)
    right, wrong = (scenes.measure(jobs, benchmark, folder, 64) for folder in samples)
    cp, pf = (np.array([[figures[name] for figures in some] for some in (right, wrong)]) for name in ("CP", "PF"))
    assert cp[0].mean() > 0.85 and pf[0].mean() > 0.95
    assert cp[1].mean() < 0.6 and pf[1].mean() < 0.8


def test_other_words_are_none_of_the_judges(published, tokenizer, example):
    items = make_items(read_benchmark(published), tokenizer)
    with pytest.raises(ValueError, match=r"caption 'a ginger cat on the beach': .* is not understood"):
        scenes.check(items, 64)
    with pytest.raises(ValueError, match="images of 36 pixels, but a multiple of 8 is needed"):
        scenes.check([], 36)


@pytest.mark.parametrize(
    ("prompt", "target", "number"),
    [
        ("a star and a circle on the grass", "a circle", 1),
        ("a circle to the left of a circle", "a circle#2", 1),
        ("a star to the right of a circle", "a star", 1),  # objects are counted from left to right
        ("a circle to the right of a circle", "a circle", 1),
        ("a star on the grass", "on the grass", None),
    ],
)
def test_the_object_that_a_target_names(prompt, target, number):
    assert scenes.object_number(prompt, target) == number
    if number is not None:
        assert parse_caption(prompt).objects[number].shape in target


def test_an_example_is_written_to_a_new_folder_only(example):
    with pytest.raises(ValueError, match="holds something already"):
        write_example(example)
