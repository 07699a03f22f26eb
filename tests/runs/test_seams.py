"""What a user can replace without editing the packages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generator_run_tools import MODEL as TINY
from generator_run_tools import images_of, run_config, write_pictures
from generator_tools import CONFIG as GENERATOR
from generator_tools import random_params as random_generator
from test_train import MODEL as TOKENIZER
from tiny_pipeline import FLUX, random_params

from mergevq_jax import SamplingConfig, codes_to_images, load_generator, load_tokenizer
from mergevq_jax.generator.run import train as train_generator
from mergevq_jax.generator.sampling.position_cache import POLICIES
from mergevq_jax.generator.sampling.raster import sample
from mergevq_jax.tokenizer import train
from mergevq_jax.tokenizer.model import Tokenizer
from mergevq_jax.tokenizer.model import param_shapes as tokenizer_shapes
from mergevq_jax.tokenizer.quantizers.quantizer import QUANTIZERS, Quantizer
from mergevq_jax.tokenizer.tome import MERGE_RULES, Matching
from runtime_jax.config import to_dict
from runtime_jax.training.update import Optimizer
from tokenverse_jax import Offsets
from tokenverse_jax.concepts.learn import flow
from tokenverse_jax.flux.autoencoder import image_ids
from tokenverse_jax.flux.model import Flux, param_shapes

GRID, TEXT, BATCH = (4, 4), 5, 4


def test_offsets_on_image_tokens_learn():
    """One direction for every image token instead of the caption's words; the model is frozen."""
    rng, tokens = np.random.default_rng(0), GRID[0] * GRID[1]
    frozen, flux = random_params(param_shapes(FLUX), seed=0), Flux(FLUX)
    latents = jnp.asarray(rng.normal(size=(BATCH, tokens, FLUX.in_channels)), jnp.float32)
    noise, times = jnp.asarray(rng.normal(size=latents.shape), jnp.float32), jnp.linspace(0.2, 0.9, BATCH)
    x, target = flow(latents, noise, times)
    txt = jnp.asarray(rng.normal(size=(BATCH, TEXT, FLUX.joint_attention_dim)), jnp.float32)
    inputs = {
        "img": x,
        "img_ids": image_ids(GRID),
        "txt": txt,
        "txt_ids": jnp.zeros((TEXT, 3)),
        "timesteps": times,
        "vec": jnp.asarray(rng.normal(size=(BATCH, FLUX.pooled_projection_dim)), jnp.float32),
        "guidance": jnp.ones(BATCH),
    }
    optimizer = optax.adam(0.05)

    def loss(direction):
        offsets = Offsets(image=jnp.broadcast_to(direction, (BATCH, *direction.shape)))
        return jnp.square(flux.apply({"params": frozen}, **inputs, offsets=offsets) - target).mean()

    @jax.jit
    def step(direction, moments):
        value, gradient = jax.value_and_grad(loss)(direction)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(direction, updates), moments, value

    direction = jnp.zeros((tokens, FLUX.width))
    moments, losses = optimizer.init(direction), []
    for _ in range(20):
        direction, moments, value = step(direction, moments)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    assert np.abs(direction).max(axis=1).all()  # every token has learned a direction


# Finite scalar quantisation instead of LFQ: rounds every channel to one of three levels.


def _digits(z):
    return jnp.round(jnp.tanh(z)) + 1


FSQ = Quantizer(
    vocab_size=lambda channels: 3**channels,
    quantize=lambda z: jnp.tanh(z) + jax.lax.stop_gradient(_digits(z) - 1 - jnp.tanh(z)),
    to_indices=lambda z: _digits(z).astype(jnp.int32) @ 3 ** jnp.arange(z.shape[-1]),
    from_indices=lambda indices, channels: jnp.stack([indices // 3**c % 3 - 1.0 for c in range(channels)], axis=-1),
)
IMAGES = np.kron(np.random.default_rng(0).integers(0, 255, (4, 4, 4, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
# Only losses that every quantizer has.
LOSSES = train.LossConfig(perceptual_weight=0.0, entropy_weight=0.0, commitment_weight=0.0)


def train_tokenizer(steps, **changes):
    """Trains a tokenizer on four images of 16 pixels; returns it with its mean squared error at every step."""
    model = dataclasses.replace(TOKENIZER, **changes)
    discriminator = train.DiscriminatorConfig(ndf=8, num_layers=2)
    config = train.StepConfig(model=model, losses=LOSSES, discriminator=discriminator)
    sides = (Optimizer(optax.adam(rate), optax.constant_schedule(rate)) for rate in (3e-3, 1e-4))
    optimizers = train.Optimizers(*sides)
    state = jax.jit(functools.partial(train.init_state, config, optimizers))()
    step = jax.jit(functools.partial(train.train_step, config=config, optimizers=optimizers, keep=36))
    errors = []
    for _ in range(steps):
        state, metrics = step(state, train.Frozen(), {"image": IMAGES})
        errors.append(float(metrics["mse"][0] / metrics["mse"][1]))
    return Tokenizer(model, state.params), errors


def test_another_quantizer_from_training_to_generated_images(monkeypatch, tmp_path):
    monkeypatch.setitem(QUANTIZERS, "fsq", FSQ)
    tokenizer, errors = train_tokenizer(15, quantizer="fsq", z_channels=5)
    assert errors[-1] < 0.35 * errors[0]  # 0.28
    tokens = tokenizer.encode(IMAGES)
    assert 3**4 <= tokens.indices.max() < 3**5
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    np.testing.assert_array_equal(loaded.decode(loaded.encode(IMAGES)), tokenizer.decode(tokens))

    side = TOKENIZER.resolution
    data = images_of(write_pictures(tmp_path / "pictures", side), image_size=side)
    model = dataclasses.replace(TINY, vocab_sizes=(9, 27), grid=(8, 8), keeps=(36, 64))
    ratio = {"keeps": [36, 64], "weights": [0.5, 0.5]}
    config = run_config(tmp_path / "tokenizer", data, model=to_dict(model), merge_ratio=ratio)
    train_generator(config, tmp_path / "run")
    trained = load_generator(tmp_path / "run" / "generator")
    drawn = trained.sample([0, 1], 36, sampling=SamplingConfig(), seed=0)
    assert 3**4 <= drawn.indices.max() < 3**5
    assert codes_to_images(trained.load_tokenizer(), drawn.indices).shape == (2, side, side, 3)


def test_a_replaced_entry_is_used(monkeypatch):
    """As in a notebook whose cell is run again."""
    monkeypatch.setitem(QUANTIZERS, "fsq", FSQ)
    model = dataclasses.replace(TOKENIZER, quantizer="fsq")
    tokenizer = Tokenizer(model, random_params(tokenizer_shapes(model), seed=0))
    before = tokenizer.encode(IMAGES).indices
    reversed_order = dataclasses.replace(FSQ, to_indices=lambda z: FSQ.to_indices(z[..., ::-1]))
    monkeypatch.setitem(QUANTIZERS, "fsq", reversed_order)
    assert (tokenizer.encode(IMAGES).indices != before).any()


def test_a_quantizer_that_is_not_there(tmp_path, monkeypatch):
    with monkeypatch.context() as there:
        there.setitem(QUANTIZERS, "fsq", FSQ)
        config = dataclasses.replace(TOKENIZER, quantizer="fsq")
        Tokenizer(config, random_params(tokenizer_shapes(config), seed=0)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="but quantizer 'fsq' has no such loss"):
            train.StepConfig(model=config, losses=train.LossConfig(perceptual_weight=0.0))
    with pytest.raises(ValueError, match=r"config\.json: tokenizer config: quantizer='fsq' is unknown; known: lfq"):
        load_tokenizer(tmp_path)


def test_codes_of_another_quantizer_are_those_of_its_indices():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    np.testing.assert_allclose(FSQ.from_indices(FSQ.to_indices(z), 3), FSQ.quantize(z), atol=1e-6)


def with_the_next(metric, r, *, class_token):
    """Unlike in ToMe, a token can join only its successor in the raster; the r most similar pairs merge."""
    first, second = metric[:, ::2], metric[:, 1::2]
    scores = jnp.einsum("bnd,bnd->bn", first[:, : second.shape[1]], second)
    scores = jnp.pad(scores, ((0, 0), (0, first.shape[1] - second.shape[1])), constant_values=-jnp.inf)
    scores = scores.at[:, 0].set(-jnp.inf) if class_token else scores
    order = jnp.argsort(-scores, axis=-1)
    merged, staying = order[:, :r], jnp.sort(order[:, r:], axis=-1)
    followers = jnp.broadcast_to(jnp.arange(1, metric.shape[1], 2), second.shape[:2])
    return Matching(
        kept=jnp.concatenate([2 * staying, followers], axis=1), source=2 * merged, target=staying.shape[1] + merged
    )


def test_another_merge_rule_trains(monkeypatch):
    monkeypatch.setitem(MERGE_RULES, "next", with_the_next)
    tokenizer, errors = train_tokenizer(15, merge_rule="next")
    assert errors[-1] < 0.25 * errors[0]  # 0.17
    maps = np.asarray(tokenizer.encode(IMAGES).source_map)
    for source_map in maps:  # 28 of the 36 tokens merge two neighbours in the raster
        groups = [np.flatnonzero(source_map == group) for group in range(36)]
        assert sorted(map(len, groups)) == 8 * [1] + 28 * [2] and max(map(np.ptp, groups)) == 1


def test_another_cache_policy_samples(monkeypatch):
    """Keeps the first token and evicts the second oldest."""
    params, labels, most = random_generator(), np.asarray([0, 3, 4, 5], np.int32), np.iinfo(np.int32).max

    def keep_the_start(positions, kept):
        return jnp.sort(jnp.where(kept, positions, most), axis=1)[:, 1]

    monkeypatch.setitem(POLICIES, "keep-the-start", keep_the_start)
    drawn = {}
    for policy in ("keep-the-start", "evict-oldest"):
        settings = SamplingConfig(capacity=2, policy=policy)
        drawn[policy] = jax.device_get(sample(params, labels, 9, config=GENERATOR, sampling=settings, seed=0))
    assert drawn["keep-the-start"].kept[:, 0].all() and not drawn["evict-oldest"].kept[:, 0].any()
    assert (drawn["keep-the-start"].overflows > 0).all()
