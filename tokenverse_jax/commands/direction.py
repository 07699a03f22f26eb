"""`tokenverse direction`: the paper's study of directions without training, on all tokens (M) and on a word's (M+).

Axes: S strengths, H W image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from runtime_jax.files import AnyPath
from runtime_jax.finite import all_finite, check_finite
from runtime_jax.pictures import heat_map, image_grid, save_png
from tokenverse_jax.commands.generate import SHOWN_SIDE, encode
from tokenverse_jax.concepts.compose import warn_strength
from tokenverse_jax.concepts.draw import Sampling, sample
from tokenverse_jax.flux import text
from tokenverse_jax.flux.model import direction
from tokenverse_jax.flux.offsets import Offsets, place_on_tokens
from tokenverse_jax.flux.pipeline import Loader, PromptEncoding
from tokenverse_jax.flux.words import find_word


class Study(NamedTuple):
    """Images from one noise: the base model's, and for each strength with the direction on all tokens or on a word."""

    base: UInt8[np.ndarray, "H W 3"]
    everywhere: UInt8[np.ndarray, "S H W 3"]  # M
    on_word: UInt8[np.ndarray, "S H W 3"]  # M+


def study(
    load: Loader,
    prompt: str,
    word: str,
    *,
    attribute: str,
    neutral: str,
    strengths: Sequence[float],
    sampling: Sampling,
) -> Study:
    """Adds the direction from the prompt `neutral` to the prompt `attribute`, with each of `strengths`.

    Args:
      load: gives parts of the model.
      word: of `prompt`, that takes the direction in M+; "dog#2" is its second "dog".

    Raises:
      ValueError: before anything is loaded: the word is not in the prompt, or impossible sizes.
      NotFiniteError: values that are not finite, see `Pipeline.generate`.
    """
    if not np.isfinite(strengths).all():
        raise ValueError(f"strengths {list(strengths)}: finite numbers are needed")
    for strength in strengths:
        warn_strength(float(strength), f"the direction to {attribute!r}")
    load.check_size(sampling.height, sampling.width)
    bare = load()
    positions = find_word(bare.tokenizer_2, prompt, word)
    text.encode(bare.tokenizer_2, [prompt, attribute, neutral], bare.text_length)
    encoded, negative = encode(load, [prompt, attribute, neutral], sampling)
    pipeline = load("transformer", "vae")
    flux = pipeline.transformer
    (one,) = np.asarray(direction(flux.config, flux.params, encoded.vec[1:2], encoded.vec[2:]))
    check_finite({"the direction": all_finite(jnp.asarray(one))}, {"transformer": flux.params})
    scaled = np.asarray([0.0, *strengths], np.float32)[:, None] * one
    none = np.zeros_like(scaled)
    on_word = np.repeat(np.concatenate([none, scaled[1:]])[:, None], len(positions), axis=1)
    images = sample(  # one program for all of them
        pipeline,
        PromptEncoding(*(part[:1] for part in encoded)),
        sampling,
        np.zeros(1 + 2 * len(strengths), int),
        negative_prompt=negative,
        offsets=Offsets(
            shared=place_on_tokens(jnp.asarray(on_word), positions, 1 + max(positions)),
            everywhere=np.concatenate([scaled, none[1:]]),
        ),
    )
    base, everywhere, on_word = np.split(images, [1, 1 + len(strengths)])
    return Study(base[0], everywhere, on_word)


def change(images: UInt8[np.ndarray, "S H W 3"], base: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "S H W"]:
    """Each pixel's difference from the base image's, from 0 to 1, mean over its colours."""
    return np.abs(images.astype(np.float32) - base).mean(axis=-1) / 255


def figure(result: Study, word: str, strengths: Sequence[float]) -> UInt8[np.ndarray, "height width 3"]:
    """Base, M and M+ by strength, each with a heat map of the change; all maps have one scale."""
    kinds = {"M\nall tokens": result.everywhere, f'M+\n"{word}" only': result.on_word}
    changes = [change(images, result.base) for images in kinds.values()]
    maximum = max(float(np.max(changes)), 1 / 255)
    rows, labels = [], []
    for (label, images), maps in zip(kinds.items(), changes, strict=True):
        rows += [[result.base, *images], [None, *(heat_map(each, maximum=maximum) for each in maps)]]
        labels += [label, "change"]
    columns = ["base", *(f"w = {strength:g}" for strength in strengths)]
    scale = max(1, SHOWN_SIDE // max(result.base.shape[:2]))
    return image_grid(rows, row_labels=labels, column_labels=columns, scale=scale)


def write(result: Study, word: str, strengths: Sequence[float], out: AnyPath) -> list[str]:
    """Writes the images and `out/directions.png`; returns a line on each strength."""
    save_png(out / "base.png", result.base)
    lines = []
    for i, strength in enumerate(strengths):
        mean = {}
        for name, images in (("m", result.everywhere), ("m_plus", result.on_word)):
            save_png(out / f"{name}_{strength:g}.png", images[i])
            mean[name] = 100 * change(images[i : i + 1], result.base).mean()
        lines.append(f"w = {strength:g}: pixels change by {mean['m']:.2f} % in M, {mean['m_plus']:.2f} % in M+")
    save_png(out / "directions.png", figure(result, word, strengths))
    return lines
