"""Workers in processes of their own on this machine: calls and answers through a pipe, tensors through shared memory.

    handle = Spawn().start("env 0", EnvProcess, (make_env, 4, 0), place, "cpu")
    answer = handle.call("reset", [1, 2, 3, 4], [0, 1, 2, 3])     # at work from here on
    views = answer.get()                                          # raises WorkerDied when the process is gone

Calls are answered in order. A worker (which has a `close()`) ends with the process that started it, however that ends.
"""

import os
import signal
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.multiprocessing as mp

from learner.placement_map import Process

CLOSING_S = 5.0


class WorkerDied(RuntimeError):
    """A worker's process is gone; says which and how it ended."""


class Answer(Protocol):
    def get(self) -> Any:
        """Raises what the method raised, and WorkerDied."""


class Handle(Protocol):
    """A worker somewhere else."""

    name: str

    def call(self, method: str, *arguments: Any) -> Answer: ...

    def is_alive(self) -> bool: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    """Starts `build(*arguments)` at a place; must survive pickling, as workers start workers."""

    def start(self, name: str, build: Callable[..., Any], arguments: tuple, place: Process, device: str) -> Handle: ...

    def address(self, place: Process) -> str:
        """Of the machine, where others reach it."""


class Spawn:
    """Everything on this machine: places differ by their GPUs alone."""

    def address(self, place: Process) -> str:
        return "127.0.0.1"

    def start(
        self, name: str, build: Callable[..., Any], arguments: tuple, place: Process, device: str
    ) -> "SpawnedWorker":
        return SpawnedWorker(name, build, arguments, local_environment(place, device))


def local_environment(place: Process, device: str) -> dict[str, str]:
    """The GPUs that a process sees, and loopback for all that it says to others on this machine. NVLink multicast can
    put a host's GPUs out of service, and gains nothing between two."""
    gpus = ",".join(map(str, place.devices)) if device == "cuda" else ""
    loopback = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
    return {"CUDA_VISIBLE_DEVICES": gpus, "NCCL_NVLS_ENABLE": "0"} | loopback


@dataclass
class _Pending:
    worker: "SpawnedWorker"
    arrived: bool = False
    outcome: Any = None

    def get(self) -> Any:
        while not self.arrived:
            self.worker.receive()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


class SpawnedWorker:
    def __init__(self, name: str, build: Callable[..., Any], arguments: tuple, environment: dict[str, str]):
        self.name = name
        # From a server that has imported the workers' module and not touched a GPU: each begins within a moment.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([build.__module__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, arguments, environment), name=name)
        self.process.start()
        theirs.close()
        self.pending: deque[_Pending] = deque([_Pending(self)])  # the first answer: it is built
        self.started = self.pending[0]

    def call(self, method: str, *arguments: Any) -> _Pending:
        answer = _Pending(self)
        self.pending.append(answer)
        try:
            self.connection.send((method, arguments))
        except (BrokenPipeError, ConnectionResetError):
            self._all_lost()
        return answer

    def receive(self) -> None:
        """The oldest awaited answer."""
        try:
            outcome = self.connection.recv()
        except (EOFError, ConnectionError, FileNotFoundError):  # the last: it died before its tensors were fetched
            self._all_lost()
            return
        answer = self.pending.popleft()
        answer.arrived, answer.outcome = True, outcome
        if answer is self.started and isinstance(outcome, BaseException):
            raise outcome

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """One that is waiting for calls closes what it holds and ends; one at work is ended."""
        self.connection.close()
        self.process.join(CLOSING_S)
        self.process.kill()
        self.process.join()

    def _all_lost(self) -> None:
        self.process.join(CLOSING_S)
        code = self.process.exitcode
        how = "is gone" if code is None else f"died by signal {-code}" if code < 0 else f"ended with status {code}"
        for answer in self.pending:
            answer.arrived, answer.outcome = True, WorkerDied(f"{self.name} {how}")
        self.pending.clear()


def _serve(connection: Any, build: Callable[..., Any], arguments: tuple, environment: dict[str, str]) -> None:
    """The process's whole life: build, then answer until the other end is closed; then close."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it decides when it ends
    worker = _outcome(build, arguments)
    failed = isinstance(worker, BaseException)
    connection.send(worker if failed else None)
    while not failed:
        try:
            method, given = connection.recv()
        except (EOFError, ConnectionError):
            break
        outcome = _outcome(getattr(worker, method), given)
        try:
            connection.send(outcome)
        except (BrokenPipeError, ConnectionResetError):
            break
    if not failed:
        worker.close()
    os._exit(0)  # whatever its libraries still hold: nobody is waiting


def _outcome(function: Callable[..., Any], arguments: tuple) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # whatever it was, the owner has to see it
        error.add_note(traceback.format_exc())  # tracebacks do not travel
        return error
