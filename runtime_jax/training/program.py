"""The compiled side of a training run: its state on the mesh, and a program for each variant of the step."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax

from runtime_jax import sharding
from runtime_jax.cost import count_flops
from runtime_jax.messages import cut


class Program:
    """A train step and its state on a mesh; use it under `jax.set_mesh(mesh)`.

    Attributes:
      abstract_state: shapes, dtypes and shardings of the state.
      shardings: the same tree, shardings alone.
      frozen: parameters that the step reads and never changes.
      undivided: lines about large leaves that the mesh does not divide; see `sharding.undivided`.
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
          init_state: makes a new state.
          train_step: (state, frozen, batch, variant) -> (state, metrics); the variant, such as a number of kept tokens,
            is static.
          rules: of the state, for `sharding.param_shardings`.
          frozen: parameters on the mesh (see `sharding.replicate`); shapes are enough for `trace`.
        """
        self._init_state, self._train_step = init_state, train_step
        self.mesh, self.frozen = mesh, frozen
        shapes = jax.eval_shape(init_state)
        self.abstract_state = sharding.sharded_shapes(shapes, rules, mesh)
        self.undivided = sharding.undivided(shapes, rules, mesh)
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self._compiled: dict[Hashable, Any] = {}
        self._flops: dict[Hashable, float] = {}

    def check_memory(self, limit: int | None = None) -> None:
        """Checks that one device can hold its share of the state and the frozen parameters; compiles nothing.

        A step needs more, for gradients and activations (`launch.compile_ahead` tells how much).

        Args:
          limit: bytes; None: of this process's devices, where they tell (GPUs and TPUs do).

        Raises:
          ValueError: it cannot; names the largest leaves.
        """
        limit = device_bytes(self.mesh) if limit is None else limit
        held = {"state": self.abstract_state, "frozen": self.frozen}
        sizes = [(sharding.shard_bytes(leaf), path) for path, leaf in jax.tree_util.tree_leaves_with_path(held)]
        if limit is None or (total := sum(size for size, _ in sizes)) <= limit:
            return
        largest = [
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} ({size / 2**30:.2f})"
            for size, path in sorted(sizes, key=lambda entry: -entry[0])
        ]
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        raise ValueError(
            f"state and frozen parameters take {total / 2**30:.2f} GiB on each device, which has {limit / 2**30:.2f}: "
            f"split them with a larger mesh.fsdp or mesh.tensor (now {mesh}), or take more devices; the largest: "
            + cut(largest, most=3)
        )

    def init(self) -> Any:
        """A new state, sharded on the mesh."""
        return jax.jit(self._init_state, out_shardings=self.shardings)()

    def trace(self, batch: Mapping[str, Any], variant: Hashable) -> Any:
        """The traced step of a variant for batches of these shapes: `.jaxpr`, `.lower()`, `.lower().compile()`."""
        jitted = jax.jit(
            lambda state, frozen, batch: self._train_step(state, frozen, batch, variant),
            donate_argnums=0,
            out_shardings=(self.shardings, sharding.replicated(self.mesh)),
        )
        return jitted.trace(self.abstract_state, self.frozen, dict(batch))

    def step(self, state: Any, batch: Mapping[str, Any], variant: Hashable) -> tuple[Any, Any]:
        """One update; donates `state`. The first call for a variant and for the shapes of a batch compiles."""
        key = variant, tuple((name, value.shape) for name, value in sorted(batch.items()))
        if key not in self._compiled:
            traced = self.trace(batch, variant)
            self._compiled[key], self._flops[variant] = traced.lower().compile(), count_flops(traced.jaxpr.jaxpr)
        return self._compiled[key](state, self.frozen, dict(batch))

    def flops(self, variant: Hashable) -> float:
        """FLOPs of a step of this variant, over all devices; 0 before its first call."""
        return self._flops.get(variant, 0.0)


def device_bytes(mesh: jax.sharding.Mesh) -> int | None:
    """Memory of a device of this process, in bytes; None where the platform does not tell (CPUs)."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
