"""A loaded pipeline: its files in every layout, what it encodes and generates, and what it refuses."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_pipeline import FLUX, SIDE, TEXT_LENGTH, VAE, tiny_pipeline, write_tiny_pipeline

from runtime_jax import sharding
from runtime_jax.config import ConfigError
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.prng import Stream, stream_key
from runtime_jax.sharding import param_shardings
from runtime_jax.weights import WeightError, export_weights, read_safetensors, write_safetensors
from runtime_jax.weights.mapped import map_safetensors
from tokenverse_jax.flux import autoencoder, model, sampling, schedule
from tokenverse_jax.flux.convert.autoencoder import FLUX as FLUX_AUTOENCODER
from tokenverse_jax.flux.convert.transformer import FLUX as FLUX_TRANSFORMER
from tokenverse_jax.flux.fingerprint import fingerprint
from tokenverse_jax.flux.model import Flux
from tokenverse_jax.flux.model_folder import Part
from tokenverse_jax.flux.offsets import Offsets
from tokenverse_jax.flux.pipeline import PARTS, Pipeline
from tokenverse_jax.flux.sampling import UsualSampling

PROMPTS = ["a dog and a cat", "a red ball"]
SIZE = {"height": 2 * SIDE, "width": 3 * SIDE, "num_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoded(pipeline):
    return pipeline.encode_prompts(PROMPTS)


@pytest.fixture(scope="module")
def base(pipeline, encoded):
    return np.asarray(pipeline.generate(encoded, **SIZE))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def params(pipeline):
    return {name: getattr(pipeline, name).params for name in PARTS}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, params(one), params(other))
    for name in PARTS:
        assert getattr(one, name).config == getattr(other, name).config
    assert (one.schedule, one.text_length, one.usual) == (other.schedule, other.text_length, other.usual)


# Files.


def test_round_trip(pipeline, folder, tmp_path):
    made = tiny_pipeline(tmp_path / "tokenizers")
    assert_same(pipeline, made)
    pipeline.save_pretrained(tmp_path / "again")
    assert_same(Pipeline.from_pretrained(tmp_path / "again"), made)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    again = {str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert again == names - {"tokenizer/vocab.json", "tokenizer/merges.txt"}  # tokenizer.json holds both
    for name in again:
        if name.endswith(".safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert pipeline.source == str(folder)


def test_how_a_model_is_usually_sampled(pipeline, copy):
    own = UsualSampling(size=64, num_steps=24, cfg_scale=4.0)
    dataclasses.replace(pipeline, usual=own).save_pretrained(copy)
    assert Pipeline.from_pretrained(copy, parts=()).usual == own
    (copy / "sampling.json").write_text('{"steps": 4}')
    with pytest.raises(ValueError, match=r"sampling\.json\.steps"):
        Pipeline.from_pretrained(copy, parts=())
    # Without that file, as FLUX.1-dev and schnell.
    (copy / "sampling.json").unlink()
    assert Pipeline.from_pretrained(copy, parts=()).usual == UsualSampling(size=1024, num_steps=28)
    path = copy / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guidance_embeds": False}))
    assert Pipeline.from_pretrained(copy, parts=()).usual.num_steps == 4


def test_the_index_names_what_other_programs_load(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index == {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    _, metadata = read_safetensors(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert metadata == {"format": "pt"}


def test_shards(pipeline, copy):
    whole = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in shards.items():
        write_safetensors(whole.with_name(file), {name: tensors[name] for name in own}, {})
    index = whole.with_name(f"{whole.name}.index.json")
    index.write_text(json.dumps({"weight_map": {name: file for file, own in shards.items() for name in own}}))
    assert_same(Pipeline.from_pretrained(copy), pipeline)
    whole.with_name(next(iter(shards))).unlink()
    with pytest.raises(WeightError, match=r"missing:\n  transformer/diffusion_pytorch_model-00001-of-00002\.safe"):
        Pipeline.from_pretrained(copy)
    pipeline.save_pretrained(copy)  # the index would hide the new file
    assert_same(Pipeline.from_pretrained(copy), pipeline)


def test_single_files_of_flux(pipeline, copy, tmp_path, monkeypatch):
    files = {"transformer": tmp_path / "flux1-dev.safetensors", "vae": tmp_path / "ae.safetensors"}
    write_safetensors(files["transformer"], export_weights(FLUX_TRANSFORMER, pipeline.transformer.params), {})
    write_safetensors(files["vae"], export_weights(FLUX_AUTOENCODER, pipeline.vae.params), {})
    for part in files:
        (copy / part / "diffusion_pytorch_model.safetensors").unlink()
    loaded = Pipeline.from_pretrained(copy, **files)
    assert_same(loaded, pipeline)
    assert loaded.base_hash() == pipeline.base_hash()
    # A folder that has no such parts at all: the configs are FLUX's own.
    for part in files:
        shutil.rmtree(copy / part)
    with pytest.raises(WeightError, match=r"flux1-dev.safetensors, for the transformer: the weights do not fit"):
        Pipeline.from_pretrained(copy, **files)
    monkeypatch.setattr(model, "PRESETS", {"dev": FLUX, "schnell": None})
    monkeypatch.setattr(autoencoder, "AutoencoderConfig", lambda: VAE)
    assert_same(Pipeline.from_pretrained(copy, **files), pipeline)


def test_bfloat16_and_parts(pipeline, folder):
    loaded = Pipeline.from_pretrained(folder, dtype="bfloat16", parts=("transformer",))
    assert (loaded.vae, loaded.clip, loaded.t5) == (None, None, None)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pipeline.transformer.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.transformer.params, expected)
    assert loaded.base_hash() == pipeline.base_hash()
    for use in (
        lambda: loaded.encode_prompts(PROMPTS),
        lambda: loaded.generate(PROMPTS, **SIZE),
        lambda: loaded.save_pretrained(folder),
    ):
        with pytest.raises(ValueError, match=r"needs the pipeline's (clip|vae), which was not loaded or has been"):
            use()


def test_parameters_go_to_a_mesh_by_their_rules(pipeline, folder, base, monkeypatch):
    monkeypatch.setattr(sharding, "LARGE", 16)  # biases are split, as FLUX.1's largest are
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    loaded = Pipeline.from_pretrained(folder, mesh=mesh)
    assert_same(loaded, pipeline)
    shardings = param_shardings(pipeline.transformer.params, model.SHARDING_RULES, mesh)
    jax.tree.map(lambda leaf, own: leaf.sharding == own or pytest.fail(), loaded.transformer.params, shardings)
    assert loaded.base_hash() == pipeline.base_hash()
    with jax.set_mesh(mesh):
        images = np.asarray(loaded.generate(loaded.encode_prompts(PROMPTS), **SIZE))
    assert np.abs(images.astype(int) - base).max() <= 1


def test_the_length_of_prompts(copy):
    def length(**arguments):
        return Pipeline.from_pretrained(copy, parts=(), **arguments).text_length

    assert (length(), length(text_length=7)) == (TEXT_LENGTH, 7)
    path = copy / "tokenizer_2/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 1000}))
    assert length() == 512
    path = copy / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guidance_embeds": False}))
    assert length() == 256


def test_mapped_tensors_are_those_of_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1.5, -2], jnp.bfloat16),
        "c": np.ones((), np.int64),
        "d": np.zeros((0, 3), np.float16),
    }
    write_safetensors(path, tensors, {"format": "pt"})
    mapped = map_safetensors(path)
    assert mapped.keys() == tensors.keys()
    for name, array in mapped.items():
        assert array.dtype == tensors[name].dtype and array.shape == tensors[name].shape
        np.testing.assert_array_equal(array, tensors[name])
        assert not array.flags.writeable
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightError, match=r"x\.safetensors: not a readable safetensors file"):
        map_safetensors(path)
    write_safetensors(path, {"a": np.zeros(2, np.uint8)}, {})
    with pytest.raises(WeightError, match=r"holds U8; supported are"):
        map_safetensors(path)


# The base's identity.


def test_fingerprint():
    tree = {"a": {"kernel": np.arange(20_000, dtype=np.float32).reshape(100, 200)}, "b": np.float32([-0.0, 1])}
    whole = fingerprint(tree)
    assert len(whole) == 64
    assert fingerprint({"b": np.float32([0, 1]), "a": tree["a"]}) == whole
    assert fingerprint(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)) == whole
    assert fingerprint(tree | {"b": np.float32([0, 1.01])}) != whole
    assert fingerprint({"a": tree["a"], "c": tree["b"]}) != whole
    assert fingerprint(tree | {"a": {"kernel": tree["a"]["kernel"].reshape(200, 100)}}) != whole
    for place in ((0, 0), (99, 199)):
        changed = tree["a"]["kernel"].copy()
        changed[place] += 1000
        assert fingerprint(tree | {"a": {"kernel": changed}}) != whole


# Encoding and decoding.


def test_encoded_prompts(pipeline, encoded):
    assert encoded.txt.shape == (2, TEXT_LENGTH, FLUX.joint_attention_dim)
    assert encoded.vec.shape == (2, FLUX.pooled_projection_dim)
    alone = pipeline.encode_prompts(PROMPTS[1:])
    np.testing.assert_allclose(alone.txt, encoded.txt[1:], atol=1e-5)
    np.testing.assert_allclose(alone.vec, encoded.vec[1:], atol=1e-5)


def test_clip_sees_the_first_tokens_and_t5_refuses_more_than_it_takes(pipeline):
    longer = " ".join(["dog"] * 20)  # 22 of CLIP's tokens for its 16 positions, 21 of T5's
    same = pipeline.encode_prompts([longer, " ".join(["dog"] * 18)])
    np.testing.assert_array_equal(same.vec[0], same.vec[1])
    with pytest.raises(ValueError, match=r"31 tokens, but the text length is 24: shorten the prompt 'dog dog"):
        pipeline.encode_prompts([" ".join(["dog"] * 30)])


def test_images_as_tokens(pipeline):
    images = np.random.default_rng(0).integers(0, 256, (2, 2 * SIDE, 3 * SIDE, 3), np.uint8)
    tokens = pipeline.encode_images(images)
    assert tokens.shape == (2, 6, FLUX.in_channels)
    module = autoencoder.Autoencoder(VAE)
    variables = {"params": pipeline.vae.params}
    encode, decode = (jax.jit(functools.partial(module.apply, method=method)) for method in ("encode", "decode"))
    posterior = encode(variables, np.float32(images) / 127.5 - 1)
    np.testing.assert_allclose(tokens, autoencoder.pack(autoencoder.to_latents(posterior.mean, VAE)), atol=1e-4)
    keys = jax.random.split(jax.random.key(0), 2)
    sampled = pipeline.encode_images(images, keys)
    np.testing.assert_allclose(pipeline.encode_images(images[1:], keys[1:]), sampled[1:], atol=1e-4)
    assert np.abs(sampled - tokens).max() > 1e-2
    decoded = pipeline.decode_latents(tokens, (2, 3))
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    expected = decode(variables, posterior.mean)
    np.testing.assert_allclose(decoded, np.clip((expected + 1) * 127.5, 0, 255), atol=0.51)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), r"uint8 \[B, H, W, 3\] is needed, got float32"),
        (np.zeros((8, 8, 3), np.uint8), r"is needed, got uint8 \(8, 8, 3\)"),
        (np.zeros((1, 8, 6, 3), np.uint8), "image size 8x6: positive multiples of 4 are needed"),
    ],
)
def test_images_that_cannot_be_encoded(pipeline, images, message):
    # As users call it: the shape types of tests would speak first.
    with pytest.raises(ValueError, match=message):
        Pipeline.encode_images.__wrapped__(pipeline, images)


def test_tokens_that_do_not_fill_the_grid(pipeline):
    with pytest.raises(ValueError, match=r"tokens \(1, 6, 16\): \(8, 16\) in each image are needed for the grid"):
        pipeline.decode_latents(jnp.zeros((1, 6, 16)), (2, 4))


# Generation.


def test_images_are_those_of_a_plain_loop(pipeline, encoded, base):
    sigmas = schedule.sigmas(pipeline.schedule, 2, 6)
    x = sampling.initial_noise(stream_key(0, Stream.SAMPLE), np.arange(2), (6, FLUX.in_channels))
    ids = autoencoder.image_ids((2, 3)), np.zeros((TEXT_LENGTH, 3), np.float32)
    apply = jax.jit(lambda *inputs: Flux(FLUX).apply({"params": pipeline.transformer.params}, *inputs))
    for now, after in itertools.pairwise(sigmas):
        times = np.full(2, now, np.float32)
        guidance = np.full(2, 3.5, np.float32)
        x = x + (after - now) * apply(x, ids[0], encoded.txt, ids[1], times, encoded.vec, guidance)
    expected = np.asarray(pipeline.decode_latents(x, (2, 3)))
    assert base.shape == (2, 2 * SIDE, 3 * SIDE, 3) and base.dtype == np.uint8
    assert np.abs(base.astype(int) - expected).max() <= 1
    assert base.std() > 10


def test_images_do_not_depend_on_the_batch(pipeline, base):
    second = np.asarray(pipeline.generate(PROMPTS[1:], **SIZE, examples=np.array([1])))
    assert np.abs(second.astype(int) - base[1:]).max() <= 1
    other = np.asarray(pipeline.generate(PROMPTS[1:], **SIZE))
    assert np.abs(other.astype(int) - base[1:]).max() > 10


def test_every_option_changes_the_image(pipeline, encoded, base):
    rng = np.random.default_rng(0)
    offsets = rng.normal(size=(2, TEXT_LENGTH, FLUX.width)).astype(np.float32)
    options = {
        "guidance": {"guidance": 30.0},
        "seed": {"seed": 1},
        "shared": {"offsets": Offsets(offsets)},
        "per_block": {"offsets": Offsets(per_block=np.stack([offsets] * 3, axis=1))},
        "double": {"offsets": Offsets(offsets, blocks="double")},
        "everywhere": {"offsets": Offsets(everywhere=offsets[:, 0])},
        "cfg": {"cfg_scale": 4.0},
        "negative": {"cfg_scale": 4.0, "negative_prompt": "a blue star"},
    }
    images = {name: np.asarray(pipeline.generate(encoded, **SIZE, **option)) for name, option in options.items()}
    np.testing.assert_array_equal(images["shared"], images["per_block"])
    del images["per_block"]
    seen = [base, *images.values()]
    assert len({image.tobytes() for image in seen}) == len(seen)
    zero = pipeline.generate(encoded, **SIZE, offsets=Offsets(np.zeros_like(offsets)))
    np.testing.assert_array_equal(zero, base)


def test_encodings_need_no_text_encoders(pipeline, encoded, base):
    rest = dataclasses.replace(pipeline, clip=None, t5=None)
    np.testing.assert_array_equal(rest.generate(encoded, **SIZE), base)


def test_parameters_are_arguments_of_the_program(pipeline, encoded, base):
    changed = jax.tree.map(lambda x: 1.1 * x, pipeline.transformer.params)
    other = dataclasses.replace(pipeline, transformer=dataclasses.replace(pipeline.transformer, params=changed))
    assert np.abs(np.asarray(other.generate(encoded, **SIZE)).astype(int) - base).max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 10}, "image size 10x12: positive multiples of 4 are needed"),
        ({"num_steps": 0}, "num_steps: got 0, at least 1"),
        ({"negative_prompt": "a cat"}, "negative_prompt has no effect with cfg_scale=1"),
        ({"examples": np.arange(3)}, r"examples: one for each of the 2 prompts is needed, got shape \(3,\)"),
    ],
)
def test_what_cannot_be_generated(pipeline, encoded, change, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.generate.__wrapped__(pipeline, encoded, **SIZE | change)


def test_a_model_without_guidance(pipeline, encoded):
    config = dataclasses.replace(FLUX, guidance_embeds=False)
    kept = {name: tree for name, tree in pipeline.transformer.params.items() if name != "guidance_in"}
    schnell = dataclasses.replace(pipeline, transformer=Part(config, kept))
    shape = jax.eval_shape(lambda: schnell.generate(encoded, **SIZE))
    assert shape.shape == (2, 2 * SIDE, 3 * SIDE, 3)
    with pytest.raises(ValueError, match="takes no guidance"):
        schnell.generate(encoded, **SIZE, guidance=3.5)


# What cannot be loaded.


def test_everything_that_is_missing_is_listed_at_once(copy):
    (copy / "model_index.json").unlink()
    (copy / "vae/config.json").unlink()
    (copy / "text_encoder_2/model.safetensors").unlink()
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(WeightError) as error:
        Pipeline.from_pretrained(copy, transformer=copy / "flux.safetensors")
    head, *missing = str(error.value).splitlines()
    assert head == f"{copy}: not a complete FLUX pipeline in diffusers' layout; missing:"
    assert {line.strip() for line in missing} == {
        "flux.safetensors",
        "model_index.json",
        "vae/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer",
    }
    with pytest.raises(WeightError, match=r"missing:\n  model_index\.json\n  tokenizer$"):
        Pipeline.from_pretrained(copy, parts=["transformer"])


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, WeightError, "a FluxPipeline is needed"),
        ("model_index.json", "[]", ValueError, "model_index.json: a JSON object is needed, got list"),
        ("vae/config.json", "{", ValueError, "vae/config.json: not a readable JSON file"),
        ("transformer/config.json", {"num_layer": 3}, ConfigError, "transformer/config.json.num_layer.*num_layers"),
        ("vae/diffusion_pytorch_model.safetensors", "x", WeightError, "not a readable safetensors file"),
    ],
)
def test_damaged_files(copy, file, content, error, message):
    (copy / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(error, match=message):
        Pipeline.from_pretrained(copy)


def test_wrong_arguments(folder):
    for arguments, message in (
        ({"parts": ["unet"]}, r"parts=\['unet'\]: a list of transformer, vae, clip, t5 is needed"),
        ({"parts": "vae"}, "parts='vae': a list"),
    ):
        with pytest.raises(ValueError, match=message):
            Pipeline.from_pretrained(folder, **arguments)
    with pytest.raises(WeightError, match="no such file or folder"):
        Pipeline.from_pretrained(folder / "nowhere")
    with pytest.raises(WeightError, match="the folder of a pipeline is needed; a single file goes into transformer="):
        Pipeline.from_pretrained(folder / "model_index.json")


def test_a_gated_hub_id_says_how_to_get_it(monkeypatch):
    asked = {}

    def gated(repository, allow_patterns):
        asked[repository] = allow_patterns
        raise OSError("403: access to this model is restricted")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(WeightError, match=r"403: access .*pass a local folder\. If .* gated.* HF_TOKEN") as error:
        Pipeline.from_pretrained("black-forest-labs/FLUX.1-dev", parts=["vae"])
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev" in str(error.value)
    assert "vae/diffusion_pytorch_model*.safetensors" in asked["black-forest-labs/FLUX.1-dev"]
    assert not any("flux1" in name or name.startswith("transformer/diff") for name in asked.popitem()[1])
