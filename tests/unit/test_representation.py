"""Probes and neighbours on features made by hand, and encoders that are measured."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergevq_jax.commands.evaluate.representation import random_tokenizer, tokenizer_encoder
from mergevq_jax.evaluate.representation import finetune, knn, probe
from mergevq_jax.evaluate.representation.encoders import CLASS, MEAN, dinov2_encoder, pixels_encoder, random_dinov2
from mergevq_jax.evaluate.representation.finetune import FinetuneConfig
from mergevq_jax.evaluate.representation.probe import Normalisation, ProbeConfig
from mergevq_jax.evaluate.representation.rows import Accuracy, Member, RepresentationConfig, rows_of
from mergevq_jax.tokenizer import tome
from mergevq_jax.tokenizer.config import PRESETS, TokenizerConfig
from runtime_jax.config import build, load
from runtime_jax.networks.dinov2 import DINOv2Config
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.update import Optimizer

CLASSES = 4
DINOV2 = DINOv2Config(width=8, num_layers=2, num_heads=2, patch_size=4, image_size=8)
TOKENIZER = TokenizerConfig(
    resolution=16,
    ch=8,
    ch_mult=(1, 1),
    norm_num_groups=4,
    num_res_blocks=(0, 0),
    num_att_blocks=2,
    num_heads=1,
    z_channels=4,
    keep=40,
    dist_head=None,
    recovery=None,
)


def data(seed: int, count: int, signal: float) -> tuple[np.ndarray, np.ndarray]:
    """Features of classes that lie `signal` standard deviations apart, in other units for each feature."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    features = rng.normal(size=(count, 6))
    features[np.arange(count), labels] += signal
    return (features * 10.0 ** np.arange(-3, 3) + 5.0).astype(np.float32), labels


@pytest.mark.parametrize(("signal", "low", "high"), [(8.0, 0.99, 1.0), (0.0, 0.15, 0.35)])
def test_a_probe_finds_what_is_there_and_no_more(tmp_path, signal, low, high):
    train, test = data(0, 256, signal), data(1, 400, signal)
    config = ProbeConfig(epochs=20, batch_size=32, learning_rate=1e-2)
    said = probe.predict(*train, test[0], classes=CLASSES, seeds=(0, 1), config=config, workdir=tmp_path / "probe")
    assert said.shape == (2, 400)
    for seed in said:
        assert low <= (seed == test[1]).mean() <= high


def test_each_seed_has_an_order_of_its_own_and_every_epoch_has_all_images():
    features, labels = np.arange(10, dtype=np.float32)[:, None], np.arange(10)
    stream = probe.batches(features, labels, (0, 1), 5, 0)
    epochs = [np.concatenate([next(stream)["label"] for _ in range(2)]) for _ in range(2)]
    for epoch in epochs:
        assert (np.sort(epoch, axis=0) == np.arange(10)[:, None]).all()
    assert (epochs[0][:, 0] != epochs[0][:, 1]).any() and (epochs[0] != epochs[1]).any()
    later = next(probe.batches(features, labels, (0, 1), 5, 3))
    np.testing.assert_array_equal(later["label"], epochs[1][5:])
    np.testing.assert_array_equal(later["features"][..., 0], later["label"])


def test_a_probe_does_not_depend_on_the_other_seeds(tmp_path):
    train, test = data(0, 64, 1.0), data(1, 64, 1.0)
    config = ProbeConfig(epochs=3, batch_size=16)
    run = functools.partial(probe.predict, *train, test[0], classes=CLASSES, config=config)
    both, alone = run(seeds=(3, 5), workdir=tmp_path / "both"), run(seeds=(5,), workdir=tmp_path / "alone")
    np.testing.assert_array_equal(both[1], alone[0])


def test_normalised_features_have_mean_0_and_variance_1():
    features, _ = data(0, 300, 3.0)
    normalised = Normalisation.of(features)(features)
    np.testing.assert_allclose(normalised.mean(axis=0), 0.0, atol=1e-3)
    np.testing.assert_allclose(normalised.std(axis=0)[1:], 1.0, atol=1e-2)
    assert not Normalisation.of(np.ones((4, 2)))(np.ones((4, 2))).any()  # a dead feature stays finite


def brute_force(train, labels, test, k, temperature):
    """One image at a time, in float64."""
    unit = [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (train, test)]
    said = []
    for query in unit[1]:
        cosines = unit[0] @ query
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        votes = np.zeros(CLASSES)
        for i in nearest:
            votes[labels[i]] += np.exp(cosines[i] / temperature)
        said.append(votes.argmax())
    return np.array(said)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 1000), st.sampled_from([1, 3, 20]), st.sampled_from([7, 64]))
def test_neighbours_vote_as_by_brute_force(seed, k, block):
    train, labels = data(seed, 40, 1.0)
    test, _ = data(seed + 1, 23, 1.0)
    centred = (x - train.mean(axis=0) for x in (train, test))
    train, test = (x / 10.0 ** np.arange(-3, 3) for x in centred)
    said = knn.predict(train, labels, test, classes=CLASSES, k=k, block=block)
    np.testing.assert_array_equal(said, brute_force(train, labels, test, k, knn.TEMPERATURE))


def test_neighbours_find_what_is_there():
    (train, labels), (test, truth), (noise, _) = data(0, 300, 8.0), data(1, 200, 8.0), data(1, 200, 0.0)
    scale = 10.0 ** np.arange(-3, 3)
    said, of_noise = (knn.predict((train - 5) / scale, labels, (x - 5) / scale, classes=CLASSES) for x in (test, noise))
    assert (said == truth).mean() > 0.99 and (of_noise == truth).mean() < 0.4


@pytest.mark.parametrize("k", [0, 5])
def test_too_few_neighbours(k):
    with pytest.raises(ValueError, match=f"k-NN: {k} neighbours of 4 training images; 1 to 4 are possible"):
        knn.predict(np.ones((4, 2)), np.zeros(4, int), np.ones((1, 2)), classes=2, k=k)


def images(size: int = 16, count: int = 3) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (count, size, size, 3), minval=-1.0, maxval=1.0)


def test_a_tokenizers_mean_counts_every_raw_token_once():
    """The mean over kept tokens with their sizes is that over the unmerged raster."""
    encoder = random_tokenizer(TOKENIZER, 20, 0)
    from mergevq_jax.tokenizer.encoder import Encoder

    found = jax.jit(encoder.apply)(encoder.params, images())
    encoded = Encoder(TOKENIZER).apply({"params": encoder.params}, images(), keep=20)
    raster = tome.unmerge(encoded.hidden[:, 1:], encoded.source_map)
    assert raster.shape == (3, 64, 8) and encoded.hidden.shape == (3, 21, 8)
    np.testing.assert_allclose(found[MEAN], raster.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(found[CLASS], encoded.hidden[:, 0], atol=1e-6)


def test_pixels_are_averages_of_squares():
    encoder = pixels_encoder(32)
    image = np.kron(np.arange(256.0).reshape(1, 16, 16, 1), np.ones((1, 2, 2, 3)))
    np.testing.assert_allclose(
        encoder.apply(None, jnp.asarray(image))["pixels"].reshape(16, 16, 3)[..., 1].ravel(), np.arange(256)
    )
    assert pixels_encoder(24).shapes()["pixels"].shape == (1, 12 * 12 * 3)


def test_layers_from_the_images_up():
    encoder = tokenizer_encoder("t", TOKENIZER, None, 20)
    paths = {
        "stem/conv_in/kernel": 0,
        "attn/cls_token": 0,
        "attn/blocks_0/ls1/gamma": 1,
        "attn/blocks_1/attn/qkv/kernel": 2,
    }
    assert {path: encoder.depth(path) for path in paths} == paths and encoder.layers == 3
    assert encoder.depth("norm_out/scale") == 3
    vit = dinov2_encoder("d", DINOV2, None, 8)
    assert vit.depth("blocks/norm1/scale").tolist() == [1, 2]
    assert (vit.depth("positions"), vit.depth("norm/scale"), vit.layers) == (0, 3, 3)
    np.testing.assert_allclose(finetune.rate("encoder/blocks/norm1/scale", vit, 0.5), [1 / 4, 1 / 2])
    rates = {path: finetune.rate(path, vit, 0.5) for path in ("encoder/positions", "encoder/norm/scale", "head/kernel")}
    assert list(rates.values()) == [1 / 8, 1.0, 1.0]


def test_rates_scale_updates():
    plain = Optimizer.make(OptimizerConfig(learning_rate=1.0), total_steps=2, batch_size=1)
    scaled = plain.scaled(lambda path: {"a": 0.5, "b": np.array([0.0, 2.0])}[path])
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 3))}
    gradients = jax.tree.map(jnp.ones_like, params)
    before, _ = plain.update(gradients, plain.transformation.init(params), params)
    after, _ = scaled.update(gradients, scaled.transformation.init(params), params)
    np.testing.assert_allclose(after["a"], 0.5 * before["a"], rtol=1e-6)
    np.testing.assert_allclose(after["b"], np.array([[0.0], [2.0]]) * before["b"], rtol=1e-6)


def test_rows_put_random_networks_together():
    floor = [random_dinov2(DINOV2, 8, seed) for seed in range(2)]
    trained = dinov2_encoder("mine", DINOV2, floor[0].params, 8)
    rows = rows_of([trained, *floor, pixels_encoder(8)], (MEAN, CLASS), 2)
    assert [(row.name, row.pooling, row.width, row.members) for row in rows] == [
        ("mine", MEAN, 8, (Member(0, (0, 1)),)),
        ("mine", CLASS, 8, (Member(0, (0, 1)),)),
        ("random weights, DINOv2", MEAN, 8, (Member(1, (0,)), Member(2, (1,)))),
        ("random weights, DINOv2", CLASS, 8, (Member(1, (0,)), Member(2, (1,)))),
        ("pixels, 8 x 8", "pixels", 192, (Member(3, (0, 1)),)),
    ]
    leaves = [jax.tree.leaves(encoder.params)[-1] for encoder in floor]
    assert not np.array_equal(*leaves)


def test_an_interval_is_over_images():
    correct = np.array([[1, 1, 0, 0], [1, 0, 0, 1]], bool)
    found = Accuracy.of(correct)
    assert found.by_seed == [50.0, 50.0] and found.estimate.mean == 50.0 and found.estimate.count == 4
    np.testing.assert_allclose(found.estimate.half_width, 3.182 * np.std([100, 50, 0, 50], ddof=1) / 2, rtol=1e-3)


def test_configs_build():
    small, published = (
        build(RepresentationConfig, load(f"configs/representation.py:{arg}")) for arg in ("small", "imagenet")
    )
    assert published == RepresentationConfig()
    assert (published.linear.batch_size, published.linear.epochs, published.linear.learning_rate) == (1024, 90, 1e-3)
    assert (small.knn.k, small.knn.temperature) == (20, 0.07) and small.linear.batch_size == 128


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProbeConfig(epochs=0), "at least 1"),
        (lambda: ProbeConfig(batch_size=8).steps(7), "7 training images don't fill a batch of 8"),
        (lambda: FinetuneConfig(layer_decay=0.0), "layer_decay=0.0 is in"),
        (lambda: FinetuneConfig(crop_area=(0.0, 1.0)), "area is"),
        (lambda: RepresentationConfig().check(("knn",), 19), "20 neighbours, but 19 training images"),
        (lambda: dinov2_encoder("d", DINOV2, None, 10), "10 pixels are not a multiple of its patches of 4"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_published_presets_have_layers():
    for config in PRESETS.values():
        assert tokenizer_encoder("t", config, None, config.keep).layers == config.num_att_blocks + 1
