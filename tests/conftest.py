"""Eight fake CPU devices, full matmul precision, no silent rank promotion, shape types checked at run time."""

import gc
import os
from pathlib import Path

# The programs of tests take far longer to compile than to run: hence the compiler's lowest effort, and in jax 0.10 its
# older way of emitting fusions, which compiles twice as fast; jax 0.12 ignores the option.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from bucket_tools import bucket, bucket_folder  # noqa: F401 (fixtures)
from jaxtyping import install_import_hook

# Tracing makes millions of small objects and hardly any garbage; looking for it more rarely saves a third of the time.
gc.set_threshold(200_000, 50, 100)

hook = install_import_hook(["mergevq_jax", "mini_scenes", "runtime_jax", "tokenverse_jax"], "beartype.beartype")

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of reference inputs, weights and outputs."""
    return Path(__file__).parent / "golden"
