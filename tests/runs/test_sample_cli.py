"""`mergevq sample`: its files, what does not change its images, and settings that are not possible."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from generator_run_tools import MODEL, RECOVERING, random_generator, random_tokenizer
from generator_tools import random_params
from PIL import Image

from mergevq_jax import cli
from mergevq_jax.commands import sample as sampling_command
from mergevq_jax.generator.convert import generator_table
from mergevq_jax.generator.images import codes_to_images, recovered_to_images
from mergevq_jax.generator.model import GeneratorModel, import_released, load_generator
from mergevq_jax.generator.sampling.plan import SamplingConfig
from runtime_jax.weights import export_weights
from runtime_jax.workdir import only_writer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tokenizer and generators of its codes, saved."""
    root = tmp_path_factory.mktemp("sample")
    tokenizer = random_tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    random_tokenizer(1).save_pretrained(root / "other")
    random_generator(tokenizer, str(root / "tokenizer")).save_pretrained(root / "generator")
    recovering = random_tokenizer(config=RECOVERING)
    recovering.save_pretrained(root / "recovering")
    for name, of in (("randar", recovering), ("lost", tokenizer)):
        where = root / ("recovering" if of is recovering else "tokenizer")
        random_generator(of, str(where), kind="random").save_pretrained(root / name)
    return root


def sample(root, out, *options):
    arguments = ["sample", "--model", str(root / "generator"), "--num", "5", "--out", str(out), *options]
    return cli.main([str(argument) for argument in arguments])


def test_files(root, tmp_path, capsys):
    options = ["--class", "odd", "--class", "0", "--cfg-scale", 2, 1.5, "--top-k", 2, "--seed", 7, "--keep", 10]
    assert sample(root, tmp_path, *options, "--capacity", 4, "--show-cache") == 0
    said = capsys.readouterr().out
    with np.load(tmp_path / "samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8 and labels.tolist() == [1, 0, 1, 0, 1]
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert protocol["sampling"]["cfg_scale"] == [2.0, 1.5] and protocol["sampling"]["window"] == 3
    assert (protocol["seed"], protocol["keep"], protocol["slots"]) == (7, 10, MODEL.prefix + 3 + 1 + 4)
    assert protocol["measured"]["slots_used_most"] <= protocol["slots"]
    evicted = protocol["measured"]["overflows"] / 5
    summary = f"on average {evicted:.3g} of an image's {MODEL.length} tokens were evicted from the KV cache"
    assert f"5 images are in {tmp_path}; {summary}\n" in said
    for name in ("samples.png", "cache.png", "occupancy.png"):
        assert Image.open(tmp_path / name).size > (100, 100)

    model = load_generator(root / "generator")
    settings = SamplingConfig(cfg_scale=(2.0, 1.5), top_k=2, capacity=4)
    samples = model.sample(labels, 10, sampling=settings, seed=7)
    np.testing.assert_array_equal(codes_to_images(model.load_tokenizer(), samples.indices), images)


def test_the_size_of_batches_changes_nothing(root, tmp_path):
    for size in (5, 2):
        assert sample(root, tmp_path / str(size), "--batch-size", size) == 0
    with np.load(tmp_path / "5" / "samples.npz") as a, np.load(tmp_path / "2" / "samples.npz") as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])


def test_devices_change_nothing(root, tmp_path):
    """Five images on eight devices are not split; eight are, over four parts of two devices each."""
    assert sample(root, tmp_path / "5", "--show-cache") == 0
    assert sample(root, tmp_path / "8", "--num", 8, "--tensor", 2, "--show-cache") == 0
    assert json.loads((tmp_path / "8" / "protocol.json").read_text())["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2}
    with np.load(tmp_path / "5" / "samples.npz") as a, np.load(tmp_path / "8" / "samples.npz") as b:
        np.testing.assert_array_equal(a["arr_1"], b["arr_1"][:5])
        # The codes are equal; the decoder rounds differently in batches of other sizes.
        np.testing.assert_allclose(a["arr_0"].astype(int), b["arr_0"][:5], atol=1)


def test_a_run_that_was_stopped_goes_on(root, tmp_path, capsys, monkeypatch):
    whole, out, options = tmp_path / "whole", tmp_path / "out", ["--batch-size", 2, "--show-cache"]
    assert sample(root, whole, *options) == 0
    draw_batch, calls = sampling_command._draw_batch, []

    def draw_or_stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_batch(*arguments)

    monkeypatch.setattr(sampling_command, "_draw_batch", draw_or_stop)
    assert sample(root, out, *options) == 130
    assert sample(root, out, *options, "--seed", 1) == 1  # nothing is lost
    assert "holds unfinished samples with another request" in capsys.readouterr().err
    assert sample(root, out, *options) == 0 and len(calls) == 4
    for name in ("samples.npz", "samples.png", "cache.png", "occupancy.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (out / "parts").exists()
    calls[:] = calls[:2]
    assert sample(root, out, *options) == 130 and not (out / "parts").exists()  # in the first batch: nothing is kept


def test_a_generator_in_random_order(root, tmp_path, capsys):
    # --merge-number: what --keep was called before
    options = ["--model", root / "randar", "--merge-number", 16, "--cfg-scale", 2, "--steps", 4, "--seed", 7]
    for size in (5, 2):
        assert sample(root, tmp_path / str(size), *options, "--batch-size", size) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"5 images are in {tmp_path / '2'}"
    assert sample(root, tmp_path / "8", *options, "--num", 8) == 0  # one on each of eight devices
    with np.load(tmp_path / "5" / "samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    for other in ("2", "8"):
        with np.load(tmp_path / other / "samples.npz") as arrays:
            # The codes are equal; the decoder rounds differently in batches of other sizes.
            np.testing.assert_allclose(images.astype(int), arrays["arr_0"][:5], atol=1)
    protocol = json.loads((tmp_path / "5" / "protocol.json").read_text())
    assert (protocol["steps"], protocol["keep"]) == (4, 16)
    model = load_generator(root / "randar")
    codes = model.sample(labels, 16, sampling=SamplingConfig(cfg_scale=2.0), seed=7, steps=4)
    np.testing.assert_array_equal(recovered_to_images(model.load_tokenizer(), codes), images)


@pytest.mark.parametrize("name", ["generator", "randar"])
def test_weights_that_are_not_finite_draw_nothing(root, tmp_path, capsys, name):
    model = load_generator(root / name)
    blocks = model.params["spatial_blocks"]
    norm = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), blocks["attention_norm"])
    params = {**model.params, "spatial_blocks": {**blocks, "attention_norm": norm}}
    dataclasses.replace(model, params=params).save_pretrained(tmp_path / "broken")
    assert sample(root, tmp_path / "out", "--model", tmp_path / "broken") == 1
    error = capsys.readouterr().err
    assert "not finite from the logits of code 1 of " in error and "generator/spatial_blocks/attention_norm" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


NUMBERED = tuple(map(str, range(1, 13)))


@pytest.mark.parametrize(
    ("names", "asked", "number"),
    [(NUMBERED, "1", 0), (NUMBERED, "12", 11), (("even", "odd"), "odd", 1), (("even", "odd"), "0", 0), ((), "7", 7)],
)
def test_a_class_by_its_name_or_number(root, names, asked, number):
    assert named(root, names).class_number(asked) == number


WORDS = ("even", "odd")


@pytest.mark.parametrize(
    ("names", "asked"), [(NUMBERED, "0"), (NUMBERED, "007"), (WORDS, "01"), (WORDS, "2"), ((), "99")]
)
def test_what_is_no_class(root, names, asked):
    known = ["named " + ", ".join(names)] if names else []
    known += [] if names == NUMBERED else [f"numbered 0 to {(len(names) or 10) - 1}"]
    with pytest.raises(ValueError, match=f"class '{asked}': this generator's classes are {', and '.join(known)}$"):
        named(root, names).class_number(asked)


def named(root, names):
    """What a generator says of itself, with classes of these names."""
    info = load_generator(root / "generator").info
    count = len(names) or 10
    return dataclasses.replace(
        info, classes=names, architecture=dataclasses.replace(info.architecture, num_classes=count)
    )


def test_a_second_sampling_into_one_folder_is_refused(root, tmp_path, capsys):
    with only_writer(tmp_path / "out"):
        assert sample(root, tmp_path / "out") == 1
        assert "another run is writing there" in capsys.readouterr().err


def test_a_folder_gives_back_what_was_saved(root, tmp_path):
    model = GeneratorModel.from_pretrained(root / "generator")
    model.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (root / "generator" / name).read_bytes()


def test_a_plain_generator_keeps_every_token():
    info = random_generator(random_tokenizer(), "", kind="plain").info
    assert info.sampling(SamplingConfig()) == SamplingConfig(window=info.window, capacity=MODEL.length)
    assert info.sampling(SamplingConfig(window=1, capacity=2)) == SamplingConfig(window=1, capacity=2)


def test_a_released_checkpoint_becomes_a_plain_generator(root, tmp_path):
    released = dataclasses.replace(MODEL, merge_instruction=False, zero_class_rope=True)
    params = random_params(released)
    tensors = export_weights(generator_table(released), params)
    others = {"first_stage_model.encoder.x": np.zeros(1, np.float32)}
    checkpoint = {f"transformer.{name}": tensor for name, tensor in tensors.items()} | others
    model = import_released(released, checkpoint, root / "tokenizer")
    assert (model.info.kind, model.info.window, model.info.class_number("1")) == ("plain", MODEL.length, 1)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    with pytest.raises(ValueError, match="the tokenizer has 16 codes"):
        import_released(dataclasses.replace(released, vocab_sizes=(16, 16)), checkpoint, root / "tokenizer")


@pytest.mark.parametrize(("kind", "row"), [("merge", "144 | 149 | 58% | 2,746"), ("plain", "256 | 257 | 100% | 4,737")])
def test_inspect_says_what_sampling_remembers(kind, row, capsys):
    changes = ["--config.model.num_layers=6", "--config.model.dim=192", "--config.model.num_heads=6"]
    assert cli.main(["inspect", "--config", f"configs/mergear_tiny.py:{kind}", *changes]) == 0
    text = capsys.readouterr().out
    assert f"| {row} |" in text and "whole train state" in text and "train step on codes, K = 256" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/no/generator"], "(and not a hub id of the form owner/name)\n"),
        (["--model", "nosuch"], "owner/name); shipped generators: tiny-mergear, tiny-plain, tiny-randar\n"),
        (["--model", "tiny"], "tiny is a tokenizer; generators are tiny-mergear, tiny-plain, tiny-randar\n"),
        (["--tokenizer", "tiny-mergear"], "tiny-mergear is a generator; tokenizers are tiny\n"),
        (["--model", "TOKENIZER"], "model_type is 'mergevq_tokenizer', but a generator's is 'mergevq_generator'"),
        (["--tokenizer", "OTHER"], "does not make the codes that this generator learned"),
        (["--class", "cat"], "class 'cat': this generator's classes are named even, odd, and numbered 0 to 1"),
        (["--class", "2"], "class '2': this generator's classes are named even, odd, and numbered 0 to 1"),
        (["--keep", "12"], "K = 12: this generator knows 10, 16"),
        (["--top-k", "3"], "top_k=3: 0 (off) to the sub-tokens' vocabularies (2, 8)"),
        (["--temperature", "1", "1", "1"], "one value, or one for each of 2 sub-tokens"),
        (["--capacity", "1"], "window=3, capacity=1: needed is 1 <= window <= capacity <= 16"),
        (["--num", "0"], "sample: --num 0: at least 1"),
        (["--num", "0", "--batch-size", "-1"], "sample: --num 0 and --batch-size -1: at least 1"),
        (["--steps", "4"], "4 steps: this generator draws one code per step"),
        (["--tensor", "3"], "needs a multiple of 3 devices, but there are 8"),
        (["--model", "RANDAR", "--steps", "17"], "17 steps: allowed are 1 to 10"),
        (["--model", "RANDAR", "--window", "2"], "window=2: for raster order"),
        (["--model", "RANDAR", "--show-cache"], "--show-cache: a generator in random order keeps every code"),
        (["--model", "LOST"], "needs a tokenizer with source recovery"),
    ],
)
def test_what_is_not_possible_is_one_line(root, tmp_path, capsys, options, message):
    names = {name.upper(): root / name for name in ("tokenizer", "other", "randar", "lost")}
    assert sample(root, tmp_path / "out", *(names.get(option, option) for option in options)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_generator_in_raster_order_refuses_a_number_of_steps(root):
    generator = load_generator(root / "generator")
    with pytest.raises(ValueError, match="4 steps: this generator draws one code per step"):
        generator.sample([0], 10, sampling=SamplingConfig(), seed=0, steps=4)
    positions = np.arange(10)[None]
    with pytest.raises(ValueError, match="positions: this generator draws all codes, in raster order"):
        generator.sample([0], 10, sampling=SamplingConfig(), seed=0, positions=positions)


def test_randar_without_counts_draws_at_given_positions(root):
    generator = dataclasses.replace(load_generator(root / "randar"), start_counts=None)
    drawn = generator.sample([0], 10, sampling=SamplingConfig(), seed=0, steps=4, positions=np.arange(10)[None])
    assert drawn.positions.tolist() == [list(range(10))] and drawn.indices.shape == (1, 10)
    with pytest.raises(ValueError, match="positions of the codes, or start_counts to draw them from, are needed"):
        generator.sample([0], 10, sampling=SamplingConfig(), seed=0, steps=4)
