"""CLIP's and T5's encoders beyond their goldens: pooling, buckets, meshes, precision, full size, conversion."""

import functools
import json

import golden_text
import golden_tools
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime_jax.config import ConfigError, build_known
from runtime_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from runtime_jax.networks import clip
from runtime_jax.networks.clip import CLIP_L, CLIPTextConfig, CLIPTextEncoder, pooled_position
from runtime_jax.networks.clip_files import convert_clip_text, export_clip_text, text_config_json
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import param_shardings
from runtime_jax.weights import WeightError, export_weights, read_safetensors
from tokenverse_jax.flux.convert.t5 import T5, config_json, convert_t5
from tokenverse_jax.flux.text_encoders import t5
from tokenverse_jax.flux.text_encoders.t5 import T5_XXL, T5Config, T5Encoder, relative_position_buckets

KINDS = {
    "clip_text": (CLIPTextConfig, CLIPTextEncoder, convert_clip_text, export_clip_text, clip.TEXT_SHARDING_RULES),
    "t5_encoder": (T5Config, T5Encoder, convert_t5, functools.partial(export_weights, T5), t5.SHARDING_RULES),
}


def load(goldens, name):
    """The golden's config fields, state dict, inputs and outputs."""
    tensors, metadata = read_safetensors(goldens / f"{name}.safetensors")
    return json.loads(metadata["config"]), *(golden_tools.parts(tensors, kind) for kind in ("param", "in", "out"))


def hidden(output):
    return output if isinstance(output, jax.Array) else output.hidden


def error(actual, expected):
    return float(np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected)))


@pytest.fixture(params=KINDS)
def encoder(request, goldens):
    """Kind, our config and parameters, and token ids of 4 prompts."""
    fields, params, inputs, _ = load(goldens, request.param)
    config = build_known(KINDS[request.param][0], fields, "config.json")
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (4, inputs["input_ids"].shape[1]))
    return request.param, config, KINDS[request.param][2](params, config), jnp.asarray(ids)


# What is computed.


def test_where_clip_pools():
    ids = jnp.array([[5, 9, 7, 9, 9], [8, 9, 3, 7, 7]])
    np.testing.assert_array_equal(pooled_position(ids, 2), [1, 1])  # the first largest id, whatever 2 stands for
    np.testing.assert_array_equal(pooled_position(ids, 7), [2, 3])  # the first 7, although 9 is larger
    np.testing.assert_array_equal(pooled_position(ids, 4), [0, 0])  # no end token


def test_clip_pools_at_another_end_token(goldens):
    fields, params, inputs, _ = load(goldens, "clip_text")
    ids = np.array(inputs["input_ids"])
    ids[:, 5] = 50
    out = golden_text.run_clip_text(fields | {"eos_token_id": 50}, params, {"input_ids": ids})
    np.testing.assert_allclose(out["pooled"], out["hidden"][:, 5], rtol=0, atol=1e-6)


def test_what_follows_the_end_token_does_not_change_the_pooled_output(goldens):
    fields, params, inputs, expected = load(goldens, "clip_text")
    ids = np.array(inputs["input_ids"][1:2])
    end = int(ids.argmax())
    ids[:, end + 1 :] = 3
    out = golden_text.run_clip_text(fields, params, {"input_ids": ids})
    assert error(out["pooled"], expected["pooled"][1:2]) < 5e-6
    assert error(out["hidden"], expected["hidden"][1:2]) > 1e-2


def test_buckets_of_t5():
    buckets = relative_position_buckets(513, T5_XXL)
    after = [0, 1, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 512]
    expected = [0, 17, 23, 24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31]
    np.testing.assert_array_equal(buckets[0, after], expected)
    np.testing.assert_array_equal(buckets[512, 512 - np.array(after[1:])], np.array(expected[1:]) - 16)
    np.testing.assert_array_equal(buckets[1:, 1:], buckets[:-1, :-1])
    # Borders at whole powers fall on the same side in float32, where the reference computes them.
    distance = np.arange(8, 513).astype(np.float32) / np.float32(8)
    single = 8 + (np.log(distance) / np.float32(np.log(16)) * np.float32(8)).astype(int)
    np.testing.assert_array_equal(buckets[8:, 0], np.minimum(single, 15))


@pytest.mark.parametrize(
    ("name", "field", "value", "limit"),
    [
        ("clip_text", "layer_norm_eps", 1e-4, 5e-6),
        ("clip_text", "hidden_act", "gelu", 1e-3),
        ("clip_text", "num_attention_heads", 8, 1e-3),
        ("t5_encoder", "layer_norm_epsilon", 1e-4, 5e-6),
        ("t5_encoder", "relative_attention_max_distance", 40, 1e-3),
    ],
)
def test_a_changed_config_fails(goldens, name, field, value, limit):
    fields, params, inputs, expected = load(goldens, name)
    out = golden_text.RUNNERS[name](fields | {field: value}, params, inputs)
    assert error(out["hidden"], expected["hidden"]) > limit


def test_the_token_embedding_of_t5_matters(goldens):
    fields, params, inputs, expected = load(goldens, "t5_encoder")
    changed = {name: array * 1.1 for name, array in params.items() if array.shape[0] == fields["vocab_size"]}
    assert len(changed) == 2
    out = golden_text.run_t5_encoder(fields, params | changed, inputs)
    assert error(out["hidden"], expected["hidden"]) > 1e-3


def test_clip_refuses_more_tokens_than_positions(goldens):
    fields, params, inputs, _ = load(goldens, "clip_text")
    with pytest.raises(ValueError, match="CLIP: 25 tokens, but there are 24 positions"):
        golden_text.run_clip_text(fields, params, {"input_ids": np.pad(inputs["input_ids"], ((0, 0), (0, 1)))})


# How it is computed.


def test_remat_gives_the_same_values_and_gradients(encoder):
    name, config, params, ids = encoder

    def run(compute):
        def loss(params):
            output = hidden(KINDS[name][1](config, compute).apply({"params": params}, ids))
            return jnp.sum(output**2), output

        gradient = jax.value_and_grad(loss, has_aux=True)
        assert ("remat" in str(jax.make_jaxpr(gradient)(params))) == compute.remat
        return golden_tools.jit(gradient)(params)

    (_, plain), gradient = run(Compute())
    (_, again), same = run(Compute(remat=True))
    np.testing.assert_allclose(again, plain, atol=1e-5)
    # Gradients that are zero but for rounding (of biases of keys) go by the largest one.
    rounding = 1e-6 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max() + rounding), same, gradient)


def test_bfloat16_computes_near_float32(encoder):
    name, config, params, ids = encoder
    exact = hidden(golden_tools.apply({"params": params}, ids, module=KINDS[name][1](config)))
    module = KINDS[name][1](config, Compute(dtype="bfloat16"))
    for variables in (params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)):
        output = hidden(golden_tools.apply({"params": variables}, ids, module=module))
        assert output.dtype == jnp.float32
        assert 1e-4 < error(output, np.asarray(exact)) < 0.1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_values_on_a_mesh_are_those_of_one_device(encoder, sizes):
    name, config, params, ids = encoder
    module = KINDS[name][1](config)
    ids = jnp.concatenate([ids, ids[::-1]])
    expected = golden_tools.apply({"params": params}, ids, module=module)
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))))
    sharded = jax.device_put(params, param_shardings(params, KINDS[name][4], mesh))
    with jax.set_mesh(mesh):
        # A function of its own: the other's program is that of no mesh.
        output = golden_tools.jit(lambda params, ids: module.apply({"params": params}, ids))(sharded, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), output, expected)


@pytest.mark.parametrize(
    ("module", "rules", "count", "replicated"),
    [
        (CLIPTextEncoder(CLIP_L), clip.TEXT_SHARDING_RULES, 123_060_480, 0.002),
        (T5Encoder(T5_XXL), t5.SHARDING_RULES, 4_762_310_656, 0.0001),
    ],
)
def test_full_size(module, rules, count, replicated):
    ids = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), ids)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == count
    shardings = jax.tree.leaves(
        param_shardings(variables["params"], rules, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    )
    own = sum(np.prod(s.shard_shape(leaf.shape)) for leaf, s in zip(leaves, shardings, strict=True))
    assert count / 8 <= own <= count * (1 / 8 + replicated)


# Weights and configs.


def test_clip_is_read_from_files_of_every_kind(goldens):
    fields, params, _, _ = load(goldens, "clip_text")
    config = build_known(CLIPTextConfig, fields, "config.json")
    expected = convert_clip_text(params, config)
    whole = {f"text_model.{name}": array for name, array in params.items()}
    whole |= {"text_model.embeddings.position_ids": np.arange(24)[None], "logit_scale": np.ones(())}
    whole |= {"text_projection.weight": np.ones((3, 32)), "vision_model.post_layernorm.bias": np.ones(4)}
    jax.tree.map(np.testing.assert_array_equal, convert_clip_text(whole, config), expected)


def test_t5_is_read_with_either_name_of_its_embedding(goldens):
    fields, params, _, _ = load(goldens, "t5_encoder")
    config = build_known(T5Config, fields, "config.json")
    expected = convert_t5(params, config)
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        other = {key: array for key, array in params.items() if key != name} | {"lm_head.weight": np.ones((2, 2))}
        jax.tree.map(np.testing.assert_array_equal, convert_t5(other, config), expected)
    with pytest.raises(WeightError, match=r"shared.weight and encoder.embed_tokens.weight differ"):
        convert_t5(params | {"shared.weight": params["shared.weight"] + 1}, config)


def test_weights_that_do_not_fit_are_all_listed(goldens):
    fields, params, _, _ = load(goldens, "t5_encoder")
    broken = dict(params)
    del broken["encoder.block.1.layer.0.SelfAttention.q.weight"]
    broken["encoder.block.1.layer.0.SelfAttention.query.weight"] = np.ones((32, 32))
    with pytest.raises(WeightError) as caught:
        convert_t5(broken, build_known(T5Config, fields, "config.json"))
    assert "SelfAttention.query.weight (32, 32): no rule" in str(caught.value)
    assert "blocks/q/kernel: positions [0, 2] are there, but 0 to 2 are needed" in str(caught.value)


def test_bfloat16_weights_stay_bfloat16(encoder):
    name, config, params, _ = encoder
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exported = KINDS[name][3](half)
    assert {array.dtype for array in exported.values()} == {np.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, KINDS[name][2](exported, config), half)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("clip_text", {"hidden_act": "relu"}, "text/config.json.hidden_act: got 'relu'"),
        ("clip_text", {"eos_token_id": None}, "text/config.json.eos_token_id: got None"),
        ("clip_text", {"num_attention_heads": 5}, "hidden_size=32 is no multiple of 5 heads"),
        ("t5_encoder", {"feed_forward_proj": "relu"}, "feed_forward_proj: got 'relu' .* expected one of 'gated-gelu'"),
        ("t5_encoder", {"relative_attention_num_buckets": 6}, "relative_attention_num_buckets=6"),
        ("t5_encoder", {"relative_attention_max_distance": 2}, "relative_attention_max_distance=2"),
    ],
)
def test_configs_of_other_models_are_refused(goldens, name, changes, message):
    fields = load(goldens, name)[0]
    with pytest.raises(ConfigError, match=message):
        build_known(KINDS[name][0], fields | changes, "text/config.json")
    fields.pop("vocab_size")
    with pytest.raises(ConfigError, match="vocab_size"):
        build_known(KINDS[name][0], fields, "config.json")


@pytest.mark.parametrize("config", [CLIP_L, T5_XXL])
def test_transformers_reads_our_config_json(config):
    import transformers

    cls = transformers.CLIPTextConfig if isinstance(config, CLIPTextConfig) else transformers.T5Config
    fields = text_config_json(config) if isinstance(config, CLIPTextConfig) else config_json(config)
    assert cls.model_type == fields["model_type"]
    assert build_known(type(config), cls.from_dict(fields).to_dict(), "config.json") == config
    assert build_known(type(config), json.loads(json.dumps(fields)), "config.json") == config
