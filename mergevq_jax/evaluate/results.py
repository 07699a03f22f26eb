"""The folder of an evaluation: a claim while it runs, results.json when it is done, and what makes figures comparable.

While an evaluation runs, `parts` holds its partial results and a claim, which says what is measured.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mergevq_jax.evaluate.features import FeatureNetwork, load_feature_network
from mergevq_jax.evaluate.images import RANDOM, Images
from runtime_jax import config as config_lib
from runtime_jax import hosts
from runtime_jax.estimate import Estimate
from runtime_jax.files import AnyPath, is_file, remove_tree, write_json
from runtime_jax.messages import cut

RESULTS_NAME, CLAIM_NAME = "results.json", "evaluation.json"
GOES_ON = "; the same command measures the parts that are missing"
PUBLISHED_COUNT = 50_000  # images of published figures
PUBLISHED_NETWORK = "inception"


def is_finished(out: AnyPath, wanted: Mapping[str, Any]) -> bool:
    """Whether `out` holds the results of the wanted evaluation; all processes call it together.

    Raises:
      ValueError: `out` holds another evaluation, or parts of one.
      HostsError: processes want different evaluations.
    """
    hosts.check_same("what is to be measured", wanted)
    finished = is_file(out / RESULTS_NAME)
    for path in (out / RESULTS_NAME, out / "parts" / CLAIM_NAME):
        if is_file(path):
            there = json.loads(path.read_text())
            there = there.get("evaluation", {}) if path.name == RESULTS_NAME else there
            if changes := config_lib.config_changes(there, wanted):
                raise ValueError(
                    f"{out} holds another evaluation; choose another --out or delete it\n  "
                    + cut(changes.values(), "\n  ")
                )
    hosts.barrier("looked")  # before process 0 writes
    if finished and jax.process_index() == 0:
        remove_tree(out / "parts")  # of a run that was killed while it deleted them
    return finished


@contextlib.contextmanager
def claimed(out: AnyPath, wanted: Mapping[str, Any]) -> Iterator[AnyPath]:
    """The folder for partial results, with a claim; deleted if the block fails without any."""
    parts = out / "parts"
    if jax.process_index() == 0 and not is_file(parts / CLAIM_NAME):
        remove_tree(parts)
        write_json(parts / CLAIM_NAME, wanted)
    hosts.barrier("claimed")
    try:
        yield parts
    except BaseException:
        if jax.process_index() == 0 and not any(parts.glob("*/[0-9]*.npz")):
            remove_tree(parts)
        raise


def load_networks(sources: Sequence[str], shapes: Iterable[tuple[int, ...]]) -> list[FeatureNetwork]:
    """Feature networks for images of these heights and widths.

    Raises:
      ValueError: as `load_feature_network`; two of one kind; sides that a network cannot read.
    """
    networks = [load_feature_network(source) for source in sources]
    if len({network.name for network in networks}) < len(networks):
        raise ValueError(f"--features {' '.join(sources)}: each kind of network once")
    for network in networks:
        for height, width in shapes:
            if height % network.side or width % network.side:
                raise ValueError(
                    f"{network.name} needs sides that are multiples of {network.side} pixels, images have {width} x "
                    f"{height}"
                )
    return networks


def finish(out: AnyPath, wanted: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Writes results.json and deletes the parts."""
    write_json(out / RESULTS_NAME, {"evaluation": wanted, **fields})
    (out / "parts" / CLAIM_NAME).unlink()  # first: parts without it are deleted by the next run
    remove_tree(out / "parts")


def finished(out: AnyPath) -> str:
    """The table of a finished evaluation."""
    return f"{(out / 'summary.md').read_text()}\nthese results are in {out}; delete it to measure again"


def made_by() -> dict[str, str]:
    """What computes the figures: versions and devices."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "tokenverse-mergevq-jax")}
    return {**versions, "device": jax.devices()[0].device_kind}


def describe_images(images: Images) -> dict[str, Any]:
    """The protocol of images."""
    return {
        "name": images.name,
        "count": len(images),
        "size": [int(side) for side in images.shape],
        "crop": images.crop,
        "first_and_last": joint_digest(digests(images.read([0, len(images) - 1]))),
    }


def describe_network(network: FeatureNetwork) -> dict[str, str]:
    """The protocol of a feature network."""
    return {"network": network.name, "fingerprint": network.fingerprint, "resize": network.resize}


def describe_estimate(value: Estimate | None) -> dict[str, Any] | None:
    """An estimate for results.json, which has no infinite numbers: "inf" is the mean PSNR if one image is exact."""
    if value is None:
        return None
    numbers = {"mean": value.mean, "half_width": value.half_width}
    return {name: str(x) if x is not None and not np.isfinite(x) else x for name, x in numbers.items()}


def digests(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 16]: a digest of each image's pixels."""
    rows = [hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() for image in images]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 16)


def joint_digest(rows: np.ndarray) -> str:
    """SHA-256 of images from their digests, in order."""
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def distance_name(network: str, prefix: str = "") -> str:
    """FID is the Fréchet distance of Inception's features alone."""
    return f"{prefix}FID" if network == PUBLISHED_NETWORK else f"{prefix}FD ({network})"


def differences(network: str, width: int, count: int, crop: str) -> list[str]:
    """Why a Fréchet distance is not comparable with published ones; none: it is.

    Args:
      network, width: name of the feature network, and number of its features.
      count: of images, on the side that has fewer.
      crop: of the images.
    """
    found = []
    if network != PUBLISHED_NETWORK:
        found.append(f"features of {network} instead of Inception")
    if count < PUBLISHED_COUNT:
        found.append(f"{count} images instead of {PUBLISHED_COUNT:,}")
    if count <= width:
        found.append(f"no more images than the {width} features, so that covariances are singular")
    if crop == RANDOM:
        found.append("random crops instead of centre crops")
    return found


def warning(reasons: Sequence[str]) -> str | None:
    """The line about a number that is not comparable; None without reasons."""
    return f"Not comparable with published figures: {'; '.join(reasons)}." if reasons else None
