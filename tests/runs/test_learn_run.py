"""A run that learns concepts: its files, a killed run that goes on, and what is refused before anything is loaded."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from run_tools import logged
from safetensors.numpy import load_file
from tiny_pipeline import FLUX, SIDE, write_tiny_pipeline

from mini_scenes import full_caption
from runtime_jax.config import build, load, to_dict
from runtime_jax.training.program import Program
from tokenverse_jax.base.corpus import draw as draw_scenes
from tokenverse_jax.base.corpus import rows
from tokenverse_jax.commands.learn import CONCEPT_FILE, LearnRunConfig, learn
from tokenverse_jax.concepts.bank import load_concepts
from tokenverse_jax.concepts.compose import compose, place_recomputed, place_stored
from tokenverse_jax.concepts.concept_data import encode_images, encode_prompts, read_image
from tokenverse_jax.concepts.familiar import UNFAMILIAR, loss_ratios, warn_unfamiliar
from tokenverse_jax.flux import model_folder
from tokenverse_jax.flux.pipeline import Pipeline

PROMPT = "a ball and a hat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a picture beside it, and a longer text length than the model's tokenizer asks for."""
    flux = dataclasses.replace(FLUX, num_single_layers=1)
    folder = write_tiny_pipeline(tmp_path_factory.mktemp("model"), flux=flux)
    path = folder / "tokenizer_2/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 64}))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "ball.png")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return build(
        LearnRunConfig,
        {
            "model": str(folder),
            "mesh": {"data": 2, "tensor": 4},
            "images": [{"path": str(folder / "ball.png"), "captions": ["a ball on the beach", "the beach and a ball"]}],
            "words": ["ball", "beach"],
            "size": 2 * SIDE,
            "learn": {
                "concept_mod": {"hidden": 8, "block_hidden": 8},
                "stage_1": {"steps": 4, "high_share": 0.9},
                "stage_2": {"steps": 1, "high_share": 0.1},
                "batch_size": 2,
                "optimizer": {"learning_rate": 1e-2},
                "isolation": {"captions": ["a dog", "a cat"], "template": "two {left} beside {right}"},
            },
            "seed": 4,  # isolation in the second stage only: two programs
            "prompts": [PROMPT],
            "sampling": {"num_steps": 2, "cfg_scale": 2.0},
            "cache": str(folder / "pool"),
            "keep_params": True,
            "log_every": 1,
            "checkpoint_every": 2,
            "preview_every": 4,
        },
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = learn(config, workdir)
    *_, last_of_stage_1, begins, first_of_stage_2 = [line for line in said.getvalue().splitlines() if "step " in line]
    assert begins == "stage 2 begins after step 4, 90% at low noise: the loss jumps"
    assert last_of_stage_1.startswith("step 4/5 ") and first_of_stage_2.startswith("step 5/5 ")
    assert (result.step, result.stopped_by) == (5, None) and (workdir / CONCEPT_FILE).is_file()
    return workdir


def test_a_run_leaves_concepts_that_change_images(trained, folder, config):
    pipeline = Pipeline.from_pretrained(folder)
    file = load_concepts(trained / CONCEPT_FILE, pipeline)
    assert [concept.word for concept in file.concepts] == ["ball", "beach"]
    assert (file.caption, file.base) == ("a ball on the beach", str(folder))
    np.testing.assert_array_equal(file.image, read_image(folder / "ball.png", config.size))
    size = {"height": config.size, "width": config.size, "num_steps": 2}
    encoded = pipeline.encode_prompts([PROMPT])
    base = np.asarray(pipeline.generate(encoded, **size))
    ball = file.concept("ball")
    for strength, changes in ((0.0, False), (50.0, True)):
        stored = place_stored(ball, pipeline.tokenizer_2, PROMPT, "ball", strength)
        recomputed = place_recomputed(ball, file.params, encoded.txt[0], pipeline.tokenizer_2, PROMPT, "ball", strength)
        for placed in (stored, recomputed):
            offsets = compose([placed], pipeline.text_length).repeat(1)
            images = pipeline.generate(encoded, offsets=offsets, **size)
            assert (np.asarray(images) != base).any() == changes


def test_a_run_tells_what_it_does(trained):
    lines = logged(trained)
    assert [line["step"] for line in lines] == list(range(1, 6))
    assert all({"loss", "grad_norm", "lr"} <= line.keys() for line in lines)
    assert {"isolation" in line for line in lines} == {True, False}
    assert sorted(path.name for path in (trained / "images").iterdir()) == [
        "prompts_00000004.png",
        "prompts_00000005.png",
    ]


def test_a_killed_run_goes_on_bit_equal(trained, config, tmp_path, monkeypatch):
    """Killed in the first stage, and where the second begins."""
    step = Program.step

    for dies_at in (3, 4):

        def dying(self, state, batch, variant, last=dies_at):
            if state.step == last:
                raise KeyboardInterrupt
            return step(self, state, batch, variant)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Program, "step", dying)
            learn(config, tmp_path)
        assert not (tmp_path / CONCEPT_FILE).exists()
    learn(config, tmp_path)
    got, expected = (load_file(workdir / CONCEPT_FILE) for workdir in (tmp_path, trained))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert logged(tmp_path) == logged(trained)


@pytest.fixture(scope="module")
def bank(config, folder):
    """A config of three images, each with a word of its own, whose captions differ in length."""
    for name, seed in (("hat", 1), ("dog", 2)):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    images = [
        {
            "path": str(folder / "ball.png"),
            "captions": ["a ball on the beach", "the beach and a ball"],
            "words": ["ball"],
        },
        {
            "path": str(folder / "hat.png"),
            "captions": ["a hat and a cat and a cat and a cat"],
            "words": ["hat", "cat#2"],
        },
        {"path": str(folder / "dog.png"), "captions": ["a dog"], "words": ["dog"]},
    ]
    return build(
        LearnRunConfig,
        to_dict(config) | {"images": images, "words": [], "prompts": ["a ball and a dog"]},
    )


def test_images_with_words_of_their_own_are_learned_as_each_alone(bank, tmp_path):
    result = learn(dataclasses.replace(bank, at_once=2), tmp_path / "all")  # two together, then the third
    assert (result.step, result.stopped_by) == (5, None)
    assert (tmp_path / "all" / "images" / "prompts_00000005.png").is_file()
    assert (tmp_path / "all" / "ball.safetensors").is_file() and not (tmp_path / "all" / CONCEPT_FILE).exists()
    for image in bank.images[1:]:
        alone = dataclasses.replace(image, words=())
        learn(dataclasses.replace(bank, images=(alone,), words=image.words, prompts=()), tmp_path / image.name)
        expected = load_concepts(tmp_path / image.name / CONCEPT_FILE)
        found = load_concepts(tmp_path / "all" / f"{image.name}.safetensors")
        assert [concept.word for concept in found.concepts] == list(image.words)
        assert found.caption == image.captions[0]
        np.testing.assert_array_equal(found.image, expected.image)
        for mine, other in zip(found.concepts, expected.concepts, strict=True):
            np.testing.assert_allclose(mine.offset, other.offset, rtol=2e-3, atol=1e-5)
            np.testing.assert_allclose(mine.block_offset, other.block_offset, rtol=2e-2, atol=1e-5)


def test_images_learned_together_may_have_words_that_others_lack(bank, tmp_path):
    images = tuple(dataclasses.replace(image, words=()) for image in bank.images[:2])
    isolation = dataclasses.replace(bank.learn.isolation, probability=1.0, together=0.5)
    how = dataclasses.replace(bank.learn, isolation=isolation)
    joint = dataclasses.replace(bank, images=images, words=("ball", "hat"), learn=how, prompts=("a hat and a ball",))
    assert learn(joint, tmp_path).step == 5
    file = load_concepts(tmp_path / CONCEPT_FILE)
    assert [concept.word for concept in file.concepts] == ["ball", "hat"]
    assert all(np.abs(concept.offset).max() > 0 for concept in file.concepts)
    lines = logged(tmp_path)
    assert {"together" in line for line in lines} == {True, False}
    assert all(("together" in line) != ("isolation" in line) for line in lines)


def test_pictures_that_the_model_cannot_draw_are_warned_of(caplog):
    warn_unfamiliar([1.9, 4.25], ["mine.png", "page.png"])
    (record,) = caplog.records
    assert record.getMessage().startswith("page.png: the model's loss on this picture is 4.2 times that on its own")


def test_scenes_are_familiar_to_the_shipped_model_and_noise_is_not():
    pipeline = Pipeline.from_pretrained("tiny")
    rng = np.random.default_rng(0)
    scenes = rows(0, "test", range(22))
    images, captions = draw_scenes(scenes, 64), [full_caption(scene) for scene in scenes]
    noise = rng.integers(0, 256, images[:2].shape, np.uint8)
    stripes = np.broadcast_to(np.where(np.arange(64) % 4 < 2, 255, 0)[:, None, None], images[:2].shape).astype(np.uint8)
    encoded = [
        (encode_images(pipeline, pictures), encode_prompts(pipeline, texts))
        for pictures, texts in (
            (np.concatenate([images[:16], noise, stripes]), [*captions[:16], *["a star on the beach"] * 4]),
            (images[16:], captions[16:]),
        )
    ]
    ratios = loss_ratios(pipeline, *encoded, (8, 8), guidance=1.0)
    assert ratios[:16].max() < UNFAMILIAR < ratios[16:].min()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": ("ball",)}, "either the run has words, .* or each image has its own"),
        ({"at_once": 0}, "at_once=0: at least 1"),
    ],
)
def test_words_of_images_that_are_not_possible(bank, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(bank, **changes)
    one, other, *_ = bank.images
    with pytest.raises(ValueError, match="each image has its own"):
        dataclasses.replace(bank, images=(one, dataclasses.replace(other, words=())))
    with pytest.raises(ValueError, match=r"files of different names .* got \['ball', 'ball'\]"):
        dataclasses.replace(bank, images=(one, one))
    isolation = dataclasses.replace(bank.learn.isolation, together=0.5)
    with pytest.raises(ValueError, match="together needs images that are learned together"):
        dataclasses.replace(bank, learn=dataclasses.replace(bank.learn, isolation=isolation))


def test_a_run_does_not_go_on_with_another_model_or_image(trained, config, folder, monkeypatch):
    """By their content: a path may hold something else by now."""
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"weights\.transformer"):
        patch.setattr(Pipeline, "base_hash", lambda self: "another")
        learn(config, trained)
    path = folder / "ball.png"
    pixels = path.read_bytes()
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match="pixels"):
        learn(config, trained)
    path.write_bytes(pixels)


# What is refused, before anything is on a device.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": ["dog"]}, "'dog' is not in the prompt 'a ball on the beach'"),
        ({"words": ["on"]}, "'on' is not in the prompt 'the beach and a ball'"),
        ({"images": []}, "at least one image is needed"),
        ({"images": [{"path": "none.png", "captions": ["a ball"]}]}, r"none\.png: no such file"),
        ({"images": [{"path": "BALL", "captions": ["a ball " * 40]}]}, "but the text length is 64: shorten the prompt"),
        ({"size": 2 * SIDE + 1}, r"image size 9x9: positive multiples of 4 are needed"),
        ({"prompts": ["a ball " * 40]}, "but the text length is 64: shorten the prompt"),
        ({"prompts": ["a dog"]}, "one of them contains none of the words to learn: .* 'a dog'"),
        ({"model": "MODEL/nowhere"}, "no such file or folder"),
        ({"mesh": {"data": 3}}, "needs 3 devices"),
    ],
)
def test_runs_that_are_not_possible(config, folder, tmp_path, monkeypatch, changes, message):
    text = json.dumps(to_dict(config) | changes).replace("BALL", str(folder / "ball.png"))
    changed = build(LearnRunConfig, json.loads(text.replace("MODEL", str(folder))))
    monkeypatch.setattr(model_folder, "read_part", lambda *args, **kwargs: pytest.fail("a part was loaded"))
    with pytest.raises(ValueError, match=message):
        learn(changed, tmp_path)


def test_an_incomplete_folder_is_told_first(config, folder, tmp_path, monkeypatch):
    for name in ("model_index.json", "vae/config.json"):
        target = tmp_path / "model" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match=r"missing:\n(.*\n)*.*transformer/diffusion_pytorch_model\.safetensors"):
        learn(dataclasses.replace(config, model=str(tmp_path / "model")), tmp_path / "run")


def test_other_spaces_have_no_files(config):
    values = to_dict(config)
    values["learn"] |= {"space": "text", "per_block": False}
    with pytest.raises(ValueError, match="concept files are of 'modulation'"):
        build(LearnRunConfig, values)


@pytest.mark.parametrize("name", ["tokenverse_flux_dev", "tokenverse_tiny"])
def test_configs_build(name):
    overrides = ["images=[{'path': 'x.png', 'captions': ['a doll']}]", "words=['doll']", "learn.batch_size=2"]
    config = build(LearnRunConfig, load(f"configs/{name}.py", overrides))
    assert config.words == ("doll",) and config.learn.batch_size == 2 and len(config.learn.isolation.captions) == 25
    assert build(LearnRunConfig, to_dict(config)) == config
    if name == "tokenverse_flux_dev":  # the paper's numbers
        learn = config.learn
        assert (learn.stage_1.steps, learn.stage_2.steps, learn.boundary) == (800, 600, 0.8)
        assert (learn.stage_1.high_share, learn.stage_2.high_share) == (0.92, 0.08)
        assert (learn.isolation.probability, learn.flip, learn.guidance) == (0.5, True, 1.0)


def test_all_examples_are_learned_side_by_side():
    config = build(LearnRunConfig, load("tokenverse_tiny:all"))
    assert config.runs == 2 and config.files() == ["star.safetensors", "heart.safetensors"]
    assert [image.words for image in config.images] == [("a star", "a drop"), ("a ring", "a heart")]


@pytest.mark.parametrize("name", ["star", "heart"])
def test_the_examples_are_there(name):
    config = build(LearnRunConfig, load(f"configs/tokenverse_tiny.py:{name}"))
    (image,) = config.images
    assert read_image(image.path, config.size).shape == (64, 64, 3)
    assert f"a {name}" in config.words and all(word in text for word in config.words for text in image.captions)
    assert all(any(word in text for word in config.words) for text in config.prompts)


def test_an_unknown_example_is_refused():
    with pytest.raises(ValueError, match="no example 'moon'; there are star, heart"):
        load("configs/tokenverse_tiny.py:moon")
