"""One update of any training: the optimizer's part, and a guard against updates that are not finite."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from runtime_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

State = TypeVar("State")
Params = Any
Metrics = dict[str, tuple[Array, Array]]  # (sum, count)


class Optimizer(NamedTuple):
    """A gradient transformation, and its learning rate for the log."""

    transformation: optax.GradientTransformation
    schedule: optax.Schedule

    @classmethod
    def make(
        cls, config: OptimizerConfig, *, total_steps: int, batch_size: int, num_examples: int | None = None
    ) -> "Optimizer":
        """The optimizer of a config; raises as `make_schedule`."""
        schedule = make_schedule(config, total_steps=total_steps, batch_size=batch_size, num_examples=num_examples)
        return cls(make_optimizer(config, schedule), schedule)

    def rate(self, step: Array) -> Float[Array, ""]:
        """Learning rate of an update."""
        return jnp.asarray(self.schedule(step), jnp.float32)

    def scaled(self, rates: Callable[[str], ArrayLike]) -> "Optimizer":
        """The same optimizer with a factor on the learning rate of each parameter.

        Args:
          rates: path of a parameter -> its factor, or an array of one for each entry of its first axis.
        """

        def scale(path: tuple, update: Array) -> Array:
            factor = np.asarray(rates(jax.tree_util.keystr(path, simple=True, separator="/")), np.float32)
            return update * factor.reshape(*factor.shape, *[1] * (update.ndim - factor.ndim))

        scaling = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
        return Optimizer(optax.chain(self.transformation, scaling), self.schedule)

    def update(self, gradients: Params, opt_state: Any, params: Params) -> tuple[Params, Any]:
        """New parameters and moments."""
        updates, opt_state = self.transformation.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def guarded(
    state: State, new: State, means: Mapping[str, Array], *, watched: Float[Array, ""]
) -> tuple[State, Metrics]:
    """The new state, or the old one if `watched` is not finite; its `step` grows by one either way.

    Args:
      state: flax dataclass with a field `step`, before the update.
      new: the state after the update, with the old `step`.
      means: to be logged.
      watched: a sum of losses and norms of gradients.

    Returns:
      The state, and the metrics as (sum, count); "nonfinite" counts a skipped step, whose means do not count.
    """
    finite = jnp.isfinite(watched)
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    counted = finite.astype(jnp.float32)  # a skipped step's values would make every average of the interval NaN
    metrics = {name: (jnp.where(finite, value, 0.0), counted) for name, value in means.items()}
    return chosen.replace(step=state.step + 1), metrics | {"nonfinite": (1.0 - counted, jnp.ones(()))}
