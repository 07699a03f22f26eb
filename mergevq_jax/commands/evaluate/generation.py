"""`mergevq evaluate generation`: how near samples are to reference images, by the features of networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mergevq_jax.commands.evaluate.generation_report import entry_of, panels_of, row_of, table_of
from mergevq_jax.commands.evaluate.generation_sets import (
    SHOWN,
    SHOWN_NAME,
    Draws,
    SampleSet,
    drawn_sets,
    features_task,
    open_samples,
)
from mergevq_jax.evaluate import results
from mergevq_jax.evaluate.features import FeatureNetwork
from mergevq_jax.evaluate.images import ArrayImages, Images, SourceImages
from mergevq_jax.evaluate.parts import Measured, Task, measure
from mergevq_jax.evaluate.statistics import Reference, Statistics, make_reference, read_reference, write_reference
from runtime_jax.data import SourceConfig
from runtime_jax.files import AnyPath, is_dir, is_file, path_of, write_text
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.pictures import image_grid, plot_lines, save_png
from runtime_jax.training.stop import Stop
from runtime_jax.workdir import check_output, only_writer

LEAST = 10  # images: the Inception Score has as many splits
MOST_FEATURES = 50_000  # images of the reference whose features are kept, for KID, precision and recall


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure: files of samples or draws of a generator."""

    samples: tuple[AnyPath, ...] = ()  # npz files, folders of `mergevq sample` or of pictures
    draws: Draws | None = None
    reference: str  # npz file, folder, or TFDS dataset
    split: str = "train"  # of a TFDS dataset
    data_dir: str = "data"
    num_reference: int | None = None  # None: all
    save_reference: AnyPath | None = None
    features: tuple[str, ...] = ("judge",)  # as `load_feature_network` takes them
    num_images: int | None = None  # of files; None: all
    batch_size: int = 64

    def __post_init__(self):
        if bool(self.samples) == (self.draws is not None):
            raise ValueError("give exactly one of --samples and --model")
        sizes = {"--num-images": self.num_images, "--reference-images": self.num_reference}
        if self.draws is not None:
            sizes["--num-images"] = self.draws.request.num
        if self.save_reference is not None and self.save_reference.suffix != ".npz":
            raise ValueError(f"--save-reference {self.save_reference}: its name must end in .npz")
        if bad := [f"{name} {value}" for name, value in sizes.items() if value is not None and value < LEAST]:
            raise ValueError(f"{' and '.join(bad)}: at least {LEAST}")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: at least 1")
        scales = () if self.draws is None else self.draws.cfg_scales
        values = {"--samples": self.samples, "--features": self.features, "--cfg-scale": scales}
        for name, given in values.items():
            if len(set(given)) < len(given):
                raise ValueError(f"{name} {' '.join(map(str, given))}: each once")


class Known(NamedTuple):
    """What there is of the reference: statistics in a file, images, or both (in ADM's files)."""

    reference: Reference | None
    images: Images | None


def evaluate(request: Request, *, out: AnyPath) -> None:
    """Prints a table; writes summary.md, results.json and samples.png, and for several guidance scales sweep.png.

    Several processes share the images; process 0 writes.

    Raises:
      ValueError: no such samples, generator, reference or weights, impossible settings, images of different sizes, too
        few images, or `out` holds another evaluation; before anything is compiled.
      WorkdirError: `out` cannot be written, or another run is writing it.
      NotFiniteError: images or features that are not finite.
      StoppedError: by a signal; complete parts are kept.
    """
    with only_writer(out), Stop() as stop:
        if request.save_reference is not None:
            check_output(request.save_reference.parent)
        opened = [open_samples(path, request.num_images) for path in request.samples]
        shapes = {found.name: tuple(found.images.shape) for found in opened}
        if request.draws is not None:
            shapes[request.draws.model] = request.draws.check()
        _check_equal(shapes, {found.name: len(found.images) for found in opened})
        shape = next(iter(shapes.values()))
        known = _open_reference(request, shape)
        networks = results.load_networks(request.features, [shape])
        _check_statistics(known, networks)
        mesh = make_mesh(MeshConfig() if request.draws is None else request.draws.mesh, jax.local_devices())
        sets = [
            SampleSet(name, results.describe_images(images) | made_by, task)
            for number, (name, images, made_by) in enumerate(opened)
            for task in [features_task(f"samples-{number}", images, networks, request.batch_size, mesh)]
        ]
        if request.draws is not None:
            sets += drawn_sets(request.draws, networks, mesh)
        wanted = {
            "command": "evaluate generation",
            "samples": {found.name: found.about for found in sets},
            "reference": _about(known),
            "features": [results.describe_network(network) for network in networks],
            "made_by": results.made_by(),
        }
        if results.is_finished(out, wanted):
            if request.save_reference is not None and not is_file(request.save_reference):
                raise ValueError(f"{out} is finished and has no statistics left to save: choose another --out")
            print(results.finished(out))
            return
        task = _reference_task(known, networks, request.batch_size, mesh)
        with results.claimed(out, wanted) as parts, jax.set_mesh(mesh):
            with stop.parts(results.GOES_ON):
                for each in [task] * (task is not None) + [found.task for found in sets]:
                    measure(each, parts, stop)
            if jax.process_index() == 0:
                reference = _whole(known, task, parts, networks)
                if request.save_reference is not None:
                    write_reference(request.save_reference, reference)
                measured = [Measured(found.task, parts) for found in sets]
                _write(out, wanted, sets, measured, reference, networks, [found.images for found in opened])
                print(f"summary.md, results.json and pictures are in {out}")


def _check_equal(shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]) -> None:
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {width} x {height}" for name, (height, width) in shapes.items())
        raise ValueError(f"samples of one size are needed: {found} pixels")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"equal numbers of samples are needed (--num-images): {found}")
    if few := [f"{name}: {count} images" for name, count in counts.items() if count < LEAST]:
        raise ValueError(f"{few[0]}, at least {LEAST} are needed")


def _open_reference(request: Request, shape: tuple[int, ...]) -> Known:
    """What `--reference` names; images are cropped to the samples' size."""
    where, count = path_of(request.reference), request.num_reference
    reference, images = None, None
    if where.suffix == ".npz":
        reference = read_reference(where)
        if reference is not None and reference.about and count is not None:
            raise ValueError(f"--reference-images {count}: {request.reference} has statistics of all its images")
        if reference is None or not reference.about:  # ADM's files may have images too
            try:
                images = ArrayImages(where, count)
            except ValueError:
                if reference is None:
                    raise
    elif shape[0] != shape[1]:
        raise ValueError(f"samples of {shape[1]} x {shape[0]} pixels: give square ones, or an npz file as --reference")
    elif is_dir(where):
        images = SourceImages(SourceConfig(kind="folder", path=request.reference), shape[0], count)
    elif request.reference.startswith(("/", ".", "~")):
        raise ValueError(f"--reference {request.reference}: no such file or folder")
    else:
        source = SourceConfig(kind="tfds", name=request.reference, split=request.split, data_dir=request.data_dir)
        images = SourceImages(source, shape[0], count)
    sizes = [reference.shape] if reference is not None and reference.shape else []
    sizes += [] if images is None else [tuple(images.shape)]
    for height, width in sizes:
        if (height, width) != shape:
            raise ValueError(
                f"the reference {request.reference} has {width} x {height} pixels, samples {shape[1]} x {shape[0]}"
            )
    if images is not None and len(images) < LEAST:
        raise ValueError(f"the reference {request.reference} has {len(images)} images, at least {LEAST} are needed")
    return Known(reference, images)


def _check_statistics(known: Known, networks: Sequence[FeatureNetwork]) -> None:
    """Raises ValueError where a file of statistics does not serve a network."""
    if known.reference is None:
        return
    name, about = known.reference.name, known.reference.about.get("features", [])
    fingerprints = {described["network"]: described["fingerprint"] for described in about}
    for network in networks:
        if network.name not in known.reference.statistics and known.images is None:
            raise ValueError(f"{name} has no statistics of {network.name}: {', '.join(known.reference.statistics)}")
        if (theirs := fingerprints.get(network.name, network.fingerprint)) != network.fingerprint:
            raise ValueError(
                f"{name} has statistics of {network.name} with other weights (fingerprint {theirs[:12]}, not "
                f"{network.fingerprint[:12]})"
            )


def _about(known: Known) -> dict[str, Any]:
    about = {} if known.images is None else {"images": results.describe_images(known.images)}
    return about if known.reference is None else {"file": known.reference.name, "hash": known.reference.hash, **about}


def _reference_task(known: Known, networks: Sequence[FeatureNetwork], batch_size: int, mesh: Mesh) -> Task | None:
    return None if known.images is None else features_task("reference", known.images, networks, batch_size, mesh)


def _whole(known: Known, task: Task | None, parts: AnyPath, networks: Sequence[FeatureNetwork]) -> Reference:
    """The reference with the statistics of all networks: those of its file come first."""
    if task is None:
        return known.reference
    data, statistics = Measured(task, parts), {}
    given = {} if known.reference is None else known.reference.statistics
    for network in networks:
        spatial = data.moments(f"{network.name}/spatial") if f"{network.name}/spatial" in data.names else None
        features = data.some(f"{network.name}/pool", MOST_FEATURES)
        statistics[network.name] = Statistics(data.count, data.moments(f"{network.name}/pool"), spatial, features)
        if network.name in given:
            statistics[network.name] = given[network.name]._replace(features=features)
    if known.reference is not None:
        return known.reference._replace(statistics=statistics)
    about = {
        "images": results.describe_images(known.images) | {"sha256": results.joint_digest(data.column("digests"))},
        "features": [results.describe_network(network) for network in networks],
    }
    return make_reference(known.images.name, about, statistics)


def _write(
    out: AnyPath,
    wanted: Mapping[str, Any],
    sets: Sequence[SampleSet],
    measured: Sequence[Measured],
    reference: Reference,
    networks: Sequence[FeatureNetwork],
    files: Sequence[Images],
) -> None:
    texts, rows, entries = [], [], []
    for network in networks:
        there = [
            row_of(found, data, network.name, reference.statistics[network.name])
            for found, data in zip(sets, measured, strict=True)
        ]
        texts.append(table_of(there, network, reference))
        entries += [entry_of(row, network, reference) for row in there]
        rows += there
    text = "\n".join(texts)
    print(text)
    write_text(out / "summary.md", text)
    shown = [images.read(range(min(SHOWN, len(images)))) for images in files]
    shown += [data.column(SHOWN_NAME) for data in measured if SHOWN_NAME in data.names]
    save_png(out / "samples.png", image_grid([list(images) for images in shown], row_labels=[s.name for s in sets]))
    if len([found for found in sets if found.cfg_scale is not None]) > 1:
        plot_lines(panels_of(rows), out / "sweep.png", x_label="classifier-free guidance scale")
    results.finish(out, wanted, {"reference": _described(reference), "results": entries})


def _described(reference: Reference) -> dict[str, Any]:
    return {"name": reference.name, "hash": reference.hash, **reference.about}
