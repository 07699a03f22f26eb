"""The compiled side of a training run: how its state lies on the mesh, and a program for each variant of the step."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from runtime_jax import sharding
from runtime_jax.cost import count_flops


class _Compiled(NamedTuple):
    program: Any
    flops: float


class Program:
    """A train step and its state under one mesh; use it under `jax.set_mesh(mesh)`.

    Attributes:
      abstract_state: shapes, dtypes and shardings of the state.
      shardings: the same tree, shardings alone.
    """

    def __init__(
        self,
        init_state: Callable[[], Any],
        train_step: Callable[[Any, Any, Mapping[str, Any], Any], tuple[Any, Any]],
        rules: Sequence[sharding.Rule],
        mesh: jax.sharding.Mesh,
        frozen: Any = None,
    ):
        """Compiles nothing yet.

        Args:
          init_state: a new state.
          train_step: (state, frozen, batch, variant) -> (state, metrics); the variant, such as a number of kept tokens,
            is static.
          rules: of `sharding.param_shardings` for the state.
          mesh: of `sharding.make_mesh`.
          frozen: parameters that the step reads and never changes; a copy on every device.
        """
        self._init_state, self._train_step, self._mesh = init_state, train_step, mesh
        shapes = jax.eval_shape(init_state)
        self.shardings = sharding.param_shardings(shapes, rules, mesh)
        self.abstract_state = jax.tree.map(
            lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, self.shardings
        )
        self.frozen = sharding.place(frozen, jax.tree.map(lambda _: sharding.replicated(mesh), frozen))
        self._compiled: dict[Hashable, _Compiled] = {}

    def init(self) -> Any:
        """A new state, made where it belongs."""
        return jax.jit(self._init_state, out_shardings=self.shardings)()

    def step(self, state: Any, batch: Mapping[str, Any], variant: Hashable) -> tuple[Any, Any]:
        """One update; `state` is donated. The first call of each variant compiles."""
        arguments = (state, self.frozen, dict(batch))
        if variant not in self._compiled:
            jitted = jax.jit(
                lambda state, frozen, batch: self._train_step(state, frozen, batch, variant),
                donate_argnums=0,
                out_shardings=(self.shardings, sharding.replicated(self._mesh)),
            )
            traced = jitted.trace(*arguments)
            self._compiled[variant] = _Compiled(traced.lower().compile(), count_flops(traced.jaxpr.jaxpr))
        return self._compiled[variant].program(*arguments)

    def flops(self, variant: Hashable) -> float:
        """FLOPs of a step of this variant, over all devices; 0 before its first call."""
        return self._compiled[variant].flops if variant in self._compiled else 0.0
