"""`tokenverse`, command by command, on a random pipeline; every line that a user gets for what cannot be done."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import FLUX, random_params, tiny_pipeline, write_tiny_pipeline

from tokenverse_jax import cli, pipeline
from tokenverse_jax.bank import Concept, ConceptFile
from tokenverse_jax.concept_mod import ConceptModConfig, init_params
from tokenverse_jax.pipeline import Pipeline
from tokenverse_jax.text import find_word

PROMPT = "a dog and a cat on the beach"
SMALL = ["--width", "16", "--height", "12", "--num-steps", "2", "--dtype", "float32", "--batch-size", "2"]


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
        params = init_params(ConceptModConfig(hidden=8, block_hidden=8), jax.random.key(0), **sizes)
        params = random_params(jax.eval_shape(lambda: params), seed)
    ids = tuple(range(5, 5 + tokens))
    concept = Concept(word=word, token_ids=ids, offset=offset, block_offset=block_offset)
    file = ConceptFile(concepts=(concept,), caption=f"a {word}", base="tiny", base_hash=base.base_hash(), params=params)
    file.save(path)
    return path


@pytest.fixture(scope="module")
def bank(model, tmp_path_factory) -> Path:
    """Concept files: dog and cat, one of too many tokens, and one of another base."""
    folder = tmp_path_factory.mktemp("bank")
    loaded = Pipeline.from_pretrained(model)
    write_concept(folder / "dog.safetensors", loaded, "dog", seed=1, kept=True)
    write_concept(folder / "cat.safetensors", loaded, "cat", seed=2)
    write_concept(folder / "long.safetensors", loaded, "dog", seed=3, more=2)
    other = tiny_pipeline(tmp_path_factory.mktemp("other"), seed=7)
    write_concept(folder / "other.safetensors", other, "dog", seed=4)
    return folder


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def run(command: str, model: Path, *arguments: str) -> int:
    return cli.main([command, "--model", str(model), *SMALL, *arguments])


def test_generate_draws_concepts_and_the_base_beside_them(model, bank, tmp_path, capsys):
    dog, cat = (f"{word}={bank / word}.safetensors" for word in ("dog", "cat"))
    arguments = ["--prompt", PROMPT, "--num", "3", "--cfg-scale", "2", "--compare"]
    assert run("generate", model, *arguments, "--concept", dog, "--concept", cat, "--out", str(tmp_path / "a")) == 0
    assert "overview.png" in capsys.readouterr().out
    names = {f"{i:04}{kind}.png" for i in range(3) for kind in ("", "_base")} | {"overview.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    both = [picture(tmp_path / "a" / f"{i:04}.png") for i in range(3)]
    base = [picture(tmp_path / "a" / f"{i:04}_base.png") for i in range(3)]
    assert all(image.shape == (12, 16, 3) for image in both + base)
    assert all(np.any(one != two) for one, two in zip(both, base, strict=True))
    # The base model's images are those of the pipeline, and no concept is as a concept of no strength.
    expected = Pipeline.from_pretrained(model).generate([PROMPT] * 3, height=12, width=16, num_steps=2, cfg_scale=2.0)
    np.testing.assert_allclose(np.stack(base).astype(int), np.asarray(expected).astype(int), atol=1)
    arguments = [*arguments[:-1], "--concept", f"{dog}@0", "--out", str(tmp_path / "b")]
    assert run("generate", model, *arguments) == 0
    for i in range(3):
        np.testing.assert_array_equal(picture(tmp_path / "b" / f"{i:04}.png"), base[i])


def test_modes_differ_and_batches_do_not(model, bank, tmp_path):
    arguments = ["--prompt", PROMPT, "--num", "3", "--concept", f"dog={bank / 'dog.safetensors'}"]
    for name, more in {"a": [], "b": ["--batch-size", "3"], "c": ["--mode", "recomputed"]}.items():
        assert run("generate", model, *arguments, *more, "--out", str(tmp_path / name)) == 0
    stored, other_batch, recomputed = (picture(tmp_path / name / "0002.png").astype(int) for name in "abc")
    assert np.abs(stored - other_batch).max() <= 1
    assert np.abs(stored - recomputed).max() > 1


def test_direction_compares_all_tokens_with_one_word(model, tmp_path, capsys):
    words = ["--prompt", PROMPT, "--word", "cat", "--attribute", "a red cat", "--neutral", "a cat"]
    assert run("direction", model, *words, "--strength", "1", "2", "--out", str(tmp_path)) == 0
    names = {"base", "directions", "m_1", "m_2", "m_plus_1", "m_plus_2"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    base = picture(tmp_path / "base.png").astype(int)
    changes = {name: np.abs(picture(tmp_path / f"{name}.png") - base).mean() for name in names - {"base", "directions"}}
    assert changes["m_2"] > changes["m_1"] > changes["m_plus_1"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"w = 1: pixels change by {100 * changes['m_1'] / 255:.2f} % in M, "
        f"{100 * changes['m_plus_1'] / 255:.2f} % in M+"
    )
    loaded = Pipeline.from_pretrained(model)
    np.testing.assert_allclose(base, np.asarray(loaded.generate([PROMPT], height=12, width=16, num_steps=2))[0], atol=1)


def test_concepts_inspect_shows_a_bank_and_warns_of_what_would_blend(model, bank, tmp_path, capsys):
    twin = tmp_path / "twin.safetensors"
    loaded = Pipeline.from_pretrained(model)
    write_concept(twin, loaded, "cat", seed=2)
    files = [str(bank / "dog.safetensors"), str(bank / "cat.safetensors"), str(twin)]
    assert cli.main(["concepts", "inspect", *files, "--model", str(model), "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| dog \| dog.safetensors \| \d \| both \| 1.0 \| [\d.]+ \| [\d.]+ \|", text)
    assert f"tiny ({loaded.base_hash()[:8]})" in text
    assert "warning: cat:cat and twin:cat have nearly parallel attention keys" in text
    assert "warning: dog:dog" not in text
    # Without other files there is nothing to compare, and no model is needed.
    assert cli.main(["concepts", "inspect", files[0]]) == 0
    assert "cosine" not in capsys.readouterr().out


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a program is compiled")

    for name in ("_encode_text", "_generate", "_encode_images"):
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
    (["--concept", "dog=BANK/other.safetensors"], "learned on tiny with weights .* but the loaded model's are"),
    (["--width", "18"], "image size 12x18: positive multiples of 4 are needed"),
    (["--num-steps", "0"], "num_steps=0, batch_size=2: at least 1"),
    (["--num", "0"], "num=0: at least 1 image"),
    (["--batch-size", "0"], "num_steps=2, batch_size=0: at least 1"),
    (["--compare"], "without concepts there is nothing to compare"),
    (["--prompt", "dog " * 30], "31 tokens, but the text length is 24: shorten the prompt 'dog dog"),
    (["--prompt", "dog " * 30, "--concept", "dog=BANK/dog.safetensors"], "31 tokens, but the text length is 24"),
    (["--steps", "4"], "unknown argument '--steps'; see tokenverse generate --help"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_GENERATE, ids=[" ".join(bad[0])[:40] for bad in BAD_GENERATE])
def test_generate_refuses_in_one_line(model, bank, tmp_path, capsys, nothing_compiles, arguments, message):
    arguments = [argument.replace("BANK", str(bank)) for argument in arguments]
    assert run("generate", model, "--prompt", PROMPT, "--out", str(tmp_path / "out"), *arguments) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1 and error.startswith("tokenverse generate: ")
    assert not (tmp_path / "out").exists()


def test_a_concept_of_other_tokens_is_refused(model, bank, tmp_path, capsys):
    arguments = ["--prompt", PROMPT, "--out", str(tmp_path / "out")]
    assert run("generate", model, *arguments, "--concept", f"dog={bank / 'long.safetensors'}") == 1
    assert re.search(
        r"concept 'dog' \(\d tokens\): 'dog' has \d tokens? \(.*dog\) in the prompt", capsys.readouterr().err
    )
    arguments += ["--mode", "recomputed"]
    assert run("generate", model, *arguments, "--concept", f"dog={bank / 'cat.safetensors'}:cat") == 1
    assert "cat.safetensors: holds no Concept-Mod" in capsys.readouterr().err


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
