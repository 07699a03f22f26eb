"""The data of all stages: mini_scenes drawn on demand, their latents, and a new caption every time.

Axes: N scenes, B batch, T text tokens, H W image, h w grid of latents, C latent channels, F features of a layout,
A attributes, P parts of a picture (its objects from left to right, and the place), L tokens of a part's caption.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float, Float16, Int32, UInt8

from mini_scenes import (
    BACKGROUNDS,
    MENTION_RATES,
    SPLITS,
    Scene,
    as_drawing,
    caption,
    example_scene,
    full_caption,
    in_a_row,
    render_scene,
)
from mini_scenes.captions import object_caption, place_caption
from mini_scenes.judge.captions import objects_in
from mini_scenes.scene import MAX_IN_A_ROW
from runtime_jax import hosts
from runtime_jax.files import AnyPath, replacing
from runtime_jax.prng import Stream, host_rng
from tokenverse_jax.base.tokenizers import Tokenizers
from tokenverse_jax.base.words import bags, words
from tokenverse_jax.concepts.isolation import IsolationConfig
from tokenverse_jax.flux.text import encode
from tokenverse_jax.flux.words import find_span

Scenes = tuple[Scene, ...]
PAIR = IsolationConfig.template  # the caption of two pictures side by side, as in learning a concept
BESIDE = IsolationConfig(captions=("",))  # merges captions with it
Images = UInt8[np.ndarray, "B H W 3"]
AT_ONCE = 64
NOBODY = -1  # owner of a token that belongs to no part
PART_LENGTH = 20  # tokens of CLIP that hold the caption of any part
# What a caption mentions of a scene whose looks are told by modulation: what is where.
BARE_RATES = {**dict.fromkeys(MENTION_RATES, 0.0), "background": 0.8}
LOOK_RATES = dict.fromkeys(MENTION_RATES, 0.5)  # what the caption of a part with its look mentions


def scenes(seed: int, split: str, examples: Sequence[int]) -> Scenes:
    """Scenes of a split ("train", "validation", "test"); a split has no end."""
    return tuple(example_scene(seed, split, example)[0] for example in examples)


def rows(seed: int, split: str, examples: Sequence[int], *, drawn: float = 0.0) -> Scenes:
    """The same scenes with their objects side by side (see `in_a_row`), which the transformer learns to draw.

    A share `drawn` of them are drawings, see `as_drawing`.
    """
    found = []
    for example, scene in zip(examples, scenes(seed, split, examples), strict=True):
        rng = host_rng(seed, Stream.DATA, SPLITS.index(split), example)
        row = in_a_row(scene, rng)
        found.append(as_drawing(row, rng) if rng.uniform() < drawn else row)
    return tuple(found)


def describe(scene: Scene, rng: np.random.Generator, rates: Mapping[str, float] = MENTION_RATES) -> str:
    """A caption from left to right, so that a pair of words stands for one picture and not for two."""
    return caption(scene, rng, left_to_right=True, rates=rates)


def draw(drawn: Sequence[Scene], size: int) -> Images:
    """Pictures of scenes."""
    return np.stack([render_scene(scene, size).image for scene in drawn])


def picture_batches(
    seed: int, size: int, batch_size: int, start_step: int, *, drawn: float = 0.0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of new training pictures, without end: "image" uint8 [B, H, W, 3] and "example" int64 [B].

    A share `drawn` of them are drawings.
    """
    for step in itertools.count(start_step):
        examples = range(step * batch_size, (step + 1) * batch_size)
        found = [
            as_drawing(scene, rng) if (rng := host_rng(seed, Stream.AUGMENT, example)).uniform() < drawn else scene
            for example, scene in zip(examples, scenes(seed, "train", examples), strict=True)
        ]
        yield {"image": draw(found, size), "example": np.array(examples)}


def cached(
    path: AnyPath, scenes: Scenes, compute: Callable[[Scenes], Float[np.ndarray, "B ..."]]
) -> Float16[np.ndarray, "N ..."]:
    """Results of `compute`, which takes some scenes at a time; from the file `path` if it exists.

    Of several processes, process 0 computes for all of them.
    """
    if jax.process_index() == 0 and not path.is_file():
        parts = (scenes[start : start + AT_ONCE] for start in range(0, len(scenes), AT_ONCE))
        found = np.concatenate([np.asarray(compute(part), np.float16) for part in parts])
        with replacing(path) as new:
            np.save(new, found)
    hosts.barrier(path.name)
    with path.open("rb") as file:
        return np.load(file)


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """What the text encoders read of a scene, or of two side by side.

    Each encoder reads a caption of its own, or sometimes nothing, so that the transformer learns to draw from either,
    as Stable Diffusion 3 did (arXiv 2403.03206, section 5.3).
    """

    text_length: int = 40  # tokens of T5
    drop_t5: float = 0.32  # shares of the examples, each by itself: both are dropped in their product
    drop_clip: float = 0.32
    local: float = 0.0  # share of the examples whose looks are told by modulation alone, see `Told`
    light: float = 0.3  # probability that a caption names the light's warmth, and its side
    pair_every: int = 8  # one batch in this many has pairs; 0: none
    easy_steps: int = 0  # the first steps, with scenes of one object
    full_steps: int = 0  # the first steps, with captions that name everything in one fixed form
    object_weights: tuple[float, ...] = (1.0, 1.0)  # after easy_steps: shares of scenes of one object and of two

    def __post_init__(self):
        for name in ("drop_t5", "drop_clip", "local", "light"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share is needed, from 0 to 1")
        weights = self.object_weights
        if len(weights) != MAX_IN_A_ROW or min(weights) < 0 or not sum(weights):
            raise ValueError(f"object_weights={weights}: shares of 1 to {MAX_IN_A_ROW} objects are needed, not all 0")
        for name in ("pair_every", "easy_steps", "full_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number is needed, or 0 for none")

    @property
    def rates(self) -> Mapping[str, float]:
        """The probability that a caption mentions each attribute."""
        return {**MENTION_RATES, "warmth": self.light, "direction": self.light}

    def is_easy_step(self, step: int) -> bool:
        """Whether this step's scenes have one object."""
        return step < self.easy_steps

    def is_pair_step(self, step: int) -> bool:
        """Whether this step's batch is one of pairs."""
        return not self.is_easy_step(step) and self.pair_every > 0 and step % self.pair_every == self.pair_every - 1


class Told(NamedTuple):
    """What an example's captions say.

    In a share `local` of the examples, T5's and CLIP's captions tell only what is where. Each word of T5's takes the
    step of the modulation vector from the caption of its part without its look to the one with it, as a direction in
    the space M+ does: so what CLIP says of a look reaches one part of the picture, and no other.
    """

    t5: str
    clip: str
    parts: tuple[tuple[str, str], ...]  # captions of each part, without its look and with it
    owners: Int32[np.ndarray, " T"]  # the part that each of T5's tokens belongs to, NOBODY where it takes no step


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Batches for the transformer; batch s is a pure function of (seed, s)."""

    latents: Float[np.ndarray, "N h w C"]  # scaled
    layouts: Float[np.ndarray, "N rows columns F"]  # of image tokens, see `layout`
    scenes: Scenes
    tokenizers: Tokenizers
    captions: CaptionConfig
    batch_size: int
    seed: int

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches start_step, start_step + 1, ... without end."""
        return map(self.batch, itertools.count(start_step))

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """One batch: what `text_to_image.loss` takes.

        latents [B, h, w, C], layouts [B, rows, columns, F], t5_ids and clip_ids [B, T], words [B, T, A], example [B];
        with `captions.local` also part_ids [B, 2, P, L], CLIP's tokens of every part's caption without its look and
        with it, and owners [B, T], the part that each of T5's tokens belongs to, NOBODY for none. A batch of pairs has
        half as many examples, of twice the width.
        """
        easy, captions = self.captions.is_easy_step(step), self.captions
        weights = (1.0,) if easy else captions.object_weights
        examples = range(step * self.batch_size, (step + 1) * self.batch_size)
        picks = np.array([self._pick(example, weights) for example in examples])
        picks = picks.reshape(-1, 2 if captions.is_pair_step(step) else 1)
        examples = examples[: len(picks)]
        told = [self._tell(*each, name_all=step < captions.full_steps) for each in zip(picks, examples, strict=True)]
        t5 = [each.t5 for each in told]
        wide = "b pictures h w c -> b h (pictures w) c"
        batch = {
            "latents": rearrange(self.latents[picks], wide),
            "layouts": rearrange(self.layouts[picks], wide),
            "t5_ids": encode(self.tokenizers.tokenizer_2, t5, captions.text_length),
            "clip_ids": self._clip_ids([each.clip for each in told], captions.text_length),
            "words": words(self.tokenizers.tokenizer_2, t5, captions.text_length),
            "example": np.array(examples),
        }
        if captions.local:
            parts = [caption for each in told for half in zip(*each.parts, strict=True) for caption in half]
            batch["part_ids"] = self._clip_ids(parts, PART_LENGTH).reshape(len(told), 2, -1, PART_LENGTH)
            batch["owners"] = np.stack([each.owners for each in told])
        return batch

    def _clip_ids(self, captions: Sequence[str], length: int) -> Int32[np.ndarray, "B length"]:
        return encode(self.tokenizers.tokenizer, captions, length, truncate=True)

    def _pick(self, example: int, weights: Sequence[float]) -> int:
        """The number of an example's scene; weights are of 1, 2, ... objects."""
        rng = host_rng(self.seed, Stream.DATA, example)
        shares = np.asarray(weights) * [len(group) > 0 for group in self._of_count[: len(weights)]]
        return int(rng.choice(self._of_count[rng.choice(len(weights), p=shares / shares.sum())]))

    @functools.cached_property
    def _of_count(self) -> list[np.ndarray]:
        """Numbers of the scenes with 1, 2, ... objects."""
        counts = np.array([len(scene.objects) for scene in self.scenes])
        return [np.flatnonzero(counts == count) for count in range(1, MAX_IN_A_ROW + 1)]

    def _tell(self, picks: np.ndarray, example: int, *, name_all: bool) -> Told:
        """What an example's captions say of its scenes."""
        config, rng = self.captions, host_rng(self.seed, Stream.AUGMENT, example)
        scenes = [self.scenes[pick] for pick in picks]
        is_local = rng.uniform() < config.local
        no_t5, no_clip = rng.uniform(size=2) < (config.drop_t5, config.drop_clip)
        rates = BARE_RATES if is_local else None if name_all else config.rates
        (t5, starts), (clip, _) = (_caption(scenes, rng, self.tokenizers, config, rates) for _ in range(2))
        told = Told(
            t5="" if no_t5 and not is_local else t5,
            clip="" if no_clip else clip,
            parts=_parts(scenes, rng),
            owners=np.full(config.text_length, NOBODY, np.int32),
        )
        if is_local:
            for number, span in _spans(scenes, t5, starts):
                told.owners[list(find_span(self.tokenizers.tokenizer_2, t5, span.start, span.stop))] = number
        return told


Rates = Mapping[str, float] | None  # of attributes that a caption mentions; None: all, in one fixed form


def _caption(
    scenes: Sequence[Scene], rng: np.random.Generator, tokenizers: Tokenizers, config: CaptionConfig, rates: Rates
) -> tuple[str, tuple[int, ...]]:
    """A caption of one scene, or of two side by side, within `text_length`; and where each scene's own one begins."""
    while True:
        texts = [full_caption(scene) if rates is None else describe(scene, rng, rates) for scene in scenes]
        text, starts = texts[0], (0,)
        if len(texts) == 2:
            text, left = BESIDE.merge(*texts, "left")
            starts = left, BESIDE.merge(*reversed(texts), "right")[1]
        if len(tokenizers.tokenizer_2(text, verbose=False)["input_ids"]) <= config.text_length:
            return text, starts
        rates = config.rates if rates is None else rates


def _parts(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    """Captions of every scene's parts, without and with their looks; objects that a scene lacks have empty ones."""
    found = []
    for scene in scenes:
        objects = sorted(scene.objects, key=lambda item: item.x)
        found += [tuple(object_caption(item, rng, rates) for rates in (BARE_RATES, LOOK_RATES)) for item in objects]
        found += [("", "")] * (MAX_IN_A_ROW - len(objects))
        found.append(tuple(place_caption(scene, rng, rates) for rates in (BARE_RATES, LOOK_RATES)))
    return tuple(found)


def _spans(scenes: Sequence[Scene], text: str, starts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The parts that a caption names, by number, and where."""
    objects = objects_in(text)
    for number, (scene, start, end) in enumerate(zip(scenes, starts, (*starts[1:], len(text)), strict=True)):
        first = number * (MAX_IN_A_ROW + 1)
        for i in range(len(scene.objects)):
            yield first + i, next(objects)[0]
        place = BACKGROUNDS[scene.background.kind]
        if (at := text.find(place, start, end)) >= 0:
            yield first + MAX_IN_A_ROW, slice(at, at + len(place))


def texts(
    scenes: Scenes, tokenizers: Tokenizers, captions: CaptionConfig, batch_size: int, seed: int, start_step: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of captions alone, without end: t5_ids and clip_ids int32 [B, T], words int32 [B, T, A], bags [B, V].

    Of the captions, which both encoders read, half name everything; one in eight is of two scenes side by side. CLIP
    reads another caption in every second example: one of a single part.
    """
    for step in itertools.count(start_step):
        t5, clip = [], []
        for example in range(step * batch_size, (step + 1) * batch_size):
            rng = host_rng(seed, Stream.AUGMENT, example)
            some = [scenes[pick] for pick in rng.integers(len(scenes), size=1 + (example % 8 == 0))]
            text, _ = _caption(some, rng, tokenizers, captions, None if example % 2 else captions.rates)
            parts = [look for _, look in _parts(some, rng) if look]
            t5.append(text)
            clip.append(str(rng.choice(parts)) if example // 2 % 2 else text)
        yield {
            "t5_ids": encode(tokenizers.tokenizer_2, t5, captions.text_length),
            "clip_ids": encode(tokenizers.tokenizer, clip, captions.text_length, truncate=True),
            "words": words(tokenizers.tokenizer_2, t5, captions.text_length),
            "bags": bags(clip),
        }
