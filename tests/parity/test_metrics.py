"""Metrics against independent implementations: torch-fidelity, scikit-image and the lpips package."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import lpips
import numpy as np
import pytest
import torch
from inception_reference import reference_features
from inception_tools import random_images, random_weights
from skimage.metrics import structural_similarity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from mergevq_jax.evaluate.features import load_feature_network
from mergevq_jax.evaluate.frechet import Moments, frechet_distance
from mergevq_jax.evaluate.inception_score import inception_score
from mergevq_jax.evaluate.kernel import kernel_distance
from mergevq_jax.evaluate.pixels import ssim
from mergevq_jax.evaluate.precision_recall import precision_recall
from mergevq_jax.tokenizer.losses.perceptual import LPIPS, load_lpips

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def features():
    """Two sets with correlated features, as a network gives them: float32, not negative, not centred."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(24, 48))
    first = np.maximum(rng.normal(size=(600, 24)) @ mixing + 1, 0)
    second = np.maximum(rng.normal(0.2, 1.1, size=(500, 24)) @ mixing + 1, 0)
    return first.astype(np.float32), second.astype(np.float32)


# The networks.


@pytest.mark.parametrize("shape", [(40, 56), (299, 299), (320, 310)])
def test_inception(shape, tmp_path):
    """Features, maps and logits, through the file that PyTorch writes, for images that grow, stay and shrink."""
    weights, images = random_weights(3), random_images(0, 2, *shape)
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, tmp_path / "weights.pth")
    got = load_feature_network(f"inception:{tmp_path / 'weights.pth'}")(images)
    for name, expected in reference_features(weights, images).items():
        values = np.asarray({"pooled": got.pool, "spatial": got.spatial, "logits": got.logits}[name])
        np.testing.assert_allclose(values, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("is_zip", [True, False])
def test_lpips(is_zip, tmp_path):
    """Random VGG16, the published linear layers, both from PyTorch's files."""
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    vgg = {
        re.sub(r"^net\.slice\d\.", "features.", name): value
        for name, value in theirs.state_dict().items()
        if name.startswith("net.")
    }
    torch.save(vgg, tmp_path / "vgg16.pth", _use_new_zipfile_serialization=is_zip)
    params = load_lpips(tmp_path / "vgg16.pth", Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
    rng = np.random.default_rng(0)
    first = rng.uniform(-1, 1, (2, 64, 80, 3)).astype(np.float32)
    second = np.clip(first + rng.normal(0, 0.3, first.shape), -1, 1).astype(np.float32)
    with torch.no_grad():
        pair = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (first, second))
        expected = theirs(*pair).numpy().reshape(-1)
    got = LPIPS().apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(first), jnp.asarray(second))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


# The numbers.


def test_frechet_distance(features):
    theirs = [fid_features_to_statistics(torch.from_numpy(x).double()) for x in features]
    expected = next(iter(fid_statistics_to_metric(*theirs, verbose=False).values()))
    assert frechet_distance(*map(Moments.of, features)) == pytest.approx(expected, rel=TOLERANCE)


def test_kernel_distance(features):
    """With the same subsets."""
    doubles = (torch.from_numpy(x).double() for x in features)
    options = {"kid_subsets": 20, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False}
    expected = kid_features_to_metric(*doubles, **options)
    assert kernel_distance(*features, subsets=20, subset_size=100) == pytest.approx(
        tuple(expected.values()), rel=TOLERANCE
    )


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score(features, splits):
    """With the same splits."""
    logits = features[0][:, :20]
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=splits, rng_seed=2020)
    got = inception_score(logits, np.arange(len(logits)), splits=splits)
    assert got == pytest.approx(tuple(expected.values()), rel=TOLERANCE)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall(features, k):
    doubles = (torch.from_numpy(x).double() for x in features)
    options = {"prc_neighborhood": k, "prc_batch_size": 256, "save_cpu_ram": True, "verbose": False}
    expected = list(prc_features_to_metric(*doubles, **options).values())
    assert precision_recall(*features, k=k) == pytest.approx(expected[:2], abs=1e-6)  # theirs are float32
    assert min(expected[:2]) > 0.05 and max(expected[:2]) < 0.95


def test_ssim():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (3, 40, 56, 3), np.uint8)
    second = np.clip(first + rng.normal(0, [[[[10]]], [[[40]]], [[[120]]]], first.shape), 0, 255).astype(np.uint8)
    options = {"channel_axis": -1, "data_range": 255, "gaussian_weights": True, "use_sample_covariance": False}
    expected = [structural_similarity(x, y, **options) for x, y in zip(first, second, strict=True)]
    np.testing.assert_allclose(ssim(first, second), expected, rtol=TOLERANCE)
