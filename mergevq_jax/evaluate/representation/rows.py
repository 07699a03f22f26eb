"""Rows of the table: which features, measured by which methods, and the share of test images that each gets right.

Axes: S seeds, M test images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from mergevq_jax.evaluate.parts import Measured
from mergevq_jax.evaluate.representation import knn, probe
from mergevq_jax.evaluate.representation.encoders import PIXELS, Encoder
from mergevq_jax.evaluate.representation.features import DIGEST, LABEL
from mergevq_jax.evaluate.representation.finetune import FinetuneConfig
from mergevq_jax.evaluate.representation.probe import ProbeConfig
from runtime_jax.estimate import Estimate, estimate
from runtime_jax.files import AnyPath

KNN, LINEAR, FINETUNE = METHODS = ("knn", "linear", "finetune")
Method = Literal["knn", "linear", "finetune"]
HEADINGS = {KNN: "k-NN, %", LINEAR: "linear probe, %", FINETUNE: "fine-tuned, %"}


@dataclass(frozen=True, kw_only=True)
class KNNConfig:
    """Of the nearest neighbours."""

    k: int = knn.NEIGHBOURS
    temperature: float = knn.TEMPERATURE

    def __post_init__(self):
        if self.k < 1 or self.temperature <= 0:
            raise ValueError(f"knn: k={self.k} is at least 1, temperature={self.temperature} is positive")


@dataclass(frozen=True, kw_only=True)
class RepresentationConfig:
    """How features are measured; the defaults are for ImageNet, as published where the paper says."""

    knn: KNNConfig = KNNConfig()
    linear: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    def check(self, methods: Sequence[Method], count: int) -> None:
        """Raises ValueError where `count` training images are too few for a method."""
        if KNN in methods and count < self.knn.k:
            raise ValueError(f"k-NN: {self.knn.k} neighbours, but {count} training images")
        for method in (LINEAR, FINETUNE):
            if method in methods:
                getattr(self, method).steps(count)


class Member(NamedTuple):
    """An encoder of a row, by its number, and the seeds of what is trained on it."""

    encoder: int
    seeds: tuple[int, ...]


class Row(NamedTuple):
    """One line of the table: one pooling of one encoder, or of several with other random weights."""

    name: str
    keep: int | None
    pooling: str
    width: int
    members: tuple[Member, ...]


def rows_of(encoders: Sequence[Encoder], poolings: Sequence[str], seeds: int) -> list[Row]:
    """The rows of some encoders. Those of random weights with one name and K share rows, and each has one seed.

    An encoder whose poolings are none of those asked for has a row for each that it has.
    """
    groups: dict[tuple[str, int | None], list[int]] = {}
    for number, encoder in enumerate(encoders):
        groups.setdefault((encoder.name, encoder.keep), []).append(number)
    rows = []
    for (name, keep), numbers in groups.items():
        shapes = encoders[numbers[0]].shapes()
        members = tuple(
            Member(number, tuple(range(seeds)) if (seed := encoders[number].seed) is None else (seed,))
            for number in numbers
        )
        for pooling in [pooling for pooling in poolings if pooling in shapes] or list(shapes):
            rows.append(Row(name, keep, pooling, shapes[pooling].shape[-1], members))
    return rows


class Split(NamedTuple):
    """What was measured of the two sets of images, by the number of the encoder."""

    train: Mapping[int, Measured]
    test: Mapping[int, Measured]

    @property
    def labels(self) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "M"]]:
        """Of training and test images."""
        return tuple(next(iter(side.values())).column(LABEL) for side in self)

    def shared(self) -> int:
        """Test images that are also training images, pixel by pixel."""
        train, test = (next(iter(side.values())).column(DIGEST) for side in self)
        seen = {row.tobytes() for row in train}
        return sum(row.tobytes() in seen for row in test)


def knn_predictions(row: Row, found: Split, classes: int, config: KNNConfig) -> Int[np.ndarray, "S M"]:
    """One prediction for each encoder of the row: nothing else is random."""
    labels, _ = found.labels
    return np.stack(
        [
            knn.predict(
                found.train[number].column(row.pooling),
                labels,
                found.test[number].column(row.pooling),
                classes=classes,
                k=config.k,
                temperature=config.temperature,
            )
            for number, _ in row.members
        ]
    )


def linear_predictions(
    row: Row, found: Split, classes: int, config: ProbeConfig, workdir: Callable[[str], AnyPath]
) -> Int[np.ndarray, "S M"]:
    """One prediction for each seed of each encoder of the row."""
    labels, _ = found.labels
    return np.concatenate(
        [
            probe.predict(
                found.train[number].column(row.pooling),
                labels,
                found.test[number].column(row.pooling),
                classes=classes,
                seeds=seeds,
                config=config,
                workdir=workdir(f"{number}-{row.pooling}"),
            )
            for number, seeds in row.members
        ]
    )


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent; `by_seed` has one for each seed."""

    estimate: Estimate
    by_seed: list[float]

    @classmethod
    def of(cls, correct: Bool[np.ndarray, "S M"]) -> "Accuracy":
        """The interval is over test images, each with its mean over the seeds."""
        shares = 100.0 * correct.mean(axis=0)
        return cls(estimate(shares), (100.0 * correct.mean(axis=1)).tolist())

    def describe(self) -> dict[str, Any]:
        """For results.json."""
        return {"mean": self.estimate.mean, "half_width": self.estimate.half_width, "by_seed": self.by_seed}


def table_of(rows: Sequence[tuple[Row, Mapping[Method, Accuracy]]], methods: Sequence[Method]) -> list[str]:
    """Lines of Markdown."""
    headings = [HEADINGS[method] for method in methods]
    lines = [
        f"| features | K | tokens | width | {' | '.join(headings)} |",
        "|---|---|---|---|" + "---|" * len(headings),
    ]
    for row, found in rows:
        cells = [f"{found[method].estimate:.1f}" if method in found else "-" for method in methods]
        pooling = "-" if row.pooling == PIXELS else row.pooling
        lines.append(f"| {row.name} | {row.keep or '-'} | {pooling} | {row.width} | {' | '.join(cells)} |")
    return lines


def logits_of(
    train: Float[np.ndarray, "N F"], test: Float[np.ndarray, "M F"], head: Mapping[str, Any]
) -> Float[np.ndarray, "M C"]:
    """What a linear layer says of test features, normalised as a probe's."""
    head = jax.device_get(dict(head))
    return probe.Normalisation.of(train)(test) @ head["kernel"] + head["bias"]
