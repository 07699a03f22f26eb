"""Weight files as others publish them: wrappers' prefixes, other things than what is needed, other kinds of files."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_pipeline import write_tiny_pipeline

from mergevq_jax.generator.convert import generator_from_released
from mergevq_jax.tokenizer.convert import from_released
from runtime_jax.messages import cut
from runtime_jax.weights import Rule, WeightError, import_weights, read_safetensors
from runtime_jax.weights.mapped import map_safetensors
from runtime_jax.weights.published import recognized, unwrapped
from tokenverse_jax.flux.pipeline import Pipeline
from tokenverse_jax.flux.text import load_tokenizer

TABLE = (Rule("blocks.{i}.weight", "blocks_{i}/kernel"), Rule("transformer_blocks.{i}.weight", "more_{i}/kernel"))
SHAPES = {name: {"kernel": jax.ShapeDtypeStruct((2,), np.float32)} for name in ("blocks_0", "more_0")}
PLAIN = {"blocks.0.weight": np.arange(2.0), "transformer_blocks.0.weight": np.ones(2)}


def imported(source):
    return jax.tree.map(np.ndarray.tolist, import_weights(TABLE, source, SHAPES))


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "transformer.", "module.", "_orig_mod.", "model.", "module.transformer.model."]
)
def test_what_wrappers_put_in_front_is_taken_off_and_said(caplog, prefix):
    assert imported({prefix + name: value for name, value in PLAIN.items()}) == imported(PLAIN)
    assert caplog.messages == [f"2 tensors are read without {prefix!r} in front of their names"]


def test_nothing_is_said_or_taken_off_where_names_fit(caplog):
    assert imported(PLAIN) == imported({name.replace("s.0", "s._orig_mod.0"): value for name, value in PLAIN.items()})
    assert not caplog.messages
    with pytest.raises(WeightError, match=r"module\.blocks\.0\.weight \(2,\): no rule"):
        imported({"module.blocks.0.weight": np.ones(2), "transformer_blocks.0.weight": np.ones(2)})


def test_of_several_networks_the_needed_one_is_read(caplog):
    source = {"model.diffusion_model." + name: value for name, value in PLAIN.items()}
    others = {"vae.decoder.weight": 1, "vae.encoder.weight": 2, "text_encoders.t5xxl.shared.weight": 3}
    got = unwrapped(source | others, lambda name: name in PLAIN)
    assert got == PLAIN
    assert caplog.messages[0].endswith("; left out: 2 of vae.*, 1 of text_encoders.*")


LORA = ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "lora_unet_double_blocks_0_img_attn_proj.alpha"]


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (LORA, "a LoRA"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
        (["lycoris_blocks_0.lokr_w1"], "a LoRA"),
        (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight.absmax"], "bitsandbytes"),
        (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.scale_weight"], "fp8 weights"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], "a ControlNet"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3's transformer"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion's UNet"),
        (["down_blocks.0.attentions.0.norm.weight", "conv_in.weight"], "Stable Diffusion's UNet"),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX's transformer, under its own names"),
        (["single_transformer_blocks.0.norm.linear.weight"], "FLUX's transformer, under diffusers' names"),
        (["decoder.adaptive.0.gamma.weight", "decoder.up.0.block.0.conv1.weight"], "a MergeVQ tokenizer"),
        (["spatial_blocks.0.attention.wo.weight"], "a MergeVQ generator"),
        (["decoder.up_blocks.0.resnets.0.conv1.weight"], "an autoencoder, under diffusers' names"),
        (["first_stage_model.decoder.up.0.block.0.conv1.weight"], "an autoencoder, under FLUX's names"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5"),
        (["text_model.embeddings.token_embedding.weight"], "a CLIP"),
        (["embeddings.patch_embeddings.projection.weight"], "a DINOv2"),
        (["Mixed_5b.branch1x1.conv.weight"], "an InceptionV3"),
        (["features.0.weight"], "a VGG"),
        (["lin0.model.1.weight"], "LPIPS"),
        (["something.else"], None),
    ],
)
def test_what_a_state_dict_is(names, what):
    found = recognized(names)
    assert found is None if what is None else what in found


def test_something_else_is_named_in_one_line():
    with pytest.raises(WeightError) as caught:
        import_weights(TABLE, dict.fromkeys(LORA, np.ones(2)), SHAPES)
    assert str(caught.value) == (
        "the weights do not fit the model: they are a LoRA, which modifies a network: merge it into its model first"
    )


def test_long_lists_are_cut():
    assert cut("abc") == "a, b, c" and cut(map(str, range(12))).endswith("8, 9, and 2 more")
    with pytest.raises(WeightError) as caught:
        import_weights(TABLE, PLAIN | {f"more.{i}": np.ones(2) for i in range(123)}, SHAPES)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-1].strip() == "and 113 more"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of git-lfs"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\n<html>", "a web page"),
        (b'{"error": "not found"}', "a JSON text"),
        (b"PK\x03\x04archive/data.pkl", "a pickled PyTorch file"),
        (b"\x80\x02}q\x00.", "a pickled PyTorch file"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"", "an empty file"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for read in (read_safetensors, map_safetensors):
        with pytest.raises(WeightError, match=f"model.safetensors: not a readable safetensors file, but {what}"):
            read(path)


def test_a_file_that_was_cut_short_is_none_of_these(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(100, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WeightError, match=r"not a readable safetensors file \("):
        read_safetensors(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_parts_of_a_pipeline_from_one_checkpoint(folder, tmp_path, caplog):
    """As ComfyUI keeps them: transformer and autoencoder in one file, each under its prefix."""
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae."}
    tensors = {}
    for part, prefix in prefixes.items():
        (path,) = (folder / part).glob("*.safetensors")
        tensors |= {prefix + name: value for name, value in load_file(path).items()}
    save_file(tensors, tmp_path / "all.safetensors")
    plain = Pipeline.from_pretrained(folder, parts=tuple(prefixes))
    single = dict.fromkeys(prefixes, tmp_path / "all.safetensors")
    loaded = Pipeline.from_pretrained(folder, parts=tuple(prefixes), **single)
    for part in prefixes:
        same(getattr(loaded, part).params, getattr(plain, part).params)
    assert [re.search(r"without '(.*?)' .* left out: \d+ of (\w+)", text).groups() for text in caplog.messages] == [
        ("model.diffusion_model.", "vae"),
        ("vae.", "model"),
    ]


def test_a_lora_is_no_transformer(folder, tmp_path):
    save_file(dict.fromkeys(LORA, np.ones(2, np.float32)), tmp_path / "style.safetensors")
    with pytest.raises(WeightError, match=r"style.safetensors, for the transformer: .* they are a LoRA, which"):
        Pipeline.from_pretrained(folder, parts=("transformer",), transformer=tmp_path / "style.safetensors")
    with pytest.raises(WeightError, match="not a stage-1 checkpoint, but a LoRA"):
        from_released(dict.fromkeys(LORA, np.ones(2)))
    with pytest.raises(WeightError, match="not a stage-2 checkpoint, but a LoRA"):
        generator_from_released(dict.fromkeys(LORA, np.ones(2)))


def test_one_part_in_place_of_another_is_named(folder, tmp_path):
    (vae,) = (folder / "vae").glob("*.safetensors")
    with pytest.raises(WeightError, match=r"for the transformer: .*: they are an autoencoder, under diffusers' names"):
        Pipeline.from_pretrained(folder, parts=("transformer",), transformer=vae)


def test_fp8_weights_are_read_as_what_they_stand_for(folder, tmp_path):
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    small = {name: value.astype(jax.numpy.float8_e4m3fn) for name, value in tensors.items()}
    start, entries, body = 0, {}, b""
    for name, value in small.items():
        entries[name] = {"dtype": "F8_E4M3", "shape": value.shape, "data_offsets": [start, start + value.nbytes]}
        start, body = start + value.nbytes, body + value.tobytes()
    header = json.dumps(entries).encode()
    (tmp_path / "fp8.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    loaded = Pipeline.from_pretrained(folder, parts=("transformer",), transformer=tmp_path / "fp8.safetensors")
    plain = Pipeline.from_pretrained(folder, parts=("transformer",))
    rounded = jax.tree.map(lambda x: x.astype(jax.numpy.float8_e4m3fn).astype(np.float32), plain.transformer.params)
    same(loaded.transformer.params, rounded)


def test_released_tokenizers_and_generators_with_a_prefix(caplog):
    inner = {"encoder.conv_out.weight": np.ones(2), "decoder.conv_out.weight": np.ones(2)}
    wrapped = {f"module.{name}": value for name, value in inner.items()}
    assert from_released(wrapped, ema=False).keys() == inner.keys()
    generator = {"transformer.norm.weight": np.ones(2), "first_stage_model.encoder.weight": np.ones(2)}
    wrapped = {f"_orig_mod.{name}": value for name, value in generator.items()}
    assert generator_from_released(wrapped).keys() == {"norm.weight"}
    assert all("tensors are read without" in text for text in caplog.messages) and len(caplog.messages) == 2


def test_a_tokenizer_of_sentencepiece_alone_says_what_is_missing(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    with pytest.raises(ValueError, match=rf"{tmp_path}: tokenizer.json is missing. FLUX.1's own tokenizer_2 has it"):
        load_tokenizer(tmp_path)
