"""The patch discriminator and adversarial losses: what test_parity.py does not compare."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from golden_mergevq import discriminator_table

from mergevq_jax.tokenizer.losses import adversarial
from mergevq_jax.tokenizer.losses.adversarial import LeCam, PatchDiscriminator
from runtime_jax.weights import import_weights, read_safetensors

MODEL = PatchDiscriminator(ndf=16, num_layers=2)


@pytest.fixture(scope="module")
def golden(goldens):
    tensors, _ = read_safetensors(goldens / "patchgan.safetensors")
    return tensors


@pytest.fixture(scope="module")
def images(golden):
    return jnp.asarray(rearrange(golden["in/x"], "b c h w -> b h w c"))


@pytest.fixture(scope="module")
def fresh(images):
    return jax.jit(lambda key: MODEL.init(key, images, train=True))(jax.random.key(0))


def logits(golden, name):
    return jnp.asarray(rearrange(golden[name], "b c h w -> b h w c"))


def test_running_statistics_are_updated_as_in_the_reference(golden, images, fresh):
    params = {name.removeprefix("param/"): array for name, array in golden.items() if name.startswith("param/")}
    expected = import_weights(discriminator_table(2), params, fresh, ignore=(r".*tracked",))
    updated = jax.jit(functools.partial(MODEL.apply, train=True, mutable=["batch_stats"]))(
        {"params": expected["params"], "batch_stats": fresh["batch_stats"]}, images
    )[1]
    # The golden's running statistics are those after this very pass, from mean 0 and variance 1.
    for n in (1, 2):
        for name in ("mean", "var"):
            right = expected["batch_stats"][f"norm_{n}"][name]
            np.testing.assert_allclose(
                updated["batch_stats"][f"norm_{n}"][name], right, rtol=0, atol=1e-5 * np.abs(right).max()
            )


def test_initialisation_leaves_the_running_statistics_alone(fresh):
    for norm in fresh["batch_stats"].values():
        assert not np.any(norm["mean"]) and np.all(norm["var"] == 1)
    assert np.std(fresh["params"]["conv_2"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(fresh["params"]["norm_2"]["scale"]) == pytest.approx(0.02, rel=0.4)
    assert np.mean(fresh["params"]["norm_2"]["scale"]) == pytest.approx(1, abs=0.01)


def test_released_size():
    shapes = jax.eval_shape(
        lambda key: PatchDiscriminator().init(key, jnp.zeros((1, 256, 256, 3)), train=False), jax.random.key(0)
    )
    count = 3 * 64 * 16 + 64 + (64 * 128 + 128 * 256 + 256 * 512) * 16 + 2 * (128 + 256 + 512) + 512 * 16 + 1
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
    output = jax.eval_shape(
        lambda v: PatchDiscriminator(dtype=jnp.bfloat16).apply(v, jnp.zeros((2, 256, 256, 3)), train=False), shapes
    )
    assert (output.shape, output.dtype) == ((2, 30, 30, 1), jnp.float32)


def test_too_small_images_are_refused(images):
    with pytest.raises(ValueError, match=r"at least 24x24 pixels, got 16x32"):
        PatchDiscriminator(ndf=4).init(jax.random.key(0), images[:, :16], train=True)


def test_lecam_before_its_update_is_another_number(golden):
    real, fake = logits(golden, "in/real"), logits(golden, "in/fake")
    early = adversarial.lecam_loss(real, fake, LeCam.zeros())
    assert float(early) != pytest.approx(float(golden["out/lecam"]), rel=1e-3)


def test_non_saturating_losses_are_of_image_means(golden):
    real, fake = logits(golden, "in/real"), logits(golden, "in/fake")
    means = [np.mean(np.asarray(x, np.float64), axis=(1, 2, 3)) for x in (real, fake)]
    expected = 0.5 * np.mean(np.log1p(np.exp(-means[0])) + np.log1p(np.exp(means[1])))
    assert float(adversarial.non_saturating_d_loss(real, fake)) == pytest.approx(expected, rel=1e-6)
    # The two sides pull apart: each gradient has one sign, and is the same for all patches of an image.
    for argument, sign in ((0, -1), (1, 1)):
        gradient = np.asarray(jax.grad(adversarial.non_saturating_d_loss, argnums=argument)(real, fake))
        assert np.all(sign * gradient > 0)
        assert np.ptp(gradient.reshape(4, -1), axis=1).max() < 1e-9


def test_no_gradient_through_the_moving_averages(golden):
    real, fake = logits(golden, "in/real"), logits(golden, "in/fake")
    gradient = jax.grad(lambda x: LeCam.zeros().update(x, fake).real)(real)
    assert not np.any(gradient)
