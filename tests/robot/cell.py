"""A stand-in cell for tests: in a thread of its own, on a loopback address of its own, without ROS."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from bridge.embodiment import Embodiment
from sim.stand_in.client import CellClient
from sim.stand_in.config import CellConfig
from sim.stand_in.server import Cell, CellServerConfig

ANY = "tcp://127.0.0.1:*"


def loopback() -> str:
    return f"127.{random.randint(1, 250)}.{random.randint(1, 250)}.{random.randint(2, 250)}"


class RunningCell:
    """`now_ns` is the cell's simulated time. `kill` lets every socket fall silent, as a power cut would."""

    def __init__(self, address: str, embodiment: Embodiment, config: CellConfig | None = None):
        self.address = address
        settings = CellServerConfig(embodiment, config or CellConfig(), address, ANY, ANY, ros=False)
        self.cell = Cell(settings)
        self._is_closed = False
        self._thread = threading.Thread(target=self.cell.run, daemon=True)
        self._thread.start()

    def now_ns(self) -> int:
        return self.cell.time_ms * 1_000_000

    def inject(self, fault: str, **details) -> None:
        """Over the control socket, so between two milliseconds: in the middle of one it throws the arm about."""
        client = CellClient(self.cell.control_endpoint)
        try:
            client.inject(fault, **details)
        finally:
            client.close()

    def freeze(self) -> None:
        """Sockets stay open and nothing answers any more."""
        self.cell.stop()
        self._thread.join(timeout=5.0)

    def close(self) -> None:
        self.freeze()
        if not self._is_closed:
            self._is_closed = True
            self.cell.close()


@contextmanager
def running_cell(embodiment: Embodiment | None = None, config: CellConfig | None = None):
    cell = RunningCell(loopback(), embodiment or Embodiment(), config)
    try:
        yield cell
    finally:
        cell.close()


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.01)
