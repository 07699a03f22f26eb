"""Several processes of one run: how they find each other, and a check that they run the same program.

A launcher, a pod or a cluster starts the processes, each with its own environment (see `find`). `start` makes them meet
at the coordinator's address and then starts `jax.distributed`, whose own service takes over that address.
"""

import contextlib
import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT = 12421  # of the coordinator, where the environment names a host alone
TIMEOUT = 120.0  # seconds to wait for the other processes
_POLL = 0.2  # seconds between two attempts to connect


class HostsError(ValueError):
    """The processes of a run do not find each other, or do not belong together."""


class AbsentError(HostsError):
    """Not all processes have come in time; they may yet."""


class Processes(NamedTuple):
    """This process among those of a run."""

    coordinator: str  # host:port of process 0
    count: int
    index: int


def find(environment: Mapping[str, str]) -> Processes | None:
    """The processes of the run that the environment describes; None: this process is the only one.

    The first of these that describes more than one process:

    1. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    2. a slice of TPUs, or several: TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, MEGASCALE_*;
    3. a job step of SLURM: SLURM_STEP_NUM_TASKS, SLURM_PROCID, SLURM_STEP_NODELIST;
    4. Open MPI: OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK, and JAX_COORDINATOR_ADDRESS.

    Raises:
      HostsError: variables are missing, or are no numbers.
    """
    given = [name for name in OWN if environment.get(name)]
    if "OMPI_COMM_WORLD_SIZE" in environment and given in ([], [OWN[0]]):
        return _of_open_mpi(environment)
    if given:
        if missing := [name for name in OWN if name not in given]:
            raise HostsError(f"{', '.join(given)} without {', '.join(missing)}: set all three, or none for one process")
        return _checked(environment[OWN[0]], _number(environment, OWN[1]), _number(environment, OWN[2]))
    for source in (_of_tpus, _of_slurm):
        if (found := source(environment)) is not None and found.count > 1:
            return found
    return None


def _of_tpus(environment: Mapping[str, str]) -> Processes | None:
    if not environment.get("TPU_WORKER_HOSTNAMES"):
        return None
    hosts = environment["TPU_WORKER_HOSTNAMES"].split(",")
    slices = _number(environment, "MEGASCALE_NUM_SLICES") if "MEGASCALE_NUM_SLICES" in environment else 1
    if slices * len(hosts) == 1:
        return None
    number = _number(environment, "MEGASCALE_SLICE_ID") if slices > 1 else 0
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]) if slices > 1 else hosts[0]
    index = number * len(hosts) + _number(environment, "TPU_WORKER_ID")
    return _checked(f"{first.split(':')[0]}:{PORT}", slices * len(hosts), index)


def _of_slurm(environment: Mapping[str, str]) -> Processes | None:
    if not {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return None
    # node[03-05,07],other: the first host of the list runs process 0
    prefix, number = re.match(r"([^\[,]+)(?:\[([^\]\-,]+))?", environment["SLURM_STEP_NODELIST"]).groups()
    port = PORT + int(environment.get("SLURM_JOB_ID", "0")) % 4096  # so that two jobs may share a host
    count, index = (_number(environment, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    return _checked(f"{prefix}{number or ''}:{port}", count, index)


def _of_open_mpi(environment: Mapping[str, str]) -> Processes | None:
    count, index = (_number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    if count == 1:
        return None
    if OWN[0] not in environment:
        raise HostsError(f"Open MPI, {count} processes: give the address of rank 0, mpirun -x {OWN[0]}=HOST:PORT")
    return _checked(environment[OWN[0]], count, index)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise HostsError(f"{name}={environment.get(name)!r}: a whole number is needed") from None


def _checked(coordinator: str, count: int, index: int) -> Processes:
    if not re.fullmatch(r"\[?[^\s/\[\]]+\]?:\d+", coordinator):
        raise HostsError(f"{OWN[0]}={coordinator!r}: HOST:PORT is needed")
    if not 0 <= index < count:
        raise HostsError(f"process {index} of {count}: {OWN[2]} is 0 to {OWN[1]} - 1")
    return Processes(coordinator, count, index)


def start(processes: Processes, program: Sequence[str], timeout: float = TIMEOUT) -> None:
    """Waits for the other processes, then starts `jax.distributed`; call it before anything else of JAX.

    Args:
      program: what this process runs, such as its command line; it must be the same everywhere.
      timeout: seconds to wait; then also how long a lost process may stay unnoticed.

    Raises:
      HostsError: a process has not come in time, runs another program, or has a number that is taken.
    """
    for connection in meet(processes, json.dumps([list(program), _versions()]), timeout).values():
        connection.close()
    import jax

    jax.distributed.initialize(
        processes.coordinator,
        processes.count,
        processes.index,
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=max(10, int(timeout)),
    )
    # Connects them while all are here. Later ones wait as long as it takes, but a first one on CPUs only 30 seconds.
    barrier("started")


def _versions() -> dict[str, str]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint")}


def meet(processes: Processes, says: str, timeout: float) -> dict[int, socket.socket]:
    """Waits until all processes are there and say the same; raises HostsError as `start` does.

    Returns open connections by process number: of process 0 to all others, of the others to process 0.
    """
    host, port = processes.coordinator.rsplit(":", 1)
    address, deadline = (host.strip("[]"), int(port)), time.monotonic() + timeout
    if processes.index == 0:
        return _receive(processes, says, address[1], deadline, timeout)
    return {0: _join(processes, says, address, deadline, timeout)}


def _receive(processes: Processes, says: str, port: int, deadline: float, timeout: float) -> dict[int, socket.socket]:
    """Process 0: collects the others, and tells all of them how it went."""
    there: dict[int, socket.socket] = {}
    error: HostsError | None = None
    with _listening(port) as server:
        while error is None and len(there) < processes.count - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(index) for index in range(1, processes.count) if index not in there)
                error = AbsentError(f"process {missing} of {processes.count} did not come within {timeout:g} s")
                break
            connection.settimeout(5.0)
            try:
                hello = json.loads(_read_line(connection))
                index, count, other = hello["process"], hello["processes"], hello["says"]
            except (OSError, ValueError, KeyError, TypeError):  # something else that tried the port
                connection.close()
                continue
            if count != processes.count:
                error = HostsError(f"process {index} expects {count} processes, process 0 expects {processes.count}")
            elif index in there:
                error = HostsError(f"two processes have number {index}")
            elif other != says:
                difference = _difference(says, other)
                error = HostsError(f"process {index} runs something else than process 0: {difference}")
            there[index if index not in there else -1] = connection
        for connection in there.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"problem": error and str(error)}).encode() + b"\n")
    if error is not None:
        for connection in there.values():
            connection.close()
        raise error
    return there


def _read_line(connection: socket.socket) -> bytes:
    """Up to a line's end, no more: what follows is for others to read."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line


def _difference(ours: str, theirs: str) -> str:
    first, second = json.loads(ours), json.loads(theirs)
    if first[0] != second[0]:
        return f"{' '.join(second[0])!r}, not {' '.join(first[0])!r}"
    return f"{second[1]}, not {first[1]}"


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    try:
        server = socket.create_server(("", port), reuse_port=False)
    except OSError as error:
        raise HostsError(f"port {port} of the coordinator cannot be opened: {error.strerror}") from error
    with server:
        yield server


def _join(processes: Processes, says: str, address: tuple[str, int], deadline: float, timeout: float) -> socket.socket:
    hello = {"process": processes.index, "processes": processes.count, "says": says}
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
            try:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                if answer := _read_line(connection):
                    if problem := json.loads(answer)["problem"]:
                        raise HostsError(problem)
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()
            reason = "it closed the connection"
        except HostsError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if time.monotonic() > deadline:
            where = processes.coordinator
            raise AbsentError(f"no coordinator at {where} within {timeout:g} s ({reason}); process 0 opens that port")
        time.sleep(_POLL)


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: np.ndarray) -> np.ndarray:
    """The arrays of all processes, of one shape and dtype, stacked in a new first dimension; bit-equal."""
    from jax.experimental import multihost_utils

    # As bytes: JAX would round float64 to float32.
    rows = multihost_utils.process_allgather(np.frombuffer(value.tobytes(), np.uint8))
    return np.frombuffer(rows.tobytes(), value.dtype).reshape(-1, *value.shape)


def from_first(value: np.ndarray) -> np.ndarray:
    """The array of process 0, on all processes; the others' have the same shape and dtype."""
    from jax.experimental import multihost_utils

    whole = multihost_utils.broadcast_one_to_all(np.frombuffer(value.tobytes(), np.uint8))
    return np.frombuffer(whole.tobytes(), value.dtype).reshape(value.shape)


def check_same(what: str, value: Any) -> None:
    """Checks that a JSON-able value is the same on all processes.

    Raises:
      HostsError: on every process; names the processes whose value is not that of process 0.
    """
    import jax

    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    gathered = gather(np.frombuffer(digest, np.uint8))
    if others := [index for index, row in enumerate(gathered) if (row != gathered[0]).any()]:
        raise HostsError(f"{what} of process {', '.join(map(str, others))} is not that of process 0")


def environment_of(processes: Processes) -> dict[str, str]:
    """The variables that tell a new process where it belongs."""
    return dict(zip(OWN, (processes.coordinator, str(processes.count), str(processes.index)), strict=True))
