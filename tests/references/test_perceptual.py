"""LPIPS against an independent computation in numpy, its properties, and the weight files it accepts."""

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergevq_jax.tokenizer.losses import perceptual
from mergevq_jax.tokenizer.losses.perceptual import LPIPS, load_lpips, unit_normalize
from runtime_jax.weights import WeightError, export_weights, read_safetensors, write_safetensors

WIDTHS = (4, 4, 6, 8, 8)
POSITIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


@pytest.fixture(scope="module")
def tensors():
    """A narrow VGG16 with torchvision's names, and linear layers with the lpips package's."""
    rng = np.random.default_rng(0)
    result, channels = {}, 3
    for width, positions in zip(WIDTHS, POSITIONS, strict=True):
        for position in positions:
            scale = np.sqrt(2 / (9 * channels))
            result[f"features.{position}.weight"] = rng.normal(0, scale, (width, channels, 3, 3)).astype(np.float32)
            result[f"features.{position}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
            channels = width
    for stage, width in enumerate(WIDTHS):
        result[f"lin{stage}.model.1.weight"] = rng.uniform(0, 1, (1, width, 1, 1)).astype(np.float32)
    return result


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips")
    classifier = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    write_safetensors(path / "vgg16.safetensors", {k: v for k, v in tensors.items() if "lin" not in k} | classifier, {})
    write_safetensors(path / "lin.safetensors", {k: v for k, v in tensors.items() if "lin" in k}, {})
    return path


@pytest.fixture(scope="module")
def params(folder):
    return load_lpips(folder, widths=WIDTHS)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(1)
    return [rng.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32) for _ in range(2)]


@jax.jit
def distance(params, a, b):
    return LPIPS(WIDTHS).apply({"params": params}, a, b)


def reference(tensors, a, b, epsilon=1e-10):
    """LPIPS of one pair in float64 and NCHW layout, by sums over shifted images."""

    def features(image):
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        x = ((image.astype(np.float64) - shift) / scale).transpose(2, 0, 1)
        for stage, positions in enumerate(POSITIONS):
            if stage:
                c, h, w = x.shape
                x = x.reshape(c, h // 2, 2, w // 2, 2).max(axis=(2, 4))
            for position in positions:
                padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
                weight, (h, w) = tensors[f"features.{position}.weight"].astype(np.float64), x.shape[1:]
                x = sum(
                    np.einsum("oi,ihw->ohw", weight[:, :, dy, dx], padded[:, dy : dy + h, dx : dx + w])
                    for dy in range(3)
                    for dx in range(3)
                )
                x = np.maximum(x + tensors[f"features.{position}.bias"].astype(np.float64)[:, None, None], 0)
            yield x / (np.sqrt((x**2).sum(axis=0, keepdims=True)) + epsilon)

    total = 0.0
    for stage, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        weight = tensors[f"lin{stage}.model.1.weight"].astype(np.float64).reshape(-1, 1, 1)
        total += ((x - y) ** 2 * weight).sum(axis=0).mean()
    return total


def test_equals_an_independent_computation(tensors, params, pictures):
    expected = [reference(tensors, a, b) for a, b in zip(*pictures, strict=True)]
    np.testing.assert_allclose(distance(params, *map(jnp.asarray, pictures)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["features.0.weight", "features.28.bias", "lin3.model.1.weight"])
def test_a_mutated_weight_fails(tensors, params, pictures, name):
    mutated = reference(tensors | {name: tensors[name] * 1.1}, pictures[0][0], pictures[1][0])
    assert abs(float(distance(params, *map(jnp.asarray, pictures))[0]) / mutated - 1) > 1e-4


def test_a_mutated_epsilon_fails(tensors, params, pictures):
    mutated = reference(tensors, pictures[0][0], pictures[1][0], epsilon=1e-2)
    assert abs(float(distance(params, *map(jnp.asarray, pictures))[0]) / mutated - 1) > 1e-4


def test_zero_for_equal_images_symmetric_and_positive(params, pictures):
    a, b = map(jnp.asarray, pictures)
    assert np.all(np.abs(distance(params, a, a)) < 1e-12)
    np.testing.assert_allclose(distance(params, a, b), distance(params, b, a), rtol=1e-6)
    near, far = distance(params, a, a + 0.1 * (b - a)), distance(params, a, b)
    assert np.all(near > 0) and np.all(far > near)


def test_gradient_is_finite_even_where_all_features_are_dead(params, pictures):
    dead = jax.tree.map(lambda x: x, params)
    dead["vgg"]["conv_2_2"] = {"kernel": 0 * dead["vgg"]["conv_2_2"]["kernel"], "bias": -np.ones(6, np.float32)}
    a, b = map(jnp.asarray, pictures)
    gradient = jax.jit(jax.grad(lambda x, weights: jnp.sum(distance(weights, x, b))))
    for images, weights in ((a, params), (a, dead), (b, params)):
        assert np.all(np.isfinite(gradient(images, weights)))
    assert np.any(gradient(a, params)) and np.any(gradient(a, dead))


def test_unit_normalisation():
    x = jnp.asarray([[[[3.0, 4.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(unit_normalize(x), [[[[0.6, 0.8], [0.0, 0.0]]]], rtol=1e-6)
    assert float(unit_normalize(jnp.full((1, 1, 1, 1), 1e-10))[0, 0, 0, 0]) == pytest.approx(0.5)


def test_full_size_has_vgg16s_parameters():
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["vgg"])) == 14_714_688
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_714_688 + 64 + 128 + 256 + 512 + 512
    bf16 = jax.eval_shape(LPIPS(dtype=jnp.bfloat16).apply, {"params": shapes}, images, images)
    assert (bf16.shape, bf16.dtype) == ((1,), jnp.float32)


def test_small_images_are_refused(params):
    with pytest.raises(ValueError, match="at least 16x16"):
        LPIPS(WIDTHS).apply({"params": params}, jnp.zeros((1, 8, 32, 3)), jnp.zeros((1, 8, 32, 3)))


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def test_separate_files_and_the_lpips_packages_names_give_the_same(tensors, folder, params, tmp_path):
    assert_same(load_lpips(folder / "vgg16.safetensors", folder / "lin.safetensors", widths=WIDTHS), params)
    package = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    for name, array in tensors.items():
        if name.startswith("lin"):
            package |= {name: array, name.replace("lin", "lins."): array}
        else:
            stage = next(i for i, positions in enumerate(POSITIONS) if int(name.split(".")[1]) in positions)
            package[name.replace("features", f"net.slice{stage + 1}")] = array
    write_safetensors(tmp_path / "lpips.safetensors", package, {})
    assert "lins.0.model.1.weight" in read_safetensors(tmp_path / "lpips.safetensors")[0]
    assert_same(load_lpips(tmp_path / "lpips.safetensors", widths=WIDTHS), params)


def test_a_hub_id_is_downloaded(folder, params, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert_same(load_lpips("someone/lpips-vgg16", widths=WIDTHS), params)


def test_unreachable_hub(monkeypatch):
    def unreachable(name, allow_patterns):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(WeightError, match=r"someone/lpips: .*hub did not provide it .*not known.*local folder"):
        load_lpips("someone/lpips")


def test_bad_sources(tensors, folder, tmp_path):
    with pytest.raises(WeightError, match=r"absent\.safetensors: no such file or folder"):
        load_lpips(tmp_path / "absent.safetensors")
    with pytest.raises(WeightError, match=r"holds no \.safetensors file"):
        load_lpips(tmp_path)
    with pytest.raises(WeightError, match="give a file"):
        load_lpips()
    (tmp_path / "vgg.pth").write_bytes(b"\x80\x02")
    for source in (tmp_path, tmp_path / "vgg.pth"):
        with pytest.raises(WeightError, match=r"vgg\.pth: not a readable PyTorch file"):
            load_lpips(source)
    (tmp_path / "cut.safetensors").write_bytes((folder / "lin.safetensors").read_bytes()[:-5])
    with pytest.raises(WeightError, match="not a readable safetensors file"):
        load_lpips(tmp_path / "cut.safetensors")


def test_missing_wrong_and_contradicting_weights(tensors, folder, tmp_path):
    with pytest.raises(WeightError) as missing:
        load_lpips(folder / "vgg16.safetensors", widths=WIDTHS)
    assert all(f"lin_{stage}" in str(missing.value) for stage in range(5))
    with pytest.raises(WeightError, match=r"features\.0\.weight: shape .* but vgg/conv_0_0/kernel has \(3, 3, 3, 64\)"):
        load_lpips(folder)
    name = "lin2.model.1.weight"
    write_safetensors(tmp_path / "negative.safetensors", tensors | {name: -tensors[name]}, {})
    with pytest.raises(WeightError, match=r"lin_2.*>= 0"):
        load_lpips(tmp_path / "negative.safetensors", widths=WIDTHS)
    with pytest.raises(WeightError, match=r"lin2.*other contents"):
        load_lpips(folder, tmp_path / "negative.safetensors", widths=WIDTHS)


def test_table_covers_every_parameter_once(params, tensors):
    exported = export_weights(perceptual.TABLE, params)
    assert exported.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(exported[name], array, strict=True)
