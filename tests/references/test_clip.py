"""CLIP and DINO beyond their goldens: changed configs, preprocessing, files, sizes of the published models."""

import json

import golden_mergevq
import golden_text
import golden_tools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from runtime_jax.config import ConfigError
from runtime_jax.data import resize_and_crop
from runtime_jax.networks import clip, clip_files, dino, dinov2
from runtime_jax.weights import WeightError, read_safetensors, write_safetensors

RUNNERS = {"clip": golden_text.run_clip, "dino": golden_mergevq.run_dino}


def load(goldens, name):
    """The golden's config fields, state dict, inputs and outputs."""
    tensors, metadata = read_safetensors(goldens / f"{name}.safetensors")
    return json.loads(metadata["config"]), *(golden_tools.parts(tensors, kind) for kind in ("param", "in", "out"))


def error(actual, expected):
    return max(
        float(np.max(np.abs(np.asarray(actual[name]) - values)) / np.max(np.abs(values)))
        for name, values in expected.items()
    )


@pytest.mark.parametrize(
    ("name", "part", "changes"),
    [
        ("clip", "vision_config", {"layer_norm_eps": 1e-3}),
        ("clip", "vision_config", {"hidden_act": "gelu"}),
        ("clip", "vision_config", {"num_attention_heads": 2}),
        ("clip", "text_config", {"eos_token_id": 3}),
        ("dino", None, {"layer_norm_eps": 1e-6}),
        ("dino", None, {"num_attention_heads": 2}),
    ],
)
def test_a_changed_config_fails(goldens, name, part, changes):
    fields, params, inputs, expected = load(goldens, name)
    changed = fields | ({part: fields[part] | changes} if part else changes)
    assert error(RUNNERS[name](changed, params, inputs), expected) > 1e-4


def test_every_parameter_of_clip_matters(goldens):
    fields, params, inputs, _ = load(goldens, "clip")
    config = clip_files.parse_config(fields)
    variables = clip_files.convert_clip(params, config)
    images, ids = jnp.asarray(golden_tools.to_nhwc(inputs["x"])), jnp.asarray(inputs["input_ids"])

    def total(params):
        return sum((part**2).sum() for part in clip.CLIP(config).apply({"params": params}, images, ids))

    gradient = golden_tools.jit(jax.grad(total))(variables)
    # A bias of keys moves all of a query's scores alike.
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if np.abs(leaf).max() < 1e-4 and "['k_proj']['bias']" not in jax.tree_util.keystr(path)
    ]
    assert dead == []


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (300, 225), (100, 347)])
def test_images_are_prepared_as_the_models_own_processors_do(size, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(*size)
    theirs = CLIPImageProcessorPil()(Image.fromarray(image), return_tensors="np")["pixel_values"]
    ours = clip.standardize(resize_and_crop(image, 224, 224)[None])
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 1), theirs, atol=2e-6)

    processor = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=dinov2.IMAGENET_MEAN,
        image_std=dinov2.IMAGENET_STD,
    )
    theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    ours = dinov2.standardize(jnp.asarray(resize_and_crop(image, 256, 224)[None]) / 127.5 - 1)
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 1), theirs, atol=2e-6)


def test_a_crop_is_not_larger_than_the_picture():
    with pytest.raises(ValueError, match="a square of 64 pixels does not fit into a picture of 32"):
        resize_and_crop(picture(48, 48), 32, 64)


def save(folder, fields, params):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    write_safetensors(folder / "model.safetensors", params, {})
    return folder


def test_clip_is_loaded_from_a_folder(goldens, tmp_path):
    fields, params, _, _ = load(goldens, "clip")
    older = {"vision_model.embeddings.position_ids": np.arange(17), "text_model.embeddings.position_ids": np.arange(16)}
    config, loaded = clip_files.load_clip(save(tmp_path / "clip", fields, params | older))
    assert config == clip_files.parse_config(fields)
    jax.tree.map(np.testing.assert_array_equal, loaded, clip_files.convert_clip(params, config))
    halves = fields | {"text_config_dict": fields["text_config"], "text_config": None}
    assert clip_files.parse_config(halves) == config
    with pytest.raises(WeightError, match="model_type = 'vit', but 'clip' is needed"):
        clip_files.load_clip(save(tmp_path / "vit", {"model_type": "vit"}, params))
    with pytest.raises(ConfigError, match=r"vision_config: image_size=28 is no multiple of patch_size=8"):
        clip_files.parse_config(fields | {"vision_config": fields["vision_config"] | {"patch_size": 8}})
    with pytest.raises(WeightError, match="visual_projection"):
        clip_files.load_clip(save(tmp_path / "part", fields, {k: v for k, v in params.items() if "visual" not in k}))


def test_dino_is_told_apart_from_dinov2(goldens, tmp_path):
    fields, params, _, _ = load(goldens, "dino")
    in_files = {
        f"vit.{name}".replace("vit.layers", "vit.encoder.layer")
        .replace("attention.q_proj", "attention.attention.query")
        .replace("attention.k_proj", "attention.attention.key")
        .replace("attention.v_proj", "attention.attention.value")
        .replace("attention.o_proj", "attention.output.dense")
        .replace("mlp.fc1", "intermediate.dense")
        .replace("mlp.fc2", "output.dense"): array
        for name, array in params.items()
    }
    config, loaded = dino.load_dino(save(tmp_path / "dino", fields, in_files))
    assert not config.layer_scale
    jax.tree.map(np.testing.assert_array_equal, loaded, dino.convert_dino(params, config))
    fields, params, _, _ = load(goldens, "dinov2")
    config, _ = dino.load_dino(save(tmp_path / "dinov2", fields | {"model_type": "dinov2"}, params))
    assert config.layer_scale
    with pytest.raises(WeightError, match="model_type = 'clip'; only 'vit' is supported"):
        dino.load_dino(save(tmp_path / "clip", {"model_type": "clip"}, {}))


@pytest.mark.parametrize(
    ("vision", "text", "projection", "count"),
    [
        ({}, {}, 512, 151_277_312),  # openai/clip-vit-base-patch32
        (
            {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
            | {"patch_size": 14},
            {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            768,
            427_616_512,  # openai/clip-vit-large-patch14
        ),
    ],
)
def test_full_size(vision, text, projection, count):
    fields = {"model_type": "clip", "vision_config": vision, "text_config": text, "projection_dim": projection}
    shapes = clip_files.param_shapes(clip_files.parse_config(fields))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count  # without the logit scale


def test_full_size_of_dino():
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    config = dino.parse_config(sizes | {"model_type": "vit", "patch_size": 16, "image_size": 224})
    assert config.layer_norm_epsilon == 1e-12
    assert sum(leaf.size for leaf in jax.tree.leaves(dinov2.param_shapes(config))) == 21_665_664
