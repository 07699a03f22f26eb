"""Eight fake CPU devices, full matmul precision, no silent rank promotion, shape types checked at run time."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from jaxtyping import install_import_hook

hook = install_import_hook(["mergevq_jax", "runtime_jax"], "beartype.beartype")

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of reference inputs, weights and outputs."""
    return Path(__file__).parent / "golden"
