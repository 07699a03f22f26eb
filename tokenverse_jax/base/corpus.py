"""The data of all stages: mini_scenes drawn on demand, their latents, and a new caption every time.

Axes: N scenes, B batch, T text tokens, H W image, h w grid of latents, C latent channels, F features of a layout,
A attributes.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float, Float16, UInt8

from mini_scenes import SPLITS, Scene, caption, example_scene, full_caption, in_a_row, render_scene
from mini_scenes.scene import MAX_IN_A_ROW
from runtime_jax import hosts
from runtime_jax.files import AnyPath, replacing
from runtime_jax.prng import Stream, host_rng
from tokenverse_jax.base.tokenizers import Tokenizers
from tokenverse_jax.base.words import words
from tokenverse_jax.concepts.isolation import IsolationConfig
from tokenverse_jax.flux.text import encode

Scenes = tuple[Scene, ...]
PAIR = IsolationConfig.template  # the caption of two pictures side by side, as in learning a concept
Images = UInt8[np.ndarray, "B H W 3"]
AT_ONCE = 64


def scenes(seed: int, split: str, examples: Sequence[int]) -> Scenes:
    """Scenes of a split ("train", "validation", "test"); a split has no end."""
    return tuple(example_scene(seed, split, example)[0] for example in examples)


def rows(seed: int, split: str, examples: Sequence[int]) -> Scenes:
    """The same scenes with their objects side by side (see `in_a_row`), which the transformer learns to draw."""
    found = zip(examples, scenes(seed, split, examples), strict=True)
    return tuple(in_a_row(scene, host_rng(seed, Stream.DATA, SPLITS.index(split), example)) for example, scene in found)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A caption from left to right, so that a pair of words stands for one picture and not for two."""
    return caption(scene, rng, left_to_right=True)


def draw(drawn: Sequence[Scene], size: int) -> Images:
    """Pictures of scenes."""
    return np.stack([render_scene(scene, size).image for scene in drawn])


def picture_batches(seed: int, size: int, batch_size: int, start_step: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of new training pictures, without end: "image" uint8 [B, H, W, 3] and "example" int64 [B]."""
    for step in itertools.count(start_step):
        examples = range(step * batch_size, (step + 1) * batch_size)
        yield {"image": draw(scenes(seed, "train", examples), size), "example": np.array(examples)}


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
    """The text encoders' inputs: a scene's caption, the caption of two scenes side by side, or sometimes nothing."""

    text_length: int = 40  # tokens of T5
    drop_both: float = 0.1  # for classifier-free guidance
    drop_t5: float = 0.1  # only CLIP gets the caption, or only T5, so that both learn to use it
    drop_clip: float = 0.1
    pair_every: int = 8  # one batch in this many has pairs; 0: none
    easy_steps: int = 0  # the first steps, with scenes of one object
    full_steps: int = 0  # the first steps, with captions that name everything in one fixed form
    object_weights: tuple[float, ...] = (1.0, 1.0)  # after easy_steps: shares of scenes of one object and of two

    def __post_init__(self):
        shares = self.drop_both, self.drop_t5, self.drop_clip
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"drop_both, drop_t5, drop_clip={shares}: shares whose sum is at most 1 are needed")
        weights = self.object_weights
        if len(weights) != MAX_IN_A_ROW or min(weights) < 0 or not sum(weights):
            raise ValueError(f"object_weights={weights}: shares of 1 to {MAX_IN_A_ROW} objects are needed, not all 0")
        for name in ("pair_every", "easy_steps", "full_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number is needed, or 0 for none")

    def is_easy_step(self, step: int) -> bool:
        """Whether this step's scenes have one object."""
        return step < self.easy_steps

    def is_pair_step(self, step: int) -> bool:
        """Whether this step's batch is one of pairs."""
        return not self.is_easy_step(step) and self.pair_every > 0 and step % self.pair_every == self.pair_every - 1


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
        """latents [B, h, w, C], layouts [B, rows, columns, F], t5_ids and clip_ids [B, T], words [B, T, A], index [B].

        A batch of pairs has half as many examples, of twice the width.
        """
        easy = self.captions.is_easy_step(step)
        weights = (1.0,) if easy else self.captions.object_weights
        examples = range(step * self.batch_size, (step + 1) * self.batch_size)
        picks = np.array([self._pick(example, weights) for example in examples])
        picks = picks.reshape(-1, 2 if self.captions.is_pair_step(step) else 1)
        examples = examples[: len(picks)]
        prompts = functools.partial(self._prompts, name_all=step < self.captions.full_steps)
        t5, clip = zip(*map(prompts, picks, examples), strict=True)
        wide = "b pictures h w c -> b h (pictures w) c"
        return {
            "latents": rearrange(self.latents[picks], wide),
            "layouts": rearrange(self.layouts[picks], wide),
            "t5_ids": encode(self.tokenizers.tokenizer_2, t5, self.captions.text_length),
            "clip_ids": encode(self.tokenizers.tokenizer, clip, self.captions.text_length, truncate=True),
            "words": words(self.tokenizers.tokenizer_2, t5, self.captions.text_length),
            "example": np.array(examples),
        }

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

    def _prompts(self, picks: np.ndarray, example: int, *, name_all: bool) -> tuple[str, str]:
        """T5's and CLIP's captions of one scene, or of two side by side."""
        config, rng = self.captions, host_rng(self.seed, Stream.AUGMENT, example)
        drawn = rng.uniform()
        text = _tell([self.scenes[pick] for pick in picks], rng, self.tokenizers, config, name_all=name_all)
        neither, only_clip, only_t5 = np.cumsum((config.drop_both, config.drop_t5, config.drop_clip))
        return ("" if drawn < only_clip else text), ("" if drawn < neither or only_clip <= drawn < only_t5 else text)


def _tell(
    scenes: Sequence[Scene], rng: np.random.Generator, tokenizers: Tokenizers, config: CaptionConfig, *, name_all: bool
) -> str:
    """A caption of one scene, or of two side by side, within `text_length`."""
    while True:
        texts = [full_caption(scene) if name_all else describe(scene, rng) for scene in scenes]
        text = texts[0] if len(texts) == 1 else PAIR.format(left=texts[0], right=texts[1])
        if len(tokenizers.tokenizer_2(text, verbose=False)["input_ids"]) <= config.text_length:
            return text
        name_all = False


def texts(
    scenes: Scenes, tokenizers: Tokenizers, captions: CaptionConfig, batch_size: int, seed: int, start_step: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of captions alone, without end: "t5_ids" int32 [B, T], "words" int32 [B, T, A].

    Half of the captions name everything; one in eight is of two scenes side by side.
    """
    for step in itertools.count(start_step):
        told = []
        for example in range(step * batch_size, (step + 1) * batch_size):
            rng = host_rng(seed, Stream.AUGMENT, example)
            some = [scenes[pick] for pick in rng.integers(len(scenes), size=1 + (example % 8 == 0))]
            told.append(_tell(some, rng, tokenizers, captions, name_all=example % 2 == 1))
        yield {
            "t5_ids": encode(tokenizers.tokenizer_2, told, captions.text_length),
            "words": words(tokenizers.tokenizer_2, told, captions.text_length),
        }
