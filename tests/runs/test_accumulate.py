"""Updates in parts: the same numbers as in one, as a loop on accelerators and one after the other on CPUs."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergevq_jax.tokenizer import run as tokenizer_run
from runtime_jax.config import build, load
from runtime_jax.mesh import MeshConfig, make_mesh
from runtime_jax.sharding import platform
from runtime_jax.training import accumulate as accumulating
from runtime_jax.training.accumulate import accumulate

BATCH = {"x": np.arange(24.0, dtype=np.float32).reshape(8, 3), "example": np.arange(8)}
WEIGHTS = np.array([1.0, -2.0, 0.5], np.float32)


def part(seen, batch):
    """Mean squares of a linear map; the carry lists the examples in the order in which they come."""
    losses = lambda w: jnp.mean(jnp.square(batch["x"] @ w))  # noqa: E731
    value, gradient = jax.value_and_grad(losses)(WEIGHTS)
    seen = jax.lax.dynamic_update_slice_in_dim(seen[0], batch["example"], seen[1], 0), seen[1] + len(batch["example"])
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


def test_a_part_is_traced_once():
    part_spy = mock.Mock(side_effect=part)
    jax.eval_shape(lambda batch: accumulate(part_spy, (jnp.zeros(8, int), jnp.int32(0)), batch, 4), BATCH)
    assert part_spy.call_count == 1


@pytest.mark.parametrize(
    ("parts", "weight", "notes"),
    [
        (1, 0.1, []),
        (2, 0.0, []),
        (2, 0.1, ["accumulate=2: each part of 16 images has its own entropy of the mean code"]),
    ],
)
def test_a_tokenizers_run_names_the_terms_that_see_the_parts(monkeypatch, tmp_path, parts, weight, notes):
    fields = load("configs/mergevq_tiny.py", [], new_keys=True)
    photos = {"image_size": 64, "batch_size": 32, "sources": [{"kind": "photos"}]}
    fields.update({"accumulate": parts, "data": photos, "evaluation": {"data": photos, "batches": 1}})
    fields["losses"].update({"adversarial_weight": 0.0, "entropy_weight": weight})
    fit = mock.Mock(side_effect=InterruptedError)
    monkeypatch.setattr(tokenizer_run, "fit", fit)
    with pytest.raises(InterruptedError):
        tokenizer_run.train(build(tokenizer_run.TrainConfig, fields), tmp_path)
    assert fit.call_args.kwargs["notes"] == notes


def test_the_platform_is_that_of_the_mesh():
    seen = []
    with jax.set_mesh(make_mesh(MeshConfig())):
        jax.eval_shape(lambda: seen.append(platform()))
    assert seen == ["cpu"] == [platform()]
