"""`tokenverse`, command by command, on a random pipeline; every line that a user gets for what cannot be done."""

import functools
import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_pipeline import FLUX, random_params, tiny_pipeline, write_tiny_pipeline

from runtime_jax.mesh import make_mesh
from tokenverse_jax import cli
from tokenverse_jax.commands.concepts import shortest_names
from tokenverse_jax.commands.inspect import read_configs
from tokenverse_jax.concepts.bank import Concept, ConceptFile
from tokenverse_jax.concepts.concept_mod import ConceptModConfig, init_params
from tokenverse_jax.flux import pipeline
from tokenverse_jax.flux.pipeline import Loader, Pipeline, PromptEncoding
from tokenverse_jax.flux.sampling import UsualSampling
from tokenverse_jax.flux.words import find_word

PROMPT = "a dog and a cat on the beach"
SMALL = ["--width", "16", "--height", "12", "--num-steps", "2", "--cfg-scale", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


def write_concept(path: Path, base: Pipeline, word: str, *, seed: int = 0, kept: bool = False, more: int = 0) -> Path:
    """A concept with random directions, of `more` tokens than its word has."""
    tokens = more + len(find_word(base.tokenizer_2, f"a {word}", word))
    rng = np.random.default_rng(seed)
    offset = rng.normal(size=(tokens, FLUX.width)).astype(np.float32)
    block_offset = rng.normal(size=(FLUX.num_blocks, tokens, FLUX.width)).astype(np.float32)
    params = None
    if kept:
        sizes = {"text_width": FLUX.joint_attention_dim, "width": FLUX.width, "num_blocks": FLUX.num_blocks}
        init = functools.partial(init_params, ConceptModConfig(hidden=8, block_hidden=8), **sizes)
        params = random_params(jax.eval_shape(init, jax.random.key(0)), seed)
    ids = tuple(range(5, 5 + tokens))
    concept = Concept(word=word, token_ids=ids, offset=offset, block_offset=block_offset)
    told = {"caption": f"a {word}", "base": "tiny", "base_hash": base.base_hash()}
    image = np.full((16, 16, 3), 100 + seed, np.uint8)
    ConceptFile(concepts=(concept,), image=image, params=params, **told).save(path)
    return path


@pytest.fixture(scope="module")
def bank(model, tmp_path_factory) -> Path:
    """Concept files: dog and cat, one of too many tokens, and one of another base."""
    folder = tmp_path_factory.mktemp("bank")
    loaded = Pipeline.from_pretrained(model)
    write_concept(folder / "dog.safetensors", loaded, "dog", seed=1)
    write_concept(folder / "cat.safetensors", loaded, "cat", seed=2, kept=True)
    write_concept(folder / "long.safetensors", loaded, "dog", seed=3, more=2)
    other = tiny_pipeline(tmp_path_factory.mktemp("other"), seed=7)
    write_concept(folder / "other.safetensors", other, "dog", seed=4)
    return folder


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def run(command: str, model: Path, *arguments: str) -> int:
    return cli.main([command, "--model", str(model), "--dtype", "float32", *SMALL, *arguments])


@pytest.fixture(scope="module")
def base(model) -> list[np.ndarray]:
    """The base model's images 0 to 2 of the prompt, and again 0, from the pipeline itself."""
    loaded = Pipeline.from_pretrained(model)
    prompt = PromptEncoding(*(np.repeat(part, 2, axis=0) for part in loaded.encode_prompts([PROMPT])))
    settings = {"height": 12, "width": 16, "num_steps": 2, "cfg_scale": 2.0}
    made = [loaded.generate(prompt, examples=np.array(two), **settings) for two in ((0, 1), (2, 0))]
    return list(np.concatenate(made).astype(int))


def test_generate_draws_concepts_and_the_base_beside_them(model, bank, base, tmp_path, capsys):
    dog, cat = (f"{word}={bank / word}.safetensors" for word in ("dog", "cat"))
    arguments = ["--prompt", PROMPT, "--num", "3"]
    both = ["--concept", dog, "--concept", cat, "--compare", "each", "--out", str(tmp_path / "a")]
    assert run("generate", model, *arguments, *both) == 0
    assert "overview.png" in capsys.readouterr().out
    names = {f"{i:04}{kind}.png" for i in range(3) for kind in ("", "_only_1", "_only_2", "_base")}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | {"overview.png"}
    overview = picture(tmp_path / "a" / "overview.png")
    assert all((overview == 100 + seed).all(axis=-1).sum() >= 16 * 16 for seed in (1, 2))  # what they were learned from
    for i in range(3):
        with_concepts, without = (picture(tmp_path / "a" / f"{i:04}{kind}.png") for kind in ("", "_base"))
        assert with_concepts.shape == (12, 16, 3) and np.any(with_concepts != without)
        np.testing.assert_allclose(without.astype(int), base[i], atol=1)
    assert run("generate", model, *arguments, "--concept", cat, "--out", str(tmp_path / "cat")) == 0
    for i in range(3):
        np.testing.assert_array_equal(
            picture(tmp_path / "a" / f"{i:04}_only_2.png"), picture(tmp_path / "cat" / f"{i:04}.png")
        )
    none = ["--concept", f"{dog}@0", "--concept", f"{cat}@0", "--out", str(tmp_path / "b")]
    assert run("generate", model, *arguments, *none) == 0
    for i in range(3):
        np.testing.assert_allclose(picture(tmp_path / "b" / f"{i:04}.png").astype(int), base[i], atol=1)


def test_recomputed_directions_are_others_than_stored_ones(model, bank, tmp_path):
    arguments = ["--prompt", PROMPT, "--num", "2", "--concept", f"cat={bank / 'cat.safetensors'}"]
    for mode in ("stored", "recomputed"):
        assert run("generate", model, *arguments, "--mode", mode, "--out", str(tmp_path / mode)) == 0
    stored, recomputed = (picture(tmp_path / mode / "0001.png").astype(int) for mode in ("stored", "recomputed"))
    assert np.abs(stored - recomputed).max() > 1


@pytest.mark.parametrize("command", ["generate", "direction", "concepts"])
def test_text_encoders_are_gone_when_the_transformer_comes(model, bank, tmp_path, monkeypatch, command):
    loaded, call, order = [], Loader.__call__, []

    def load(self, *parts):
        gc.collect()
        if "transformer" in parts:
            assert len(loaded) == 2 and all(part() is None for part in loaded)
        made = call(self, *parts)
        loaded.extend(weakref.ref(part) for part in (made.clip, made.t5) if part is not None)
        order.append(parts)
        return made

    monkeypatch.setattr(Loader, "__call__", load)
    dog, cat = (str(bank / f"{word}.safetensors") for word in ("dog", "cat"))
    prompt = ["--prompt", PROMPT, "--out", str(tmp_path)]
    if command == "generate":
        assert run("generate", model, *prompt, "--num", "2", "--concept", f"dog={dog}") == 0
    elif command == "direction":
        words = ["--word", "cat", "--attribute", "a red cat", "--neutral", "a cat", "--strength", "1"]
        assert run("direction", model, *prompt, *words) == 0
    else:
        assert cli.main(["concepts", "inspect", dog, cat, "--model", str(model), "--dtype", "float32"]) == 0
    assert next(parts for parts in order if parts) == ("clip", "t5")


@pytest.mark.parametrize(
    ("part", "leaf", "message"),
    [
        ("transformer", "img_in.weight", "not finite from sampling step 1 of 2 on; .*: transformer/img_in/kernel"),
        ("vae", "decoder.conv_out.bias", "not finite from the decoded images on; .*: vae/decoder/conv_out/bias"),
        ("text_encoder", "final_layer_norm.bias", "not finite from CLIP's output on; .*: clip/final_layer_norm/bias"),
        ("text_encoder_2", "encoder.final_layer_norm.weight", "from T5's outputs on; .*: t5/final_layer_norm/scale"),
    ],
)
def test_weights_that_are_not_finite_draw_nothing(model, tmp_path, capsys, part, leaf, message):
    broken = shutil.copytree(model, tmp_path / "broken")
    (path,) = (broken / part).glob("*.safetensors")
    tensors = load_file(path)
    name = {"img_in.weight": "x_embedder.weight"}.get(leaf, leaf)
    (name,) = [own for own in tensors if own.endswith(name)]
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, path)
    arguments = ["--prompt", PROMPT, "--out", str(tmp_path / "out")]
    words = ["--word", "cat", "--attribute", "a red cat", "--neutral", "a cat", "--strength", "1"]
    for command, more in (("generate", ["--num", "2"]), ("direction", words)):
        assert run(command, broken, *arguments, *more) == 1
        error = capsys.readouterr().err
        assert re.search(message, error) and len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_found_out_first(model, tmp_path, capsys, nothing_compiles):
    out = tmp_path / "file"
    out.touch()
    words = ["--word", "cat", "--attribute", "a red cat", "--neutral", "a cat"]
    for command, more in (("generate", []), ("direction", words)):
        assert run(command, model, "--prompt", PROMPT, *more, "--out", str(out)) == 1
        assert f"{out}: cannot be written: Not a directory" in capsys.readouterr().err


NINE = ["dog", "cat", "beach", "red", "striped", "ball", "blue", "star", "hat"]


def test_nine_concepts_and_one_word_twice(model, tmp_path):
    longer = tmp_path / "model"
    shutil.copytree(model, longer)
    file = longer / "tokenizer_2/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 64}))
    base = Pipeline.from_pretrained(longer)
    paths = [write_concept(tmp_path / f"{i}.safetensors", base, word, seed=i) for i, word in enumerate(NINE)]

    def draw(name: str, prompt: str, *concepts: str) -> np.ndarray:
        given = [argument for concept in concepts for argument in ("--concept", concept)]
        arguments = ["--prompt", prompt, "--num", "2", *given, "--out", str(tmp_path / name)]
        assert run("generate", longer, *arguments) == 0
        return picture(tmp_path / name / "0001.png").astype(int)

    prompt = " ".join(NINE)
    concepts = [f"{word}={path}@0.5" for word, path in zip(NINE, paths, strict=True)]
    every = draw("all", prompt, *concepts)
    np.testing.assert_array_equal(draw("again", prompt, *concepts[::-1]), every)
    assert all(np.any(draw(f"not {i}", prompt, *concepts[:i], *concepts[i + 1 :]) != every) for i in (0, 4, 8))

    other = write_concept(tmp_path / "other.safetensors", base, "dog", seed=20)
    both = [[f"dog#1={first}", f"dog#2={second}"] for first, second in ((paths[0], other), (other, paths[0]))]
    one, swapped = (draw(f"twice {i}", "a dog and a dog", *each) for i, each in enumerate(both))
    assert np.any(one != swapped)


def test_weights_in_flux_own_file_and_split_over_devices(model, base, tmp_path):
    weights = "transformer/diffusion_pytorch_model.safetensors"
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("sampling.json"))
    (tmp_path / "model" / weights).rename(tmp_path / "flux.safetensors")
    arguments = ["--prompt", PROMPT, "--num", "1", "--out", str(tmp_path / "out"), "--tensor", "2"]
    assert run("generate", tmp_path / "model", *arguments, "--transformer", str(tmp_path / "flux.safetensors")) == 0
    assert np.abs(picture(tmp_path / "out" / "0000.png").astype(int) - base[0]).max() <= 1


def test_a_model_is_sampled_as_its_folder_says(model, base, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    usual = UsualSampling(size=12, num_steps=2, cfg_scale=2.0)
    (tmp_path / "model" / "sampling.json").write_text(json.dumps(vars(usual)))
    command = ["generate", "--model", str(tmp_path / "model"), "--prompt", PROMPT, "--num", "2"]
    assert cli.main([*command, "--width", "16", "--out", str(tmp_path / "out")]) == 0
    for i in range(2):
        np.testing.assert_allclose(picture(tmp_path / "out" / f"{i:04}.png").astype(int), base[i], atol=1)


def test_direction_compares_all_tokens_with_one_word(model, base, tmp_path, capsys):
    words = ["--prompt", PROMPT, "--word", "cat", "--attribute", "a red cat", "--neutral", "a cat"]
    assert run("direction", model, *words, "--strength", "1", "2", "--out", str(tmp_path)) == 0
    names = {"base", "directions", "m_1", "m_2", "m_plus_1", "m_plus_2"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    own = picture(tmp_path / "base.png").astype(int)
    np.testing.assert_allclose(own, base[0], atol=1)
    changes = {name: np.abs(picture(tmp_path / f"{name}.png") - own).mean() for name in names - {"base", "directions"}}
    assert changes["m_2"] > changes["m_1"] > changes["m_plus_1"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"w = 1: pixels change by {100 * changes['m_1'] / 255:.2f} % in M, "
        f"{100 * changes['m_plus_1'] / 255:.2f} % in M+"
    )


def test_concepts_inspect_shows_a_bank_and_warns_of_what_would_blend(model, bank, tmp_path, capsys):
    twin = tmp_path / "twin.safetensors"
    loaded = Pipeline.from_pretrained(model)
    write_concept(twin, loaded, "cat", seed=2)
    files = [str(bank / "dog.safetensors"), str(bank / "cat.safetensors"), str(twin)]
    assert cli.main(["concepts", "inspect", *files, "--model", str(model), "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| dog \| dog.safetensors \| \d \| both \| 1.0 \| [\d.]+ \| [\d.]+ \|", text)
    assert f"tiny ({loaded.base_hash()[:8]})" in text
    assert "warning: cat:cat and twin:cat have similar attention keys" in text
    assert "warning: dog:dog" not in text
    twins = [Path("a/x.safetensors"), Path("b/a/x.safetensors"), Path("b/y.safetensors"), Path("/c/a/x.safetensors")]
    assert list(map(str, shortest_names(twins).values())) == [
        "a/x.safetensors",
        "b/a/x.safetensors",
        "y.safetensors",
        "c/a/x.safetensors",
    ]
    same = shutil.copy(files[1], tmp_path / "dog.safetensors")
    assert cli.main(["concepts", "inspect", files[0], str(same), "--model", str(model), "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert f"| {bank.name}/dog.safetensors |" in text and f"| {tmp_path.name}/dog:cat |" in text
    # As many words as there are: each pair is looked at by itself.
    many = [str(write_concept(tmp_path / f"{i}.safetensors", loaded, "dog", seed=i)) for i in range(7)]
    assert cli.main(["concepts", "inspect", *many, "--model", str(model), "--dtype", "float32"]) == 0
    assert len(re.findall(r"\| \d:dog \| \d:dog \|", capsys.readouterr().out)) == 21
    # Without other files there is nothing to compare, and no model is needed.
    assert cli.main(["concepts", "inspect", files[0]]) == 0
    assert "cosine" not in capsys.readouterr().out


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a program is compiled")

    for name in ("_encode_text", "run", "_encode_images"):
        monkeypatch.setattr(pipeline, name, refuse)


def incomplete(model: Path, folder: Path) -> Path:
    for path in ("model_index.json", "transformer/config.json", "tokenizer/vocab.json"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((model / path).read_bytes())
    return folder


BAD_GENERATE = [
    (["--concept", "dog"], r"'dog': not of the form TARGET=FILE.safetensors\[:WORD\]\[@STRENGTH\]"),
    (["--concept", "dog=BANK/none.safetensors"], r"bank.*/none.safetensors: no such concept file"),
    (["--concept", "dog=BANK/dog.safetensors@x"], "the strength 'x' is not a number"),
    (["--concept", "fox=BANK/dog.safetensors"], "'fox' is not in the prompt '.*'; its words are a, dog, and, a#2, cat"),
    (["--concept", "dog#2=BANK/dog.safetensors"], "'dog#2' is not in the prompt"),
    (["--concept", "dog=BANK/dog.safetensors:fox"], "no concept of 'fox' among .* there are: dog"),
    (["--width", "18"], "image size 12x18: positive multiples of 4 are needed"),
    (["--width", "0"], "image size 12x0: positive multiples of 4 are needed"),
    (["--num-steps", "0"], "num_steps=0, batch_size=2: at least 1"),
    (["--num", "0"], "num=0: at least 1 image"),
    (["--batch-size", "0"], "num_steps=2, batch_size=0: at least 1"),
    (["--compare"], "without concepts there is nothing to compare"),
    (["--prompt", "dog " * 30], "31 tokens, but the text length is 24: shorten the prompt 'dog dog"),
    (["--prompt", "dog " * 30, "--concept", "dog=BANK/dog.safetensors"], "31 tokens, but the text length is 24"),
    (["--tensor", "99"], r"mesh \(data=1, fsdp=1, tensor=99\) needs 99 devices, but there are"),
    (["--steps", "4"], "unknown argument '--steps'; see tokenverse generate --help"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_GENERATE, ids=[" ".join(bad[0])[:40] for bad in BAD_GENERATE])
def test_generate_refuses_in_one_line(model, bank, tmp_path, capsys, nothing_compiles, arguments, message):
    arguments = [argument.replace("BANK", str(bank)) for argument in arguments]
    assert run("generate", model, "--prompt", PROMPT, "--out", str(tmp_path / "out"), *arguments) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1 and error.startswith("tokenverse generate: ")
    assert not (tmp_path / "out").exists()


def test_a_concept_of_another_model_is_refused(model, bank, tmp_path, capsys):
    concept = ["--concept", f"dog={bank / 'other.safetensors'}", "--out", str(tmp_path / "out")]
    assert run("generate", model, "--prompt", PROMPT, *concept) == 1
    error = capsys.readouterr().err
    assert re.search("learned on tiny with weights .* but the loaded model's are", error)
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_concept_of_other_tokens_is_refused(model, bank, tmp_path, capsys):
    arguments = ["--prompt", PROMPT, "--out", str(tmp_path / "out")]
    assert run("generate", model, *arguments, "--concept", f"dog={bank / 'long.safetensors'}") == 1
    assert re.search(
        r"concept 'dog' \(\d tokens\): 'dog' has \d tokens? \(.*dog\) in the prompt", capsys.readouterr().err
    )
    arguments += ["--mode", "recomputed"]
    assert run("generate", model, *arguments, "--concept", f"dog={bank / 'dog.safetensors'}") == 1
    assert "dog.safetensors: holds no Concept-Mod" in capsys.readouterr().err


def test_direction_refuses_in_one_line(model, tmp_path, capsys, nothing_compiles):
    words = ["--prompt", PROMPT, "--attribute", "a red cat", "--neutral", "a cat", "--out", str(tmp_path)]
    assert run("direction", model, *words, "--word", "fox") == 1
    assert "'fox' is not in the prompt" in capsys.readouterr().err
    assert run("direction", model, *words, "--word", "cat", "--height", "13") == 1
    assert "image size 13x16" in capsys.readouterr().err


def test_models_that_cannot_be_loaded_are_named(model, tmp_path, capsys, monkeypatch, nothing_compiles):
    prompt = ["--prompt", PROMPT]
    assert run("generate", tmp_path / "none", *prompt) == 1
    assert "none: no such file or folder (and not a hub id of the form owner/name)" in capsys.readouterr().err
    assert run("generate", incomplete(model, tmp_path / "part"), *prompt) == 1
    error = capsys.readouterr().err
    missing = ["scheduler/scheduler_config.json", "vae/config.json", "text_encoder/model.safetensors", "tokenizer_2"]
    assert "missing:" in error and all(f"\n  {name}" in error for name in missing)

    assert run("generate", model, *prompt, "--vae", str(tmp_path / "ae.safetensors")) == 1
    assert f"missing:\n  {tmp_path / 'ae.safetensors'}" in capsys.readouterr().err

    def gated(*_, **__):
        raise OSError("401 Client Error")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    assert run("generate", Path("black-forest-labs/FLUX.1-dev"), *prompt) == 1
    error = capsys.readouterr().err
    assert "401 Client Error" in error and "accept its licence on https://huggingface.co/black-forest-labs" in error
    assert "HF_TOKEN" in error and "pass a local folder" in error


def test_concept_files_that_cannot_be_shown_are_named(model, bank, tmp_path, capsys):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    assert cli.main(["concepts", "inspect", str(damaged)]) == 1
    assert "damaged.safetensors" in capsys.readouterr().err
    files = [str(bank / "dog.safetensors"), str(bank / "other.safetensors")]
    assert cli.main(["concepts", "inspect", *files]) == 1
    assert "learned on different models" in capsys.readouterr().err
    assert cli.main(["concepts", "inspect", files[0], str(bank / "cat.safetensors"), "--model", "nowhere"]) == 1
    assert "nowhere: no such file or folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A picture, a long one, and a file that is none."""
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 30, 3), np.uint8)
    Image.fromarray(pixels[:, :16]).save(folder / "dog.png")
    Image.fromarray(pixels).save(folder / "long.png")
    (folder / "text.png").write_text("a dog")
    return folder


def learn(base: Path, files: Path, workdir: Path, **changes) -> int:
    """Runs `tokenverse learn` on the random pipeline, for one step."""
    own = {
        "model": str(base),
        "images": [{"path": str(files / changes.pop("image", "dog.png")), "captions": ["a dog", "the dog, a hat"]}],
        "words": ["dog"],
        "size": 8,
        "prompts": [],
        "learn.isolation": None,
        "learn.batch_size": 2,
        "learn.stage_1.steps": 1,
        "learn.stage_2.steps": 0,
        "learn.optimizer.warmup.steps": 0,
    }
    overrides = [f"--config.{name}={value!r}" for name, value in (own | changes).items()]
    return cli.main(["learn", "--config", "configs/tokenverse_tiny.py", "--workdir", str(workdir), *overrides])


def test_a_learned_concept_is_inspected_and_drawn(model, files, tmp_path, capsys, monkeypatch):
    # Programs for one device take a fraction of the time to compile; test_learn_run.py has a mesh.
    one_device = functools.partial(make_mesh, devices=jax.devices()[:1])
    for module in ("tokenverse_jax.commands.learn", "runtime_jax.mesh"):
        monkeypatch.setattr(f"{module}.make_mesh", one_device)
    assert learn(model, files, tmp_path / "run") == 0
    path = tmp_path / "run" / "concept.safetensors"
    assert f"the concepts are in {path}" in capsys.readouterr().out
    assert cli.main(["concepts", "inspect", str(path)]) == 0
    assert re.search(rf"\| {path} \| a dog \| {model} ", capsys.readouterr().out)
    arguments = ["--prompt", "a cat and a dog", "--concept", f"dog={path}", "--num", "2"]
    assert run("generate", model, *arguments, "--out", str(tmp_path / "out")) == 0


BAD_LEARN = [
    ({"words": ["fox"]}, "'fox' is not in the prompt 'a dog'; its words are a, dog"),
    ({"words": ["dog#2"]}, "'dog#2' is not in the prompt"),
    ({"prompts": ["a cat"]}, "one of them contains none of the words to learn: 'dog' is not in the prompt 'a cat'"),
    ({"image": "text.png"}, "text.png: not a readable image"),
    ({"image": "long.png"}, r"long.png: 30 x 12 pixels: one side is more than 2 times the other"),
    ({"image": "none.png"}, "none.png: no such file"),
    ({"size": 10}, "image size 10x10: positive multiples of 4 are needed"),
    ({"model": "nowhere"}, r"nowhere: no such file or folder \(and not a hub id of the form owner/name\)"),
    ({"learn.stage_3": 1}, "config.learn.stage_3: unknown key"),
    ({"learn.stage1.steps": 4}, r"learn.stage1: unknown key \(value {'steps': 4}\); did you mean 'stage_1'\?"),
    ({"learn.optimizer.warmup.steps": 1}, "config.learn: optimizer.warmup of 1 steps must be shorter than stage_1.ste"),
    ({"learn.space": "pixels"}, "config.learn.space: got 'pixels'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_LEARN, ids=[str(bad[0]) for bad in BAD_LEARN])
def test_learn_refuses_in_one_line(model, files, tmp_path, capsys, nothing_compiles, changes, message):
    assert learn(model, files, tmp_path / "run", **changes) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1 and error.startswith("tokenverse learn: ")


def test_learn_refuses_long_captions_and_incomplete_models(model, files, tmp_path, capsys, nothing_compiles):
    image = {"path": str(files / "dog.png"), "captions": ["dog " * 30]}
    assert learn(model, files, tmp_path / "run", images=[image]) == 1
    assert "31 tokens, but the text length is 24: shorten the prompt 'dog dog" in capsys.readouterr().err
    assert learn(incomplete(model, tmp_path / "part"), files, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "missing:" in error and "vae/diffusion_pytorch_model.safetensors" in error


def test_inspect_knows_the_full_size_without_weights(capsys):
    assert cli.main(["inspect", "--size", "512"]) == 0
    text = capsys.readouterr().out
    assert "| transformer | 11,901,408,320 | 23.803 |" in text  # the published 12B
    assert "| t5 | 4,762,310,656 |" in text
    plain, isolated = re.findall(r"\| 512 px.*", text)
    tokens, forward, step, kept, block, all_kept = (float(n.replace(",", "")) for n in plain.split("|")[2:-1])
    assert tokens == 1024
    assert forward == pytest.approx(21.5, rel=0.02)
    # Backward without gradients of weights costs what forward costs, and so does doing it again.
    assert 2.9 < step / forward < 3.1
    # The 57 blocks' inputs, text and image tokens 3072 wide, are kept: 38 joint ones, 19 in two parts.
    assert kept == pytest.approx(57 * 1536 * 3072 * 2 / 1e9, rel=0.15)
    assert all_kept > 50 * kept and block < all_kept / 20
    assert float(isolated.split("|")[4]) > 3 * step
    words = dict(re.findall(r"\| (\d) tokens? \| ([\d,]+) \|", text))
    assert int(words["5"].replace(",", "")) < 2000  # kB


def test_inspect_takes_a_folder_and_refuses_in_one_line(model, capsys):
    assert read_configs(str(model))["transformer"] == FLUX
    assert cli.main(["inspect", "--model", str(model), "--size", "18"]) == 1
    assert "image size 18x18" in capsys.readouterr().err
    assert cli.main(["inspect", "--model", "huge"]) == 1
    assert "huge: no such file or folder" in capsys.readouterr().err
