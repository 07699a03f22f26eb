"""Requests for concepts, their positions in a prompt, and what several of them add up to."""

import dataclasses
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tokenverse_jax.concepts import concept_mod
from tokenverse_jax.concepts.bank import Concept, ConceptFile
from tokenverse_jax.concepts.compose import (
    ConceptRequest,
    PlacedConcept,
    compose,
    parse_request,
    place_recomputed,
    place_stored,
)
from tokenverse_jax.concepts.pretrained import SHIPPED

D, BLOCKS, LENGTH = 6, 3, 8


@pytest.fixture(scope="module")
def tokenizer():
    """As T5's: spaces belong to the word that follows."""
    pieces = ["▁a", "▁dog", "▁cat", "▁and", "▁", "s", "ball", "▁ball"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in pieces)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def make_concept(word="dog", tokens=1, seed=0, per_block=True, **fields):
    rng = np.random.default_rng(seed)
    offset = rng.normal(size=(tokens, D)).astype(np.float32)
    block_offset = rng.normal(size=(BLOCKS, tokens, D)).astype(np.float32) if per_block else None
    return Concept(word=word, token_ids=(7,) * tokens, offset=offset, block_offset=block_offset, **fields)


def make_file(*words):
    concepts = tuple(make_concept(word) for word in words)
    return ConceptFile(concepts=concepts, caption="a caption", base="some/FLUX", base_hash="abc")


# Requests.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("doll=bank/doll.safetensors", ("doll", "bank/doll.safetensors", None, 1.0)),
        ("dawn=street.safetensors:light", ("dawn", "street.safetensors", "light", 1.0)),
        ("dawn=street.safetensors:light@0.8", ("dawn", "street.safetensors", "light", 0.8)),
        ("doll#2=doll.safetensors:doll#3@-1", ("doll#2", "doll.safetensors", "doll#3", -1.0)),
        ("teddy bear=C:\\me@home\\a=b.safetensors@2", ("teddy bear", "C:\\me@home\\a=b.safetensors", None, 2.0)),
        ("a = b.safetensors : c @ 1e-1", None),  # no spaces around the path's end
        (" a = b.safetensors: c @ 1e-1", ("a", "b.safetensors", "c", 0.1)),
        ("a star=tiny-star", ("a star", str(SHIPPED["tiny-star"]), None, 1.0)),
        ("a ring=tiny-star:a drop@0.5", ("a ring", str(SHIPPED["tiny-star"]), "a drop", 0.5)),
    ],
)
def test_requests(text, expected):
    if expected is None:
        with pytest.raises(ValueError, match="not of the form"):
            parse_request(text)
    else:
        assert dataclasses.astuple(parse_request(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "doll", "doll=", "=a.safetensors", "doll=doll.pt", "doll=a.safetensors:", "a.safetensors", "doll=tiny-stars"],
)
def test_requests_of_another_form(text):
    with pytest.raises(ValueError, match=r"not of the form TARGET=FILE\.safetensors\[:WORD\]\[@STRENGTH\]"):
        parse_request(text)


@pytest.mark.parametrize("strength", ["strong", "nan", "inf", "1@2"])
def test_strengths_that_are_no_numbers(strength):
    with pytest.raises(ValueError, match=f"the strength {strength!r} is not a number"):
        parse_request(f"doll=a.safetensors@{strength}")


@pytest.mark.parametrize(
    ("words", "request_", "chosen"),
    [
        (["dog"], "dog=f.safetensors", "dog"),
        (["dog"], "wolf=f.safetensors", "dog"),  # there is no other
        (["dog", "cat"], "Cat=f.safetensors", "cat"),
        (["dog", "cat"], "cat#2=f.safetensors", "cat"),  # the second cat of the prompt
        (["dog", "dog#2"], "cat=f.safetensors:dog#2", "dog#2"),
        (["dog", "dog#2"], "Dog#2=f.safetensors", "dog#2"),  # the file has one of that name
        (["cafe\u0301", "dog's"], "caf\u00e9=f.safetensors", "cafe\u0301"),
        (["cafe\u0301", "dog's"], "Dog\u2019s#2=f.safetensors", "dog's"),
    ],
)
def test_the_word_that_a_request_means(words, request_, chosen):
    assert parse_request(request_).choose(make_file(*words)).word == chosen


def test_requests_that_a_file_cannot_meet():
    with pytest.raises(ValueError, match=r"f: no concept of 'wolf' .* dog, cat; name one of them: wolf=f:WORD$"):
        ConceptRequest(target="wolf", path="f").choose(make_file("dog", "cat"))
    with pytest.raises(ValueError, match=r"f: no concept of 'cat' .*; there are: dog$"):
        ConceptRequest(target="dog", path="f", word="cat").choose(make_file("dog"))


# Positions.


def test_a_stored_concept_lies_on_its_word(tokenizer):
    concept = make_concept("dogs", tokens=2)
    placed = place_stored(concept, tokenizer, "a cat and dogs", "dogs", 0.5)
    assert placed == (concept, (3, 4), 0.5)
    assert place_stored(make_concept(), tokenizer, "a dog and a dog", "dog#2").positions == (4,)


def test_a_stored_concept_needs_its_number_of_tokens(tokenizer):
    message = r"concept 'dog' \(1 tokens\): 'dogs' has 2 tokens \(▁dog s\) in the prompt 'a cat and dogs', but needs 1"
    with pytest.raises(ValueError, match=message):
        place_stored(make_concept(), tokenizer, "a cat and dogs", "dogs")
    with pytest.raises(ValueError, match=r"concept 'dog' .*'dog' is not in the prompt .*its words are a, cat$"):
        place_stored(make_concept(), tokenizer, "a cat", "dog")


def test_a_recomputed_concept_has_the_prompts_own_directions(tokenizer):
    config, sizes = concept_mod.ConceptModConfig(hidden=4, block_hidden=4), {"text_width": 5, "width": D}
    params = concept_mod.init_params(config, jax.random.key(0), **sizes, num_blocks=BLOCKS)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    txt = jax.random.normal(jax.random.key(1), (LENGTH, 5))
    concept = make_concept(strength=2.0, blocks="double")
    placed = place_recomputed(concept, params, txt, tokenizer, "a cat and dogs", "dogs", 0.5)
    own = concept_mod.directions(params, txt[None])
    assert placed.positions == (3, 4) and placed.strength == 0.5
    assert placed.concept.token_ids == tuple(tokenizer("dogs")["input_ids"][:2])
    assert (placed.concept.word, placed.concept.strength, placed.concept.blocks) == ("dog", 2.0, "double")
    np.testing.assert_allclose(placed.concept.offset, own.shared[0, 3:5], rtol=1e-5)
    np.testing.assert_allclose(placed.concept.block_offset, own.per_block[0, :, 3:5], rtol=1e-5)
    assert np.abs(placed.concept.offset).max() > 0.01


# Sums.


def test_concepts_lie_on_their_own_tokens():
    dogs, cat = make_concept("dogs", tokens=2), make_concept("cat", seed=1)
    composed = compose([PlacedConcept(dogs, (5, 1)), PlacedConcept(cat, (3,))], LENGTH)
    offsets, block_offsets = composed.shared, composed.per_block
    assert composed.blocks == "both"
    assert offsets.dtype == block_offsets.dtype == jnp.float32
    np.testing.assert_array_equal(offsets[np.asarray([5, 1])], dogs.offset)
    np.testing.assert_array_equal(offsets[3], cat.offset[0])
    np.testing.assert_array_equal(block_offsets[:, np.asarray([5, 1])], dogs.block_offset)
    np.testing.assert_array_equal(block_offsets[:, 3], cat.block_offset[:, 0])
    rest = np.asarray([0, 2, 4, 6, 7])
    assert not offsets[rest].any() and not block_offsets[:, rest].any()


def test_strengths_are_factors():
    concept = make_concept(strength=0.5)
    composed = compose([PlacedConcept(concept, (2,), -3.0)], LENGTH)
    np.testing.assert_array_equal(composed.shared[2], concept.offset[0] * np.float32(-1.5))
    np.testing.assert_array_equal(composed.per_block[:, 2], concept.block_offset[:, 0] * np.float32(-1.5))
    assert not any(part.any() for part in jax.tree.leaves(compose([PlacedConcept(concept, (2,), 0.0)], LENGTH)))


@pytest.mark.parametrize(
    ("own", "asked", "shown"),
    [(1.0, 1e9, "1e+09"), (4.0, -3.0, "-12"), (4.0, 2.5, None), (1.0, -10.0, None), (20.0, 0.1, None)],
)
def test_a_strength_beyond_reason_is_warned_of_once(caplog, own, asked, shown):
    word = f"dog {own} {asked}"
    placed = PlacedConcept(make_concept(word, strength=own), (2,), asked)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            compose([placed], LENGTH)
    line = f"concept {word!r}: strength {shown}; usual is about 1, and beyond 10 in absolute value images tend to"
    assert caplog.messages == ([f"{line} fall apart"] if shown else [])


def test_concepts_on_one_token_add_up_in_any_order():
    one = make_concept("one", tokens=2, seed=1, strength=0.3)
    two = make_concept("two", seed=2)
    three = make_concept("three", tokens=3, seed=3, strength=1e3)
    four = make_concept("four", seed=4, per_block=False, strength=-1e3)
    placed = [PlacedConcept(one, (1, 2)), PlacedConcept(two, (2,)), PlacedConcept(three, (3, 2, 4))]
    placed.append(PlacedConcept(four, (2,), 1 / 3))
    first = compose(placed, LENGTH)
    total = 0.3 * one.offset[1] + two.offset[0] + 1e3 * three.offset[1] - 1e3 / 3 * four.offset[0]
    np.testing.assert_allclose(first.shared[2], total, rtol=1e-4, atol=1e-3)
    total = 0.3 * one.block_offset[:, 1] + two.block_offset[:, 0] + 1e3 * three.block_offset[:, 1]
    np.testing.assert_allclose(first.per_block[:, 2], total, rtol=1e-4, atol=1e-3)
    for order in itertools.permutations(placed):
        other = compose(order, LENGTH)
        assert np.asarray(other.shared).tobytes() == np.asarray(first.shared).tobytes()
        assert np.asarray(other.per_block).tobytes() == np.asarray(first.per_block).tobytes()


def test_block_offsets_only_where_a_concept_has_them():
    plain, full = make_concept("plain", per_block=False), make_concept("full", seed=1)
    assert compose([PlacedConcept(plain, (0,))], LENGTH).per_block is None
    both = compose([PlacedConcept(plain, (0,)), PlacedConcept(full, (1,))], LENGTH)
    assert not both.per_block[:, 0].any() and both.per_block[:, 1].any()


def test_nine_concepts():
    placed = [PlacedConcept(make_concept(f"word{i}", seed=i), (i,)) for i in range(9)]
    offsets = compose(placed, 9).shared
    np.testing.assert_array_equal(offsets, np.concatenate([item.concept.offset for item in placed]))


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ([], "no concepts to compose"),
        ([PlacedConcept(make_concept(), (1, 2))], r"concept 'dog': 1 different positions are needed, got \(1, 2\)"),
        ([PlacedConcept(make_concept(tokens=2), (1, 1))], r"2 different positions are needed, got \(1, 1\)"),
        ([PlacedConcept(make_concept(), (LENGTH,))], r"positions \(8,\): different tokens of a text of 8"),
        (
            [PlacedConcept(make_concept(), (1,)), PlacedConcept(make_concept("hat", blocks="double"), (2,))],
            r"concepts 'dog', 'hat' do not go together: their blocks are \['both', 'double'\]",
        ),
        (
            [
                PlacedConcept(make_concept(), (1,)),
                PlacedConcept(Concept(word="hat", token_ids=(1,), offset=np.ones((1, 5), np.float32)), (2,)),
            ],
            r"their widths are \[5, 6\]",
        ),
    ],
)
def test_concepts_that_cannot_be_composed(placed, message):
    with pytest.raises(ValueError, match=message):
        compose(placed, LENGTH)
