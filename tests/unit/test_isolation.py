"""The isolation loss: two images side by side, their caption, and the pool of the base model's own images."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import SIDE, tiny_pipeline

from tokenverse_jax.concepts.concept_data import encode_prompts
from tokenverse_jax.concepts.isolation import IsolationConfig, halves, isolation_loss, side_by_side
from tokenverse_jax.concepts.pool import make_pool
from tokenverse_jax.flux.autoencoder import image_ids
from tokenverse_jax.flux.pipeline import Pipeline
from tokenverse_jax.flux.sampling import SamplingConfig

GRID = (2, 3)
POOL = IsolationConfig(captions=("a dog", "a cat and a dog"))
SAMPLING = SamplingConfig(num_steps=2, cfg_scale=2.0)


def test_side_by_side_is_one_image_of_twice_the_width():
    left, right = (np.random.default_rng(seed).normal(size=(2, 6, 4)).astype(np.float32) for seed in range(2))
    pair = side_by_side(jnp.asarray(left), jnp.asarray(right), GRID)
    rows = [half.reshape(2, *GRID, 4) for half in (left, right)]
    np.testing.assert_array_equal(pair, np.concatenate(rows, axis=2).reshape(2, 12, 4))
    own, other = halves(pair, GRID, jnp.asarray([False, True]))
    np.testing.assert_array_equal(own, [left[0], right[1]])
    np.testing.assert_array_equal(other, [right[0], left[1]])
    columns = image_ids((2, 6))[None, :, 2:]
    left, right = halves(columns, GRID, jnp.asarray([False]))
    assert left.max() == 2 and right.min() == 3  # as the model is told


def test_only_the_other_half_counts():
    rng = np.random.default_rng(0)
    base = jnp.asarray(rng.normal(size=(2, 12, 4)), jnp.float32)
    left_only = side_by_side(jnp.ones((2, 6, 4)), jnp.zeros((2, 6, 4)), GRID)
    right_only = side_by_side(jnp.zeros((2, 6, 4)), jnp.full((2, 6, 4), 3.0), GRID)
    for own_on_right, own, other, square in ((False, left_only, right_only, 9), (True, right_only, left_only, 1)):
        on_right = jnp.full(2, own_on_right)
        assert isolation_loss(base + own, base, GRID, on_right) == 0
        assert isolation_loss(base + other, base, GRID, on_right) == pytest.approx(square, rel=1e-5)


def test_the_merged_caption():
    config = dataclasses.replace(POOL, template="left: {left} right: {right}")
    for side, expected in (
        ("left", "left: a {right} dog right: a cat {left}"),
        ("right", "left: a cat {left} right: a {right} dog"),
    ):
        merged, start = config.merge("a {right} dog", "a cat {left}", side)
        assert merged == expected
        assert merged[start:].startswith("a {right} dog")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": ()}, "at least one image is needed in the pool"),
        ({"template": "{right} and {left}"}, r"must contain \{left\} and then \{right\}"),
        ({"template": "{left}"}, r"must contain \{left\} and then \{right\}"),
        ({"template": "{left} {left} {right}"}, r"must contain \{left\} and then \{right\}, each once"),
        ({"probability": 0.0}, "isolation=None disables the loss"),
        ({"weight": -1.0}, "weight=-1.0 positive"),
        ({"own_weight": -1.0}, "own_weight=-1.0 not negative"),
        ({"sides": ()}, r"sides=\(\): one or both of left, right"),
        ({"sides": ("left", "left")}, "one or both of left, right"),
    ],
)
def test_configs_that_are_not_possible(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(POOL, **changes)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizers"))


def test_the_pool_is_made_once(pipeline, tmp_path, monkeypatch):
    def pool(pipeline, config=POOL, **changes):
        prompts = encode_prompts(pipeline, config.captions)
        arguments = {"size": 2 * SIDE, "sampling": SAMPLING, "negative": encode_prompts(pipeline, [""])}
        arguments["weights"] = {"transformer": pipeline.base_hash()}
        return make_pool(pipeline, prompts, config, cache=tmp_path, **arguments | changes)

    images = pool(pipeline)
    assert images.shape == (2, 2 * SIDE, 2 * SIDE, 3) and (images[0] != images[1]).any()
    size = {"height": 2 * SIDE, "width": 2 * SIDE}
    expected = pipeline.generate([POOL.captions[1]], **size, num_steps=2, cfg_scale=2.0, examples=np.array([1]))
    np.testing.assert_allclose(images[1].astype(int), expected[0].astype(int), atol=1)
    (folder,) = tmp_path.iterdir()
    (folder / "001.png").unlink()  # as if it had been stopped
    np.testing.assert_array_equal(pool(pipeline), images)

    made = []
    generate = Pipeline.generate
    monkeypatch.setattr(Pipeline, "generate", lambda *args, **kwargs: made.append(1) or generate(*args, **kwargs))
    np.testing.assert_array_equal(pool(pipeline), images)
    pool(pipeline, dataclasses.replace(POOL, weight=1.0, probability=0.1, template="{left} {right}"))
    assert not made
    pool(pipeline, sampling=dataclasses.replace(SAMPLING, cfg_scale=3.0))
    pool(pipeline, dataclasses.replace(POOL, captions=("a hat",)))
    bias = pipeline.transformer.params["img_in"]["bias"] + 1
    params = pipeline.transformer.params | {"img_in": pipeline.transformer.params["img_in"] | {"bias": bias}}
    part = dataclasses.replace(pipeline.transformer, params=params)
    pool(dataclasses.replace(pipeline, transformer=part))
    assert len(made) == 5 and len(list(tmp_path.iterdir())) == 4

    (folder / "000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000\.png: not a readable image .* delete it to have it drawn again"):
        pool(pipeline)
