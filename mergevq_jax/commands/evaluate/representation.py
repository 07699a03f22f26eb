"""`mergevq evaluate representation`: what features tell about an image's class, beside pixels and random weights."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mergevq_jax.evaluate import results
from mergevq_jax.evaluate.parts import Measured, measure
from mergevq_jax.evaluate.representation import finetune
from mergevq_jax.evaluate.representation import rows as rows_lib
from mergevq_jax.evaluate.representation.encoders import (
    CLASS,
    MEAN,
    Encoder,
    dinov2_encoder,
    pixels_encoder,
    random_dinov2,
)
from mergevq_jax.evaluate.representation.features import LabelledImages, task_of
from mergevq_jax.evaluate.representation.rows import FINETUNE, KNN, LINEAR, Accuracy, Method, Row, Split
from mergevq_jax.tokenizer.config import TokenizerConfig
from mergevq_jax.tokenizer.encoder import Encoder as TokenizerEncoder
from mergevq_jax.tokenizer.model import init_params, load_tokenizer, read_tokenizer_config
from runtime_jax import config as config_lib
from runtime_jax.data import SourceConfig, check_same_classes
from runtime_jax.files import AnyPath, write_text
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.networks.dinov2 import load_dinov2, read_dinov2_config
from runtime_jax.prng import Stream, stream_key
from runtime_jax.sharding import check_batch
from runtime_jax.training.stop import Stop
from runtime_jax.weights.fingerprint import fingerprint
from runtime_jax.workdir import only_writer


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure."""

    tokenizers: tuple[str, ...]  # shipped names, folders or hub ids
    teachers: tuple[str, ...] = ()  # DINOv2 folders or hub ids
    train: SourceConfig
    test: SourceConfig
    methods: tuple[Method, ...] = (KNN, LINEAR)
    keeps: tuple[int, ...] = (64, 144, 256)  # K of a training-size image
    poolings: tuple[str, ...] = (MEAN,)
    seeds: int = 3  # of probes, fine-tuning and random weights
    size: int | None = None  # of the images, if there is no tokenizer; None: the teacher's
    batch_size: int = 32  # of the features; no figure depends on it
    config: rows_lib.RepresentationConfig

    def __post_init__(self):
        named = {"--method": self.methods, "--keep": self.keeps, "--tokens": self.poolings}
        named["--tokenizer and --teacher"] = (*self.tokenizers, *self.teachers)
        for name, values in named.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} {' '.join(map(str, values))}: at least one, and each once")
        if min(self.seeds, self.batch_size) < 1:
            raise ValueError(f"--seeds {self.seeds} and --batch-size {self.batch_size}: at least 1")
        if self.size is not None and (self.tokenizers or self.size < 1):
            raise ValueError(f"--size {self.size}: positive, and for teachers alone: a tokenizer has its own")
        if self.train == self.test:
            raise ValueError("training and test images are the same: choose another --test-split or --test-folder")


def evaluate(request: Request, *, out: AnyPath) -> None:
    """Prints a table; writes it as summary.md and results.json.

    Several processes share the images and the training of probes; process 0 writes.

    Raises:
      ValueError: no such tokenizer, teacher or dataset, no labels, an impossible K, too few images, or `out` holds
        another evaluation; before any features are computed.
      WorkdirError: `out` cannot be written, or another run is writing it.
      NotFiniteError: features that are not finite.
      StoppedError: by a signal; complete parts and checkpoints are kept.
    """
    with only_writer(out), Stop() as stop:
        size = _size(request)
        train, test = LabelledImages(request.train, size), LabelledImages(request.test, size)
        check_same_classes([(images.name, images.classes) for images in (train, test)])
        request.config.check(request.methods, len(train))
        for method in (LINEAR, FINETUNE):
            if method in request.methods:
                batch_size = getattr(request.config, method).batch_size
                check_batch(f"{method}.batch_size", batch_size, make_mesh(MeshConfig()))
        encoders = _encoders(request, size)
        rows = rows_lib.rows_of(encoders, request.poolings, request.seeds)
        wanted = _protocol(request, encoders, train, test)
        if results.is_finished(out, wanted):
            print(results.finished(out))
            return
        with results.claimed(out, wanted) as parts:
            work = _Work(request, encoders, train, test, parts, stop)
            found = work.measured(dict(enumerate(encoders)))
            accuracies = [work.accuracies(row, found) for row in rows]
            if jax.process_index() == 0:
                _write(out, wanted, request, rows, accuracies, train, found)
                print(f"summary.md and results.json are in {out}")


def _size(request: Request) -> int:
    """The side of the images that all encoders see; raises ValueError where they differ, or K is impossible."""
    configs = {name: read_tokenizer_config(name) for name in request.tokenizers}
    sizes = {name: config.resolution for name, config in configs.items()}
    if not sizes:
        sizes = {name: request.size or read_dinov2_config(name).image_size for name in request.teachers}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"rows compare features of the same images, but sizes in pixels differ: {shown}")
    for config in configs.values():
        for keep in request.keeps:
            config.merge_counts(config.raw_tokens, keep)
    return next(iter(sizes.values()))


def _encoders(request: Request, size: int) -> list[Encoder]:
    """What is measured, then random weights of the same architectures, and pixels."""
    encoders, floor = [], {}
    for name in request.tokenizers:
        tokenizer = load_tokenizer(name)
        config, params = tokenizer.config, tokenizer.params["encoder"]
        encoders += [tokenizer_encoder(name, config, params, keep) for keep in request.keeps]
        floor[config] = [random_tokenizer(config, max(request.keeps), seed) for seed in range(request.seeds)]
    for name in request.teachers:
        config, params = load_dinov2(name)
        encoders.append(dinov2_encoder(name, config, params, size))
        floor[config] = [random_dinov2(config, size, seed) for seed in range(request.seeds)]
    names = [group[0].name for group in floor.values()]
    for number, group in enumerate(floor.values(), 1):
        clash = names.count(group[0].name) > 1  # of two architectures, whose rows must not be taken for one
        encoders += [replace(encoder, name=f"{encoder.name} ({number})") if clash else encoder for encoder in group]
    return [*encoders, pixels_encoder(size)]


def tokenizer_encoder(name: str, config: TokenizerConfig, params: Any, keep: int) -> Encoder:
    """A tokenizer's encoder at K, after its last block; the mean counts a kept token once for each raw token in it."""

    def apply(params: Any, images: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B F"]]:
        encoded = TokenizerEncoder(config).apply({"params": params}, images, keep=keep)
        shares = encoded.size / jnp.sum(encoded.size, axis=1, keepdims=True)
        mean = jnp.einsum("bk,bkd->bd", shares, encoded.hidden[:, 1:], precision="highest")
        return {CLASS: encoded.hidden[:, 0], MEAN: mean}

    def depth(path: str) -> int:
        part, _, rest = path.partition("/")
        if part == "stem" or rest == "cls_token":
            return 0
        block = rest.partition("/")[0].removeprefix("blocks_")
        return int(block) + 1 if part == "attn" else config.num_att_blocks + 1

    return Encoder(name, config.resolution, params, apply, depth, config.num_att_blocks + 1, keep=keep)


def random_tokenizer(config: TokenizerConfig, keep: int, seed: int) -> Encoder:
    """The same architecture with random weights."""
    params = jax.jit(functools.partial(init_params, config))(stream_key(seed, Stream.PARAMS))["encoder"]
    return replace(tokenizer_encoder("random weights, tokenizer", config, params, keep), seed=seed)


def _protocol(request: Request, encoders: list[Encoder], train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    return {
        "command": "evaluate representation",
        "encoders": [
            {"name": encoder.name, "keep": encoder.keep, "seed": encoder.seed}
            | {"fingerprint": fingerprint(encoder.params)}
            for encoder in encoders
        ],
        "train": train.describe(),
        "test": test.describe(),
        "methods": {method: config_lib.to_dict(getattr(request.config, method)) for method in request.methods},
        "poolings": list(request.poolings),
        "seeds": request.seeds,
        "made_by": results.made_by(),
    }


@dataclass
class _Work:
    """The long part: features, probes and fine-tuning."""

    request: Request
    encoders: list[Encoder]
    train: LabelledImages
    test: LabelledImages
    parts: AnyPath
    stop: Stop

    def __post_init__(self):
        self.mesh = make_mesh(MeshConfig(), jax.local_devices())

    def measured(self, encoders: Mapping[int, Encoder], prefix: str = "") -> Split:
        """The features of both sets, by the encoders' numbers."""
        sides: list[dict[int, Measured]] = []
        for side, images in (("train", self.train), ("test", self.test)):
            tasks = {
                number: task_of(f"{prefix}{number}-{side}", encoder, images, self.request.batch_size, self.mesh)
                for number, encoder in encoders.items()
            }
            with jax.set_mesh(self.mesh), self.stop.parts(results.GOES_ON):
                for task in tasks.values():
                    measure(task, self.parts, self.stop)
            sides.append({number: Measured(task, self.parts) for number, task in tasks.items()})
        return Split(*sides)

    def accuracies(self, row: Row, found: Split) -> dict[Method, Accuracy]:
        """Of all methods that the row can have."""
        config, classes = self.request.config, len(self.train.classes)
        predictions: dict[Method, Callable[[], np.ndarray]] = {
            KNN: lambda: rows_lib.knn_predictions(row, found, classes, config.knn),
            LINEAR: lambda: rows_lib.linear_predictions(
                row, found, classes, config.linear, lambda name: self.parts / f"probe-{name}"
            ),
            FINETUNE: lambda: self._finetuned(row, classes),
        }
        _, labels = found.labels
        accuracies = {}
        for method in self.request.methods:
            if method == FINETUNE and self.encoders[row.members[0].encoder].depth is None:
                continue
            with self.stop.parts(results.GOES_ON):
                self.stop.check()
            accuracies[method] = Accuracy.of(predictions[method]() == labels[None])
        return accuracies

    def _finetuned(self, row: Row, classes: int) -> np.ndarray:
        said = []
        for number, seed in [(number, seed) for number, seeds in row.members for seed in seeds]:
            name = f"tuned-{number}-{row.pooling}-{seed}"
            tuned, head = finetune.finetuned(
                self.encoders[number],
                row.pooling,
                self.train.source,
                len(self.train),
                classes=classes,
                seed=seed,
                config=self.request.config.finetune,
                workdir=self.parts / name,
            )
            split = self.measured({number: tuned}, f"{name}-")
            train, test = (side[number].column(row.pooling) for side in split)
            said.append(rows_lib.logits_of(train, test, head).argmax(axis=-1))
        return np.stack(said)


def _write(
    out: AnyPath,
    wanted: Mapping[str, Any],
    request: Request,
    rows: list[Row],
    accuracies: list[dict[Method, Accuracy]],
    train: LabelledImages,
    found: Split,
) -> None:
    labels, test_labels = found.labels
    shared, often = found.shared(), np.bincount(test_labels).max() / len(test_labels)
    lines = [
        *rows_lib.table_of(list(zip(rows, accuracies, strict=True)), request.methods),
        "",
        f"Top-1 accuracy and 95 % interval over {len(test_labels)} test images ({wanted['test']['name']}). Of what is "
        f"random, each has its mean over {request.seeds} seeds. Trained on {len(labels)} images "
        f"({wanted['train']['name']}). Always the commonest of {len(train.classes)} classes: {100 * often:.1f} %.",
    ]
    if shared:
        lines.append(f"{shared} of the test images are also training images: these figures are too high.")
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(out / "summary.md", text)
    entries = [
        {"name": row.name, "keep": row.keep, "pooling": row.pooling, "width": row.width}
        | {"encoders": [member.encoder for member in row.members]}
        | {method: accuracy.describe() for method, accuracy in by_method.items()}
        for row, by_method in zip(rows, accuracies, strict=True)
    ]
    results.finish(out, wanted, {"results": entries, "shared_images": shared, "chance": 100 * float(often)})
