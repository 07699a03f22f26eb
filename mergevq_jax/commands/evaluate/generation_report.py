"""What `mergevq evaluate generation` writes: rows of its table, their JSON, and curves over the guidance scale."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mergevq_jax.commands.evaluate.generation_sets import SampleSet
from mergevq_jax.evaluate import inception_score as inception_score_lib
from mergevq_jax.evaluate import kernel, results
from mergevq_jax.evaluate.features import FeatureNetwork
from mergevq_jax.evaluate.frechet import frechet_distance
from mergevq_jax.evaluate.inception_score import InceptionScore, inception_score
from mergevq_jax.evaluate.kernel import KernelDistance, kernel_distance
from mergevq_jax.evaluate.parts import Measured
from mergevq_jax.evaluate.precision_recall import PrecisionRecall, precision_recall
from mergevq_jax.evaluate.statistics import Reference, Statistics
from runtime_jax.cost import table
from runtime_jax.pictures import Points

KID_SUBSETS, KID_SUBSET = 100, 1000  # and images in each; fewer where there are fewer
NEIGHBOURS = 3  # of precision and recall
SPLITS = 10  # of the Inception Score


class Row(NamedTuple):
    """Figures of a set of samples in one network's features; None where the network or reference has too little."""

    samples: SampleSet
    digest: str  # SHA-256 of the samples
    network: str
    count: int
    reference_count: int | None  # None: the file does not say
    width: int  # features
    distance: float
    spatial_distance: float | None
    score: InceptionScore | None
    kernel: KernelDistance | None
    subset: int | None  # images of KID's subsets
    share: PrecisionRecall | None
    compared: int | None  # reference images of KID, precision and recall


def row_of(samples: SampleSet, data: Measured, network: str, reference: Statistics) -> Row:
    """Measures a set of samples against the reference."""
    features, name = data.column(f"{network}/pool"), f"{network}/spatial"
    pool, real = data.moments(f"{network}/pool"), reference.features
    spatial = name in data.names and reference.spatial is not None
    logits = data.column(f"{network}/logits") if f"{network}/logits" in data.names else None
    subset = None if real is None else min(KID_SUBSET, len(features), len(real))
    return Row(
        samples,
        results.joint_digest(data.column("digests")),
        network,
        data.count,
        reference.count,
        len(pool.mean),
        frechet_distance(pool, reference.pool),
        frechet_distance(data.moments(name), reference.spatial) if spatial else None,
        None if logits is None else inception_score(logits, np.arange(len(logits)), splits=SPLITS),
        None if real is None else kernel_distance(features, real, subsets=KID_SUBSETS, subset_size=subset),
        subset,
        None if real is None else precision_recall(features, real, k=NEIGHBOURS),
        None if real is None else len(real),
    )


def warning_of(row: Row) -> str | None:
    """Why the row is not comparable with published figures."""
    found = results.differences(row.network, row.width, row.count, row.samples.about["crop"])
    if row.reference_count is not None and row.reference_count < results.PUBLISHED_COUNT:
        found.append(f"{row.reference_count} reference images instead of {results.PUBLISHED_COUNT:,}")
    return results.warning(found)


def table_of(rows: Sequence[Row], network: FeatureNetwork, reference: Reference) -> str:
    """The table of one network in Markdown, with what to know about it."""
    head = ["samples", "count", results.distance_name(network.name), "sFID", "IS", "KID", "precision", "recall"]
    count = "an unknown number of" if rows[0].reference_count is None else rows[0].reference_count
    lines = [f"### Features of {network.name}", "", *table(head, map(_cells, rows)), ""]
    lines.append(f"Reference: {reference.name} ({count} images, SHA-256 {reference.hash[:12]}).")
    lines += dict.fromkeys(line for row in rows if (line := warning_of(row)))
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    score, kid, share = row.score, row.kernel, row.share
    return [
        row.samples.name,
        str(row.count),
        f"{row.distance:.3f}",
        "-" if row.spatial_distance is None else f"{row.spatial_distance:.3f}",
        "-" if score is None else f"{score.mean:.2f} ± {score.std:.2f}",
        "-" if kid is None else f"{kid.mean:.5f} ± {kid.std:.5f}",
        *("-" if value is None else f"{value:.4f}" for value in (share or (None, None))),
    ]


def entry_of(row: Row, network: FeatureNetwork, reference: Reference) -> dict[str, Any]:
    """A row for results.json."""
    kid = score = None
    if row.kernel is not None:
        kid = {**row.kernel._asdict(), "subsets": KID_SUBSETS, "subset_size": row.subset, "seed": kernel.SEED}
    if row.score is not None:
        score = {**row.score._asdict(), "splits": SPLITS, "seed": inception_score_lib.SEED}
    share = None if row.share is None else {**row.share._asdict(), "neighbours": NEIGHBOURS}
    return {
        "name": row.samples.name,
        "samples": {**row.samples.about, "count": row.count, "sha256": row.digest},
        "features": results.describe_network(network),
        "reference": {"name": reference.name, "hash": reference.hash, "count": row.reference_count},
        "frechet_distance": {"name": results.distance_name(network.name), "value": row.distance},
        "sfid": row.spatial_distance,
        "inception_score": score,
        "kernel_distance": kid,
        "precision_recall": share,
        "compared_reference_images": row.compared,
        "warning": warning_of(row),
    }


def panels_of(rows: Sequence[Row]) -> dict[str, dict[str, Points]]:
    """Panels of a plot over the guidance scale: a quantity each, a line for each feature network."""
    values = {
        "Fréchet distance": lambda row: row.distance,
        "sFID": lambda row: row.spatial_distance,
        "Inception Score": lambda row: row.score and row.score.mean,
        "KID": lambda row: row.kernel and row.kernel.mean,
        "precision": lambda row: row.share and row.share.precision,
        "recall": lambda row: row.share and row.share.recall,
    }
    panels: dict[str, dict[str, Points]] = {}
    for quantity, value in values.items():
        for network in dict.fromkeys(row.network for row in rows):
            own = sorted((row.samples.cfg_scale, value(row)) for row in rows if row.network == network)
            if all(y is not None for _, y in own):
                x, y = zip(*own, strict=True)
                panels.setdefault(quantity, {})[network] = Points(x, y, [np.nan] * len(x))
    return panels
