"""Start the nodes of a launch file where ROS's launch is not installed: `cotwin up launch/cell.launch.yaml arg:=value`.

Every program is required: when one ends, all others are stopped and its exit code becomes ours. A program with
`respawn` is started again instead. Lines of output carry the name of the program that wrote them.
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from robot.launch_file import Process, arguments, processes

STOP_PATIENCE_S = ((signal.SIGINT, 6.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 2.0))
USAGE = "usage: cotwin up FILE [arg:=value ...] [--show-args]"
PR_SET_PDEATHSIG = 1
SHARED_MEMORY = Path("/dev/shm")
YOUNG_S = 60.0  # a node that is about to start has made its files, and may not hold them yet

_libc = ctypes.CDLL(None)


class Graph:
    """The programs of a launch file, as long as the context lasts.

    Example:
        with Graph("launch/cell.launch.yaml", {"record": "true"}) as graph:
            ...
            if graph.ended(): ...
    """

    def __init__(self, file: str, args: Mapping[str, str] | None = None, out: TextIO | None = None):
        """Raises ValueError for a file or an argument that makes no sense. `out`: where output goes, stderr if None."""
        self.processes = processes(file, dict(args or {}))
        self._out = out if out is not None else sys.stderr
        self._running: dict[str, subprocess.Popen] = {}
        self._again_s: dict[str, float] = {}  # when a program with `respawn` starts again
        self._readers: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Graph":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        clear_shared_memory()
        try:
            for process in self.processes:
                self._start(process)
        except BaseException:
            self.stop()
            raise

    def ended(self) -> dict[str, int]:
        """Exit codes of required programs that have ended; a negative code is the signal that ended it."""
        self._respawn()
        required = {process.name for process in self.processes if not process.respawn}
        codes = {name: child.poll() for name, child in self._running.items() if name in required}
        return {name: code for name, code in codes.items() if code is not None}

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def wait(self) -> tuple[str, int]:
        """Until a required program ends: its name and code."""
        while not (ended := self.ended()):
            time.sleep(0.1)
        return next(iter(ended.items()))

    def stop(self) -> None:
        """SIGINT, then SIGTERM, then SIGKILL, to what still runs."""
        for number, patience_s in STOP_PATIENCE_S:
            left = [child for child in self._running.values() if child.poll() is None]
            for child in left:
                child.send_signal(number)
            until_s = time.monotonic() + patience_s
            for child in left:
                try:
                    child.wait(max(0.0, until_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        for reader in self._readers:
            reader.join(timeout=1.0)

    def _start(self, process: Process) -> None:
        env = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "OMP_NUM_THREADS": "1", **os.environ, **process.env}
        env["PYTHONUNBUFFERED"] = "1"
        try:
            child = subprocess.Popen(
                process.command,
                env=env,
                cwd=process.cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C in the terminal comes to us alone, and we stop them in order
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            raise ValueError(f"{process.name}: cannot start {process.command[0]}: {error}") from error
        self._running[process.name] = child
        reader = threading.Thread(target=self._relay, args=(process.name, child), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _respawn(self) -> None:
        for process in self.processes:
            if process.respawn and self._running[process.name].poll() is not None:
                again_s = self._again_s.setdefault(process.name, time.monotonic() + process.respawn_delay_s)
                if time.monotonic() >= again_s:
                    del self._again_s[process.name]
                    self._start(process)

    def _relay(self, name: str, child: subprocess.Popen) -> None:
        for line in child.stdout:
            with self._lock:
                print(f"[{name}] {line.rstrip()}", file=self._out, flush=True)


def clear_shared_memory() -> None:
    """Remove what killed nodes left: 64 MB each (fastdds.xml), which Fast DDS never clears by itself. A node that lives
    holds the lock of its segment, which `fastdds shm clean` goes by as well."""
    for lock in SHARED_MEMORY.glob("fastdds_" + "[0-9a-f]" * 16 + "_el"):
        with suppress(OSError), open(lock) as file:  # held by its owner, another user's, or just removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock.stat().st_mtime > YOUNG_S:
                lock.with_name(lock.name.removesuffix("_el")).unlink(missing_ok=True)
                lock.unlink()


def _die_with_parent() -> None:
    """In the child: end it even when we are killed without a chance to stop it."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__.strip()}")
        return 0 if argv else 2
    file, rest = argv[0], argv[1:]
    try:
        if rest and rest[0] in ("-s", "--show-args"):
            _show(file)
            return 0
        graph = Graph(file, dict(_split(text) for text in rest), sys.stdout)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    with graph:
        while not stopped and not graph.ended():
            time.sleep(0.1)
        ended = graph.ended()
    if not ended:
        return 0
    name, code = next(iter(ended.items()))
    print(f"{name} ended with code {code}; stopped all others", file=sys.stderr)
    return code if code >= 0 else 128 - code


def _split(text: str) -> tuple[str, str]:
    name, found, value = text.partition(":=")
    if not found:
        raise ValueError(f"{text!r}: arguments look like name:=value")
    return name, value


def _show(file: str) -> None:
    for argument in arguments(file):
        default = "needed" if argument.default is None else f"default {argument.default!r}"
        choices = f", one of {argument.choices}" if argument.choices else ""
        print(f"{argument.name:<20} {argument.description} ({default}{choices})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
