"""PSNR and SSIM per image, intervals and codebook usage against numbers that are easy to verify by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergevq_jax.evaluate.pixels import psnr, ssim
from mergevq_jax.evaluate.reconstruction import CodeUsage
from runtime_jax.estimate import estimate


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-0.8, 0.8, (3, 4, 5, 3)).astype(np.float32)


def test_psnr_of_known_errors(images):
    offsets = np.array([0.2, 0.02, 0.002], np.float32)
    np.testing.assert_allclose(psnr(images + offsets[:, None, None, None], images), [20, 40, 60], atol=1e-2)
    a = np.full((1, 2, 2, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(a, a + np.uint8(5)), 20 * np.log10(255 / 5))
    np.testing.assert_allclose(psnr(a + np.uint8(5), a), 20 * np.log10(255 / 5))  # no wrap-around below zero


def test_psnr_does_not_depend_on_the_batch(images):
    noisy = images + np.float32([0.3, 0.1, 0.01])[:, None, None, None]
    alone = np.concatenate([psnr(noisy[i : i + 1], images[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(psnr(noisy, images), alone)


def test_psnr_units_agree(images):
    a = np.round((images + 1) * 127.5).astype(np.uint8)
    b = np.clip(a.astype(int) + 9, 0, 255).astype(np.uint8)
    np.testing.assert_allclose(psnr(a / 127.5 - 1, b / 127.5 - 1), psnr(a, b), rtol=1e-10)


def test_psnr_clips_equals_and_nan(images):
    assert np.all(psnr(images, images) == np.inf)
    np.testing.assert_array_equal(psnr(np.full((1, 2, 2, 3), 1.5), np.ones((1, 2, 2, 3))), [np.inf])
    broken = images.copy()
    broken[1, 0, 0, 0] = np.nan
    assert np.isnan(psnr(broken, images)).tolist() == [False, True, False]
    assert psnr(jnp.asarray(images, jnp.bfloat16), images).min() > 40


@pytest.mark.parametrize(
    "other", [np.zeros((3, 4, 5, 3), np.uint8), np.zeros((3, 4, 5, 1)), np.zeros((3, 4, 5, 3), int)]
)
def test_psnr_refuses_mixed_kinds(images, other):
    with pytest.raises(ValueError, match="psnr needs two arrays"):
        psnr(images, other)


# SSIM.


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 16, 20, 3), np.uint8)
    return pictures, np.clip(pictures + rng.normal(0, 40, pictures.shape), 0, 255).astype(np.uint8)


def test_ssim_by_windows(pictures):
    """The definition, window by window: weighted means, variances and covariance."""
    a, b = (x[0].astype(np.float64) for x in pictures)
    line = np.exp(-np.square(np.arange(-5, 6) / 1.5) / 2)
    weights = np.outer(line, line)[..., None] / line.sum() ** 2
    values = []
    for y in range(16 - 10):
        for x in range(20 - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            m, n = (weights * p).sum((0, 1)), (weights * q).sum((0, 1))
            variances = (weights * (np.square(p - m) + np.square(q - n))).sum((0, 1))
            covariance = (weights * (p - m) * (q - n)).sum((0, 1))
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * m * n + c1) * (2 * covariance + c2) / ((m**2 + n**2 + c1) * (variances + c2)))
    np.testing.assert_allclose(ssim(*pictures)[0], np.mean(values), rtol=1e-9)


def test_ssim_of_each_image_alone(pictures):
    a, b = pictures
    together = ssim(a, b)
    np.testing.assert_array_equal(together, np.concatenate([ssim(a[i : i + 1], b[i : i + 1]) for i in range(3)]))
    np.testing.assert_allclose(ssim(b, a), together, rtol=1e-12)
    np.testing.assert_allclose(ssim(a, a), 1, rtol=1e-12)
    np.testing.assert_allclose(ssim(a / 127.5 - 1, b / 127.5 - 1), together, rtol=1e-9)
    assert np.all((together > 0.1) & (together < 0.999))
    broken = (a / 127.5 - 1).astype(np.float32)
    broken[1, 8, 8] = np.nan
    assert np.isnan(ssim(broken, b / np.float32(127.5) - 1)).tolist() == [False, True, False]


def test_ssim_needs_a_window(images):
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, got \[3, 4, 5, 3\]"):
        ssim(images, images)
    with pytest.raises(ValueError, match="ssim needs two arrays"):
        ssim(images, images[:1])


def test_estimate():
    result = estimate([1.0, 2.0, 3.0, 4.0])
    assert f"{result}" == str(result) == "2.50 ± 2.05" and f"{result:.1f}" == "2.5 ± 2.1"
    assert (result.mean, result.count) == (2.5, 4)
    t = 3.182446  # from a table, 3 degrees of freedom
    assert result.half_width == pytest.approx(t * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-6)
    assert estimate([7.0]).half_width == np.inf
    with pytest.raises(ValueError, match=r"NaN at positions \[1\] of 2"):
        estimate([1.0, np.nan])
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    results = [estimate(rng.normal(5, 2, 6)) for _ in range(2000)]
    assert np.mean([abs(r.mean - 5) <= r.half_width for r in results]) == pytest.approx(0.95, abs=0.015)


def test_code_usage_of_a_known_stream():
    usage = CodeUsage(8)
    usage.update(np.array([[1, 1], [3, 3]]))
    usage.update(np.array([5, 5, 7, 7]))
    assert usage.tokens == 8
    np.testing.assert_array_equal(usage.bit_rates, [1, 0.5, 0.5])
    assert usage.dead_bits == (0,)
    assert usage.used == 0.5
    assert usage.perplexity == pytest.approx(4)
    usage.update(np.array([0, 0]))
    assert usage.dead_bits == () and usage.used == 5 / 8 and usage.perplexity == pytest.approx(5)


def test_a_bit_that_is_never_one_is_dead_too():
    usage = CodeUsage(4)
    usage.update(np.array([0, 1]))
    assert usage.dead_bits == (1,)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 10), st.lists(st.integers(0, 2**10 - 1), min_size=1, max_size=60))
def test_code_usage_equals_counting_one_by_one(bits, raw):
    indices = np.array(raw) % 2**bits
    usage = CodeUsage(2**bits)
    for index in indices:
        usage.update(index)
    expected = [np.mean([(int(i) >> bit) & 1 for i in indices]) for bit in range(bits)]
    np.testing.assert_allclose(usage.bit_rates, expected)
    assert usage.used == len(set(indices.tolist())) / 2**bits
    assert 1 - 1e-9 <= usage.perplexity <= len(set(indices.tolist())) + 1e-9


def test_code_usage_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match=r"indices -1\.\.8 not in 0\.\.7"):
        CodeUsage(8).update(np.array([-1, 8]))
    with pytest.raises(ValueError, match=r"CodeUsage counts 2 to 2\^24 codes, not 1"):
        CodeUsage(1)
    for name in ("bit_rates", "dead_bits", "used", "perplexity"):
        with pytest.raises(ValueError, match="no indices counted"):
            getattr(CodeUsage(8), name)
