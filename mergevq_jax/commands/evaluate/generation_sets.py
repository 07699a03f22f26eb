"""Sets of images that `mergevq evaluate generation` measures: files, or draws of a generator that are not kept.

Axes: B batch, n images that are no padding, H W image.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from mergevq_jax.commands import sample
from mergevq_jax.evaluate import results
from mergevq_jax.evaluate.features import FeatureNetwork, Features
from mergevq_jax.evaluate.images import AS_THEY_ARE, ArrayImages, FolderImages, Images
from mergevq_jax.evaluate.parts import Rows, Task, fitting, padded, split_over
from mergevq_jax.generator.kinds.table import KINDS
from mergevq_jax.generator.model import GeneratorInfo, GeneratorModel, load_generator, read_info
from mergevq_jax.tokenizer.model import Tokenizer
from runtime_jax import config as config_lib
from runtime_jax.files import AnyPath, is_dir, is_file
from runtime_jax.finite import NotFiniteError
from runtime_jax.mesh import MeshConfig
from runtime_jax.nn.compute import Compute
from runtime_jax.sharding import replicate

SHOWN = 8  # images of a set in the picture
SHOWN_NAME = "shown"  # their array in the parts


class SampleSet(NamedTuple):
    """Images of one row of the table."""

    name: str
    about: Mapping[str, Any]  # how they were made
    task: Task
    cfg_scale: float | None = None  # of a sweep


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Images to draw with a generator, once for each guidance scale."""

    model: str  # shipped name, folder or hub id
    request: sample.Request  # its cfg_scale is that of no draw
    cfg_scales: tuple[float, ...]
    tokenizer: str | None = None  # None: the one that it was trained with
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig()

    def requests(self) -> dict[float, sample.Request]:
        """What is drawn with each scale."""
        sampling = self.request.sampling
        return {scale: replace(self.request, sampling=replace(sampling, cfg_scale=scale)) for scale in self.cfg_scales}

    def check(self) -> tuple[int, int]:
        """Height and width of the images; raises ValueError for what cannot be drawn, before weights are read."""
        info = read_info(self.model)
        config = sample.read_tokenizer_config_of(info, self.tokenizer)
        sample.labels_of(info, self.request)
        for request in self.requests().values():
            sample.plan_of(info, request, self.compute)
        return config.resolution, config.resolution


class Opened(NamedTuple):
    """Images in files."""

    name: str  # the path that was given
    images: Images
    made_by: Mapping[str, Any]  # from the protocol of `mergevq sample`; empty: unknown


def open_samples(path: AnyPath, count: int | None) -> Opened:
    """The images of an npz file in ADM's layout, a folder of `mergevq sample` or one of pictures, and their protocol.

    Raises:
      ValueError: no such images, fewer than `count`, or pictures of several sizes.
    """
    if not is_dir(path):
        if not is_file(path):
            raise ValueError(f"{path}: no such file or folder")
        return Opened(str(path), ArrayImages(path, count), {})
    if is_file(path / "samples.npz"):
        protocol = path / "protocol.json"
        made_by = json.loads(protocol.read_text()) if is_file(protocol) else {}
        kept = ("model", "fingerprint", "keep", "sampling", "steps", "seed", "compute", "device")
        made_by = {name: made_by[name] for name in kept if name in made_by}
        return Opened(str(path), ArrayImages(path / "samples.npz", count), made_by)
    return Opened(str(path), FolderImages(path, count), {})


def drawn_sets(draws: Draws, networks: Sequence[FeatureNetwork], mesh: Mesh) -> list[SampleSet]:
    """Images that the generator draws while they are measured."""
    model = load_generator(draws.model, compute=draws.compute)
    loaded = model.load_tokenizer(draws.tokenizer)
    fingerprints = {"fingerprint": model.fingerprint(), "tokenizer": loaded.fingerprint()}
    placed, loaded = model.place(mesh), replace(loaded, params=replicate(loaded.params, mesh))
    sets = []
    for number, (scale, request) in enumerate(draws.requests().items()):
        about = {"model": draws.model, **fingerprints, **_about(model.info, request, draws.compute)}
        about |= {"count": request.num, "size": [loaded.config.resolution] * 2, "crop": AS_THEY_ARE}
        task = _draws_task(f"draws-{number}", placed, loaded, request, networks)
        sets.append(SampleSet(f"{draws.model}, cfg scale {scale:g}", about, task, scale))
    return sets


def _about(info: GeneratorInfo, request: sample.Request, compute: Compute) -> dict[str, Any]:
    plan = sample.plan_of(info, request, compute)
    return {
        "classes": list(request.classes) or "all in turn",
        "keep": sample.keep_of(info, request),
        "sampling": config_lib.to_dict(info.sampling(request.sampling)),
        "steps": KINDS[info.kind].calls(info.architecture, plan),
        "seed": request.seed,
        "compute": config_lib.to_dict(compute),
    }


def features_task(name: str, images: Images, networks: Sequence[FeatureNetwork], batch_size: int, mesh: Mesh) -> Task:
    """Features of images."""
    size = fitting(batch_size, len(images))

    def start(rows: range, batch: UInt8[np.ndarray, "n H W 3"]) -> dict[str, Features]:
        on_mesh = split_over(mesh, padded(batch, size))
        return {network.name: network(on_mesh) for network in networks}

    def finish(batch: UInt8[np.ndarray, "n H W 3"], found: Mapping[str, Features]) -> Rows:
        return {"digests": results.digests(batch), **_rows(found, len(batch))}

    return Task(name, images.name, len(images), size, images.read, start, finish, _check(images.name))


def _draws_task(
    name: str, model: GeneratorModel, tokenizer: Tokenizer, request: sample.Request, networks: Sequence[FeatureNetwork]
) -> Task:
    size, label = fitting(request.batch_size, request.num), f"cfg scale {request.sampling.cfg_scale:g}"
    labels = np.resize(sample.labels_of(model.info, request), request.num + size)

    def start(rows: range, _: range) -> tuple[UInt8[Array, "B H W 3"], dict[str, Features]]:
        examples = np.arange(rows.start, rows.start + size, dtype=np.int32)
        images, _ = sample.draw_batch(model, tokenizer, request, labels[examples], examples)
        return images, {network.name: network(images) for network in networks}

    def finish(rows: range, found: tuple[UInt8[np.ndarray, "B H W 3"], Mapping[str, Features]]) -> Rows:
        images = found[0][: len(rows)]
        shown = images[: max(0, SHOWN - rows.start)]
        return {"digests": results.digests(images), SHOWN_NAME: shown, **_rows(found[1], len(rows))}

    return Task(name, label, request.num, size, lambda rows: rows, start, finish, _check(label))


def _rows(found: Mapping[str, Features], count: int) -> Rows:
    return {
        f"{network}/{field}": np.asarray(values)[:count]
        for network, features in found.items()
        for field, values in features._asdict().items()
        if values is not None
    }


def _check(label: str) -> Any:
    def check(rows: range, arrays: Rows) -> None:
        for name, values in arrays.items():
            if broken := int((~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))).sum()):
                where = f"{len(rows)} images {rows.start} to {rows.stop - 1} of {label}"
                raise NotFiniteError(f"{name} of {broken} of the {where} are not finite")

    return check
