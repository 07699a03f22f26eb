"""Feature networks: what they read, and what may not change the features of an image."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_tools import random_images, random_weights
from PIL import Image

from mergevq_jax.evaluate.features import bicubic, load_feature_network
from mini_scenes import CLASSES, example_scene, render_scene
from mini_scenes.judge import Judge
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks.dinov2 import DINOv2, load_dinov2, standardize
from runtime_jax.networks.inception import SIZE, bilinear_matrix, convert_inception, resize
from runtime_jax.weights import WeightError, read_safetensors, write_safetensors

SCENES = [example_scene(0, "test", example, single=True)[0] for example in range(8)]
IMAGES = np.stack([render_scene(scene, 64).image for scene in SCENES])


@pytest.fixture(scope="module")
def judge():
    return load_feature_network("judge")


@pytest.fixture(scope="module")
def dinov2_folder(goldens, tmp_path_factory):
    tensors, metadata = read_safetensors(goldens / "dinov2.safetensors")
    path = tmp_path_factory.mktemp("dinov2")
    (path / "config.json").write_text(metadata["config"][:-1] + ', "model_type": "dinov2"}')
    params = {name.removeprefix("param/"): array for name, array in tensors.items() if name.startswith("param/")}
    write_safetensors(path / "model.safetensors", params, {})
    return path


def test_the_judges_features(judge):
    got = judge(IMAGES)
    np.testing.assert_allclose(got.pool, Judge.load().features(IMAGES), rtol=1e-5, atol=1e-5)
    assert got.spatial is None and got.pool.dtype == got.logits.dtype == jnp.float32
    assert got.logits.shape == (8, len(CLASSES))
    np.testing.assert_array_equal(np.argmax(got.logits, axis=1), [scene.label for scene in SCENES])
    assert judge.name == "judge" and len(judge.fingerprint) == 64 and "as they are" in judge.resize


def same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jax.device_get(got), expected)


def test_batch_order_and_mesh_change_nothing(judge):
    whole = jax.device_get(judge(IMAGES))
    parts = [jax.device_get(judge(IMAGES[start:end])) for start, end in ((0, 1), (1, 4), (4, 8))]
    same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), whole)
    same(jax.tree.map(lambda leaf: leaf[::-1], jax.device_get(judge(IMAGES[::-1]))), whole)
    with jax.set_mesh(make_mesh(MeshConfig())):
        split = judge(IMAGES)
        assert len(split.pool.sharding.device_set) == 8 and not split.pool.sharding.is_fully_replicated
        few = judge(IMAGES[:3])  # three images on eight devices
    same(split, whole)
    same(few, jax.tree.map(lambda leaf: leaf[:3], whole))


def test_dinov2_reads_resized_images(dinov2_folder):
    network = load_feature_network(f"dinov2:{dinov2_folder}")
    config, params = load_dinov2(dinov2_folder)
    images = random_images(0, 2, 50, 40)
    resized = np.stack([np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in images])
    params = jax.tree.map(jnp.asarray, params)
    expected = DINOv2(config).apply({"params": params}, standardize(jnp.asarray(resized / np.float32(127.5) - 1)))
    got = network(images)
    np.testing.assert_allclose(got.pool, expected.pooled, atol=2e-3)
    assert got.spatial is None and got.logits is None and "224 x 224" in network.resize
    assert network.fingerprint != load_feature_network("judge").fingerprint


def test_inception_by_its_file(goldens, tmp_path):
    """Of one image alone, what the reference says of it in a batch of two (tests/golden_inception.py)."""
    tensors, metadata = read_safetensors(goldens / "inception.safetensors")
    config = json.loads(metadata["config"])
    write_safetensors(tmp_path / "weights.safetensors", random_weights(config["seed"]), {})
    network = load_feature_network(f"inception:{tmp_path / 'weights.safetensors'}")
    got = network(tensors["in/images"][:1])
    assert (got.pool.shape, got.spatial.shape, got.logits.shape) == ((1, 2048), (1, 2023), (1, 1008))
    for name, values in {"pooled": got.pool, "spatial": got.spatial, "logits": got.logits}.items():
        expected = tensors[f"out/{name}"][:1]
        np.testing.assert_allclose(values[:, :: config["every"]], expected, atol=2e-5 * np.abs(expected).max())
    assert network.name == "inception" and "TensorFlow 1" in network.resize


@pytest.mark.parametrize("shape", [(50, 40), (300, 500), (224, 224)])
def test_bicubic_is_pillows(shape):
    images = random_images(1, 1, *shape)
    expected = Image.fromarray(images[0]).resize((224, 224), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(bicubic(jnp.asarray(images), 224))[0] - np.asarray(expected, np.float32))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_tensorflows_bilinear_resize():
    np.testing.assert_allclose(bilinear_matrix(2, 4), [[1, 0], [0.5, 0.5], [0, 1], [0, 1]])
    np.testing.assert_allclose(bilinear_matrix(4, 2), [[1, 0, 0, 0], [0, 0, 1, 0]])  # without antialiasing
    for old in (1, 32, 256, 299, 512):
        matrix = bilinear_matrix(old, SIZE)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(
            matrix @ np.arange(old), np.minimum(np.arange(SIZE) * old / SIZE, old - 1), atol=1e-4
        )
    images = random_images(0, 1, SIZE, SIZE)
    np.testing.assert_array_equal(resize(jnp.asarray(images)), (images.astype(np.float32) - 128) / 128)


def test_images_that_cannot_be_read(judge):
    with pytest.raises(ValueError, match=r"judge needs images whose sides are multiples of 8 pixels, got 60 x 64"):
        judge(IMAGES[:, :60])


@pytest.mark.parametrize("source", ["inception", "dinov2:", "clip:folder", "judge:folder", ""])
def test_unknown_networks(source):
    with pytest.raises(ValueError, match=f"feature network '{source}': known are judge, inception:PATH"):
        load_feature_network(source)


def test_weights_that_are_not_inceptions(tmp_path):
    with pytest.raises(WeightError, match=r"absent\.pth: no such file"):
        load_feature_network(f"inception:{tmp_path / 'absent.pth'}")
    with pytest.raises(WeightError, match="the weights do not fit the model: they are a VGG"):
        convert_inception({"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)})
    names = {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    with pytest.raises(WeightError, match=r"fc\.weight: shape \(2048, 1000\).*has \(2048, 1008\)(.|\n)*not among"):
        convert_inception(names)
