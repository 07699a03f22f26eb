"""Metrics on features: against formulas written out, and what may not change them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from mergevq_jax.evaluate.frechet import Moments, frechet_distance
from mergevq_jax.evaluate.inception_score import inception_score
from mergevq_jax.evaluate.kernel import kernel_distance
from mergevq_jax.evaluate.precision_recall import precision_recall


def sets(width=5, counts=(400, 300)):
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) for count in counts)
    return first, second + 1


# Fréchet distance.


def test_distance_of_gaussians():
    """Against the formula with a matrix square root; invariant under rotations; zero and symmetric as a distance is."""
    first, second = sets()
    a, b = Moments.of(first), Moments.of(second)
    covariances = np.cov(first.T), np.cov(second.T)
    expected = np.square(first.mean(0) - second.mean(0)).sum()
    expected += np.trace(sum(covariances) - 2 * np.real(sqrtm(covariances[0] @ covariances[1])))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    assert frechet_distance(Moments.of(first @ turn), Moments.of(second @ turn)) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-12
    constant = Moments.of(np.ones((4, 5)))
    assert frechet_distance(constant, b) == pytest.approx(np.square(1 - b.mean).sum() + np.trace(b.covariance))


def test_fewer_images_than_features():
    """A shift of singular Gaussians is its square, to the last digits: nothing is lost in roots of rounding errors."""
    features = np.random.default_rng(0).normal(size=(20, 150))
    shift = np.linspace(0, 1e-3, 150)
    got = frechet_distance(Moments.of(features), Moments.of(features + shift))
    assert got == pytest.approx(np.square(shift).sum(), abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), offset=st.sampled_from([0, 1e3]))
def test_batches_and_processes_do_not_change_the_moments(cuts, offset):
    """Features may come in any batches, empty ones too, in two streams, and far from zero."""
    features = np.random.default_rng(0).normal(size=(60, 7)).astype(np.float32) + np.float32(offset)
    whole = Moments.of(features)
    streams = [Moments.zeros(7), Moments.zeros(7)]
    for number, batch in enumerate(np.split(features, sorted(cuts))):
        streams[number % 2] = streams[number % 2].update(batch)
    merged = streams[0].merge(streams[1])
    assert merged.count == whole.count == 60
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(features.T.astype(np.float64)), rtol=1e-9, atol=1e-9)


def test_moments_that_cannot_be():
    with pytest.raises(ValueError, match="at least two images, got 1"):
        frechet_distance(Moments.of(np.ones((1, 3))), Moments.of(np.ones((5, 3))))
    with pytest.raises(ValueError, match="features of 2 of 4 images are not finite"):
        Moments.zeros(3).update(np.asarray([[0, 1, 2], [np.nan] * 3, [np.inf, 0, 0], [1, 2, 3]]))
    with pytest.raises(ValueError, match=r"shape \[4, 2\], but \[N, 3\] are needed"):
        Moments.zeros(3).update(np.ones((4, 2)))
    for compare in (frechet_distance, Moments.merge):
        with pytest.raises(ValueError, match="3 features on one side, 4 on the other"):
            compare(Moments.of(np.ones((5, 3))), Moments.of(np.ones((5, 4))))


# Kernel distance.


def test_kernel_distance_of_whole_sets():
    """A subset of all images leaves no choice: the estimator written out as sums over pairs."""
    first, second = sets(counts=(30, 30))

    def kernel(x, y):
        return (np.dot(x, y) / 5 + 1) ** 3

    pairs = [(i, j) for i in range(30) for j in range(30)]
    expected = sum(kernel(x[i], x[j]) for x in (first, second) for i, j in pairs if i != j) / (30 * 29)
    expected -= 2 * sum(kernel(first[i], second[j]) for i, j in pairs) / 900
    got = kernel_distance(first, second, subsets=3, subset_size=30)
    assert got.mean == pytest.approx(expected, rel=1e-9) and got.std < 1e-9 * abs(expected)


def test_kernel_distance_is_unbiased():
    """Two samples of one distribution: zero within its error, on either side; another distribution: far from zero."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 2000, 4))
    values = [kernel_distance(first, second, subset_size=50, seed=seed).mean for seed in range(4)]
    assert np.max(np.abs(values)) < 0.05 < kernel_distance(first, second + 0.5, subset_size=50).mean
    assert kernel_distance(first, second, subset_size=50) == kernel_distance(first, second, subset_size=50)


def test_subsets_that_cannot_be():
    first, second = sets()
    with pytest.raises(ValueError, match="100 subsets of 1000 images: at least 1, of 2 to 300 images"):
        kernel_distance(first, second)
    with pytest.raises(ValueError, match="1 of 300 images are not finite"):
        kernel_distance(first, np.where(np.arange(300)[:, None] == 7, np.nan, second), subset_size=10)


# Inception Score.


def logits_of_classes(count=200, classes=10):
    """Of confident and less confident images, sorted by class as samples often are."""
    labels = np.arange(count) * classes // count
    return (np.eye(classes)[labels] * np.linspace(1, 20, count)[:, None]).astype(np.float32)


def test_inception_score_of_known_distributions():
    certain = 100 * np.eye(10, dtype=np.float32)
    assert inception_score(certain, np.arange(10), splits=1).mean == pytest.approx(10)
    assert inception_score(np.zeros((10, 7), np.float32), np.arange(10)) == pytest.approx((1, 0))
    logits = logits_of_classes()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), axis=1)))
    assert inception_score(logits, np.arange(200), splits=1).mean == pytest.approx(expected, rel=1e-5)


def test_inception_score_depends_on_no_order():
    """Neither that of rows, nor one by class: splits of consecutive images would see one class each and score 1."""
    logits, examples = logits_of_classes(), np.arange(200)
    score = inception_score(logits, examples)
    order = np.random.default_rng(0).permutation(200)
    assert inception_score(logits[order], examples[order]) == score
    consecutive = np.mean([inception_score(part, np.arange(20), splits=1).mean for part in np.split(logits, 10)])
    assert consecutive < 1.01 and score.mean > 4 and score.std > 0


def test_scores_that_cannot_be():
    logits = logits_of_classes()
    with pytest.raises(ValueError, match="2 examples occur twice"):
        inception_score(logits, np.minimum(np.arange(200), 197))
    with pytest.raises(ValueError, match="10 splits of 5 images: 1 to 5 are possible"):
        inception_score(logits[:5], np.arange(5))
    with pytest.raises(ValueError, match="not finite"):
        inception_score(logits * np.float32(np.nan), np.arange(200))


# Precision and recall.


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_all_distances(k):
    first, second = sets()
    distances = {name: cdist(*pair) for name, pair in {"ff": (first, first), "ss": (second, second)}.items()}
    radii = {name: np.sort(matrix, axis=1)[:, k] for name, matrix in distances.items()}
    across = cdist(first, second)
    got = precision_recall(first, second, k=k)
    assert got.precision == pytest.approx((across <= radii["ss"][None]).any(axis=1).mean())
    assert got.recall == pytest.approx((radii["ff"][None] >= across.T).any(axis=1).mean())
    assert 0.02 < got.precision < 0.98 and 0.02 < got.recall < 0.98


def test_equal_and_separate_sets():
    first, second = sets()
    assert precision_recall(first, first) == (1, 1)
    assert precision_recall(first, first[::-1]) == (1, 1)
    assert precision_recall(first, second + 100) == (0, 0)
    narrow = precision_recall(0.01 * second, second)  # near the mean: all look real, hardly any variety
    assert narrow.precision > 0.99 and narrow.recall < 0.1


def test_blocks_and_order_change_nothing():
    first, second = (features.astype(np.float32) for features in sets())
    whole = precision_recall(first, second)
    assert precision_recall(first, second, block=64) == whole
    assert precision_recall(first[::-1], second[::-1]) == whole


def test_neighbours_that_cannot_be():
    with pytest.raises(ValueError, match="k=3 neighbours of 3 and 9 images"):
        precision_recall(np.ones((3, 2)), np.ones((9, 2)))
    with pytest.raises(ValueError, match="9 of 9 images are not finite"):
        precision_recall(np.ones((5, 2)), np.full((9, 2), np.inf))
