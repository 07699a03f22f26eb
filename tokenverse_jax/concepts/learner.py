"""Learns concepts of one model, several at once or one after the other, with programs that are compiled once."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from runtime_jax.data import center_crop
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.prng import Stream, stream_key
from runtime_jax.training.program import Program
from tokenverse_jax.concepts.bank import KEPT_SIDE, ConceptFile
from tokenverse_jax.concepts.captions import bind_captions
from tokenverse_jax.concepts.concept_data import (
    Beside,
    ConceptData,
    beside,
    draw,
    encode_concept,
    encode_images,
    make_concepts,
)
from tokenverse_jax.concepts.concept_mod import SHARDING_RULES, Params
from tokenverse_jax.concepts.learn import LearnConfig, LearnState, Metrics, init_state, learn_step, make_optimizers
from tokenverse_jax.flux.model import Flux, FluxConfig
from tokenverse_jax.flux.pipeline import Pipeline


def make_program(
    flux: Flux, config: LearnConfig, mesh: Mesh, frozen: Params, *, runs: int | None = None, at_once: int = 1
) -> Program:
    """The program of learning, with the parameters of `flux` as its frozen ones.

    Its variants are (stage, what stands beside the concept's image, grid of image tokens).

    Args:
      runs: None: one run. Otherwise all leaves of the state but its step have a first axis of so many runs, and those
        of a batch a second one.
      at_once: so many of the runs are computed together, the others after them.
    """
    optimizers = make_optimizers(config)

    def train_step(state, frozen, batch, variant):
        stage, _, grid = variant
        static = {"config": config, "flux": flux, "optimizer": optimizers[stage - 1], "stage": stage, "grid": grid}
        if runs is None:
            return learn_step(state, frozen, batch, **static)

        def learn_one(own: tuple[LearnState, Mapping[str, Any]]) -> tuple[LearnState, Metrics]:
            return learn_step(own[0].replace(step=state.step), frozen, own[1], **static)

        own = state.replace(step=None), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), batch)
        new, metrics = jax.lax.map(learn_one, own, batch_size=at_once)
        return new.replace(step=state.step + 1), jax.tree.map(lambda x: x.sum(axis=0), metrics)

    def init():
        return init_states(config, flux.config, jax.random.key(0), runs)

    rules = SHARDING_RULES
    if runs is not None:  # an optimizer's count is a number for each run
        rules = [*((name, axes and (None, *axes)) for name, axes in rules), (r"count", ())]
    return Program(init, train_step, rules, mesh, frozen)


def init_states(config: LearnConfig, flux: FluxConfig, key: Array, runs: int | None) -> LearnState:
    """A new state, or that of so many runs, which all begin alike; their step is one."""
    state = init_state(config, flux, key)
    if runs is None:
        return state
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (runs, *x.shape)), state).replace(step=state.step)


class Learner:
    """Learning, compiled. Concepts whose data have the same shapes share the programs.

    >>> learner = Learner(pipeline, config)
    >>> captions = bind_captions(pipeline.tokenizer_2, pipeline.text_length, [["a dog"]], ["dog"], config.isolation)
    >>> data = encode_concept(pipeline, config, images, captions)
    >>> concepts = make_concepts(learner.learn(data, seed=0), data, config)
    """

    def __init__(
        self,
        pipeline: Pipeline,
        config: LearnConfig,
        mesh: Mesh | None = None,
        *,
        runs: int | None = None,
        at_once: int = 1,
    ):
        """`pipeline` needs only its transformer, which lies on the mesh, or without one on the default device.

        `runs`, `at_once`: as of `make_program`.
        """
        flux, devices = pipeline.transformer, jax.devices()[:1]
        mesh = make_mesh(MeshConfig(), devices) if mesh is None else mesh
        self._config = config
        self._init = functools.partial(init_states, config, flux.config, runs=runs)
        module = Flux(flux.config, pipeline.compute)
        self.program = make_program(module, config, mesh, flux.params, runs=runs, at_once=at_once)

    def init(self, seed: int) -> LearnState:
        """A new state, made where it belongs."""
        return jax.jit(self._init, out_shardings=self.program.shardings)(stream_key(seed, Stream.PARAMS))

    def variant(self, step: int, seed: int, data: ConceptData) -> tuple[int, Beside, tuple[int, int]]:
        """The program of a step: its stage, what stands beside the concept's image, and the grid of image tokens."""
        return self._config.stage(step), beside(self._config, seed, step), data.grid

    def step(
        self, state: LearnState, batch: Mapping[str, Any], step: int, data: ConceptData
    ) -> tuple[LearnState, Metrics]:
        """One update with a batch of `concept_data.draw`; `state` is donated."""
        kind = "own" if "other_mask" in batch else "pool" if "pair_noise" in batch else "nothing"
        return self.program.step(state, batch, (self._config.stage(step), kind, data.grid))

    def learn(self, data: ConceptData, seed: int) -> Params:
        """All steps of both stages; returns Concept-Mod's parameters, FloatingPointError if updates were not finite."""
        state, skipped = self.init(seed), 0.0
        for step in range(self._config.total_steps):
            state, metrics = self.step(state, draw(data, self._config, seed, step), step, data)
            skipped += metrics["nonfinite"][0]
        if skipped:
            raise FloatingPointError(f"loss or gradient not finite in {skipped:.0f} of {step + 1} updates")
        return state.params


def learn_concepts(
    pipeline: Pipeline,
    image: UInt8[np.ndarray, "H W 3"],
    captions: Sequence[str],
    words: Sequence[str],
    *,
    config: LearnConfig = LearnConfig(),
    seed: int = 0,
    pool: UInt8[np.ndarray, "K H W 3"] | None = None,
    learner: Learner | None = None,
    keep_params: bool = False,
) -> ConceptFile:
    """The concepts of an image: a direction in the modulation space for each token of the words (paper section 3).

    >>> learned = learn_concepts(pipeline, image, ["a star and a drop in the snow"], ["a star", "a drop"])
    >>> learned.save("star.safetensors")

    Args:
      pipeline: with all its parts; its weights stay as they are.
      image: that shows the concepts; sides are multiples of a token's (16 pixels for FLUX).
      captions: of the image, in different words and orders; each contains every word to learn.
      words: to learn.
      config: how to learn; the defaults are the paper's, except for the isolation loss.
      seed: of parameters and noise.
      pool: for the isolation loss, the base model's images of `config.isolation.captions`; see `pool.make_pool`.
      learner: of the pipeline and config, to learn several images with programs that are compiled once.
      keep_params: also store Concept-Mod's parameters, to recompute directions for each prompt.

    Raises:
      ValueError: a caption without one of the words, an impossible size, or no pool where one is needed.
      FloatingPointError: updates were not finite.
    """
    if (config.isolation is None) != (pool is None):
        raise ValueError("config.isolation and pool: both, or neither, are needed")
    bound = bind_captions(pipeline.tokenizer_2, pipeline.text_length, [tuple(captions)], list(words), config.isolation)
    data = encode_concept(pipeline, config, image[None], bound)
    if pool is not None:
        data = replace(data, pool_latents=encode_images(pipeline, pool))
    params = (learner or Learner(pipeline, config)).learn(data, seed)
    return ConceptFile(
        concepts=make_concepts(params, data, config),
        caption=captions[0],
        base=pipeline.source,
        base_hash=pipeline.base_hash(),
        image=center_crop(image, min(*image.shape[:2], KEPT_SIDE)),
        params=params if keep_params else None,
    )
