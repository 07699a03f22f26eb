"""Learns concepts of one model, one after the other, with programs that are compiled once."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from runtime_jax.cost import count_flops
from runtime_jax.prng import Stream, stream_key
from runtime_jax.sharding import param_shardings, replicated
from tokenverse_jax.concepts.concept_data import ConceptData, draw
from tokenverse_jax.concepts.concept_mod import SHARDING_RULES, Params
from tokenverse_jax.concepts.learn import (
    LearnConfig,
    LearnState,
    Metrics,
    init_state,
    learn_step,
    make_optimizers,
)
from tokenverse_jax.flux.model import Flux
from tokenverse_jax.flux.pipeline import Pipeline


class Learner:
    """The compiled side of learning. Concepts whose data have the same shapes share the programs.

    >>> learner = Learner(pipeline, config)
    >>> captions = bind_captions(pipeline.tokenizer_2, pipeline.text_length, [["a dog"]], ["dog"], config.isolation)
    >>> data = encode_concept(pipeline, config, images, captions)
    >>> concepts = make_concepts(learner.learn(data, seed=0), data, config)
    """

    def __init__(self, pipeline: Pipeline, config: LearnConfig, mesh: Mesh | None = None):
        """`pipeline` needs its transformer only; with a mesh, use all of this under `jax.set_mesh(mesh)`."""
        self._config, self._frozen = config, pipeline.transformer.params
        flux = Flux(pipeline.transformer.config, pipeline.compute)
        self._init = functools.partial(init_state, config, flux.config)
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        self._shardings = None if mesh is None else param_shardings(shapes, SHARDING_RULES, mesh)
        self.abstract_state = shapes
        if mesh is not None:
            self.abstract_state = jax.tree.map(
                lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
                shapes,
                self._shardings,
            )
        self._steps = [
            jax.jit(
                functools.partial(learn_step, config=config, flux=flux, optimizer=optimizer, stage=stage),
                static_argnames="grid",
                donate_argnums=0,
                out_shardings=None if mesh is None else (self._shardings, replicated(mesh)),
            )
            for stage, optimizer in enumerate(make_optimizers(config), start=1)
        ]
        self.flops: dict[tuple[int, bool], float] = {}  # of the programs used so far, by stage and isolation

    def init(self, seed: int) -> LearnState:
        """A new state, made where it belongs."""
        return jax.jit(self._init, out_shardings=self._shardings)(stream_key(seed, Stream.PARAMS))

    def step(
        self, state: LearnState, batch: Mapping[str, Any], step: int, data: ConceptData
    ) -> tuple[LearnState, Metrics]:
        """One update with a batch of `concept_data.draw`; `state` is donated."""
        stage = self._config.stage(step)
        arguments = (state, self._frozen, dict(batch))
        variant = (stage, "pair_noise" in batch)
        if variant not in self.flops:
            self.flops[variant] = count_flops(self._steps[stage - 1].trace(*arguments, grid=data.grid).jaxpr.jaxpr)
        return self._steps[stage - 1](*arguments, grid=data.grid)

    def learn(self, data: ConceptData, seed: int) -> Params:
        """All steps of both stages, without a run's files: Concept-Mod's parameters.

        Raises:
          FloatingPointError: updates were not finite.
        """
        state, skipped = self.init(seed), 0.0
        for step in range(self._config.total_steps):
            state, metrics = self.step(state, draw(data, self._config, seed, step), step, data)
            skipped += metrics["nonfinite"][0]
        if skipped:
            raise FloatingPointError(f"loss or gradient not finite in {skipped:.0f} of {step + 1} updates")
        return state.params
