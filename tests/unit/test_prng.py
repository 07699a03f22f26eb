"""Keys are a pure function of (seed, stream, step, example)."""

import itertools

import jax
import numpy as np
import pytest

from runtime_jax.prng import Stream, example_keys, host_rng, stream_key


def test_numbers_never_change():
    # A change here means that no earlier run can be continued.
    assert [int(stream) for stream in Stream] == list(range(len(Stream)))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2), 7)
    assert (stream_key(3, Stream.MERGE, 7) == key).all()


def test_streams_and_steps_differ():
    keys = {
        tuple(np.asarray(jax.random.key_data(stream_key(seed, stream, step))).tolist())
        for seed, stream, step in itertools.product(range(2), Stream, range(3))
    }
    assert len(keys) == 2 * len(Stream) * 3


def test_step_may_be_traced():
    traced = jax.jit(lambda step: stream_key(1, Stream.NOISE, step))(5)
    assert (traced == stream_key(1, Stream.NOISE, 5)).all()


def test_examples_keep_their_numbers_in_any_batch():
    key = stream_key(0, Stream.NOISE)
    whole = jax.vmap(jax.random.normal)(example_keys(key, np.arange(8)))
    order = np.array([5, 2, 7])
    some = jax.vmap(jax.random.normal)(example_keys(key, order))
    np.testing.assert_array_equal(np.asarray(whole)[order], some)
    assert len(set(np.asarray(whole).tolist())) == 8


def test_host_rng_is_a_function_of_its_counters():
    draw = [host_rng(1, Stream.DATA, 2, index).random() for index in range(4)]
    assert draw == [host_rng(1, Stream.DATA, 2, index).random() for index in range(4)]
    assert len({*draw, host_rng(1, Stream.AUGMENT, 2, 0).random(), host_rng(2, Stream.DATA, 2, 0).random()}) == 6


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"seed: got {seed}, expected an integer in 0..4294967295"):
        stream_key(seed, Stream.DATA)
    with pytest.raises(ValueError, match="seed: got"):
        host_rng(seed, Stream.DATA)
