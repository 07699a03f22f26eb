"""The published lists of K, and draws that depend only on config, seed and step."""

import itertools

import numpy as np
import pytest

from mergevq_jax import merge_ratio
from mergevq_jax.merge_ratio import MergeRatioConfig, draw_keep
from mergevq_jax.tokenizer.config import PRESETS

G_R = merge_ratio.gaussian(144, 6)
R = merge_ratio.exponential(36, 6)
G = merge_ratio.gaussian(256, 9)


@pytest.mark.parametrize(
    ("config", "keeps", "probabilities"),
    [
        (G_R, (121, 144, 169, 196, 225, 256), (0.118, 0.668, 0.118, 0.032, 0.032, 0.032)),
        (R, (36, 49, 64, 81, 100, 121), (0.721, 0.127, 0.047, 0.036, 0.035, 0.034)),
        (G, (225, 256, 289, 324, 361, 400, 441, 484, 529), None),
    ],
)
def test_published_lists(config, keeps, probabilities):
    assert config.keeps == keeps
    assert config.probabilities.sum() == pytest.approx(1)
    if probabilities is not None:
        np.testing.assert_allclose(config.probabilities, probabilities, atol=6e-4)


def test_the_target_is_the_likeliest():
    for config, target in ((G_R, 144), (R, 36), (G, 256)):
        assert config.keeps[int(np.argmax(config.probabilities))] == target
    weights = np.exp(-((np.arange(9) - 1) ** 2) / 0.5) + 0.05
    np.testing.assert_allclose(G.probabilities, weights / weights.sum())


def test_candidates_of_a_target_that_is_not_square():
    assert merge_ratio.square_candidates(150, 3, start=-1) == (126, 150, 175)


@pytest.mark.parametrize(("name", "config"), [("gr-d64", G_R), ("r-d64", R), ("g-d64", G)])
def test_every_candidate_can_be_reached(name, config):
    model = PRESETS[name]
    for keep in config.keeps:
        assert sum(model.merge_counts(model.raw_tokens, keep)) == model.raw_tokens - keep


def draws(config, seed, steps):
    return [draw_keep(config, seed, step) for step in steps]


def test_a_draw_depends_on_config_seed_and_step_alone():
    forward = draws(G_R, 3, range(50))
    assert draws(G_R, 3, reversed(range(50))) == forward[::-1]  # draws have no state
    assert draws(G_R, 3, range(20, 50)) == forward[20:]  # so a resumed run draws the same
    assert draws(G_R, 4, range(50)) != forward
    assert all(type(keep) is int for keep in forward)  # a static argument


@pytest.mark.parametrize("config", [G_R, R, G])
def test_frequencies(config):
    count = 4000
    drawn = draws(config, 0, range(count))
    frequencies = np.array([drawn.count(keep) for keep in config.keeps]) / count
    spread = np.sqrt(config.probabilities * (1 - config.probabilities) / count)
    assert (np.abs(frequencies - config.probabilities) < 4 * spread).all()


def test_the_order_is_random():
    """The released code cycles through its candidates by the batch's number."""
    drawn = draws(MergeRatioConfig(keeps=(1, 2, 3, 4), weights=(1.0, 1.0, 1.0, 1.0)), 0, range(4000))
    for lag in range(1, 13):
        same = np.mean([one == other for one, other in itertools.pairwise(drawn[::lag])])
        assert abs(same - 0.25) < 4 * np.sqrt(0.25 * 0.75 / (4000 / lag))
    pairs = np.zeros((4, 4))
    for one, other in itertools.pairwise(drawn):
        pairs[one - 1, other - 1] += 1
    assert (np.abs(pairs / pairs.sum() - 1 / 16) < 0.02).all()


def test_a_single_candidate_and_one_of_no_weight():
    assert set(draws(MergeRatioConfig(keeps=(36,), weights=(5.0,)), 0, range(5))) == {36}
    assert set(draws(MergeRatioConfig(keeps=(36, 49), weights=(0.0, 2.0)), 0, range(20))) == {49}


@pytest.mark.parametrize(
    ("keeps", "weights", "message"),
    [
        ((36, 49), (1.0,), "merge_ratio: 2 keeps, but 1 weights; give one each"),
        ((), (), "0 keeps, but 0 weights"),
        ((36, 49), (-1.0, 2.0), "must be finite and >= 0"),
        ((36, 49), (0.0, 0.0), "one must be positive"),
        ((36, 49), (1.0, float("nan")), "merge_ratio.weights"),
        ((36, 49), (1.0, float("inf")), "merge_ratio.weights"),
    ],
)
def test_impossible_lists(keeps, weights, message):
    with pytest.raises(ValueError, match=message):
        MergeRatioConfig(keeps=keeps, weights=weights)
