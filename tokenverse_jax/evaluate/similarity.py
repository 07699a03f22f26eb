"""Similarities of DreamBench++: CLIP-I and DINO between images, CLIP-T between image and prompt; cosines.

CLIP takes images whose shorter side was resized to its input's (224 pixels), DINO and DINOv2 the middle 224 of 256
pixels. Resizing is Pillow's, bicubic with antialias, as in the models' own preprocessors. Images are the written files.

Axes: N images or texts, S side of a network's input, E features.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from runtime_jax.data import resize_and_crop
from runtime_jax.finite import all_finite, check_finite
from runtime_jax.networks import clip_files
from runtime_jax.networks.clip import CLIP, standardize
from runtime_jax.networks.dino import load_dino
from runtime_jax.networks.dinov2 import DINOv2
from runtime_jax.networks.dinov2 import standardize as standardize_dino
from runtime_jax.weights.hub import local_path
from tokenverse_jax.evaluate.benchmark import Benchmark
from tokenverse_jax.evaluate.draw import Job
from tokenverse_jax.evaluate.samples import Samples
from tokenverse_jax.flux import text
from tokenverse_jax.flux.fingerprint import fingerprint

_LOG = logging.getLogger(__name__)
AT_ONCE = 16  # images or texts in one program
DINO_SIDE = 224
DINO_RESIZED = 256
Image = UInt8[np.ndarray, "H W 3"]
Features = Float[np.ndarray, "N E"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A network that embeds images, and texts if it is CLIP, as unit vectors."""

    name: str
    source: str
    fingerprint: str
    preparation: str
    embed: Callable[[Iterable[Image]], Features]
    embed_texts: Callable[[Sequence[str]], Features] | None = None

    @property
    def protocol(self) -> dict[str, str]:
        """What a result was computed with."""
        return {name: getattr(self, name) for name in ("source", "fingerprint", "preparation")}


def load_clip(source: str | os.PathLike) -> Network:
    """CLIP from a folder in transformers' layout with its tokenizer, or a hub id.

    Raises:
      ValueError: the source is missing, unreadable or does not fit; no tokenizer.
    """
    folder = local_path(source, (*clip_files.WEIGHTS, *clip_files.TOKENIZER))
    config, params = clip_files.load_clip(folder)
    tokenizer, params, side = text.load_tokenizer(folder), jax.device_put(params), config.vision.image_size
    network = CLIP(config)

    def embed_texts(texts: Sequence[str]) -> Features:
        length = config.text.max_position_embeddings
        if long := sum(len(ids) > length for ids in tokenizer(list(texts), verbose=False)["input_ids"]):
            _LOG.warning("CLIP-T: %d of %d prompts are cut at %d tokens", long, len(texts), length)
        ids = text.encode(tokenizer, texts, length, truncate=True)
        return _in_batches(functools.partial(_clip_texts, network=network), params, ids, "CLIP's texts")

    def embed(images: Iterable[Image]) -> Features:
        prepared = (resize_and_crop(image, side, side) for image in images)
        return _in_batches(functools.partial(_clip_images, network=network), params, prepared, "CLIP's images")

    return Network(
        name="CLIP",
        source=str(source),
        fingerprint=fingerprint(params),
        preparation=f"shorter side to {side} pixels, bicubic with antialias (Pillow), centre {side} x {side}",
        embed=embed,
        embed_texts=embed_texts,
    )


def load_dino_network(source: str | os.PathLike) -> Network:
    """DINO or DINOv2, its class token, from a folder in transformers' layout, or a hub id.

    Raises:
      ValueError: the source is missing, unreadable or does not fit.
    """
    config, params = load_dino(source)
    params, network = jax.device_put(params), DINOv2(config)
    name = "DINOv2" if config.layer_scale else "DINO"

    def embed(images: Iterable[Image]) -> Features:
        prepared = (resize_and_crop(image, DINO_RESIZED, DINO_SIDE) for image in images)
        return _in_batches(functools.partial(_dino_images, network=network), params, prepared, f"{name}'s images")

    size = f"{config.num_layers} layers of {config.width}, patches of {config.patch_size} pixels"
    filtered = "bicubic with antialias (Pillow)"
    preparation = f"shorter side to {DINO_RESIZED} pixels, {filtered}, centre {DINO_SIDE} x {DINO_SIDE}; {size}"
    return Network(name=name, source=str(source), fingerprint=fingerprint(params), preparation=preparation, embed=embed)


def _unit(features: Float[Array, "N E"]) -> tuple[Array, Array]:
    unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    return unit, all_finite(unit)


@functools.partial(jax.jit, static_argnames="network")
def _clip_images(params: Any, images: Array, *, network: CLIP) -> tuple[Array, Array]:
    return _unit(network.apply({"params": params}, standardize(images), method="embed_images"))


@functools.partial(jax.jit, static_argnames="network")
def _clip_texts(params: Any, ids: Array, *, network: CLIP) -> tuple[Array, Array]:
    return _unit(network.apply({"params": params}, ids, method="embed_texts"))


@functools.partial(jax.jit, static_argnames="network")
def _dino_images(params: Any, images: Array, *, network: DINOv2) -> tuple[Array, Array]:
    return _unit(network.apply({"params": params}, standardize_dino(images.astype(jnp.float32) / 127.5 - 1)).pooled)


def _in_batches(apply: Callable, params: Any, inputs: Iterable[np.ndarray], what: str) -> Features:
    """All rows, a few at a time in one program."""
    parts = []
    for batch in _chunks(inputs):
        padded = np.stack([*batch, *[batch[-1]] * (AT_ONCE - len(batch))])
        rows, finite = jax.device_get(apply(params, padded))
        check_finite({what: finite}, {"params": params})
        parts.append(rows[: len(batch)])
    return np.concatenate(parts)


def _chunks(rows: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for row in rows:
        batch.append(row)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def measure(network: Network, jobs: Sequence[Job], benchmark: Benchmark, samples: Samples) -> list[dict[str, float]]:
    """For each image its figures: NAME-I, the mean over its concepts, and of CLIP also CLIP-T.

    Raises:
      NotFiniteError: features that are not finite.
    """
    concepts = list(dict.fromkeys((use.image, use.word) for job in jobs for use in job.item.uses))
    references = dict(zip(concepts, network.embed(benchmark.reference(*which) for which in concepts), strict=True))
    drawn = network.embed(samples.pixels(job.item, job.image) for job in jobs)
    figures = []
    for job, features in zip(jobs, drawn, strict=True):
        own = [references[use.image, use.word] @ features for use in job.item.uses]
        figures.append({image_figure(network): float(np.mean(own))})
    if network.embed_texts is not None:
        prompts = list(dict.fromkeys(job.item.prompt for job in jobs))
        texts = dict(zip(prompts, network.embed_texts(prompts), strict=True))
        for job, features, own in zip(jobs, drawn, figures, strict=True):
            own[f"{network.name}-T"] = float(texts[job.item.prompt] @ features)
    return figures


def image_figure(network: Network) -> str:
    """The name of the similarity between images: CLIP-I, DINO or DINOv2."""
    return f"{network.name}-I" if network.embed_texts is not None else network.name
