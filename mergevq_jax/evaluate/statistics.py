"""Statistics of reference images, which need to be computed once: one npz file for any number of feature networks.

Arrays of a network NAME: NAME/count, NAME/mean, NAME/scatter, the same of NAME/spatial, and NAME/features of some
images, for metrics that compare single images. `about` is JSON, and `hash` the SHA-256 of all other arrays.

Axes: N images, F features.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mergevq_jax.evaluate.features import INCEPTION
from mergevq_jax.evaluate.frechet import Moments
from runtime_jax.files import AnyPath, replacing

ADM = {"mean": "mu", "scatter": "sigma", "spatial/mean": "mu_s", "spatial/scatter": "sigma_s"}
Arrays = dict[str, np.ndarray]


class Statistics(NamedTuple):
    """What one network says of the reference images."""

    count: int | None  # images; None: the file does not say
    pool: Moments
    spatial: Moments | None  # for sFID
    features: Float[np.ndarray, "N F"] | None  # of some images, for KID, precision and recall


class Reference(NamedTuple):
    """Reference images, as far as metrics need them."""

    name: str
    hash: str  # SHA-256
    about: Mapping[str, Any]  # the images' protocol, and each network's; empty: unknown
    statistics: Mapping[str, Statistics]  # by network

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Height and width of the images; None: unknown."""
        return tuple(self.about["images"]["size"]) if self.about else None


def make_reference(name: str, about: Mapping[str, Any], statistics: Mapping[str, Statistics]) -> Reference:
    """A reference with its hash, which is that of the file."""
    return Reference(name, _hash(_arrays(about, statistics)), about, statistics)


def write_reference(path: AnyPath, reference: Reference) -> None:
    """Writes an npz file."""
    arrays = _arrays(reference.about, reference.statistics)
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, **arrays, name=np.array(reference.name), hash=np.array(reference.hash))


def read_reference(path: AnyPath) -> Reference | None:
    """Statistics from `write_reference`, or in ADM's layout: mu, sigma, and mu_s and sigma_s for sFID.

    None: the file has none, only images.

    Raises:
      ValueError: not an npz file, or a damaged one.
    """
    try:
        with path.open("rb") as file, np.load(file) as found:
            names = set(found.files)
            arrays = {name: found[name] for name in names if name != "arr_0"} if names & {"about", "mu"} else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz file ({error})") from error
    try:
        if "about" in arrays:
            name, digest = str(arrays.pop("name")), str(arrays.pop("hash"))
            if digest != _hash(arrays):
                raise ValueError(f"{path}: damaged, its arrays are not those that its hash names")
            about = json.loads(str(arrays["about"]))
            networks = [network["network"] for network in about["features"]]
            return Reference(name, digest, about, {name: _statistics(arrays, name) for name in networks})
        return _of_adm(path, arrays) if arrays else None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of reference statistics ({error!r} is missing)") from error


def _of_adm(path: AnyPath, arrays: Arrays) -> Reference:
    """ADM's files hold Inception's covariances, of an unknown number of images."""
    found = {ours: arrays[theirs] for ours, theirs in ADM.items() if theirs in arrays}
    counts = {"count": np.array(2), "spatial/count": np.array(2)}  # with two images, the scatter is the covariance
    statistics = _statistics({f"{INCEPTION}/{name}": array for name, array in (counts | found).items()}, INCEPTION)
    return Reference(path.name, _hash(found), {}, {INCEPTION: statistics._replace(count=None)})


def _statistics(arrays: Arrays, name: str) -> Statistics:
    spatial = _moments(arrays, f"{name}/spatial") if f"{name}/spatial/mean" in arrays else None
    pool = _moments(arrays, name)
    return Statistics(pool.count, pool, spatial, arrays.get(f"{name}/features"))


def _moments(arrays: Arrays, name: str) -> Moments:
    mean, scatter = (arrays[f"{name}/{field}"].astype(np.float64) for field in ("mean", "scatter"))
    if scatter.shape != (*mean.shape, *mean.shape):
        raise KeyError(f"a square covariance of {name}")
    return Moments(int(arrays[f"{name}/count"]), mean, scatter)


def _arrays(about: Mapping[str, Any], statistics: Mapping[str, Statistics]) -> Arrays:
    arrays = {"about": np.array(json.dumps(about, sort_keys=True))}
    for name, (_, pool, spatial, features) in statistics.items():
        arrays |= {f"{name}/{field}": np.asarray(value) for field, value in pool._asdict().items()}
        if spatial is not None:
            arrays |= {f"{name}/spatial/{field}": np.asarray(value) for field, value in spatial._asdict().items()}
        if features is not None:
            arrays[f"{name}/features"] = features
    return arrays


def _hash(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
