"""What `mergevq evaluate reconstruction` computes for each image.

Axes: B batch, n images that are no padding, H W image.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from mergevq_jax.commands.evaluate.round_trip import RoundTrip, round_trip
from mergevq_jax.evaluate import results
from mergevq_jax.evaluate.features import FeatureNetwork
from mergevq_jax.evaluate.images import Images
from mergevq_jax.evaluate.parts import Rows, Task, fitting, padded, split_over
from mergevq_jax.evaluate.pixels import psnr, ssim
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.losses.perceptual import LPIPS
from mergevq_jax.tokenizer.model import Tokenizer, to_float
from runtime_jax.finite import NotFiniteError, check_finite

LPIPS_SIZE = 16  # pixels that it needs
TRUE, RECOVERED = "true", "recovered"  # source maps


class Networks(NamedTuple):
    """What looks at images beside the tokenizer."""

    features: Sequence[FeatureNetwork]
    lpips: Mapping[str, Any] | None  # parameters


class OnDevices(NamedTuple):
    """What devices compute of a batch."""

    trips: dict[int, RoundTrip]  # by K
    values: dict[str, Array]  # a row an image, by the name in a part


def source_maps(config: TokenizerConfig) -> tuple[str, ...]:
    """The source maps that a tokenizer decodes with."""
    return (TRUE,) if config.recovery is None else (TRUE, RECOVERED)


def task_of(
    name: str,
    tokenizer: Tokenizer,
    images: Images,
    keeps: Sequence[int],
    networks: Networks,
    batch_size: int,
    mesh: Mesh,
) -> Task:
    """The measurement of one tokenizer on a set of images; weights are on the mesh."""
    maps, size = source_maps(tokenizer.config), fitting(batch_size, len(images))

    def start(rows: range, batch: UInt8[np.ndarray, "n H W 3"]) -> OnDevices:
        original = split_over(mesh, padded(batch, size))
        trips, values = {}, {f"real/{network.name}": network(original).pool for network in networks.features}
        for keep in keeps:
            trips[keep] = round_trip(tokenizer, original, keep)
            for source_map in maps:
                rebuilt, key = getattr(trips[keep], source_map).images, f"{keep}/{source_map}"
                values |= {f"{key}/{network.name}": network(rebuilt).pool for network in networks.features}
                if networks.lpips is not None:
                    values[f"{key}/lpips"] = _lpips(networks.lpips, rebuilt, original)
        return OnDevices(trips, values)

    def finish(batch: UInt8[np.ndarray, "n H W 3"], found: OnDevices) -> Rows:
        rows = {"digests": results.digests(batch), **found.values}
        for keep, trip in found.trips.items():
            rows[f"{keep}/indices"] = trip.indices
            for source_map in maps:
                decoded, key = getattr(trip, source_map), f"{keep}/{source_map}"
                rebuilt = decoded.images[: len(batch)]
                rows |= {f"{key}/psnr": psnr(rebuilt, batch), f"{key}/ssim": ssim(rebuilt, batch)}
                rows[f"{key}/finite"] = decoded.finite
        return {name: np.asarray(values)[: len(batch)] for name, values in rows.items()}

    def check(rows: range, arrays: Rows) -> None:
        for keep in keeps:
            for source_map in maps:
                finite = arrays[f"{keep}/{source_map}/finite"]
                if broken := int((~finite).sum()):
                    first = rows[int(np.argmin(finite))]
                    stage = (
                        f"{broken} of the {len(rows)} reconstructions of {images.name} {rows.start} to {rows.stop - 1}"
                        f" at K = {keep} with the {source_map} source map (image {first} is the first)"
                    )
                    check_finite({stage: np.asarray(False)}, {"tokenizer": tokenizer.params})
        for name, values in arrays.items():
            if name.rpartition("/")[2] != "psnr" and not np.isfinite(values).all():
                raise NotFiniteError(f"{name} of {images.name} {rows.start} to {rows.stop - 1} is not finite")

    return Task(name, images.name, len(images), size, images.read, start, finish, check)


@jax.jit
def _lpips(params: Any, images: UInt8[Array, "B H W 3"], targets: UInt8[Array, "B H W 3"]) -> Float[Array, "B"]:
    return LPIPS().apply({"params": params}, to_float(images), to_float(targets))
