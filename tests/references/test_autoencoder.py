"""FLUX's autoencoder beyond its golden: names, sizes, packing, meshes, what it refuses."""

import dataclasses

import golden_tools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden_tools import jit

from runtime_jax.config import ConfigError
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import param_shardings, shard_batch
from runtime_jax.weights import export_weights, import_weights
from tokenverse_jax.flux import autoencoder
from tokenverse_jax.flux.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from tokenverse_jax.flux.convert.autoencoder import FLUX, diffusers_table

TINY = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4)
# The file of FLUX.1-dev.
FLUX_JSON = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(config: AutoencoderConfig):
    shapes = traverse_util.flatten_dict(golden_tools.shapes(Autoencoder(config), (1, 32, 32, 3))["params"])
    return traverse_util.unflatten_dict(
        {path: 0.3 * numbers(*leaf.shape, seed=seed) for seed, (path, leaf) in enumerate(shapes.items())}
    )


def outputs(params, images, compute=Compute()):
    def both(params, images):
        posterior = Autoencoder(TINY, compute).apply({"params": params}, images, method="encode")
        return posterior.mean, posterior.logvar, Autoencoder(TINY, compute).apply({"params": params}, images)

    return jit(both)(params, images)


def relative_error(got, expected):
    return max(float(jnp.abs(g - e).max() / jnp.abs(e).max()) for g, e in zip(got, expected, strict=True))


def test_full_size():
    shapes = golden_tools.shapes(Autoencoder(AutoencoderConfig()), (1, 16, 16, 3))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_819_683


def test_configs_of_diffusers():
    assert autoencoder.parse_config(FLUX_JSON) == AutoencoderConfig()
    assert autoencoder.config_fields(AutoencoderConfig()).items() <= FLUX_JSON.items()
    assert autoencoder.parse_config(autoencoder.config_fields(TINY)) == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, r"_class_name: got 'AutoencoderTiny', only 'AutoencoderKL' is supported"),
        ({"use_quant_conv": True, "act_fn": "relu"}, r"act_fn: got 'relu'.*\n.*use_quant_conv: got True, only False"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, r"down_block_types: got \['DownEncoderBlock2D'\], only"),
        ({"latent_chanels": 4}, r"vae/config.json.latent_chanels: unknown key"),
        ({"block_out_channels": 64, "down_block_types": [], "up_block_types": []}, "block_out_channels: got 64"),
        ({"norm_num_groups": 48}, r"block_out_channels=\(128, 256, 512, 512\): multiples of norm_num_groups=48"),
        ({"layers_per_block": 0}, "sizes must be positive"),
    ],
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        autoencoder.parse_config(FLUX_JSON | changes)


def test_names_of_both_layouts():
    config = dataclasses.replace(TINY, block_out_channels=(4, 8, 16, 16), layers_per_block=2)
    params = random_params(config)
    diffusers, flux = export_weights(diffusers_table(config), params), export_weights(FLUX, params)
    assert len(diffusers) == len(flux) == 244  # tensors in the released files
    for ours, theirs in {
        "encoder.conv_in.bias": "encoder.conv_in.bias",
        "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down.2.downsample.conv.weight": "encoder.down_blocks.2.downsamplers.0.conv.weight",
        "decoder.mid.block_2.norm1.weight": "decoder.mid_block.resnets.1.norm1.weight",
        "decoder.mid.attn_1.norm.bias": "decoder.mid_block.attentions.0.group_norm.bias",
        "decoder.up.0.block.2.conv2.weight": "decoder.up_blocks.3.resnets.2.conv2.weight",
        "decoder.up.3.upsample.conv.bias": "decoder.up_blocks.0.upsamplers.0.conv.bias",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
    }.items():
        np.testing.assert_array_equal(flux[ours], diffusers[theirs])
    for ours, theirs in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
        kernel = flux[f"encoder.mid.attn_1.{ours}.weight"]
        assert kernel.shape == (16, 16, 1, 1)
        np.testing.assert_array_equal(kernel[:, :, 0, 0], diffusers[f"encoder.mid_block.attentions.0.{theirs}.weight"])
    jax.tree.map(np.testing.assert_array_equal, import_weights(FLUX, flux, params), params)


def test_remat_changes_no_gradient():
    config = dataclasses.replace(TINY, block_out_channels=(8,))
    params, images = random_params(config), jnp.asarray(numbers(1, 4, 6, 3))

    def program(remat):
        module = Autoencoder(config, Compute(remat=remat))
        return jit(jax.grad(lambda params: jnp.mean(module.apply({"params": params}, images) ** 2))).lower(params)

    programs = program(False), program(True)
    assert len(programs[1].as_text()) > 1.05 * len(programs[0].as_text())  # something is computed again
    plain, again = (traverse_util.flatten_dict(p.compile()(params), sep="/") for p in programs)
    scale = max(np.abs(leaf).max() for leaf in plain.values())
    for path, leaf in plain.items():
        np.testing.assert_allclose(leaf, again[path], rtol=1e-3, atol=1e-5 * scale, err_msg=path)


def test_bfloat16_is_near():
    params, images = random_params(TINY), numbers(2, 8, 12, 3)
    low = outputs(params, images, Compute(dtype="bfloat16"))
    assert {x.dtype for x in low} == {jnp.dtype("float32")}
    assert 1e-6 < relative_error(low, outputs(params, images)) < 0.1


def test_mesh_equals_one_device():
    params, images = random_params(TINY), numbers(8, 8, 12, 3)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, autoencoder.SHARDING_RULES, mesh))
        sharded = outputs(placed, shard_batch({"image": images}, mesh)["image"])
        assert len(sharded[0].sharding.device_set) == 8
        sharded = jax.device_get(sharded)
    assert relative_error(sharded, outputs(params, images)) < 1e-5


def test_posterior():
    mean, logvar, noise = (numbers(1, 2, 3, 4, seed=seed) for seed in range(3))
    drawn = Posterior(mean=jnp.asarray(mean), logvar=jnp.asarray(logvar)).sample(jnp.asarray(noise))
    np.testing.assert_allclose(drawn, mean + np.sqrt(np.exp(logvar)) * noise, rtol=1e-5)


def test_log_variances_are_bounded():
    params = random_params(TINY)
    params["encoder"]["conv_out"]["bias"][4:] = 100.0, -100.0, 0.0, 0.0
    logvar = outputs(params, numbers(1, 4, 4, 3))[1]
    assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all()


def test_scaling():
    sample = jnp.asarray(numbers(1, 2, 2, 4))
    latents = autoencoder.to_latents(sample, TINY)
    np.testing.assert_allclose(latents, (np.asarray(sample) - 0.1159) * 0.3611, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(autoencoder.from_latents(latents, TINY), sample, rtol=1e-5, atol=1e-6)


def test_packing():
    latents = numbers(2, 4, 6, 5)
    tokens = autoencoder.pack(jnp.asarray(latents))
    assert tokens.shape == (2, 6, 20)
    ids = np.asarray(autoencoder.image_ids((2, 3)))
    assert ids.shape == (6, 3) and ids.dtype == np.float32
    for token, (zero, row, column) in enumerate(ids.astype(int)):
        assert (zero, row, column) == (0, token // 3, token % 3)
        for channel, i, j in np.ndindex(5, 2, 2):
            expected = latents[:, 2 * row + i, 2 * column + j, channel]
            np.testing.assert_array_equal(tokens[:, token, 4 * channel + 2 * i + j], expected)
    np.testing.assert_array_equal(autoencoder.unpack(tokens, (2, 3)), latents)


def test_token_grid():
    assert AutoencoderConfig().token_grid(512, 768) == (32, 48)
    assert TINY.token_grid(4, 12) == (1, 3)


@pytest.mark.parametrize("size", [(520, 512), (512, 8), (0, 512), (-16, 512)])
def test_sizes_that_are_no_multiples(size):
    with pytest.raises(ValueError, match=rf"image size {size[0]}x{size[1]}: positive multiples of 16 are needed"):
        AutoencoderConfig().token_grid(*size)


def test_images_that_cannot_be_encoded():
    with pytest.raises(ValueError, match=r"image size 8x7: multiples of 2 are needed"):
        golden_tools.shapes(Autoencoder(TINY), (1, 8, 7, 3))
