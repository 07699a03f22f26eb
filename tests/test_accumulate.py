"""Updates in parts: the same numbers as in one, as a loop on accelerators and one after the other on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime_jax.sharding import MeshConfig, make_mesh, platform
from runtime_jax.training import accumulate as accumulating
from runtime_jax.training.accumulate import accumulate

BATCH = {"x": np.arange(24.0, dtype=np.float32).reshape(8, 3), "index": np.arange(8)}
WEIGHTS = np.array([1.0, -2.0, 0.5], np.float32)


def part(seen, batch):
    """Mean squares of a linear map; the carry lists the examples in the order in which they come."""
    losses = lambda w: jnp.mean(jnp.square(batch["x"] @ w))  # noqa: E731
    value, gradient = jax.value_and_grad(losses)(WEIGHTS)
    seen = jax.lax.dynamic_update_slice_in_dim(seen[0], batch["index"], seen[1], 0), seen[1] + len(batch["index"])
    return {"w": gradient}, seen, {"loss": value}


def run(parts):
    return jax.jit(lambda batch: accumulate(part, (jnp.zeros(8, int), 0), batch, parts))


@pytest.mark.parametrize("on", ["cpu", "tpu"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up(monkeypatch, on, parts):
    monkeypatch.setattr(accumulating, "platform", lambda: on)
    whole, (order, _), metrics = run(1)(BATCH)
    gradients, (seen, count), others = run(parts)(BATCH)
    np.testing.assert_allclose(gradients["w"], whole["w"], rtol=1e-6)
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-6)
    assert order.tolist() == list(range(8)) and count == 8
    assert seen.tolist() == [example for first in range(parts) for example in range(first, 8, parts)]


def test_a_loop_on_accelerators_only(monkeypatch):
    for on, loops in (("tpu", 1), ("gpu", 1), ("cpu", 0)):
        monkeypatch.setattr(accumulating, "platform", lambda on=on: on)
        assert run(4).lower(BATCH).as_text().count("stablehlo.while") == loops


def test_the_platform_is_that_of_the_mesh():
    seen = []
    with jax.set_mesh(make_mesh(MeshConfig())):
        jax.eval_shape(lambda: seen.append(platform()))
    assert seen == ["cpu"] == [platform()]
