"""What a user exchanges without an edit of the packages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generator_tools import CONFIG as GENERATOR
from generator_tools import random_params as random_generator
from test_train import MODEL as TOKENIZER
from tiny_pipeline import FLUX, random_params

from mergevq_jax import load_tokenizer
from mergevq_jax.generator.sampling.plan import SamplingConfig
from mergevq_jax.generator.sampling.position_cache import POLICIES
from mergevq_jax.generator.sampling.raster import sample
from mergevq_jax.tokenizer import train
from mergevq_jax.tokenizer.model import Tokenizer
from mergevq_jax.tokenizer.quantizers.quantizer import Quantizer
from tokenverse_jax import Offsets
from tokenverse_jax.concepts.learn import flow
from tokenverse_jax.flux.autoencoder import image_ids
from tokenverse_jax.flux.model import Flux, param_shapes

GRID, TEXT, BATCH = (4, 4), 5, 4


def test_offsets_on_image_tokens_learn():
    """A direction for every token of the image, in place of those of the caption's words; the model is frozen."""
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
    assert np.abs(direction).max(axis=1).all()  # every token has learned one of its own


# Finite scalar quantisation in place of LFQ: every channel is rounded to one of four levels, two bits.


def _digits(z):
    return jnp.round((jnp.tanh(z) + 1) * 1.5)


def _quantize(z):
    soft = jnp.tanh(z)
    return soft + jax.lax.stop_gradient(_digits(z) / 1.5 - 1 - soft)


def _to_indices(z):
    return _digits(z).astype(jnp.int32) @ 4 ** jnp.arange(z.shape[-1])


def _from_indices(indices, channels):
    return jnp.stack([(indices >> 2 * channel) & 3 for channel in range(channels)], axis=-1) / 1.5 - 1


FSQ = Quantizer(
    name="fsq",
    bits=lambda channels: 2 * channels,
    quantize=_quantize,
    to_indices=_to_indices,
    from_indices=_from_indices,
)


def test_another_quantizer_trains_and_is_kept(tmp_path):
    rng = np.random.default_rng(0)
    images = np.kron(rng.integers(0, 255, (4, 4, 4, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    batch = {"image": images, "label": np.zeros(4, np.int32), "index": np.arange(4)}
    losses = train.LossConfig(perceptual_weight=0.0, entropy_weight=0.0, commitment_weight=0.0)
    config = train.StepConfig(
        model=TOKENIZER,
        losses=losses,
        discriminator=train.DiscriminatorConfig(ndf=8, num_layers=2),
        quantizer=FSQ,
    )
    optimizers = train.Optimizers(optax.adam(3e-3), optax.adam(1e-4), lambda step: 3e-3)
    state = jax.jit(functools.partial(train.init_state, config, optimizers))()
    step = jax.jit(functools.partial(train.train_step, config=config, optimizers=optimizers, keep=36))
    pixel = []
    for _ in range(15):
        state, metrics = step(state, train.Frozen(), batch)
        pixel.append(float(metrics["mse"][0] / metrics["mse"][1]))
    assert pixel[-1] < 0.4 * pixel[0] and not metrics["nonfinite"][0]

    tokenizer = Tokenizer(TOKENIZER, state.params, quantizer=FSQ)
    tokens = tokenizer.encode(images)
    assert tokenizer.bits == 16 and 2**8 <= tokens.indices.max() < 2**16
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="model_type is 'mergevq_tokenizer_fsq', but a tokenizer's is 'mergevq_tokenizer'"
    ):
        load_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path, quantizer=FSQ)
    np.testing.assert_array_equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokens))


def test_codes_of_another_quantizer_are_those_of_its_indices():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    np.testing.assert_allclose(FSQ.from_indices(FSQ.to_indices(z), 3), FSQ.quantize(z), atol=1e-6)


def test_a_loss_that_a_quantizer_does_not_have():
    with pytest.raises(ValueError, match=r"losses.entropy_weight is not 0, but the quantizer 'fsq' has no such loss"):
        train.StepConfig(model=TOKENIZER, losses=train.LossConfig(perceptual_weight=0.0), quantizer=FSQ)


def test_another_cache_policy_samples(monkeypatch):
    """The very first token always stays, and the second oldest goes."""
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
