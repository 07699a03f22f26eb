"""Concept files, and the similarity of attention keys."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import random_params

from runtime_jax.weights import read_safetensors, write_safetensors
from tokenverse_jax.concepts.bank import Concept, ConceptFile, key_similarity, load_concepts, text_keys
from tokenverse_jax.flux.model import Flux, FluxConfig, param_shapes

D, BLOCKS = 6, 3


def make_concept(word="dog", tokens=2, seed=0, per_block=True, **fields):
    rng = np.random.default_rng(seed)
    offset = rng.normal(size=(tokens, D)).astype(np.float32)
    block_offset = rng.normal(size=(BLOCKS, tokens, D)).astype(np.float32) if per_block else None
    ids = tuple(range(7, 7 + tokens))
    return Concept(**{"word": word, "token_ids": ids, "offset": offset, "block_offset": block_offset} | fields)


def make_file(*concepts, **fields):
    defaults = {"caption": "a dog at dawn", "base": "some/FLUX", "base_hash": "abc"}
    return ConceptFile(concepts=concepts or (make_concept(),), **defaults | fields)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a good file with other tensors or metadata."""

    def save(change_tensors=None, **metadata):
        path = tmp_path / "dog.safetensors"
        make_file().save(path)
        tensors, found = read_safetensors(path)
        found = {name: value for name, value in (found | metadata).items() if value is not None}
        write_safetensors(path, tensors | (change_tensors or {}), found)
        return path

    return save


def test_a_file_comes_back(tmp_path):
    light = make_concept("light", tokens=1, seed=1, per_block=False, blocks="double", strength=0.5)
    params = {"concept_mod": {"out_layer": {"kernel": np.ones((2, D), np.float32)}}}
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    file = make_file(make_concept(), light, params=params, image=image, caption='a "dog" at dawn, \u00e9')
    path = tmp_path / "bank" / "street.safetensors"
    file.save(path)
    back = load_concepts(path, base_hash="abc")
    for name in ("caption", "base", "base_hash", "tool_version"):
        assert getattr(back, name) == getattr(file, name)
    assert back.tool_version
    np.testing.assert_array_equal(back.image, image)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    for got, expected in zip(back.concepts, file.concepts, strict=True):
        for name in ("word", "token_ids", "blocks", "strength"):
            assert getattr(got, name) == getattr(expected, name)
        np.testing.assert_array_equal(got.offset, expected.offset)
        assert got.offset.dtype == np.float32
    rounded = file.concepts[0].block_offset.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(back.concepts[0].block_offset, rounded)
    assert back.concepts[1].block_offset is None

    again = tmp_path / "again.safetensors"
    back.save(again)
    (tensors, metadata), (tensors_again, metadata_again) = read_safetensors(path), read_safetensors(again)
    jax.tree.map(np.testing.assert_array_equal, tensors_again, tensors)
    assert metadata_again == metadata


def test_a_file_takes_arrays_of_jax(tmp_path):
    concept = make_concept(offset=np.asarray(jnp.ones((2, D))))
    make_file(concept, params={"concept_mod": {"bias": jnp.ones(3)}}).save(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(load_concepts(tmp_path / "a.safetensors").params["concept_mod"]["bias"], 1)


def test_a_word_at_full_size_is_below_two_megabytes(tmp_path):
    zeros = {"offset": np.zeros((4, 3072), np.float32), "block_offset": np.zeros((57, 4, 3072), np.float32)}
    path = tmp_path / "doll.safetensors"
    make_file(make_concept("doll", token_ids=(1, 2, 3, 4), **zeros)).save(path)
    assert path.stat().st_size < 2_000_000


def test_words_are_found_whatever_their_case():
    file = make_file(make_concept("Dog"), make_concept("dog#2"))
    assert file.concept("dOG") is file.concepts[0]
    assert file.concept("dog#2") is file.concepts[1]
    with pytest.raises(ValueError, match=r"no concept of 'cat' .*'a dog at dawn'; there are: Dog, dog#2$"):
        file.concept("cat")


def test_words_are_found_whatever_their_unicode_form():
    file = make_file(make_concept("Cafe\u0301"), make_concept("dog\u2019s"))
    assert file.concept("caf\u00e9") is file.concepts[0]
    assert file.concept("DOG'S#1") is file.concepts[1]
    assert [concept.word for concept in file.concepts] == ["Cafe\u0301", "dog\u2019s"]  # as they were typed
    with pytest.raises(ValueError, match="no concept of 'cafe' among"):
        file.concept("cafe")
    with pytest.raises(ValueError, match="one or more different words, got \\['caf\u00e9', 'caf\u00e9'\\]"):
        make_file(make_concept("cafe\u0301"), make_concept("CAF\u00c9"))


def test_the_same_word_twice_or_none():
    with pytest.raises(ValueError, match=r"one or more different words, got \['dog', 'dog'\]"):
        make_file(make_concept("dog"), make_concept("Dog"))
    with pytest.raises(ValueError, match=r"got \[\]"):
        dataclasses.replace(make_file(), concepts=())


def test_an_image_is_of_bytes():
    with pytest.raises(ValueError, match=r"image is uint8 \[h, w, 3\], got float32 \[4, 4, 3\]"):
        make_file(image=np.zeros((4, 4, 3), np.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": (7,)}, r"concept 'dog': 1 token ids for offsets of shapes \(2, 6\) and \(3, 2, 6\)"),
        ({"token_ids": (), "offset": np.zeros((0, D), np.float32), "block_offset": None}, "0 token ids"),
        ({"offset": np.zeros(D, np.float32)}, r"shapes \(6,\) and .*, not \[n, D\] and \[blocks, n, D\]"),
        ({"block_offset": np.zeros((3, 2, 5), np.float32)}, r"shapes \(2, 6\) and \(3, 2, 5\), not"),
        ({"offset": np.full((2, D), np.nan, np.float32)}, "not finite"),
        ({"strength": float("inf")}, "not finite"),
        ({"blocks": "all"}, "blocks='all', not both, double, single"),
    ],
)
def test_bad_concepts(fields, message):
    with pytest.raises(ValueError, match=message):
        make_concept(**fields)


def test_the_name_of_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"dog\.pt: the name of a concept file ends in \.safetensors"):
        make_file().save(tmp_path / "dog.pt")


def test_a_concept_of_another_base_is_refused(saved):
    path = saved()
    with pytest.raises(ValueError, match="learned on some/FLUX with weights abc, but the loaded model's are xyz"):
        load_concepts(path, base_hash="xyz")
    assert load_concepts(path).base == "some/FLUX"


WORD = {"word": "dog", "token_ids": [7, 8], "blocks": "both", "strength": 1.0}


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        (
            {"format": None},
            {},
            r"dog.safetensors: not a concept file \(its format is None, not 'tokenverse-concepts'\)",
        ),
        ({"format_version": "2"}, {}, "version '2', but only '1' can be read"),
        ({"words": "["}, {}, r"dog.safetensors: its words are not JSON"),
        ({"words": None}, {}, r"dog.safetensors.words: missing"),
        ({"base": None}, {}, r"dog.safetensors.base: missing"),
        ({"author": "me"}, {}, r"dog.safetensors.author: unknown key"),
        ({"words": json.dumps([WORD | {"blocks": "all"}])}, {}, r"dog.safetensors.words.0.blocks: got 'all'"),
        (
            {"words": json.dumps([WORD | {"strength": float("nan")}])},
            {},
            "dog.safetensors: concept 'dog': .* not finite",
        ),
        ({"words": json.dumps([WORD, WORD | {"word": "cat"}])}, {}, "concept 'cat' has tensors .*, got none"),
        ({"words": "[]"}, {}, "unknown tensors words/0"),
        ({}, {"other": np.zeros(1, np.float32)}, "dog.safetensors: unknown tensors other"),
        ({}, {"words/0/scale": np.zeros(1, np.float32)}, "concept 'dog' has .*, got block_offset, offset, scale"),
        ({}, {"words/0/offset": np.zeros((2, 5), np.float32)}, r"dog.safetensors: concept 'dog': offsets of shapes"),
    ],
)
def test_files_that_are_not_right(saved, metadata, tensors, message):
    path = saved(tensors, **metadata)
    with pytest.raises(ValueError, match=message):
        load_concepts(path, base_hash="abc")


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.safetensors: no such file"):
        load_concepts(tmp_path / "nothing.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_concepts(tmp_path / "torn.safetensors")


# Keys.

CONFIG = FluxConfig(
    in_channels=4,
    num_layers=2,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    pooled_projection_dim=5,
    axes_dims_rope=(2, 2, 4),
)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def test_text_keys_are_those_of_the_attention():
    def value(path, leaf):
        """As in a new model: the gates, shifts and scales are zero, so that all blocks see the same text."""
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        random = re.search(r"(_in|qkv|linear1)/kernel$", name)
        return np.asarray(leaf) if random else np.full_like(leaf, "scale" in name)

    params = jax.tree_util.tree_map_with_path(value, random_params(param_shapes(CONFIG), seed=0))
    rng = np.random.default_rng(1)
    inputs = {"img": (2, 6, 4), "txt": (2, 3, 6), "timesteps": (2,), "vec": (2, 5), "guidance": (2,)}
    inputs = {name: rng.uniform(size=shape).astype(np.float32) for name, shape in inputs.items()}
    inputs |= {"img_ids": np.ones((6, 3), np.float32), "txt_ids": np.zeros((3, 3), np.float32)}
    keys = jax.jit(lambda params, inputs: text_keys(Flux(CONFIG), params, inputs))(params, inputs)
    assert keys.shape == (3, 2, 3, 2, 8)

    txt = layer_norm(inputs["txt"] @ params["txt_in"]["kernel"] + params["txt_in"]["bias"])
    kernels = [*params["double_blocks"]["txt_attn"]["qkv"]["kernel"], params["single_blocks"]["linear1"]["kernel"][0]]
    for got, kernel in zip(keys, kernels, strict=True):
        key = (txt @ kernel[:, 16:32]).reshape(2, 3, 2, 8)
        key = key / np.sqrt(np.square(key).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(got, key, atol=1e-4)


def test_key_similarity():
    up, right = [0.0, 2.0], [3.0, 0.0]
    keys = np.zeros((2, 4, 1, 2), np.float32)
    keys[:, :, 0] = [up, up, right, [-0.5, 0.0]]
    turned = keys.copy()
    turned[1, 0, 0] = right  # in one of the two blocks
    keys, turned = jnp.asarray(keys), jnp.asarray(turned)
    assert key_similarity(keys, (0,), (1,)) == 1
    assert key_similarity(keys, (0, 1), (2,)) == 0
    assert key_similarity(keys, (2,), (3,)) == -1
    assert key_similarity(keys, (1, 2), (0, 3)) == 0.5  # of 1 for the tokens 0 and 1, 0 for 2 and 3
    assert key_similarity(keys, (0, 2), (0, 2)) == 1
    assert key_similarity(turned, (0,), (1,)) == 0.5
