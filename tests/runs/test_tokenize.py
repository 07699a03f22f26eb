"""Tokens of a folder on disk: interrupted runs and unreadable images."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mergevq_jax.commands import tokenize as tokenize_lib
from mergevq_jax.commands.tokenize import tokenize, views_of
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.model import Tokenizer, param_shapes
from mergevq_jax.tokens_folder import read_tokens
from runtime_jax.data import SourceConfig, center_crop, open_source

CONFIG = TokenizerConfig(
    resolution=16,
    ch=32,
    ch_mult=(1, 1),
    num_res_blocks=(0, 0),
    num_att_blocks=1,
    num_heads=1,
    z_channels=4,
    keep=40,
    dist_head=None,
    recovery=None,
)
IMAGES = 7


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), param_shapes(CONFIG))
    Tokenizer(CONFIG, params).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def source(tmp_path) -> SourceConfig:
    """Seven images, of which 2 and 5 are unreadable."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
    for number in (2, 5):
        (folder / f"{number}.png").write_bytes(b"not a picture")
    return SourceConfig(kind="folder", path=str(folder))


def content(out: Path) -> dict:
    """tokens.json, and the records by the number of their image."""
    records = {
        int(record["index"]): (record["indices"].tolist(), record["source_map"].tolist()) for record in read_tokens(out)
    }
    return {"info": json.loads((out / "tokens.json").read_text()), "records": records}


def test_an_interrupted_run_ends_with_the_same_tokens_and_count(tmp_path, tokenizer, source, monkeypatch):
    sizes = {"keep": None, "batch_size": 2, "shard_size": 3}
    said = tokenize(source, tokenizer, tmp_path / "whole", **sizes)
    assert said.startswith("5 images in 3 shards") and "2 unreadable" in said
    whole = content(tmp_path / "whole")
    assert whole["info"]["unreadable"] == 2 and list(whole["records"]) == [0, 1, 3, 4, 6]

    write_shard = tokenize_lib._write_shard

    def stopped(path, *args):
        if "00001-of" in path.name:
            raise KeyboardInterrupt
        write_shard(path, *args)

    out = tmp_path / "again"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize_lib, "_write_shard", stopped)
        tokenize(source, tokenizer, out, **sizes)
    assert "unreadable" not in json.loads((out / "tokens.json").read_text())
    for _ in range(2):  # a complete folder stays as it is
        tokenize(source, tokenizer, out, **sizes)
        assert content(out) == whole
    assert not list(out.glob(".*"))


def test_views_of_an_image():
    rows, columns = np.meshgrid(np.arange(44), np.arange(66), indexing="ij")
    image = np.stack([rows, columns, rows], -1).astype(np.uint8)  # a pixel says where it is
    one, flip, ten = (views_of(image, 40, views) for views in ("one", "flip", "ten-crop"))
    np.testing.assert_array_equal(one, [center_crop(image, 40)])
    np.testing.assert_array_equal(flip, [one[0], one[0][:, ::-1]])
    starts = [(int(view[0, 0, 0]), int(view[0, 0, 1])) for view in ten[:5]]
    assert starts == [(0, 11), (0, 15), (4, 11), (4, 15), (2, 13)]
    np.testing.assert_array_equal(ten[5:], [view[:, ::-1] for view in ten[:5]])


def test_every_view_has_the_codes_of_its_pixels(tmp_path, tokenizer, source):
    sizes = {"keep": None, "batch_size": 2, "shard_size": 3}
    tokenize(source, tokenizer, tmp_path, **sizes, views="flip")
    assert json.loads((tmp_path / "tokens.json").read_text())["views"] == "flip"
    records, images = list(read_tokens(tmp_path)), open_source(source)
    assert [record["indices"].shape for record in records] == [(2, CONFIG.keep)] * 5
    loaded = Tokenizer.from_pretrained(tokenizer)
    for record in records:
        image = images[int(record["index"])]["image"]
        tokens = loaded.encode(np.stack([image, image[:, ::-1]]), keep=CONFIG.keep)
        np.testing.assert_array_equal(record["indices"], tokens.indices)
        np.testing.assert_array_equal(record["source_map"], tokens.source_map)
    for views in ("one", "ten-crop"):
        with pytest.raises(ValueError, match="holds other tokens"):
            tokenize(source, tokenizer, tmp_path, **sizes, views=views)
