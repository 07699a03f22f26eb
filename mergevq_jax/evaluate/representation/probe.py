"""The linear probe: parameter-free batch normalisation and a linear layer, trained on features that don't change.

Axes: N training images, M test images, B batch, S seeds, F features, C classes.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from runtime_jax.config import Duration
from runtime_jax.files import AnyPath
from runtime_jax.prng import Stream, host_rng, stream_key
from runtime_jax.training.loop import LoopConfig
from runtime_jax.training.network import Means, TrainingConfig, train_network
from runtime_jax.training.optimizer import OptimizerConfig
from runtime_jax.training.stop import StoppedError
from runtime_jax.training.update import Params

EPSILON = 1e-6  # of the normalisation
INITIAL = 0.01  # standard deviation of new weights


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """AdamW with a cosine schedule; the defaults are those of the paper, for ImageNet, but the weight decay is ours."""

    epochs: int = 90
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.01

    def __post_init__(self):
        if min(self.epochs, self.batch_size) < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(f"probe: {self}: epochs and batch size are at least 1, the learning rate is positive")

    def steps(self, count: int) -> int:
        """Steps of a probe on `count` images; raises ValueError where they don't fill a batch."""
        if count < self.batch_size:
            raise ValueError(
                f"{count} training images don't fill a batch of {self.batch_size}: set a smaller batch_size "
                "(--config.linear.batch_size, --config.finetune.batch_size)"
            )
        return self.epochs * (count // self.batch_size)

    def training(self, count: int) -> TrainingConfig:
        """How a network is trained on `count` images; a few checkpoints and lines of the log."""
        steps = self.steps(count)
        optimizer = OptimizerConfig(learning_rate=self.learning_rate, schedule="cosine", weight_decay=self.weight_decay)
        often = max(1, steps // 5)
        return TrainingConfig(
            batch_size=self.batch_size,
            optimizer=optimizer,
            ema_decay=0.0,
            loop=LoopConfig(
                duration=Duration(steps=steps), log_every=often, checkpoint_every=often, keep_checkpoints=1
            ),
        )


class Normalisation(NamedTuple):
    """Batch normalisation without parameters, by the statistics of all training features.

    Features don't change while a probe learns, so this is what batch normalisation's running averages estimate.
    """

    mean: Float[np.ndarray, "F"]
    deviation: Float[np.ndarray, "F"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "N F"]) -> "Normalisation":
        """The statistics of features."""
        wide = np.asarray(features, np.float64)
        return cls(wide.mean(axis=0), np.sqrt(wide.var(axis=0) + EPSILON))

    def __call__(self, features: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n F"]:
        """Normalised features, float32."""
        return ((features - self.mean) / self.deviation).astype(np.float32)


def predict(
    train: Float[np.ndarray, "N F"],
    labels: Int[np.ndarray, "N"],
    test: Float[np.ndarray, "M F"],
    *,
    classes: int,
    seeds: Sequence[int],
    config: ProbeConfig,
    workdir: AnyPath,
) -> Int[np.ndarray, "S M"]:
    """What probes of several seeds, trained at once, say about the test images; all processes call it together.

    A seed sets the new weights and the order of the images. A run that is started again in `workdir` goes on.

    Raises:
      ValueError: fewer training images than a batch.
      StoppedError: by a signal, after a checkpoint.
    """
    normalise = Normalisation.of(train)
    result = train_network(
        config.training(len(train)),
        workdir,
        resolved_config={"probe": asdict(config) | {"seeds": list(seeds), "classes": classes}},
        must_match=("probe",),
        init=lambda: init_params(train.shape[1], classes, seeds),
        loss=loss,
        batches=functools.partial(batches, normalise(train), labels, seeds, config.batch_size),
        dtype="float32",
    )
    if result.stopped_by is not None:
        raise StoppedError(result.stopped_by, f" after step {result.step} of a probe; the same command goes on")
    params = jax.device_get(result.state.params)
    logits = np.einsum("mf,sfc->smc", normalise(test), params["kernel"]) + params["bias"][:, None]
    return logits.argmax(axis=-1)


def init_params(width: int, classes: int, seeds: Sequence[int]) -> Params:
    """One linear layer for each seed: kernel [S, F, C] and bias [S, C]."""
    keys = [stream_key(seed, Stream.PARAMS) for seed in seeds]
    kernels = [INITIAL * jax.random.normal(key, (width, classes)) for key in keys]
    return {"kernel": jnp.stack(kernels), "bias": jnp.zeros((len(keys), classes))}


def loss(params: Params, batch: dict[str, Array], step: Array) -> tuple[Array, Means]:
    """The mean of the probes' cross-entropies, each on its own batch: "features" [B, S, F] and "label" [B, S]."""
    logits = jnp.einsum("bsf,sfc->bsc", batch["features"], params["kernel"]) + params["bias"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), {"accuracy": jnp.mean(logits.argmax(axis=-1) == batch["label"])}


def batches(
    features: Float[np.ndarray, "N F"],
    labels: Int[np.ndarray, "N"],
    seeds: Sequence[int],
    batch_size: int,
    start: int,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches from step `start` on: each seed has an order of its own, in every epoch another."""
    in_epoch = len(features) // batch_size
    epoch, orders = -1, []
    for step in itertools.count(start):
        if step // in_epoch != epoch:
            epoch = step // in_epoch
            orders = [host_rng(seed, Stream.ORDER, epoch).permutation(len(features)) for seed in seeds]
        first = step % in_epoch * batch_size
        rows = np.stack([order[first : first + batch_size] for order in orders], axis=1)
        yield {"features": features[rows], "label": np.asarray(labels[rows], np.int32)}
