"""The patch discriminator and adversarial losses against the released modules' outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from mergevq_jax.tokenizer.losses import adversarial
from mergevq_jax.tokenizer.losses.adversarial import LeCam, PatchDiscriminator
from runtime_jax.weights import export_weights, import_weights, read_safetensors

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


@pytest.fixture(scope="module")
def variables(golden, fresh):
    source = {name.removeprefix("param/"): array for name, array in golden.items() if name.startswith("param/")}
    table = adversarial.discriminator_table(2)
    return import_weights(table, source, fresh, ignore=adversarial.DISCRIMINATOR_IGNORED)


def logits(golden, name):
    return jnp.asarray(rearrange(golden[name], "b c h w -> b h w c"))


def error(actual, expected):
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


@jax.jit
def train_pass(variables, images):
    return MODEL.apply(variables, images, train=True, mutable=["batch_stats"])


@jax.jit
def eval_pass(variables, images):
    return MODEL.apply(variables, images, train=False)


def test_batch_statistics_and_running_statistics_equal_the_reference(golden, images, fresh, variables):
    output, updated = train_pass({"params": variables["params"], "batch_stats": fresh["batch_stats"]}, images)
    assert error(output, logits(golden, "out/logits_train")) < 1e-5
    # The golden's running statistics are those after this very pass, from mean 0 and variance 1.
    for n in (1, 2):
        for name in ("mean", "var"):
            expected = variables["batch_stats"][f"norm_{n}"][name]
            assert error(updated["batch_stats"][f"norm_{n}"][name], expected) < 1e-5


def test_running_statistics_equal_the_reference(golden, images, variables):
    assert error(eval_pass(variables, images), logits(golden, "out/logits_eval")) < 1e-5


def test_round_trip_is_bit_equal(golden, variables):
    exported = export_weights(adversarial.discriminator_table(2), variables)
    assert len(exported) == sum("param/" in name and "tracked" not in name for name in golden)
    for name, array in exported.items():
        np.testing.assert_array_equal(array, golden[f"param/{name}"], strict=True)


@pytest.mark.parametrize("path", ["conv_1/kernel", "norm_2/scale", "logits/bias"])
def test_a_mutated_weight_fails(golden, images, variables, path):
    module, leaf = path.split("/")
    params = dict(variables["params"])
    params[module] = params[module] | {leaf: params[module][leaf] * 1.1}
    output = eval_pass(variables | {"params": params}, images)
    assert error(output, logits(golden, "out/logits_eval")) > 1e-4


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


def test_losses_equal_the_reference(golden):
    real, fake = logits(golden, "in/real"), logits(golden, "in/fake")
    ema = LeCam.zeros().update(real, fake, decay=0.9)
    values = {
        "hinge_d": adversarial.hinge_d_loss(real, fake),
        "vanilla_d": adversarial.vanilla_d_loss(real, fake),
        "hinge_g": adversarial.hinge_g_loss(fake),
        "nonsat_g": adversarial.non_saturating_g_loss(fake),
        "ema_real": ema.real,
        "ema_fake": ema.fake,
        "lecam": adversarial.lecam_loss(real, fake, ema),
    }
    for name, value in values.items():
        assert float(value) == pytest.approx(float(golden[f"out/{name}"]), rel=1e-6), name


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
