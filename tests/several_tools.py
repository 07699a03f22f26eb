"""Runs of several processes on this machine, under launch.run."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEVICES = 4  # of a run, over all its processes


def environment(devices: int = 2) -> dict[str, str]:
    """Of this test, with so many devices for each process, and programs that compile fast."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {
        "XLA_FLAGS": f"{flags} --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def coordinator() -> str:
    """An address with a free port and a free one after it: tests run side by side."""
    while True:
        with socket.create_server(("localhost", 0)) as first:
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("localhost", port + 1)):
                return f"localhost:{port}"


def launched(
    processes: int, command: Sequence[str], options: Sequence[str] = (), *, devices: int | None = None
) -> subprocess.Popen:
    """A run of `python COMMAND` on DEVICES devices, or on `devices` for each process."""
    line = [sys.executable, "-m", "launch.run", "--processes", str(processes), "--timeout", "60"]
    line += ["--coordinator", coordinator(), *options, "--", sys.executable, *command]
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(devices or DEVICES // processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
    """Exit status, output and errors of a run that ends by itself."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def write_config(path: Path, fields: Mapping[str, Any]) -> None:
    """A config file with these values."""
    text = "import json\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
    path.write_text(f"{text}    return ConfigDict(json.loads({json.dumps(fields)!r}))\n")
