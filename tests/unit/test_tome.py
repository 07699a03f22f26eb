"""Token merging against plain loops and dense matrices, and a check that it never builds a dense matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_mergevq import one_hot
from golden_tools import jit
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from mergevq_jax.tokenizer import model, tome
from mergevq_jax.tokenizer.config import TokenizerConfig
from runtime_jax.nn.compute import Compute

B, T, R, D = 2, 17, 6, 5
K = T - R


def reference_step(metric, x, size, r, class_token):
    """One merge of one example in plain loops: kept features, sizes, and the new position of every token."""
    tokens = len(metric)
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    even, odd = range(0, tokens, 2), range(1, tokens, 2)
    pairs = []
    for source in even:
        if class_token and source == 0:
            continue
        similarity = [unit[source] @ unit[target] for target in odd]
        pairs.append((max(similarity), source, odd[int(np.argmax(similarity))]))
    joins = {source: target for _, source, target in sorted(pairs, key=lambda pair: -pair[0])[:r]}
    kept = [token for token in even if token not in joins] + list(odd)
    position = np.array([kept.index(joins.get(token, token)) for token in range(tokens)])
    merged, new_size = np.zeros((len(kept), x.shape[1])), np.zeros(len(kept))
    for token in range(tokens):
        merged[position[token]] += size[token] * x[token]
        new_size[position[token]] += size[token]
    return merged / new_size[:, None], new_size, position


@functools.partial(jit, static_argnames=("r", "class_token"))
def merge_step(metric, x, size, r=R, class_token=True):
    matching = tome.bipartite_soft_matching(metric, r, class_token=class_token)
    identity = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return *tome.merge(matching, x, size), tome.merge_source_map(matching, identity)


def example(seed=0, tokens=T):
    rng = np.random.default_rng(seed)
    metric, x = rng.normal(size=(B, tokens, 3)), rng.normal(size=(B, tokens, D))
    return metric.astype(np.float32), x.astype(np.float32), rng.integers(1, 9, (B, tokens)).astype(np.float32)


@pytest.mark.parametrize(
    ("tokens", "r", "class_token"), [(17, 6, True), (17, 8, True), (17, 8, False), (16, 7, True), (16, 8, False)]
)
def test_a_step_equals_plain_loops(tokens, r, class_token):
    metric, x, size = example(tokens, tokens)
    merged, new_size, source_map = merge_step(metric, x, size, r, class_token)
    assert merged.shape == (B, tokens - r, D)
    for b in range(B):
        expected, expected_size, position = reference_step(metric[b], x[b], size[b], r, class_token)
        np.testing.assert_array_equal(source_map[b], position)
        np.testing.assert_array_equal(new_size[b], expected_size)
        np.testing.assert_allclose(merged[b], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("r", [0, 1, 5, 11, 12])
def test_the_highest_values_are_those_of_a_stable_sort(r):
    """Also among equal values, infinities and NaN, which counts as -inf."""
    values = np.random.default_rng(r).integers(-2, 3, (50, 12)).astype(np.float32)
    values[:10, 3], values[:10, 7], values[5:15, 0] = -np.inf, np.nan, -0.0
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf, neginf=-np.inf), axis=1, kind="stable")
    highest, others = jit(tome._highest, static_argnums=1)(jnp.asarray(values), r)
    np.testing.assert_array_equal(highest, order[:, :r])
    np.testing.assert_array_equal(others, np.sort(order[:, r:], axis=1))


def test_remat_matches_once_and_changes_nothing():
    sizes = {"resolution": 16, "ch": 32, "ch_mult": (1, 1), "num_res_blocks": 0, "num_att_blocks": 2, "num_heads": 2}
    config = TokenizerConfig(**sizes, keep=40, recovery=None, dist_head=None)
    params = model.init_params(config, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def gradient(remat):
        def loss(params):
            return jnp.mean(jnp.square(model.encode(params, config, images, keep=40, compute=Compute(remat=remat)).z))

        return jax.grad(loss)

    plain, kept = (str(jax.make_jaxpr(gradient(remat))(params)) for remat in (False, True))
    assert "remat" in kept and kept.count("argmax[") == plain.count("argmax[") == 2  # one match a block
    values, again = (jit(gradient(remat))(params) for remat in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), values, again)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_mass_is_conserved_and_the_class_token_stays(seed):
    metric, x, size = example(seed)
    merged, new_size, source_map = (np.asarray(part) for part in merge_step(metric, x, size))
    np.testing.assert_array_equal(new_size.sum(1), size.sum(1))
    mass, before = (merged * new_size[..., None]).sum(1), (x * size[..., None]).sum(1)
    np.testing.assert_allclose(mass, before, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(merged[:, 0], x[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(new_size[:, 0], size[:, 0])
    for b in range(B):
        assert np.flatnonzero(source_map[b] == 0).tolist() == [0]  # nothing joins the class token either
        assert set(source_map[b]) == set(range(K))  # no group is empty
        np.testing.assert_array_equal(np.bincount(source_map[b], size[b]), new_size[b])


def test_the_class_token_stays_whatever_is_most_similar():
    metric, x, size = example()
    metric = np.broadcast_to(metric[:, :1], metric.shape)  # every pair ties at similarity 1
    _, new_size, source_map = merge_step(metric, x, size, 8)
    assert source_map[:, 0].tolist() == [0, 0] and (new_size[:, 0] == size[:, 0]).all()


@pytest.mark.parametrize("zeros", [slice(None), slice(1, None), slice(4, 5)])
def test_zero_keys_are_no_accident(zeros):
    """A black image gives zero keys at initialisation: 0 / 0 once let the class token merge."""
    metric, x, size = example()
    metric[:, zeros] = 0
    merged, _, source_map = (np.asarray(part) for part in merge_step(metric, x, size))
    assert np.isfinite(merged).all()
    for row in source_map:
        assert np.flatnonzero(row == 0).tolist() == [0] and set(row) == set(range(K))


def test_the_order_of_kept_tokens():
    metric, _, _ = example(3)
    matching = match(metric, r=R, class_token=True)
    kept = np.asarray(matching.kept)
    evens = K - T // 2
    assert (kept[:, :evens] % 2 == 0).all() and (np.diff(kept[:, :evens]) > 0).all()
    assert (kept[:, evens:] == np.arange(1, T, 2)).all()
    together = np.sort(np.concatenate([kept, np.asarray(matching.source)], axis=1))
    assert (together == np.arange(T)).all()
    assert (np.asarray(matching.target) >= evens).all()  # only odd tokens are joined


def test_bfloat16_tokens_are_summed_in_float32():
    metric, _, _ = example()
    large = jnp.full((B, T, D), 256.0, jnp.bfloat16).at[:, ::2].set(1.0)
    merged, _, source_map = merge_step(metric, large, jnp.full((B, T), 1.0))
    assert merged.dtype == jnp.bfloat16
    for b in range(B):
        groups = [np.asarray(large[b, :, 0], np.float32)[source_map[b] == k].mean() for k in range(K)]
        np.testing.assert_array_equal(merged[b, :, 0], np.asarray(groups, dtype=jnp.bfloat16))


def test_no_gradient_through_the_metric():
    metric, x, size = example()

    def loss(metric):
        matching = tome.bipartite_soft_matching(metric, R, class_token=True)
        return (tome.merge(matching, jnp.asarray(x), jnp.asarray(size))[0] ** 2).sum()

    assert not np.any(jit(jax.grad(loss))(metric))


@pytest.mark.parametrize(("r", "class_token", "limit"), [(9, True, 8), (9, False, 8), (-1, True, 8)])
def test_more_than_half_is_refused(r, class_token, limit):
    metric, _, _ = example()
    with pytest.raises(ValueError, match=rf"cannot merge {r} of 17 tokens in one step: allowed are 0 to {limit}"):
        tome.bipartite_soft_matching(jnp.asarray(metric), r, class_token=class_token)


# Source maps.


match = jit(tome.bipartite_soft_matching, static_argnames=("r", "class_token"))
compose = jit(tome.merge_source_map)


@pytest.mark.parametrize("steps", [(6,), (3, 0, 6)])
def test_source_map_equals_the_product_of_matrices(steps):
    rng = np.random.default_rng(len(steps))
    source_map = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    matrix = np.broadcast_to(np.eye(T, dtype=np.int32), (B, T, T))
    tokens = T
    for r in steps:
        matching = match(rng.normal(size=(B, tokens, 3)).astype(np.float32), r=r, class_token=True)
        identity = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (B, tokens))
        tokens -= r
        matrix = one_hot(compose(matching, identity), tokens) @ matrix
        source_map = compose(matching, source_map)
    np.testing.assert_array_equal(one_hot(source_map, tokens), matrix)
    assert (matrix.sum(1) == 1).all()


def random_map(seed=0, raw=29, kept=7):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.r_[np.arange(kept), rng.integers(0, kept, raw - kept)]) for _ in range(B)])


def test_unmerge_gives_every_position_its_groups_token():
    source_map = jnp.asarray(random_map(), jnp.int32)
    tokens = np.random.default_rng(1).normal(size=(B, 7, D)).astype(np.float32)
    expected = one_hot(source_map, 7).swapaxes(1, 2).astype(np.float32) @ tokens
    np.testing.assert_array_equal(tome.unmerge(jnp.asarray(tokens), source_map), expected)


def test_group_starts():
    source_map = np.where(random_map() == 3, 4, random_map())  # group 3 is empty
    found = tome.group_starts(jnp.asarray(source_map, jnp.int32), 7)
    for b in range(B):
        expected = [int(np.append(np.flatnonzero(source_map[b] == k), 29)[0]) for k in range(7)]
        assert found[b].tolist() == expected and expected[3] == 29


def test_the_papers_example_of_group_starts():
    groups = jnp.asarray([[0, 0, 1, 1, 2, 2, 2, 3, 3]], jnp.int32)
    members = tome.group_starts(groups, 4)
    positions = jnp.take_along_axis(members, groups, axis=1) + 1
    assert positions.tolist() == [[1, 1, 3, 3, 5, 5, 5, 8, 8]]


def test_gradient_of_merge_and_unmerge_equals_the_dense_form():
    metric, x, size = example(5)
    matching = match(metric, r=R, class_token=True)
    weight = np.random.default_rng(6).normal(size=(B, T, D)).astype(np.float32)

    def sparse(x, size):
        identity = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        merged, _ = tome.merge(matching, x, size)
        return (weight * jnp.sin(tome.unmerge(merged, tome.merge_source_map(matching, identity)))).sum()

    matrix = one_hot(merge_step(metric, x, size)[2], K).astype(np.float32)

    def dense(x, size):
        weighted = matrix * size[:, None, :]
        merged = jnp.einsum("bkt,btd->bkd", weighted, x) / weighted.sum(-1)[..., None]
        return (weight * jnp.sin(jnp.einsum("bkt,bkd->btd", matrix, merged))).sum()

    (ours, gradients), (theirs, expected) = (
        jit(jax.value_and_grad(function, argnums=(0, 1)))(x, size) for function in (sparse, dense)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for gradient, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=1e-6)
        assert np.abs(right).max() > 0.1


# The bookkeeping has no array with two token axes, and none as large as one.

RAW, STEPS, BATCH, WIDTH = 73, (19, 13, 11), 3, 5
COUNTS = (73, 54, 41, 30)
KEPT = COUNTS[-1]


def arrays(jaxpr):
    """Shapes of all arrays in a jaxpr and the programs inside it."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield tuple(variable.aval.shape)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays(inner)


def matrices(function, *arguments):
    """Shapes in a function's jaxpr that have two token axes, or as many entries as a [K, L] matrix."""
    shapes = set(arrays(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert len(shapes) > 2
    is_matrix = lambda shape: sum(size in COUNTS for size in shape) > 1 or np.prod(shape) >= KEPT * RAW  # noqa: E731
    return {shape for shape in shapes if is_matrix(shape)}


def matchings():
    """Only their shapes matter."""
    index = lambda count: jnp.zeros((BATCH, count), jnp.int32)  # noqa: E731
    return [
        tome.Matching(kept=index(tokens - r), source=index(r), target=index(r))
        for tokens, r in zip(COUNTS, STEPS, strict=False)
    ]


def bookkeeping(steps, x, size):
    """An encoder's merges and their reversal: tokens, sizes, source map, unmerged tokens, starts of groups."""
    source_map = jnp.broadcast_to(jnp.arange(RAW, dtype=jnp.int32), (BATCH, RAW))
    for matching in steps:
        x, size = tome.merge(matching, x, size)
        source_map = tome.merge_source_map(matching, source_map)
    return x, size, source_map, tome.unmerge(x, source_map), tome.group_starts(source_map, KEPT)


def dense_bookkeeping(steps, x, size):
    """The same with the matrices that `bookkeeping` avoids."""
    source_map = bookkeeping(steps, x, size)[2]
    matrix = (source_map[:, None, :] == jnp.arange(KEPT)[None, :, None]).astype(x.dtype)
    merged = jnp.einsum("bkl,bld->bkd", matrix, x)
    return jnp.einsum("bkl,bkd->bld", matrix, merged)


X, SIZE = jnp.ones((BATCH, RAW, WIDTH)), jnp.ones((BATCH, RAW))


def test_bookkeeping_has_no_matrix():
    assert matrices(bookkeeping, matchings(), X, SIZE) == set()


def test_the_gradient_of_bookkeeping_has_no_matrix():
    def loss(x, size, steps):
        x, size, _, full, _ = bookkeeping(steps, x, size)
        return (full**2).sum() + x.sum() + size.sum()

    assert matrices(jax.grad(loss, argnums=(0, 1)), X, SIZE, matchings()) == set()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_one_hot_matrix_would_be_found(with_gradient):
    function = lambda x, steps: dense_bookkeeping(steps, x, SIZE).sum()  # noqa: E731
    found = matrices(jax.grad(function) if with_gradient else function, X, matchings())
    assert (BATCH, KEPT, RAW) in found
    flat = lambda x: jnp.zeros(KEPT * RAW).at[0].set(x.sum())  # noqa: E731
    assert (KEPT * RAW,) in matrices(jax.jit(flat), X)


def test_decoding_has_no_matrix_of_kept_and_raw_tokens():
    config = TokenizerConfig(
        resolution=16, ch=32, ch_mult=(1, 1), num_res_blocks=0, num_att_blocks=1, num_heads=2, keep=40, recovery=None
    )
    params = model.param_shapes(config)
    kept, raw, batch = 39, 7 * 9, 3  # sizes of no other axis
    codes = jax.ShapeDtypeStruct((batch, kept, config.z_channels), jnp.float32)
    source_map = jax.ShapeDtypeStruct((batch, raw), jnp.int32)
    program = jax.make_jaxpr(lambda *arguments: model.decode(arguments[0], config, *arguments[1:], (7, 9)))
    shapes = set(arrays(program(params, codes, source_map).jaxpr))
    assert (batch, kept, config.z_channels) in shapes and any(shape.count(raw) == 2 for shape in shapes)
    assert not [shape for shape in shapes if kept in shape and raw in shape]


# Schedules.


def allowed(raw, kept, layers, counts):
    tokens = raw
    for count in counts:
        assert 0 <= count <= tokens // 2
        tokens -= count
    return len(counts) == layers and tokens == kept


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 150), st.integers(1, 13), st.data())
def test_schedules_are_exact(raw, layers, data):
    kept = data.draw(st.integers(1, raw))
    try:
        counts = tome.merge_counts(raw, kept, layers)
    except ValueError as error:
        assert f"cannot keep {kept} of {raw} tokens in {layers} layers" in str(error)
        fewest = int(str(error).split("allowed are ")[1].split()[0])
        assert allowed(raw, fewest, layers, tome.merge_counts(raw, fewest, layers))
        assert kept < fewest
    else:
        assert allowed(raw, kept, layers, counts)


@pytest.mark.parametrize(("raw", "layers", "fewest"), [(256, 12, 7), (1024, 12, 24), (256, 3, 32), (64, 1, 32)])
def test_everything_above_the_fewest_is_reachable(raw, layers, fewest):
    for kept in (*range(fewest, raw, raw // 40), *range(raw - 30, raw + 1)):
        assert allowed(raw, kept, layers, tome.merge_counts(raw, kept, layers))
    with pytest.raises(ValueError, match=f"allowed are {fewest} to {raw}$"):
        tome.merge_counts(raw, fewest - 1, layers)


@pytest.mark.parametrize(
    ("raw", "kept", "layers", "counts"),
    [
        (256, 144, 12, (12, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 5)),  # the paper's G+R
        (256, 248, 12, (8, *[0] * 11)),  # the closest schedule would start at 1 - 4 tokens
        (64, 64, 2, (0, 0)),
        (5, 5, 0, ()),
        (9, 6, 1, (3,)),
    ],
)
def test_some_schedules(raw, kept, layers, counts):
    assert tome.merge_counts(raw, kept, layers) == counts


@pytest.mark.parametrize(
    ("raw", "kept", "layers", "message"),
    [
        (256, 257, 12, "cannot keep 257 of 256 tokens: allowed are 1 to 256"),
        (256, 0, 12, "cannot keep 0 of 256 tokens: allowed are 1 to 256"),
        (9, 6, 0, "cannot merge 9 tokens to 6 without transformer blocks"),
        (256, 31, 3, "cannot keep 31 of 256 tokens in 3 layers, each of which merges at most half of its tokens: "),
    ],
)
def test_impossible_schedules(raw, kept, layers, message):
    with pytest.raises(ValueError) as error:
        tome.merge_counts(raw, kept, layers)
    assert message in str(error.value)
