"""Concept-Mod and its head for blocks: what they start at, what they compute, where they lie on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.sharding import param_shardings
from tokenverse_jax.concepts.concept_mod import (
    SHARDING_RULES,
    ConceptModConfig,
    directions,
    init_params,
    word_directions,
)

J, D, BLOCKS, TEXT = 6, 8, 3, 5
CONFIG = ConceptModConfig(hidden=7, block_hidden=4)
SIZES = {"text_width": J, "width": D}
init = jax.jit(functools.partial(init_params, CONFIG, **SIZES), static_argnames="num_blocks")


@pytest.fixture(scope="module")
def txt():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, TEXT, J)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    """Every parameter random."""
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0), **SIZES, num_blocks=BLOCKS))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)), shapes)


def mlp(params, x):
    """Linear, GELU in its tanh form, linear, in float64."""
    first, last = (jax.tree.map(np.float64, params[name]) for name in ("in_layer", "out_layer"))
    hidden = np.float64(x) @ first["kernel"] + first["bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ last["kernel"] + last["bias"]


def test_training_starts_at_the_base_model(txt):
    new = directions(init(jax.random.key(0), num_blocks=BLOCKS), txt)
    assert new.shared.shape == (2, TEXT, D) and new.per_block.shape == (2, BLOCKS, TEXT, D)
    assert not new.shared.any() and not new.per_block.any()


def test_concept_mod_can_learn_from_its_start(txt):
    params = init(jax.random.key(0), num_blocks=BLOCKS)

    def loss(params):
        return sum(jnp.square(part - 1).sum() for part in jax.tree.leaves(directions(params, txt)))

    grads = jax.jit(jax.grad(loss))(params)
    assert grads["concept_mod"]["out_layer"]["kernel"].any()
    assert grads["block_head"]["mlp"]["out_layer"]["kernel"].any()


def test_the_second_stage_only_adds_its_head():
    first = init(jax.random.key(3))
    second = init(jax.random.key(3), num_blocks=BLOCKS)
    assert first.keys() == {"concept_mod"} and second.keys() == {"concept_mod", "block_head"}
    jax.tree.map(np.testing.assert_array_equal, first["concept_mod"], second["concept_mod"])


def test_values_are_those_of_the_definition(params, txt):
    own = directions(params, txt)
    np.testing.assert_allclose(own.shared, mlp(params["concept_mod"], txt), rtol=1e-4, atol=1e-5)
    flat = mlp(params["block_head"]["mlp"], txt)  # the blocks of a token lie side by side
    for block in range(BLOCKS):
        np.testing.assert_allclose(
            own.per_block[:, block], flat[..., block * D : (block + 1) * D], rtol=1e-4, atol=1e-5
        )
    assert directions({"concept_mod": params["concept_mod"]}, txt).per_block is None


def test_output_is_float32_for_bfloat16_text(params, txt):
    for part in jax.tree.leaves(directions(params, txt.astype(jnp.bfloat16))):
        assert part.dtype == jnp.float32


def test_a_mask_leaves_its_tokens_bit_equal_and_clears_all_others(params, txt):
    mask = jnp.arange(TEXT)[None] < jnp.asarray([[2], [4]])
    both = (jax.tree.leaves(directions(params, txt, *given)) for given in ((), (mask,)))
    for whole, masked, axes in zip(*both, (2, 3), strict=True):
        keep = np.broadcast_to(mask[:, :, None] if axes == 2 else mask[:, None, :, None], whole.shape)
        np.testing.assert_array_equal(masked, np.where(keep, whole, 0))


def test_a_words_directions_are_the_mean_over_captions(params, txt):
    word, own = word_directions(params, txt, [(1, 2), (4, 0)]), directions(params, txt)
    expected = (own.shared[0, [1, 2]] + own.shared[1, [4, 0]]) / 2
    np.testing.assert_allclose(word.shared, expected, rtol=1e-5, atol=1e-6)
    expected = (own.per_block[0][:, [1, 2]] + own.per_block[1][:, [4, 0]]) / 2
    np.testing.assert_allclose(word.per_block, expected, rtol=1e-5, atol=1e-6)
    assert word_directions({"concept_mod": params["concept_mod"]}, txt, [(1,), (1,)]).per_block is None


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([(1,)], "1 lists of positions for 2 captions"),
        ([(1,), (1, 2)], r"the word has \[1, 2\] tokens in the captions"),
        ([(), ()], r"the word has \[0\] tokens"),
        ([(1,), (TEXT,)], r"positions \[\[1\], \[5\]\] are not all within a text of 5 tokens"),
    ],
)
def test_positions_that_fit_no_word(params, txt, positions, message):
    with pytest.raises(ValueError, match=message):
        word_directions(params, txt, positions)


def test_bad_widths():
    with pytest.raises(ValueError, match="hidden=3072, block_hidden=0: positive widths"):
        ConceptModConfig(block_hidden=0)


def test_sharding_rules_cover_the_full_size():
    width, num_blocks = 3072, 57  # FLUX.1-dev
    make = functools.partial(init_params, ConceptModConfig(), text_width=4096, width=width, num_blocks=num_blocks)
    shapes = jax.eval_shape(make, jax.random.key(0))
    assert shapes["block_head"]["mlp"]["out_layer"]["kernel"].shape == (512, num_blocks * width)
    shardings = param_shardings(shapes, SHARDING_RULES, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    kernel = shardings["block_head"]["mlp"]["out_layer"]["kernel"]
    assert kernel.shard_shape((512, num_blocks * width)) == (256, num_blocks * width // 2)
