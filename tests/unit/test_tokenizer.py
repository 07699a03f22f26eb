"""The whole tokenizer: sizes, files, accepted and refused shapes, and what must not change its values."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import traverse_util
from golden_tools import jit

from mergevq_jax.tokenizer import convert, layers, model, recovery, tome
from mergevq_jax.tokenizer.config import PRESETS, RecoveryConfig, TokenizerConfig, preset, ratio_keep
from mergevq_jax.tokenizer.decoder import _PositionedBlocks
from mergevq_jax.tokenizer.encoder import _MergingBlocks
from mergevq_jax.tokenizer.model import Tokenizer, Tokens
from mergevq_jax.tokenizer.quantizers import lfq
from runtime_jax.cost import count_flops
from runtime_jax.nn.compute import Compute
from runtime_jax.weights import WeightError, export_weights, import_weights, read_safetensors, write_safetensors

# 8 x 8 raw tokens of 4 pixels, of which 36 are kept.
CONFIG = TokenizerConfig(
    resolution=32,
    ch=32,
    ch_mult=(1, 1, 1),
    num_res_blocks=(0, 1, 0),
    num_att_blocks=2,
    num_heads=2,
    z_channels=6,
    keep=36,
    num_classes=5,
    recovery=RecoveryConfig(rec_embed_dim=32, num_heads=2, num_layers=1, num_self_layers=1),
)


def random_params(config, seed=0):
    """All parameters random, even norms and LayerScale, so that none can be forgotten."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(model.param_shapes(config), sep="/").items():
        fan_in = np.prod(leaf.shape[:-1]) if path.endswith("kernel") else 1
        offset = 1.0 if path.endswith(("scale", "gamma")) else 0.0
        spread = fan_in**-0.5 if path.endswith("kernel") else 0.2
        leaves[path] = jnp.asarray(offset + spread * rng.normal(size=leaf.shape), jnp.float32)
    return traverse_util.unflatten_dict(leaves, sep="/")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(CONFIG, random_params(CONFIG))


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@functools.partial(jit, static_argnames=("keep", "compute", "with_head"))
def encode(params, images, keep=36, compute=Compute(), with_head=True):
    return model.encode(params, CONFIG, model.to_float(images), keep=keep, with_head=with_head, compute=compute)


@functools.partial(jit, static_argnames=("grid", "compute"))
def decode(params, codes, source_map, grid=(8, 8), compute=Compute()):
    return model.decode(params, CONFIG, codes, source_map, grid, compute=compute)


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


# Sizes.


def millions(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"), [("g-d64", 62.3, 82.9), ("gr-d64", 62.7, 83.4), ("r-d64", 85.7, 83.4)]
)
def test_parameter_counts_are_the_papers(name, encoder, decoder):
    shapes = model.param_shapes(PRESETS[name])
    without_head = {key: part for key, part in shapes["encoder"].items() if key != "head"}
    # The paper rounds up G's decoder of 82.847 million.
    assert round(millions(without_head), 1) == encoder
    assert abs(millions(shapes["decoder"]) - decoder) < 0.06
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("name", "downsampling", "raw", "keep", "widths", "heads"),
    [
        ("g-d64", 8, 1024, 256, (64, 128, 256, 512), 8),
        ("gr-d64", 16, 256, 144, (64, 64, 128, 256, 512), 8),
        ("r-d64", 16, 256, 36, (64, 64, 128, 256, 512), 12),
    ],
)
def test_presets_are_the_papers_table(name, downsampling, raw, keep, widths, heads):
    config = preset(name)
    assert (config.downsampling, config.raw_tokens, config.keep) == (downsampling, raw, keep)
    assert (config.widths, config.encoder_heads, config.decoder_heads) == (widths, heads, 8)
    assert (config.z_channels, config.num_att_blocks, config.layer_scale) == (18, 12, 1e-5)


def test_every_preset_stands():
    for name, config in PRESETS.items():
        assert len(config.merge_counts(config.raw_tokens, config.keep)) == config.num_att_blocks, name
    with pytest.raises(ValueError, match="no preset 'gr'; known: g-d32, g-d64, gr-d32"):
        preset("gr")


def test_initial_layer_scale_and_class_token_are_the_released_ones():
    x = jnp.zeros((1, 2, 3, 32))
    blocks = jit(_PositionedBlocks(CONFIG, Compute()).init)(jax.random.key(0), x)["params"]["blocks"]
    np.testing.assert_array_equal(blocks["ls1"]["gamma"], np.full((2, 32), 1e-5, np.float32))
    kernel = np.asarray(blocks["mlp"]["fc1"]["kernel"])
    assert kernel.shape == (2, 32, 128) and not np.array_equal(kernel[0], kernel[1])
    assert 0.017 < kernel.std() < 0.021
    merging = _MergingBlocks(CONFIG, Compute(), counts=()).init(jax.random.key(0), x[0])
    assert 0 < np.abs(merging["params"]["cls_token"]).max() < 1e-5


def test_modules_can_be_left_out():
    bare = model.param_shapes(dataclasses.replace(CONFIG, dist_head=None, recovery=None))
    whole = model.param_shapes(CONFIG)
    assert whole.keys() - bare.keys() == {"recovery"}
    assert whole["encoder"].keys() - bare["encoder"].keys() == {"head"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ch_mult": ()}, "ch_mult=() must be positive"),
        ({"num_heads": 0, "ch": -32}, "ch=-32, num_heads=0 must be positive"),
        ({"recovery": RecoveryConfig(num_heads=0)}, "recovery.num_heads=0 must be positive"),
        ({"ch": 48}, "widths (48, 48, 96, 192, 384) must be multiples of norm_num_groups=32"),
        ({"num_res_blocks": (1, 2)}, "num_res_blocks=(1, 2) must be one number or 5"),
        ({"num_res_blocks": (1, 1, 1, 1, 0)}, "to change the width, the last level needs blocks"),
        ({"norm_num_groups": 0}, "norm_num_groups=0 must be positive"),
        ({"isotropic": 0}, "isotropic=0 must be a positive multiple of norm_num_groups=32"),
        ({"z_channels": 31}, "z_channels=31 must be positive and give at most 2^30 codes"),
        ({"resolution": 100}, "resolution=100 must be a multiple of the downsampling 16"),
        ({"resolution": 16}, "resolution=16 must be a multiple of the downsampling 16, at least twice it"),
        ({"num_heads": 7}, "encoder: width 512 does not divide into 7 heads; decoder: width 512"),
        ({"recovery": RecoveryConfig(num_heads=7)}, "recovery: width 512 does not divide into 7 heads"),
        ({"keep": 257}, "cannot keep 257 of 256 tokens"),
        ({"keep": 1}, "cannot keep 1 of 256 tokens in 12 layers"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(ValueError) as error:
        TokenizerConfig(**fields)
    assert message in str(error.value)


# Files.


@pytest.mark.parametrize("positions", ["none", "starts"])
def test_round_trip_through_a_folder(positions, tmp_path):
    config = dataclasses.replace(CONFIG, recovery=dataclasses.replace(CONFIG.recovery, positions=positions))
    tokenizer = Tokenizer(config, random_params(config))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.config == tokenizer.config
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    assert jax.tree.structure(again.params) == jax.tree.structure(tokenizer.params)
    equal = functools.partial(np.testing.assert_array_equal, strict=True)
    jax.tree.map(equal, again.params, tokenizer.params)
    images = pictures(2, 32, 32)
    ours, theirs = tokenizer.encode(images), again.encode(images)
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(ours.source_map, theirs.source_map)
    again.save_pretrained(tmp_path / "again")
    (first, _), (second, _) = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("saved", "again"))
    assert first.keys() == second.keys()
    assert all(array.tobytes() == second[name].tobytes() for name, array in first.items())


def test_saved_names_are_the_released_ones(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"encoder", "decoder", "recovery"}
    assert {"encoder.down.1.block.0.conv1.weight", "decoder.attn.blocks.1.attn.qkv.weight"} <= tensors.keys()
    assert tensors["encoder.attn.blocks.1.mlp.fc1.weight"].shape == (128, 32)


def test_weights_of_half_precision_are_loaded_as_float32(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
    write_safetensors(
        tmp_path / "model.safetensors", {name: a.astype(jnp.bfloat16) for name, a in tensors.items()}, metadata
    )
    leaf = Tokenizer.from_pretrained(tmp_path).params["encoder"]["norm_out"]["scale"]
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, tensors["encoder.norm_out.weight"].astype(jnp.bfloat16).astype(np.float32))


def edited(config: dict, **fields) -> str:
    return json.dumps({key: value for key, value in (config | fields).items() if value != "absent"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "{", "not a readable JSON file"),
        (lambda text: "[1]", "model_type is None, but a tokenizer's is 'mergevq_tokenizer'"),
        (lambda text: edited(json.loads(text), model_type="dinov2"), "model_type is 'dinov2'"),
        (lambda text: edited(json.loads(text), model_type="absent"), "model_type is None"),
        (lambda text: edited(json.loads(text), num_head=2), "num_head: unknown key (value 2)"),
        (lambda text: edited(json.loads(text), ch="32"), "ch: got '32' (str), expected int"),
        (lambda text: edited(json.loads(text), keep=65), "cannot keep 65 of 64 tokens"),
        (lambda text: edited(json.loads(text), dist_head="layer4"), "dist_head: got 'layer4'"),
    ],
)
def test_errors_in_config_json(tokenizer, tmp_path, spoil, message):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_missing_and_corrupt_files(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"not a tokenizer's folder, config\.json and model\.safetensors missing"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        Tokenizer.from_pretrained(tmp_path / "nothing")
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for spoiled in (b"", whole[:100], whole[: len(whole) // 2]):
        weights.write_bytes(spoiled)
        with pytest.raises(WeightError, match=r"model\.safetensors: not a readable safetensors file"):
            Tokenizer.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"not a tokenizer's folder, model\.safetensors missing"):
        Tokenizer.from_pretrained(tmp_path)


def test_every_weight_that_does_not_fit_is_listed(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
    tensors["encoder.conv_out.weight"] = tensors["encoder.conv_out.weight"][:4]
    tensors["decoder.attn.blocks.1.norm1.bias"] = np.zeros(3, np.float32)
    del tensors["recovery.rec_head.bias"], tensors["decoder.attn.blocks.0.norm2.bias"]
    tensors["decoder.attn.blocks.2.norm2.bias"] = np.zeros(32, np.float32)
    tensors["encoder.head.weight"] = np.zeros(2, np.float32)
    tensors["encoder.norm_out.weight"] = np.zeros((1, 32), np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(WeightError) as error:
        Tokenizer.from_pretrained(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'model.safetensors'}: the weights do not fit the model:")
    for line in (
        "encoder.norm_out.weight: shape (1, 32) after conversion, but encoder/norm_out/scale has (32,)",
        "encoder.conv_out.weight: shape (32, 4) after conversion, but encoder/conv_out/kernel has (32, 6)",
        "decoder.attn.blocks.1.norm1.bias: shape (3,) after conversion, but decoder/attn/blocks/norm1/bias has (32,)",
        "recovery/rec_head/bias (32,): not among the weights",
        "decoder/attn/blocks/norm2/bias: positions [1, 2] are there, but 0 to 1 are needed",
        "encoder.head.weight (2,): no rule for this name",
    ):
        assert line in text


def test_a_convolution_is_not_taken_for_a_pointwise_one(tokenizer):
    tensors = export_weights(convert.tokenizer_table(CONFIG), tokenizer.params)
    tensors["encoder.conv_out.weight"] = np.zeros((6, 32, 3, 3), np.float32)
    with pytest.raises(WeightError, match=r"encoder\.conv_out\.weight \(6, 32, 3, 3\): cannot become"):
        import_weights(convert.tokenizer_table(CONFIG), tensors, model.param_shapes(CONFIG))


# The released checkpoints.


@pytest.fixture(scope="module")
def released(tokenizer):
    """A stage-1 checkpoint as the released code writes it, with averages that differ from the last weights."""
    last = export_weights(convert.tokenizer_table(CONFIG), tokenizer.params)
    averages = {"model_ema." + name.replace(".", ""): array + 1 for name, array in last.items()}
    others = {
        "loss.discriminator.main.0.weight": np.zeros((4, 3, 4, 4), np.float32),
        "loss.perceptual_loss.net.slice1.0.bias": np.zeros(4, np.float32),
        "model_ema.decay": np.float32(0.999),
        "model_ema.num_updates": np.int32(7),
    }
    return last | averages | others


@pytest.mark.parametrize("ema", [False, True])
def test_released_layout(released, tokenizer, ema):
    tensors = convert.from_released(released, ema=ema)
    params = import_weights(convert.tokenizer_table(CONFIG), tensors, model.param_shapes(CONFIG))
    jax.tree.map(lambda got, own: np.testing.assert_array_equal(got, own + int(ema)), params, tokenizer.params)


def test_a_checkpoint_without_averages(released):
    last = {name: array for name, array in released.items() if not name.startswith("model_ema.")}
    with pytest.raises(WeightError, match=r"no moving average of .* \(\d+ in all\); use ema=False"):
        convert.from_released(last)
    assert convert.from_released(last, ema=False).keys() == {n for n in last if not n.startswith("loss.")}


def test_another_programs_checkpoint():
    with pytest.raises(WeightError, match=r"no encoder\.\* or decoder\.\* among the 1 tensors: not a stage-1"):
        convert.from_released({"model.weight": np.zeros(3)})


# Accepted and refused shapes.


@pytest.mark.parametrize("height, width, keep, expected", [(32, 32, None, 36), (20, 44, None, 31)])
def test_sizes_other_than_the_training_size(tokenizer, height, width, keep, expected):
    images = pictures(2, height, width)
    tokens = tokenizer.encode(images, keep=keep)
    raw = height * width // 16
    assert tokens.grid == (height // 4, width // 4)
    assert tokens.indices.shape == (2, expected) and tokens.source_map.shape == (2, raw)
    assert tokens.indices.dtype == tokens.source_map.dtype == jnp.int32
    assert set(np.unique(tokens.source_map)) == set(range(expected))
    assert int(tokens.indices.min()) >= 0 and int(tokens.indices.max()) < 2**6
    drawn = tokenizer.decode(tokens)
    assert drawn.shape == images.shape and drawn.dtype == jnp.uint8
    if keep is None:
        np.testing.assert_array_equal(tokenizer.reconstruct(images), drawn)


@pytest.mark.parametrize("name", ["gr-d64", "tiny"])
def test_every_image_size_has_a_default_keep(name):
    config = PRESETS[name]
    for raw in range(2, 300):
        assert sum(config.merge_counts(raw, ratio_keep(config, raw))) == raw - ratio_keep(config, raw)
    assert ratio_keep(config, config.raw_tokens) == config.keep


@pytest.mark.parametrize(
    ("shape", "keep", "message"),
    [
        ((30, 32), None, "image of 30 x 32 pixels (height x width): both sides must be multiples of 4"),
        ((32, 33), None, "image of 32 x 33 pixels"),
        ((4, 4), None, "at least two tokens of 4 x 4"),
        ((32, 32), 65, "cannot keep 65 of 64 tokens: allowed are 1 to 64"),
        ((32, 32), 0, "cannot keep 0 of 64 tokens"),
        ((32, 32), 15, "cannot keep 15 of 64 tokens in 2 layers, each of which merges at most half of its tokens"),
    ],
)
def test_images_and_keeps_that_are_refused(tokenizer, shape, keep, message):
    for call in (
        lambda: tokenizer.encode(pictures(1, *shape), keep=keep),
        lambda: encode(tokenizer.params, pictures(1, *shape), keep=36 if keep is None else keep),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


def test_images_that_are_not_uint8_are_refused(tokenizer):
    unchecked = Tokenizer.encode.__wrapped__  # without the type check that only tests have
    for images in (np.zeros((1, 32, 32, 3), np.float32), pictures(32, 32), np.zeros((1, 32, 32, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"images must be uint8 \[B, H, W, 3\], got (float32|uint8) \("):
            unchecked(tokenizer, images)


def test_modules_that_a_config_leaves_out(tokenizer):
    bare = dataclasses.replace(CONFIG, dist_head=None, recovery=None)
    with pytest.raises(ValueError, match="no source recovery"):
        model.recover(tokenizer.params, bare, jnp.zeros((1, 36, 6)))
    with pytest.raises(ValueError, match="no alignment head"):
        model.encode(tokenizer.params, bare, jnp.zeros((1, 32, 32, 3)), keep=36, with_head=True)


def test_pixels_to_float_and_back():
    pixels = jnp.arange(256, dtype=jnp.uint8)
    floats = model.to_float(pixels)
    assert (float(floats[0]), float(floats[-1])) == (-1.0, 1.0)
    np.testing.assert_array_equal(model.to_uint8(floats), pixels)
    np.testing.assert_array_equal(model.to_uint8(jnp.asarray([-7.0, 7.0, 0.0])), [0, 255, 128])


# What must not change values.


def test_an_image_does_not_depend_on_its_batch_mates(tokenizer):
    images = pictures(2, 32, 32)
    others = np.stack([np.zeros_like(images[0]), images[0]])
    ours, theirs = encode(tokenizer.params, images), encode(tokenizer.params, others)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one[0], other[1])
    codes = lfq.quantize(ours.z)
    mates = codes.at[1].multiply(-1), ours.source_map.at[1].set(ours.source_map[0])
    drawn, again = decode(tokenizer.params, codes, ours.source_map), decode(tokenizer.params, *mates)
    np.testing.assert_array_equal(drawn[0], again[0])
    assert relative_error(drawn[1], again[1]) > 0.1


def test_keeping_everything_gives_the_identity_map(tokenizer):
    encoded = encode(tokenizer.params, pictures(2, 32, 32), keep=64)
    np.testing.assert_array_equal(encoded.source_map, np.broadcast_to(np.arange(64), (2, 64)))
    np.testing.assert_array_equal(encoded.size, np.ones((2, 64)))


def test_sizes_count_the_source_map(tokenizer):
    encoded = encode(tokenizer.params, pictures(2, 32, 32))
    assert encoded.z.shape == (2, 36, 6) and encoded.head.shape == (2, 5)
    for source_map, size in zip(encoded.source_map, encoded.size, strict=True):
        np.testing.assert_array_equal(np.bincount(source_map, minlength=36), size)


def test_decoding_is_unmerging_then_the_decoder(tokenizer):
    tokens = tokenizer.encode(pictures(2, 32, 32))
    codes = lfq.from_indices(tokens.indices, 6)
    full = tome.unmerge(codes, tokens.source_map)
    every = decode(tokenizer.params, full, jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (2, 64)))
    np.testing.assert_allclose(model.to_uint8(every).astype(int), tokenizer.decode(tokens).astype(int), atol=1)
    swapped = Tokens(indices=tokens.indices[::-1], source_map=tokens.source_map[::-1], grid=tokens.grid)
    np.testing.assert_array_equal(tokenizer.decode(swapped), tokenizer.decode(tokens)[::-1])


def test_bfloat16_is_finite_and_near_float32(tokenizer):
    images = pictures(2, 32, 32)
    half = Compute(dtype="bfloat16")
    full, rough = encode(tokenizer.params, images, keep=64), encode(tokenizer.params, images, keep=64, compute=half)
    assert rough.z.dtype == rough.head.dtype == jnp.float32  # outputs, whatever the compute dtype
    assert np.isfinite(rough.z).all() and relative_error(rough.z, full.z) < 0.1  # measured: 0.03
    codes = lfq.quantize(full.z)
    drawn = [decode(tokenizer.params, codes, full.source_map, compute=compute) for compute in (Compute(), half)]
    assert drawn[1].dtype == jnp.float32
    assert np.isfinite(drawn[1]).all() and relative_error(*drawn[::-1]) < 0.1


def test_remat_changes_neither_value_nor_gradient():
    config = dataclasses.replace(
        CONFIG, resolution=8, ch_mult=(1, 1), num_res_blocks=(1, 0), num_att_blocks=1, keep=9, recovery=None
    )
    params, images = random_params(config), model.to_float(pictures(2, 8, 8))

    @functools.partial(jit, static_argnames="compute")
    def loss_and_gradient(params, compute):
        def loss(params):
            encoded = model.encode(params, config, images, keep=9, with_head=True, compute=compute)
            codes = lfq.quantize(encoded.z)
            drawn = model.decode(params, config, codes, encoded.source_map, (4, 4), compute=compute)
            return jnp.mean((drawn - images) ** 2) + jnp.mean(encoded.head**2)

        return jax.value_and_grad(loss)(params)

    programs = [loss_and_gradient.trace(params, Compute(remat=remat)) for remat in (False, True)]
    plain, recomputing = (count_flops(program.jaxpr.jaxpr) for program in programs)
    assert 1.1 < recomputing / plain < 4 / 3  # the blocks a second time, besides a forward pass and its gradient
    (value, gradient), (again, other) = (program.lower().compile()(params) for program in programs)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    flat, flat_other = (traverse_util.flatten_dict(tree, sep="/") for tree in (gradient, other))
    scale = max(np.abs(leaf).max() for leaf in flat.values())
    for path, leaf in flat.items():
        np.testing.assert_allclose(leaf, flat_other[path], rtol=1e-3, atol=1e-5 * scale, err_msg=path)
        assert np.any(leaf), path


def test_scanned_blocks_equal_a_loop(tokenizer):
    """The decoder's scanned blocks against a loop of module calls."""
    params = tokenizer.params["decoder"]["attn"]
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 32)).astype(np.float32)
    scanned = jit(_PositionedBlocks(CONFIG, Compute()).apply)({"params": params}, x)

    @jit
    def loop(params, x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = params["pos_embed"]["kernel"]
        position = sum(padded[:, i : i + 3, j : j + 5] * kernel[i, j][None, None] for i in range(3) for j in range(3))
        x = rearrange(x + position + params["pos_embed"]["bias"][None, None, None], "b h w d -> b (h w) d")
        block = layers.Block(2, 1.0, Compute(), grid=(3, 5))
        for index in range(2):
            one = jax.tree.map(lambda leaf, index=index: leaf[index], params["blocks"])
            x, _, _ = block.apply({"params": one}, x)
        return rearrange(x, "b (h w) d -> b h w d", h=3)

    assert relative_error(scanned, loop(params, x)) < 1e-5
    swapped = params | {"blocks": jax.tree.map(lambda leaf: leaf[::-1], params["blocks"])}
    assert relative_error(scanned, loop(swapped, x)) > 1e-2


# Source recovery.


def test_recovered_maps_come_from_the_codes_alone(tokenizer):
    indices = jnp.asarray(np.random.default_rng(0).integers(64, size=(2, 36)), jnp.int32)
    source_map = tokenizer.recover(indices)
    logits = jit(lambda codes: model.recover(tokenizer.params, CONFIG, codes))(lfq.from_indices(indices, 6))
    chosen = np.take_along_axis(np.asarray(logits), np.asarray(source_map)[..., None], axis=-1)[..., 0]
    assert source_map.shape == (2, 64) and np.all(chosen >= np.asarray(logits).max(-1) - 1e-4)
    with pytest.raises(ValueError, match="no source recovery"):
        Tokenizer(dataclasses.replace(CONFIG, recovery=None), tokenizer.params).recover(indices)


def test_where_groups_start_says_which_are_possible(tokenizer):
    logits = jnp.asarray([[[3.0, 1.0, 2.0]] * 6])  # the first group is the likeliest everywhere
    starts = jnp.asarray([[4, 0, 2]])
    assert recovery.recovered_source_map(logits, starts).tolist() == [[1, 1, 2, 2, 0, 0]]
    late = jnp.asarray([[4, 1, 2]])  # before the first start any group is possible
    assert recovery.recovered_source_map(logits, late).tolist() == [[0, 1, 2, 2, 0, 0]]

    rng = np.random.default_rng(0)
    source_map = np.stack([rng.permutation(np.r_[:36, rng.integers(0, 36, 28)]) for _ in range(2)]).astype(np.int32)
    starts = np.asarray(tome.group_starts(jnp.asarray(source_map), 36))
    indices = jnp.asarray(rng.integers(64, size=(2, 36)), jnp.int32)
    found = np.asarray(tokenizer.recover(indices, jnp.asarray(starts)))
    np.testing.assert_array_equal(tome.group_starts(jnp.asarray(found), 36), starts)


def test_kept_tokens_with_positions(tokenizer):
    """Where its group starts tells a token from its equals; the order of the tokens means nothing."""
    config = dataclasses.replace(CONFIG, recovery=dataclasses.replace(CONFIG.recovery, positions="starts"))
    params = {**tokenizer.params, "recovery": random_params(config)["recovery"]}
    codes = jnp.ones((1, 5, 6))
    starts = jnp.asarray([[0, 7, 20, 33, 64]])  # the last group is empty
    recover = jit(lambda params, codes, starts: model.recover(params, config, codes, starts))
    logits = np.asarray(recover(params, codes, starts))
    assert len({tuple(token) for token in logits[0].T.round(4).tolist()}) == 5
    np.testing.assert_allclose(recover(params, codes, starts[:, ::-1])[..., ::-1], logits, rtol=1e-4, atol=1e-4)
    blind = np.asarray(jit(lambda codes: model.recover(tokenizer.params, CONFIG, codes))(codes))
    np.testing.assert_allclose(blind, blind[..., :1].repeat(5, axis=-1), rtol=1e-4, atol=1e-4)

    # A bias for one row down and two columns left: from 7 to 13 and from 20 to 26; from 0 and 33 it leaves the image.
    biases = params["recovery"]["offset_bias"]
    biased = {**params, "recovery": params["recovery"] | {"offset_bias": biases.at[7 + 1, 7 - 2].add(5.0)}}
    more = np.asarray(recover(biased, codes, starts)) - logits
    assert np.argwhere(more > 4.9).tolist() == [[0, 13, 1], [0, 26, 2]] and np.abs(more).sum() < 10.1

    placed = Tokenizer(config, params)
    tokens = placed.encode(pictures(1, 32, 32), keep=36)
    np.testing.assert_array_equal(placed.recovered(tokens).group_starts, tokens.group_starts)
    with pytest.raises(ValueError, match="give group_starts"):
        placed.recover(tokens.indices)


def test_a_code_is_spread_from_its_cell():
    """Without cross-attention, the code of an empty group changes only its own scores."""
    own = dataclasses.replace(CONFIG.recovery, positions="starts", num_layers=0, num_self_layers=0, num_res_blocks=1)
    config = dataclasses.replace(CONFIG, recovery=own)
    params = {"recovery": random_params(config)["recovery"]}
    recover = jit(lambda codes, starts: model.recover(params, config, codes, starts))
    codes = jnp.ones((1, 2, 6))
    for start, others_change in ((20, True), (64, False)):
        starts = jnp.asarray([[3, start]])
        change = np.abs(recover(codes.at[0, 1].multiply(-1.0), starts) - recover(codes, starts))
        assert change[..., 1].max() > 1e-3 and (change[..., 0].max() > 1e-3) == others_change


def test_what_makes_the_codes_has_a_fingerprint(tokenizer):
    """Decoder, source recovery and alignment head may change; everything on the way to the codes may not."""
    codes = tokenizer.code_fingerprint()

    def with_other(part, *path):
        params = jax.tree.map(lambda x: x, tokenizer.params)
        where = functools.reduce(lambda tree, key: tree[key], path[:-1], params[part])
        where[path[-1]] = jax.tree.map(lambda x: x + 1, where[path[-1]])
        return dataclasses.replace(tokenizer, params=params)

    bare = dataclasses.replace(CONFIG, recovery=None, dist_head=None)
    same = [with_other("decoder", "conv_out"), with_other("recovery", "rec_head"), with_other("encoder", "head")]
    encoder = {name: params for name, params in tokenizer.params["encoder"].items() if name != "head"}
    same.append(Tokenizer(bare, {"encoder": encoder, "decoder": tokenizer.params["decoder"]}))
    assert {one.code_fingerprint() for one in same} == {codes}
    other = [with_other("encoder", "conv_out"), with_other("encoder", "attn", "blocks_1")]
    other.append(dataclasses.replace(tokenizer, config=dataclasses.replace(CONFIG, num_heads=4)))
    assert codes not in {one.code_fingerprint() for one in other}
    assert all(one.made(codes) and not one.made("") for one in same) and same[0].made(same[0].fingerprint())
    assert not any(one.made(codes) for one in other)


def test_source_loss_is_the_cross_entropy():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(2, 7, 4)).astype(np.float32), rng.integers(0, 4, (2, 7)).astype(np.int32)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean(np.take_along_axis(log_probability, target[..., None], -1))
    assert float(recovery.source_loss(jnp.asarray(logits), jnp.asarray(target))) == pytest.approx(expected, rel=1e-6)
    found = recovery.recovered_source_map(jnp.asarray(logits))
    assert found.dtype == jnp.int32 and found.tolist() == logits.argmax(-1).tolist()


def test_recovery_takes_any_number_of_tokens(tokenizer):
    codes = lfq.quantize(jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32))
    recover = jit(lambda codes: model.recover(tokenizer.params, CONFIG, codes))
    logits = recover(codes)
    assert logits.shape == (2, 64, 5) and logits.dtype == jnp.float32
    # The kept tokens are a set: permuting them permutes the logits.
    np.testing.assert_allclose(recover(codes[:, ::-1])[..., ::-1], logits, rtol=1e-4, atol=1e-4)
