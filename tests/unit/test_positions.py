"""Where groups start: what is counted, the shares of a few images and of none, and how often a cell is drawn."""

import dataclasses

import numpy as np
import pytest
from generator_tools import CONFIG
from golden_tools import jit

from mergevq_jax.generator.kinds.positions import count_starts, draw_positions, new_counts, shares
from runtime_jax.prng import Stream, example_keys, stream_key

C, L, NUMBERS = CONFIG.num_classes, CONFIG.length, CONFIG.keeps


def keys_of(count, seed=0):
    return example_keys(stream_key(seed, Stream.ORDER), np.arange(count))


def source_maps(count, keep, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.r_[:keep, rng.integers(0, keep, L - keep)]) for _ in range(count)])


def counted(counts, labels, maps, keep, config=CONFIG):
    return jit(lambda *arrays: count_starts(*arrays, config=config, keep=keep))(counts, labels, maps)


def test_what_is_counted():
    labels, maps = np.asarray([0, 3, 3, 0]), source_maps(4, 9)
    counts = np.asarray(counted(counted(new_counts(CONFIG), labels[:2], maps[:2], 9), labels[2:], maps[2:], 9))
    expected = np.zeros((len(NUMBERS), C, L), int)
    for label, groups in zip(labels, maps, strict=True):
        for group in range(9):
            expected[NUMBERS.index(9), label, np.flatnonzero(groups == group)[0]] += 1
    np.testing.assert_array_equal(counts, expected)
    assert counts[:, :, 0].sum() == 4


def test_a_generator_without_merge_instruction_counts_all():
    config = dataclasses.replace(CONFIG, merge_instruction=False)
    counts = counted(new_counts(config), np.asarray([1]), np.arange(L)[None], L, config)
    np.testing.assert_array_equal(counts[0, 1], np.ones(L))
    np.testing.assert_allclose(shares(counts, config), np.ones((1, C + 1, L)))


def test_shares():
    """One image of the mean is added to a class, and one of equal cells to the mean."""
    maps = source_maps(3, 4)
    first = np.asarray([[np.flatnonzero(groups == groups[cell])[0] == cell for cell in range(L)] for groups in maps])
    got = np.asarray(shares(counted(new_counts(CONFIG), np.asarray([2, 2, 4]), maps, 4), CONFIG))
    assert got.shape == (len(NUMBERS), C + 1, L)
    np.testing.assert_allclose(
        got.sum(axis=-1), np.repeat(np.asarray(NUMBERS, float)[:, None], C + 1, axis=1), rtol=1e-6
    )
    equal = np.r_[1.0, np.full(L - 1, 3 / (L - 1))]
    together = (first.sum(axis=0) + equal) / 4
    np.testing.assert_allclose(got[0, -1], together, rtol=1e-6)
    np.testing.assert_allclose(got[0, 2], (first[:2].sum(axis=0) + together) / 3, rtol=1e-6)
    np.testing.assert_allclose(got[0, 0], together, rtol=1e-6)
    np.testing.assert_allclose(got[1], np.broadcast_to(np.r_[1.0, np.full(L - 1, 8 / (L - 1))], (C + 1, L)), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 4, L])
def test_cells_are_drawn_as_often_as_their_share(count):
    """Exactly so, not only in proportion: also where some cells are in all images or in none."""
    rest = np.asarray([0.9, 0.05, 0.05, 0.0, 1.0, 0.4, 0.2, 0.15, 0.1, 0.1, 0.05])
    share = {1: np.eye(L)[0], 4: np.r_[1.0, rest], L: np.ones(L)}[count]
    assert share.sum() == pytest.approx(count)
    tries = 4000
    drawn = np.asarray(draw_positions(np.tile(share, (tries, 1)).astype(np.float32), keys_of(tries), count))
    assert drawn.shape == (tries, count)
    got = np.bincount(drawn.reshape(-1), minlength=L) / tries
    assert (np.abs(got - share) <= 4 * (share * (1 - share) / tries) ** 0.5 + 1e-9).all()
    places = [(drawn[:, place] == 0).mean() for place in range(count)]  # the order is random too
    assert np.ptp(places) < 0.1


def test_a_draw_is_of_its_example():
    share = np.asarray(shares(new_counts(CONFIG), CONFIG))[1, :3]
    whole = draw_positions(share, keys_of(3), 9)
    np.testing.assert_array_equal(draw_positions(share[1:], keys_of(3)[1:], 9), whole[1:])
    assert (np.asarray(draw_positions(share, keys_of(3, seed=1), 9)) != np.asarray(whole)).any(axis=1).all()


def test_a_cell_of_every_image_is_always_drawn():
    """Although float32 rounds the sum of many shares."""
    rng = np.random.default_rng(0)
    share = np.clip(rng.beta(0.3, 0.3, (64, 4096)), 0, 1)
    share[:, :512] = 1.0
    free = share[:, 512:]
    count = 2048
    free *= ((count - 512) / free.sum(axis=1))[:, None]
    for _ in range(50):  # what is above 1 goes to the others
        free[:] = np.minimum(free, 1.0)
        free *= ((count - 512) / free.sum(axis=1))[:, None]
    drawn = np.asarray(draw_positions(np.minimum(share, 1.0).astype(np.float32), keys_of(64), count))
    assert (np.sort(drawn, axis=1)[:, :512] == np.arange(512)).all()
