"""Starts the processes of a run on this host and watches them; a run on several hosts has one such supervisor on each.

    python -m launch.run --processes 2 -- mergevq train --config configs/mergevq_tiny.py --workdir runs/tiny
    python -m launch.run --hosts 4 --host $I --coordinator host0:12421 --restarts 10 -- mergevq train ...

When a process is lost (killed, crashed, its host gone), the supervisors end all others within the timeout and print one
line that names it and the checkpoint to resume from. Each run of the command resumes where the last one stopped, so
`--restarts` starts it again by itself. SIGTERM or SIGINT, sent to one supervisor, goes to the processes of all hosts.

Exit status: 0 all processes succeeded; 75 a process was lost or did not come; 143 or 130 SIGTERM or SIGINT stopped the
run, which is saved; otherwise that of a process which failed.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from runtime_jax.hosts import PORT, TIMEOUT, AbsentError, HostsError, Processes, environment_of, meet

LOST = 75  # EX_TEMPFAIL: the same command may succeed
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
GRACE = 120.0  # seconds for processes to save after a signal
LAST_LINES = 5.0  # seconds, at most, to copy what ended processes have printed
_POLL = 0.1
_BEAT = 1.0
# What XLA prints when another process has gone, before it aborts: the supervisor's own line says it.
_NOISE = re.compile(rb"\*\*\* Check failure stack trace|^\s+@\s+0x|Terminating process because the JAX distributed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="launch.run", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="on this host (default: 1)")
    parser.add_argument("--hosts", type=int, default=1, help="of the run (default: 1)")
    parser.add_argument("--host", type=int, default=0, help="number of this host, from 0")
    parser.add_argument("--coordinator", default=f"localhost:{PORT}", help="HOST:PORT on host 0; PORT + 1 is used too")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds until a silent host counts as lost")
    parser.add_argument("--restarts", type=int, default=0, help="times to start again, unless this is sent a signal")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    host, _, port = args.coordinator.rpartition(":")
    problems = [
        (not command, "no command: launch.run ... -- COMMAND"),
        (args.processes < 1 or args.hosts < 1, f"--processes {args.processes} --hosts {args.hosts}: at least 1"),
        (not 0 <= args.host < args.hosts, f"--host {args.host}: 0 to {args.hosts - 1}"),
        (not host or not port.isdecimal(), f"--coordinator {args.coordinator}: HOST:PORT is needed"),
        (args.timeout <= 0 or args.restarts < 0, "--timeout is positive, --restarts is not negative"),
    ]
    if wrong := [text for is_wrong, text in problems if is_wrong]:
        print("launch.run: " + "; ".join(wrong), file=sys.stderr)
        return 2
    processes = [
        Processes(args.coordinator, args.hosts * args.processes, args.host * args.processes + number)
        for number in range(args.processes)
    ]
    if args.dry_run:
        for process in processes:
            setting = environment_of(process) if process.count > 1 else {}
            print(" ".join([*(f"{name}={value}" for name, value in setting.items()), shlex.join(command)]))
        return 0
    hosts = Processes(f"{host}:{int(port) + 1}", args.hosts, args.host)
    for attempt in range(args.restarts + 1):
        supervisor = Supervisor(command, processes, hosts, args.timeout)
        try:
            status = supervisor.run()
        except HostsError as error:
            print(f"launch.run: {error}", file=sys.stderr)
            status = LOST if isinstance(error, AbsentError) else 1
        if status not in (LOST, STOPPED[0]) or attempt == args.restarts or supervisor.asked_to_stop:
            break
        print(f"launch.run: starting again ({attempt + 1} of {args.restarts})", file=sys.stderr)
    return status


class Ended(NamedTuple):
    """Why a run ends."""

    status: int
    reason: str | None  # None: as it should


class Supervisor:
    """One attempt: the processes of this host, and a connection to the supervisors of the others."""

    def __init__(self, command: Sequence[str], processes: Sequence[Processes], hosts: Processes, timeout: float):
        self.command, self.processes, self.timeout = list(command), processes, timeout
        self.peers = Peers(hosts, timeout)
        self.signal: int | None = None
        self.children: list[subprocess.Popen] = []
        self.copiers: list[threading.Thread] = []

    def run(self) -> int:
        """Starts the processes and waits for all of them, here and on the other hosts; the exit status."""
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.peers.connect(json.dumps([self.command, {}]))
            if self.signal is not None:  # while the hosts met
                return 128 + self.signal
            self.children = [self._start(process) for process in self.processes]
            ended = self._watch()
            self.peers.tell(ended)
            for child in self.children:
                if child.poll() is None:
                    child.kill()
                child.wait()
            until = time.monotonic() + LAST_LINES  # a grandchild may hold a pipe open
            for copier in self.copiers:
                copier.join(max(0.0, until - time.monotonic()))
        finally:
            self.peers.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if ended.reason is not None:
            print(f"launch.run: {ended.reason}{self._advice(ended)}", file=sys.stderr)
        return ended.status

    @property
    def asked_to_stop(self) -> bool:
        """Whether a supervisor, here or on another host, was sent a signal."""
        return self.peers.signal is not None

    def _start(self, process: Processes) -> subprocess.Popen:
        alone = process.count == 1
        pipe = None if alone else subprocess.PIPE
        setting = {} if alone else environment_of(process) | {"PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(self.command, env=os.environ | setting, stdout=pipe, stderr=pipe)
        if not alone:
            for source, target in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer)):
                self.copiers.append(threading.Thread(target=_copy, args=(source, target, process.index), daemon=True))
                self.copiers[-1].start()
        return child

    def _forward(self, number: int, frame: Any) -> None:
        self.signal = self.peers.signal = number
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def _watch(self) -> Ended:
        stopped_at = None
        while True:
            codes = [child.poll() for child in self.children]
            for process, child, code in zip(self.processes, self.children, codes, strict=True):
                if code is not None and (code < 0 or code == 128 + signal.SIGABRT):
                    how = signal.Signals(-code).name if code < 0 else "SIGABRT"
                    name = f"process {process.index} of {process.count} on {socket.gethostname()} (pid {child.pid})"
                    if self.signal is None or -code != self.signal:
                        return Ended(LOST, f"{name} was lost ({how})")
                elif code not in (None, 0, *STOPPED):
                    return Ended(code, f"process {process.index} of {process.count} failed with status {code}")
            if (told := self.peers.told()) is not None:
                return told
            if self.signal is None and self.peers.signal is not None:
                self._forward(self.peers.signal, None)
            if None not in codes:
                status = max(-code + 128 if code < 0 else code for code in codes)
                return self.peers.agree(status)
            if self.signal is not None:
                stopped_at = stopped_at or time.monotonic()
                if time.monotonic() - stopped_at > GRACE:
                    return Ended(128 + self.signal, f"a process did not end within {GRACE:g} s of the signal")
            time.sleep(_POLL)

    def _advice(self, ended: Ended) -> str:
        """Where the same command resumes."""
        if ended.status not in (LOST, *STOPPED):
            return ""
        folders = {word.rpartition("=")[2] for word in self.command} - {""}
        saved = [path for folder in folders for path in Path(folder).glob("**/checkpoints/*/_CHECKPOINT_METADATA")]
        steps = [path.parent for path in saved if path.parent.name.isdecimal()]
        if not steps:
            return ""
        newest = max(steps, key=lambda path: (path.parent.stat().st_mtime, int(path.name)))
        return f"; the same command resumes from {newest}"


def _copy(source: BinaryIO, target: BinaryIO, number: int) -> None:
    """Lines of a process, with its number; without what XLA prints before it aborts."""
    for line in iter(source.readline, b""):
        if not _NOISE.search(line):
            with contextlib.suppress(ValueError, OSError):
                target.write(f"[{number}] ".encode() + line.rsplit(b"\r", 1)[-1])
                target.flush()


class Peers:
    """The supervisors of the other hosts: a star around host 0, which passes on what it is told."""

    def __init__(self, hosts: Processes, timeout: float):
        self.hosts, self.timeout = hosts, timeout
        self._connections: dict[int, socket.socket] = {}
        self._done: dict[int, int] = {}  # hosts that have ended as they should, and their status
        self._told: Ended | None = None
        self.signal: int | None = None  # that one of the supervisors was sent: all pass it on to their processes
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._closed = threading.Event()

    def connect(self, says: str) -> None:
        """Waits for all hosts; raises HostsError where one does not come or runs another command."""
        if self.hosts.count == 1:
            return
        self._connections = meet(self.hosts, says, self.timeout)
        for connection in self._connections.values():
            connection.settimeout(self.timeout)
        for number, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(number, connection), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._closed.wait(min(_BEAT, self.timeout / 4)):
            self._send({})

    def _send(self, message: dict[str, Any]) -> None:
        message = {**message, "signal": self.signal}
        for connection in self._connections.values():
            with self._writing, contextlib.suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, number: int, connection: socket.socket) -> None:
        stream = connection.makefile("r")
        try:
            for line in stream:
                message = json.loads(line)
                self.signal = self.signal or message["signal"]
                with self._lock:
                    if "ended" in message:
                        self._told = self._told or Ended(*message["ended"])
                        if self.hosts.index == 0:
                            self._send(message)
                    if "done" in message:
                        self._done |= {int(host): status for host, status in message["done"].items()}
        except (OSError, ValueError):
            pass
        if not self._closed.is_set():
            with self._lock:
                if number not in self._done and self._told is None:
                    self._told = Ended(LOST, f"host {number} of {self.hosts.count} was lost")
                    if self.hosts.index == 0:
                        self._send({"ended": self._told})

    def told(self) -> Ended | None:
        """Why another host says that the run ends."""
        with self._lock:
            return self._told

    def tell(self, ended: Ended) -> None:
        """Tells the others why the run ends."""
        if ended.reason is not None and self._connections:
            self._send({"ended": ended})
            time.sleep(_POLL)  # for the message to leave

    def agree(self, status: int) -> Ended:
        """Waits for the processes of the other hosts to end as well; the largest status of all."""
        with self._lock:
            self._done[self.hosts.index] = status
        while self._connections:
            with self._lock:
                if self._told is not None:
                    return self._told
                done = dict(self._done)
            self._send({"done": done})
            if len(done) == self.hosts.count:
                return Ended(max(done.values()), None)
            time.sleep(_POLL)
        return Ended(status, None)

    def close(self) -> None:
        """Ends the connections."""
        self._closed.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


if __name__ == "__main__":
    sys.exit(main())
