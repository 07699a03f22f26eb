"""FLUX's transformer: sizes, names, offsets of the modulation, and what must not change its values."""

import dataclasses
import functools

import check_golden
import golden_flux
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import traverse_util
from golden_tools import jit

from runtime_jax.config import ConfigError, to_dict
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.nn.compute import Compute
from runtime_jax.nn.rotary import apply_rope
from runtime_jax.sharding import param_shardings, shard_batch
from runtime_jax.weights import WeightError, export_weights
from tokenverse_jax.flux import layers, model
from tokenverse_jax.flux.convert import transformer
from tokenverse_jax.flux.math import layer_norm, rope, timestep_embedding
from tokenverse_jax.flux.model import PRESETS, SHARDING_RULES, Flux, FluxConfig, param_shapes, parse_config
from tokenverse_jax.flux.offsets import Offsets

CONFIG = FluxConfig(
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(4, 6, 6),
)
MODEL = Flux(CONFIG)
BATCH, HEIGHT, WIDTH, TEXT = 2, 3, 5, 4


def random_params(config=CONFIG, seed=0):
    """Every parameter random, norms too, so that none of them can be forgotten."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(param_shapes(config), sep="/").items():
        spread = leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.2
        value = path.endswith("scale") + spread * rng.normal(size=leaf.shape)
        leaves[path] = value.astype(np.float32)
    return jax.device_put(traverse_util.unflatten_dict(leaves, sep="/"))


def random_inputs(config=CONFIG, batch=BATCH, seed=1):
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    shapes = {
        "img": (batch, HEIGHT * WIDTH, config.in_channels),
        "txt": (batch, TEXT, config.joint_attention_dim),
        "vec": (batch, config.pooled_projection_dim),
    }
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    ids = np.stack([np.zeros(rows.size), rows.ravel(), columns.ravel()], axis=-1).astype(np.float32)
    times = rng.uniform(size=batch).astype(np.float32)
    return inputs | {
        "img_ids": ids,
        "txt_ids": np.zeros((TEXT, 3), np.float32),
        "timesteps": times,
        "guidance": np.full(batch, 3.5, np.float32),
    }


def random_offsets(*shape, seed=2):
    return np.random.default_rng(seed).normal(size=(*shape, CONFIG.width)).astype(np.float32)


@functools.partial(jit, static_argnames=("module", "blocks"))
def run(params, inputs, offsets=None, block_offsets=None, everywhere=None, image=None, *, module=MODEL, blocks="both"):
    offsets = Offsets(offsets, block_offsets, image, everywhere, blocks)
    return module.apply({"params": params}, **inputs, offsets=offsets)


@functools.partial(jit, static_argnames="blocks")
def modulations(params, inputs, offsets=None, block_offsets=None, image=None, *, blocks="both"):
    """What every block is modulated by: name -> [blocks, B, 1 or tokens, vectors x D]."""
    _, state = MODEL.apply(
        {"params": params},
        **inputs,
        offsets=Offsets(offsets, block_offsets, image, None, blocks),
        capture_intermediates=lambda module, _: isinstance(module, layers.Modulation),
        mutable="intermediates",
    )
    captured = {
        "img": state["intermediates"]["double_blocks"]["img_mod"],
        "txt": state["intermediates"]["double_blocks"]["txt_mod"],
        "single": state["intermediates"]["single_blocks"]["modulation"],
    }
    return {name: jnp.concatenate(jax.tree.leaves(value), axis=-1) for name, value in captured.items()}


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def inputs():
    return random_inputs()


@pytest.fixture(scope="module")
def base(params, inputs):
    return np.asarray(run(params, inputs))


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


# Sizes, configs, names.


@pytest.mark.parametrize(("name", "count"), [("dev", 11_901_408_320), ("schnell", 11_891_178_560)])
def test_parameter_counts(name, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(PRESETS[name]))) == count


def test_config_json():
    dev = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0"} | {
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    }
    assert parse_config(dev) == PRESETS["dev"]
    assert parse_config(dev | {"guidance_embeds": False}) == PRESETS["schnell"]
    assert parse_config(to_dict(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layer": 3}, r"transformer/config\.json\.num_layer\b.*num_layers"),
        ({"patch_size": 2}, r"config\.json\.patch_size.*2"),
        ({"num_layers": 0}, "num_layers=0: positive numbers are needed"),
        ({"attention_head_dim": 64}, r"axes_dims_rope=\(16, 56, 56\).*attention_head_dim=64"),
        ({"axes_dims_rope": [15, 57, 56]}, "even numbers"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(fields)


def test_flux_file_names():
    """The number of tensors in the released flux1-dev file, and some of their names."""
    names = set()
    for path, leaf in traverse_util.flatten_dict(param_shapes(PRESETS["dev"]), sep="/").items():
        (rule,) = (rule for rule in transformer.FLUX if rule._target_pattern.fullmatch(path))
        names |= {rule.to_source(path, i) for i in (range(leaf.shape[0]) if rule.is_stacked(path) else [None])}
    assert len(names) == 780
    assert {
        "img_in.weight",
        "time_in.in_layer.weight",
        "guidance_in.out_layer.bias",
        "double_blocks.18.img_mod.lin.weight",
        "double_blocks.0.txt_attn.norm.key_norm.scale",
        "double_blocks.7.txt_mlp.2.bias",
        "single_blocks.37.linear1.weight",
        "single_blocks.0.norm.query_norm.scale",
        "single_blocks.0.modulation.lin.bias",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.linear.bias",
    } <= names


def test_layouts_give_the_same_parameters(params):
    for table in (transformer.DIFFUSERS, transformer.FLUX):
        again = transformer.convert_transformer(export_weights(table, params), CONFIG)
        jax.tree.map(np.testing.assert_array_equal, again, params)
    half = {name: array.astype(jnp.bfloat16) for name, array in export_weights(transformer.FLUX, params).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(transformer.convert_transformer(half, CONFIG))} == {
        jnp.dtype("bfloat16")
    }


def test_weights_that_do_not_fit(params):
    tensors = export_weights(transformer.DIFFUSERS, params)
    del tensors["transformer_blocks.1.attn.add_k_proj.weight"]
    with pytest.raises(WeightError) as error:
        transformer.convert_transformer(tensors, dataclasses.replace(CONFIG, guidance_embeds=False))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 5
    assert "guidance_embedder.linear_1.bias (32,): the model has no parameter guidance_in/in_layer/bias" in lines[0]
    assert lines[-1].endswith("its part transformer_blocks.1.attn.add_k_proj.weight is not among the weights")


# Parity: the golden files themselves are compared in test_parity.py.


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("math.ROPE_THETA", 9_900),
        ("math.TIME_FACTOR", 1000.1),
        ("math.TIME_PERIOD", 10_010),
        ("math.LAYER_NORM_EPSILON", 1e-2),
    ],
)
def test_a_changed_constant_fails_parity(constant, value, goldens, monkeypatch):
    monkeypatch.setattr(f"tokenverse_jax.flux.{constant}", value)
    golden_flux.apply.clear_cache()
    found = check_golden.check(goldens / "flux_transformer.safetensors")
    golden_flux.apply.clear_cache()
    assert found["img"][0] > 4e-5


def test_epsilons():
    """The goldens' activations are too large to tell an epsilon of 1e-6 from 1e-5; these are of its size."""
    x = 1e-3 * np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    scales = {"query_norm": {"scale": np.ones(8, np.float32)}, "key_norm": {"scale": np.full(8, 2, np.float32)}}
    expected = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)
    query, key = layers.QKNorm().apply({"params": scales}, jnp.asarray(x), jnp.asarray(x))
    np.testing.assert_allclose(query, expected, rtol=1e-5)
    np.testing.assert_allclose(key, 2 * expected, rtol=1e-5)
    centred = x[0] - x[0].mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x[0])), expected, rtol=1e-4, atol=1e-6)


# Offsets.


ZERO = np.zeros((BATCH, TEXT, CONFIG.width), np.float32)
ZEROS = np.zeros((BATCH, CONFIG.num_blocks, TEXT, CONFIG.width), np.float32)


@pytest.mark.parametrize(
    ("dtype", "zeros"),
    [("float32", [(ZERO, None), (None, ZEROS), (ZERO, ZEROS)]), ("bfloat16", [(ZERO, ZEROS)])],
    ids=["float32", "bfloat16"],
)
def test_zero_offsets_are_bit_equal_to_none(params, inputs, dtype, zeros):
    module = Flux(CONFIG, Compute(dtype=dtype))
    expected = np.asarray(run(params, inputs, module=module))
    for given in zeros:
        np.testing.assert_array_equal(run(params, inputs, *given, module=module), expected)


def test_an_offset_changes_its_own_tokens_modulation_and_no_other(params, inputs):
    before = modulations(params, inputs)
    offsets = np.zeros((BATCH, TEXT, CONFIG.width), np.float32)
    offsets[1, 2] = random_offsets()
    after = modulations(params, inputs, offsets)
    image, text, single = (np.array(after[name] - before[name]) for name in ("img", "txt", "single"))
    assert image.shape[2] == 1 and not image.any()
    assert text.shape[2] == TEXT and single.shape[2] == TEXT + HEIGHT * WIDTH
    for change in (text, single):
        assert change[:, 1, 2].all()
        change[:, 1, 2] = 0
        assert not change.any()


def test_offsets_of_the_first_tokens_only(params, inputs):
    """The same as zeros for the rest."""
    offsets, per_block = random_offsets(BATCH, 3), random_offsets(BATCH, CONFIG.num_blocks, 3, seed=3)
    padded = [np.pad(given, [(0, 0)] * (given.ndim - 2) + [(0, TEXT - 3), (0, 0)]) for given in (offsets, per_block)]
    np.testing.assert_array_equal(run(params, inputs, offsets, per_block), run(params, inputs, *padded))


def test_the_blocks_that_take_offsets(params, inputs):
    before, offsets = modulations(params, inputs), random_offsets(BATCH, TEXT)
    per_block = np.broadcast_to(offsets[:, None], (BATCH, CONFIG.num_blocks, *offsets.shape[1:]))
    for blocks, changed in (("double", {"txt"}), ("single", {"single"}), ("both", {"txt", "single"})):
        for given in ((offsets, None), (None, per_block)):
            after = modulations(params, inputs, *given, blocks=blocks)
            assert {name for name in before if (after[name] != before[name]).any()} == changed


def test_an_offset_of_an_image_token(params, inputs):
    """In the double blocks the image's own modulation, in the single blocks its row after those of all text tokens."""
    before, image = modulations(params, inputs), np.zeros((BATCH, HEIGHT * WIDTH, CONFIG.width), np.float32)
    image[1, 5] = random_offsets()
    for text in (None, np.zeros((BATCH, 3, CONFIG.width), np.float32)):
        after = modulations(params, inputs, text, image=image)
        assert not (after["txt"] - before["txt"]).any()
        for name, row in (("img", 5), ("single", TEXT + 5)):
            change = np.array(after[name] - before[name])
            assert change[:, 1, row].all()
            change[:, 1, row] = 0
            assert not change.any()
    only = modulations(params, inputs, image=image, blocks="double")
    assert not (only["single"] - before["single"]).any() and (only["img"] - before["img"]).any()


def test_one_offset_on_all_tokens_differs_from_everywhere_by_the_last_layer_alone(params, inputs):
    step = random_offsets(BATCH)
    text, image = (np.repeat(step[:, None], count, axis=1) for count in (TEXT, HEIGHT * WIDTH))
    y = jnp.asarray(step)
    tokens, everywhere = run(params, inputs, text, None, None, image), run(params, inputs, None, None, y)
    assert relative_error(tokens, everywhere) > 1e-3
    last = params["final_layer"]
    off = {"adaLN_modulation": jax.tree.map(np.zeros_like, last["adaLN_modulation"])}
    no_last = params | {"final_layer": last | off}
    tokens, everywhere = run(no_last, inputs, text, None, None, image), run(no_last, inputs, None, None, y)
    assert relative_error(tokens, everywhere) < 5e-6


def test_an_offset_of_one_block(params, inputs):
    before = modulations(params, inputs)
    for block in range(CONFIG.num_blocks):
        offsets = np.zeros((BATCH, CONFIG.num_blocks, TEXT, CONFIG.width), np.float32)
        offsets[:, block] = 1
        after = modulations(params, inputs, None, offsets)
        changed = [
            (name, index)
            for name in ("txt", "single")
            for index in range(len(before[name]))
            if (after[name][index] != before[name][index]).any()
        ]
        assert changed == [("txt", block) if block < CONFIG.num_layers else ("single", block - CONFIG.num_layers)]


def test_offsets_of_all_blocks_and_of_one_add_up(params, inputs):
    offsets, per_block = random_offsets(BATCH, TEXT), random_offsets(BATCH, CONFIG.num_blocks, TEXT, seed=3)
    together = run(params, inputs, offsets, per_block)
    assert relative_error(together, run(params, inputs, None, offsets[:, None] + per_block)) < 1e-6


class LiteralModulation(layers.Modulation):
    """The definition, row by row: the linear layer of SiLU(y + offset), where rows without an offset add zero."""

    def __call__(self, vec, num_tokens, offsets=None):
        if offsets is not None:
            rows = vec[:, None] + jnp.pad(offsets, ((0, 0), (0, num_tokens - offsets.shape[1]), (0, 0)))
            out = super().__call__(rows.reshape(-1, rows.shape[-1]), 1)
            return jax.tree.map(lambda vectors: vectors.reshape(rows.shape), out)
        return super().__call__(vec, num_tokens)


def test_offsets_and_their_gradient_are_those_of_the_definition(params, inputs, base, monkeypatch):
    offsets, per_block = random_offsets(BATCH, TEXT), random_offsets(BATCH, CONFIG.num_blocks, TEXT, seed=3)
    given = jax.tree.map(jnp.asarray, inputs)

    def value_and_gradient():
        def loss(offsets):
            out = MODEL.apply({"params": params}, **given, offsets=Offsets(*offsets))
            return jnp.square(out).mean(), out

        return jit(jax.grad(loss, has_aux=True))((offsets, per_block))

    (gradient, block_gradient), out = value_and_gradient()
    assert relative_error(out, base) > 0.1
    monkeypatch.setattr(layers, "Modulation", LiteralModulation)
    (expected, block_expected), expected_out = value_and_gradient()
    assert relative_error(out, expected_out) < 1e-5
    assert relative_error(gradient, expected) < 1e-5 and relative_error(block_gradient, block_expected) < 1e-5
    assert np.abs(block_gradient).max(axis=(0, 2, 3)).all()


def test_offsets_stay_with_their_tokens(params, inputs):
    """All text tokens are at position 0, so a new order of tokens and offsets together changes nothing."""
    offsets, order = random_offsets(BATCH, TEXT), np.array([2, 0, 3, 1])
    expected = run(params, inputs, offsets)
    turned = inputs | {"txt": inputs["txt"][:, order]}
    assert relative_error(run(params, turned, offsets[:, order]), expected) < 1e-5
    assert relative_error(run(params, turned, offsets), expected) > 1e-2


def test_small_offsets_survive_bfloat16(params, inputs):
    """A change below bfloat16's resolution of the vectors that it changes."""
    active = jnp.asarray(random_offsets(1, 1)[0])
    mod = layers.Modulation(1, Compute(dtype="bfloat16"))
    weights = {"lin": {"kernel": params["single_blocks"]["modulation"]["lin"]["kernel"][0]}, "bias": jnp.ones(96)}
    offsets = jnp.asarray(1e-4 * random_offsets(1, TEXT))
    (plain,), (got,) = (mod.apply({"params": weights}, active, TEXT, given) for given in (None, offsets))
    (exact,), (plain32,) = (
        layers.Modulation(1, Compute()).apply({"params": weights}, active, TEXT, given) for given in (offsets, None)
    )
    assert relative_error(got.shift - plain.shift, exact.shift - plain32.shift) < 2e-2


def test_the_space_m_is_the_pooled_vectors_embedding(params, inputs):
    """y is a sum, so the difference of two prompts' y, added to one, gives the other."""
    other = jnp.asarray(random_inputs(seed=5)["vec"])
    y = functools.partial(MODEL.apply, {"params": params}, method="modulation_vector")
    times, vec, guidance = (jnp.asarray(inputs[name]) for name in ("timesteps", "vec", "guidance"))
    change = y(times, other, guidance) - y(times, vec, guidance)
    expected = run(params, inputs | {"vec": other})
    assert relative_error(run(params, inputs, None, None, change), expected) < 1e-5


# What must not change the values.


def test_examples_of_a_batch_do_not_mix(params, inputs, base):
    offsets = random_offsets(BATCH, TEXT)
    expected = run(params, inputs, offsets)
    shared = ("img_ids", "txt_ids")
    for i in range(BATCH):
        alone = {name: array if name in shared else array[i : i + 1] for name, array in inputs.items()}
        assert relative_error(run(params, alone, offsets[i : i + 1]), expected[i : i + 1]) < 1e-5


def test_unrolled_and_recomputed_blocks_agree(inputs):
    config = dataclasses.replace(CONFIG, num_single_layers=2)
    params, per_block = random_params(config), random_offsets(BATCH, config.num_blocks, TEXT)
    given = jax.tree.map(jnp.asarray, inputs | {"offsets": Offsets(per_block=per_block)})

    def loss(params, module):
        return jnp.square(module.apply({"params": params}, **given)).mean()

    differentiate = jit(jax.value_and_grad(loss), static_argnums=1)
    expected, gradient = differentiate(params, Flux(config))
    value, other = differentiate(params, Flux(config, Compute(remat=True)))
    for got, wanted in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        assert relative_error(got, wanted) < 1e-4
    for got in (value, jit(loss, static_argnums=1)(params, Flux(config, unroll=True))):
        assert relative_error(got, expected) < 1e-6


def test_an_unrolled_program_has_no_loop(params, inputs):
    texts = [run.lower(params, inputs, module=Flux(CONFIG, unroll=unroll)).as_text() for unroll in (False, True)]
    assert ["stablehlo.while" in text for text in texts] == [True, False]


def test_bfloat16_is_close(params, inputs):
    half = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), params)
    offsets, module = random_offsets(BATCH, TEXT), Flux(CONFIG, Compute(dtype="bfloat16", remat=True))
    got = run(half, inputs, offsets, module=module)
    assert got.dtype == jnp.float32
    assert relative_error(got, run(params, inputs, offsets)) < 5e-2


def test_a_new_model_predicts_zero(inputs):
    params = jit(lambda: model.init_params(CONFIG, jax.random.key(0)))()
    assert not np.asarray(run(params, inputs)).any()


def test_a_model_without_guidance():
    config = dataclasses.replace(CONFIG, guidance_embeds=False)
    inputs, params = random_inputs(config) | {"guidance": None}, random_params(config)
    assert np.isfinite(run(params, inputs, module=Flux(config))).all()


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_values_equal_one_device(shape, params):
    inputs = random_inputs(batch=8)
    offsets, per_block = random_offsets(8, TEXT), random_offsets(8, CONFIG.num_blocks, TEXT, seed=3)
    expected = run(params, inputs, offsets, per_block)
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, SHARDING_RULES, mesh))
        ids = {name: inputs.pop(name) for name in ("img_ids", "txt_ids")}
        batch = shard_batch(inputs | {"offsets": offsets, "block_offsets": per_block}, mesh)
        given = batch.pop("offsets"), batch.pop("block_offsets")
        got = run(placed, batch | ids, *given)
    assert relative_error(got, expected) < 1e-5


def test_parameters_are_split():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shapes = param_shapes(PRESETS["dev"])
    shards = param_shardings(shapes, SHARDING_RULES, mesh)
    bytes_each = [
        np.prod(s.shard_shape(leaf.shape)) for leaf, s in zip(*map(jax.tree.leaves, (shapes, shards)), strict=True)
    ]
    assert sum(bytes_each) < 1.01 * 11_901_408_320 / 8


# Bad input.


@pytest.fixture
def no_type_hook():
    """What a user has: the types are not checked, so the model itself must."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": None}, "needs a guidance strength"),
        ({"txt": np.zeros((BATCH, TEXT, 13))}, r"txt has shape \(2, 4, 13\), not \(2, 4, 12\)"),
        ({"img": np.zeros((15, 8))}, r"img \(15, 8\) and txt \(2, 4, 12\) must be \[batch, tokens, channels\]"),
        ({"timesteps": np.zeros((BATCH, 1)), "vec": np.zeros((3, 10))}, r"timesteps has .*; vec has shape \(3, 10\)"),
        ({"offsets": Offsets(np.zeros((BATCH, 5, 32)))}, r"offsets.shared has shape \(2, 5, 32\), not \(2, 4, 32\)"),
        ({"offsets": Offsets(None, np.zeros((BATCH, 4, TEXT, 32)))}, r"offsets.per_block .* not \(2, 5, 4, 32\)"),
        (
            {"offsets": Offsets(np.zeros((BATCH, 3, 32)), np.zeros((BATCH, 5, TEXT, 32)))},
            r"offsets.per_block .* not \(2, 5, 3, 32\)",
        ),
        ({"offsets": Offsets(image=np.zeros((BATCH, 3, 32)))}, r"offsets.image has shape \(2, 3, 32\)"),
        ({"offsets": Offsets(np.zeros(32))}, r"offsets.shared has shape \(32,\), not \(2, 4, 32\)"),
        ({"offsets": Offsets(everywhere=np.zeros((BATCH, 4)))}, r"offsets.everywhere has shape \(2, 4\)"),
    ],
)
def test_bad_inputs(changes, message, inputs, no_type_hook):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), **inputs | changes))


def test_blocks_that_are_none(inputs, no_type_hook):
    with pytest.raises(ValueError, match=r"offsets.blocks='all': allowed are both, double, single"):
        jax.eval_shape(lambda: MODEL.init(jax.random.key(0), **inputs, offsets=Offsets(blocks="all")))


def test_guidance_for_a_model_that_takes_none(inputs, no_type_hook):
    with pytest.raises(ValueError, match="takes no guidance"):
        config = dataclasses.replace(CONFIG, guidance_embeds=False)
        jax.eval_shape(lambda: Flux(config).init(jax.random.key(0), **inputs))


# The functions of math.py.


def test_positions_turn_relative_to_each_other():
    """The product of a turned query and key depends on the difference of their positions only."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(position, other):
        pes = (rope(jnp.asarray([[0.0, *where]]), (4, 6, 6)) for where in (position, other))
        return float(jnp.sum(apply_rope(query, next(pes)) * apply_rope(key, next(pes))))

    assert abs(product((3, 60), (1, 5)) - product((2, 55), (0, 0))) < 1e-4
    assert abs(product((3, 60), (1, 5)) - product((60, 3), (5, 1))) > 1e-2


def test_timestep_embedding_starts_with_cosines():
    got = np.asarray(timestep_embedding(jnp.asarray([0.0, 0.001])))
    assert got.shape == (2, 256)
    np.testing.assert_allclose(got[0], [1.0] * 128 + [0.0] * 128)
    np.testing.assert_allclose(got[1, [0, 128]], [np.cos(1), np.sin(1)], rtol=1e-6)
