"""`mergevq evaluate reconstruction`: how near tokenizers' reconstructions are to the images, and how codes are used."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mergevq_jax.commands.evaluate.reconstruction_report import entry_of, reasons, rows_of, table_of, write_csv
from mergevq_jax.commands.evaluate.reconstruction_task import LPIPS_SIZE, Networks, task_of
from mergevq_jax.evaluate import results
from mergevq_jax.evaluate.held_out import held_out
from mergevq_jax.evaluate.images import RANDOM, Images, SourceImages
from mergevq_jax.evaluate.parts import Measured, measure
from mergevq_jax.evaluate.pixels import WINDOW
from mergevq_jax.tokenizer import report
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.losses.perceptual import load_lpips
from mergevq_jax.tokenizer.model import Tokenizer, load_tokenizer, read_tokenizer_config
from runtime_jax.data import SourceConfig
from runtime_jax.files import AnyPath, is_file, path_of, write_text
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.pictures import image_grid, loss_curve, save_png
from runtime_jax.sharding import replicate
from runtime_jax.training.stop import Stop
from runtime_jax.weights.fingerprint import fingerprint
from runtime_jax.workdir import only_writer

HELD_OUT_COUNT = 256  # scenes; photographs are a quarter of them
SHOWN = 8  # images in the picture


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure."""

    tokenizers: tuple[str, ...]  # shipped names, folders or hub ids
    keeps: tuple[int, ...] = (64, 144, 256)  # K of a training-size image
    source: SourceConfig | None = None  # None: held-out scenes and photographs
    data_dir: str = "data"  # of the scenes
    num_images: int | None = None  # None: all images of `source`, 256 scenes
    batch_size: int = 32
    features: tuple[str, ...] = ("judge",)  # as `load_feature_network` takes them
    lpips: tuple[str, ...] = ()  # files of weights; none: no LPIPS

    def __post_init__(self):
        sizes = {"--num-images": self.num_images, "--batch-size": self.batch_size}
        if bad := [f"{name} {value}" for name, value in sizes.items() if value is not None and value < 1]:
            raise ValueError(f"{' and '.join(bad)}: at least 1")
        for name, values in (("--tokenizer", self.tokenizers), ("--keep", self.keeps), ("--features", self.features)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} {' '.join(map(str, values))}: at least one, and each once")


def evaluate(request: Request, *, out: AnyPath, metrics: str | None = None) -> None:
    """Prints a table; writes it as summary.md, results.json, per_image.csv and reconstructions.png.

    With a metrics.jsonl as `metrics` also loss.png. Several processes share the images; process 0 writes.

    Raises:
      ValueError: no such tokenizer, dataset, weights or `metrics` file, an impossible K, too few images, or `out` holds
        another evaluation; before anything is compiled.
      WorkdirError: `out` cannot be written, or another run is writing it.
      NotFiniteError: reconstructions, features or distances that are not finite; says how many.
      StoppedError: by a signal; complete parts are kept.
    """
    if metrics and not is_file(path_of(metrics)):
        raise ValueError(f"--metrics {metrics}: no such file")
    with only_writer(out), Stop() as stop:
        configs = {name: read_tokenizer_config(name) for name in request.tokenizers}
        _check(configs.values(), request)
        images = {size: _images(request, size) for size in sorted({config.resolution for config in configs.values()})}
        lpips = load_lpips(*request.lpips) if request.lpips else None
        networks = Networks(results.load_networks(request.features, [(size, size) for size in images]), lpips)
        tokenizers = {name: load_tokenizer(name) for name in request.tokenizers}
        wanted = _protocol(request, tokenizers, images, networks)
        if results.is_finished(out, wanted):
            print(results.finished(out))
            return
        mesh = make_mesh(MeshConfig(), jax.local_devices())
        networks = networks._replace(lpips=None if lpips is None else replicate(lpips, mesh))
        tokenizers = {name: replace(t, params=replicate(t.params, mesh)) for name, t in tokenizers.items()}
        tasks = {
            (name, kind): task_of(f"{i}-{j}", tokenizer, found, request.keeps, networks, request.batch_size, mesh)
            for i, (name, tokenizer) in enumerate(tokenizers.items())
            for j, (kind, found) in enumerate(images[tokenizer.config.resolution].items())
        }
        with results.claimed(out, wanted) as parts, jax.set_mesh(mesh):
            with stop.parts(results.GOES_ON):
                for task in tasks.values():
                    measure(task, parts, stop)
            if jax.process_index() == 0:
                measured = {key: Measured(task, parts) for key, task in tasks.items()}
                _write(out, wanted, request, tokenizers, images, measured)
                if metrics:
                    loss_curve(metrics, out / "loss.png", names=("loss", "pixel"), title="training")
                print(f"summary.md, results.json, per_image.csv and pictures are in {out}")


def _check(configs: Collection[TokenizerConfig], request: Request) -> None:
    metric, least = ("LPIPS", LPIPS_SIZE) if request.lpips else ("SSIM", WINDOW)
    if small := [config.resolution for config in configs if config.resolution < least]:
        raise ValueError(f"{metric} needs images of at least {least} pixels, a tokenizer's have {small[0]}")
    for config in configs:
        for keep in request.keeps:
            config.merge_counts(config.raw_tokens, keep)


def _images(request: Request, size: int) -> dict[str, Images]:
    """The images to reconstruct, by their name in the table."""
    if request.source is not None:
        images = SourceImages(request.source, size, request.num_images)
        return {images.name: images}
    count = HELD_OUT_COUNT if request.num_images is None else request.num_images
    return held_out(size, count, request.data_dir)


def _protocol(
    request: Request,
    tokenizers: Mapping[str, Tokenizer],
    images: Mapping[int, Mapping[str, Images]],
    networks: Networks,
) -> dict[str, Any]:
    lpips = None
    if networks.lpips is not None:
        lpips = {
            "network": "VGG16, version 0.1",
            "fingerprint": fingerprint(networks.lpips),
            "resize": "none",
        }
    return {
        "command": "evaluate reconstruction",
        "tokenizers": {name: tokenizer.fingerprint() for name, tokenizer in tokenizers.items()},
        "images": {
            str(size): {kind: results.describe_images(found) for kind, found in kinds.items()}
            for size, kinds in images.items()
        },
        "keeps": list(request.keeps),
        "features": [results.describe_network(network) for network in networks.features],
        "lpips": lpips,
        "pixels": "8 bits, as decoded images are saved",
        "made_by": results.made_by(),
    }


def _write(
    out: AnyPath,
    wanted: Mapping[str, Any],
    request: Request,
    tokenizers: Mapping[str, Tokenizer],
    images: Mapping[int, Mapping[str, Images]],
    measured: Mapping[tuple[str, str], Measured],
) -> None:
    names = [network["network"] for network in wanted["features"]]
    texts, pictures, entries = [], [], []
    for name, tokenizer in tokenizers.items():
        rows, notes, kinds = [], [], images[tokenizer.config.resolution]
        for kind, found in kinds.items():
            data = measured[name, kind]
            there = rows_of(kind, data, tokenizer.config, request.keeps, names, independent=found.crop != RANDOM)
            warnings = {network: results.warning(reasons(network, data, found)) for network in names}
            notes += [f"{kind}: {warning}" for warning in warnings.values() if warning]
            about = wanted["images"][str(tokenizer.config.resolution)][kind]
            about = about | {"sha256": results.joint_digest(data.column("digests"))}
            made_by = {"tokenizer": name, "fingerprint": wanted["tokenizers"][name], "images": about}
            entries += [made_by | entry_of(row, warnings) for row in there]
            rows += there
        texts.append("\n".join([f"### {name}", "", *table_of(rows, names), "", *notes]))
        shares = [5, 3] if request.source is None else [SHOWN]
        shown = [found.read(range(min(n, len(found)))) for n, found in zip(shares, kinds.values(), strict=True)]
        batch = np.concatenate(shown)
        pictures.append([report.picture(tokenizer, batch, request.keeps, batch_size=len(batch))])
    text = "\n".join(texts)
    print(text)
    write_text(out / "summary.md", text)
    write_csv(out / "per_image.csv", measured, request.keeps)
    save_png(out / "reconstructions.png", image_grid(pictures, row_labels=list(tokenizers)))
    results.finish(out, wanted, {"results": entries})
