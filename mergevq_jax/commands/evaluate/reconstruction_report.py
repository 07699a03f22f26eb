"""What `mergevq evaluate reconstruction` writes: rows of its table, their JSON, and a CSV with every image."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mergevq_jax.commands.evaluate.reconstruction_task import RECOVERED, TRUE, source_maps
from mergevq_jax.evaluate import results
from mergevq_jax.evaluate.frechet import frechet_distance
from mergevq_jax.evaluate.images import Images
from mergevq_jax.evaluate.parts import Measured
from mergevq_jax.evaluate.reconstruction import CodeUsage
from mergevq_jax.tokenizer.config import TokenizerConfig
from runtime_jax.cost import table
from runtime_jax.estimate import Estimate, estimate
from runtime_jax.files import AnyPath, replacing

PER_IMAGE = ("psnr", "ssim", "lpips")


class Row(NamedTuple):
    """Figures of one tokenizer, K and source map over a set of images."""

    images: str
    count: int
    keep: int
    source_map: str
    distances: Mapping[str, float]  # Fréchet distances, by feature network
    per_image: Mapping[str, Estimate]  # of `PER_IMAGE`, LPIPS only with weights
    usage: CodeUsage


def rows_of(
    name: str,
    data: Measured,
    config: TokenizerConfig,
    keeps: Sequence[int],
    networks: Sequence[str],
    *,
    independent: bool,
) -> list[Row]:
    """The rows of one tokenizer on a set of images; with intervals if the images are `independent`."""
    real, rows = {network: data.moments(f"real/{network}") for network in networks}, []
    for keep in keeps:
        usage = CodeUsage(config.vocab_size)
        for indices in data.parts(f"{keep}/indices"):
            usage.update(indices)
        for source_map in source_maps(config):
            key = f"{keep}/{source_map}"
            distances = {
                network: frechet_distance(data.moments(f"{key}/{network}"), moments)
                for network, moments in real.items()
            }
            there = [value for value in PER_IMAGE if f"{key}/{value}" in data.names]
            per_image = {value: estimate(data.column(f"{key}/{value}"), independent=independent) for value in there}
            rows.append(Row(name, data.count, keep, source_map, distances, per_image, usage))
    return rows


def reasons(network: str, data: Measured, images: Images) -> list[str]:
    """Why the distances in a network's features are not comparable with published ones."""
    return results.differences(network, data.width(f"real/{network}"), data.count, images.crop)


def table_of(rows: Sequence[Row], networks: Sequence[str]) -> list[str]:
    """Lines of the table in Markdown."""
    distances = [results.distance_name(network, "r") for network in networks]
    head = ["images", "count", "K", "source map", *distances, "PSNR, dB", "SSIM", "LPIPS"]
    return table([*head, "codes used", "perplexity", "ones per bit", "dead bits"], map(_cells, rows))


def _cells(row: Row) -> list[str]:
    usage, rates, lpips = row.usage, row.usage.bit_rates, row.per_image.get("lpips")
    codes = [
        f"{100 * usage.used:.1f} % of {usage.vocab_size}",
        f"{usage.perplexity:.0f}",
        f"{rates.min():.2f} to {rates.max():.2f}",
        str(len(usage.dead_bits)),
    ]
    return [
        row.images,
        str(row.count),
        str(row.keep),
        row.source_map,
        *(f"{distance:.3f}" for distance in row.distances.values()),
        f"{row.per_image['psnr']}",
        f"{row.per_image['ssim']:.4f}",
        "no weights (--lpips)" if lpips is None else f"{lpips:.4f}",
        *(codes if row.source_map == TRUE else [""] * len(codes)),  # the codes are the same
    ]


def entry_of(row: Row, warnings: Mapping[str, str | None]) -> dict[str, Any]:
    """A row for results.json; `warnings` by feature network."""
    usage = row.usage
    return {
        "keep": row.keep,
        "source_map": row.source_map,
        "frechet_distances": {
            network: {"name": results.distance_name(network, "r"), "value": value, "warning": warnings[network]}
            for network, value in row.distances.items()
        },
        **{name: results.describe_estimate(row.per_image.get(name)) for name in PER_IMAGE},
        "codes": {
            "vocab_size": usage.counts.size,
            "tokens": usage.tokens,
            "used": usage.used,
            "perplexity": usage.perplexity,
            "ones_per_bit": usage.bit_rates.tolist(),
            "dead_bits": list(usage.dead_bits),
        },
    }


def write_csv(path: AnyPath, measured: Mapping[tuple[str, str], Measured], keeps: Sequence[int]) -> None:
    """A line for each tokenizer, image, K and source map; `measured` by tokenizer and set of images."""
    with replacing(path) as new, new.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tokenizer", "images", "image", "keep", "source_map", *PER_IMAGE])
        for (tokenizer, images), data in measured.items():
            for keep in keeps:
                for source_map in (name for name in (TRUE, RECOVERED) if f"{keep}/{name}/psnr" in data.names):
                    key = f"{keep}/{source_map}"
                    columns = [
                        data.column(f"{key}/{name}") if f"{key}/{name}" in data.names else [""] * data.count
                        for name in PER_IMAGE
                    ]
                    for image, values in enumerate(zip(*columns, strict=True)):
                        writer.writerow([tokenizer, images, image, keep, source_map, *values])
