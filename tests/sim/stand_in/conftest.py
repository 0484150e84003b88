"""A running cell as its users have it: another process, the real franky client, own loopback address."""

import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import franky
import numpy as np
import pytest

from bridge.config import load
from sim.stand_in.client import CellClient
from sim.stand_in.server import CellServerConfig
from sim.stand_in.world import World

SERVE = "import sys; from sim.stand_in.server import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="session")
def config() -> CellServerConfig:
    return load("cell", CellServerConfig)


@pytest.fixture
def world(config: CellServerConfig) -> World:
    return World(config.cell, config.embodiment)


@dataclass
class RunningCell:
    process: subprocess.Popen
    address: str
    client: CellClient
    frames_endpoint: str

    def robot(self) -> franky.Robot:
        """Ready to move at a third of its limits."""
        gc.collect()  # a failed test's traceback may still hold the last client; the cell serves one
        try:
            robot = franky.Robot(self.address, realtime_config=franky.RealtimeConfig.Ignore)
        finally:  # the client makes the thread that constructs it real-time, refused or not: put it back
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        robot.relative_dynamics_factor = 0.3
        assert robot.recover_from_errors()
        robot.set_collision_behavior(20.0, 20.0)
        return robot

    def close(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


def start_cell(*overrides: str) -> RunningCell:
    address = f"127.{random.randrange(1, 250)}.{random.randrange(250)}.{random.randrange(1, 250)}"
    endpoints = ["control_endpoint=tcp://127.0.0.1:*", "frames_endpoint=tcp://127.0.0.1:*"]
    command = [sys.executable, "-c", SERVE, f"address={address}", "ros=false", *endpoints, *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    ready = process.stdout.readline()
    assert "cell ready" in ready, f"the cell did not start: {ready!r}"
    control, frames = (ready.split(f"{name} ")[1].split(",")[0].strip() for name in ("control", "frames"))
    return RunningCell(process, address, CellClient(control), frames)


@pytest.fixture(scope="module")
def cell() -> Iterator[RunningCell]:
    """As fast as this machine steps it: lock-step keeps every motion sound."""
    running = start_cell("speed=0")
    yield running
    assert running.close() == 0


@pytest.fixture(scope="module")
def timed_cell() -> Iterator[RunningCell]:
    """At the wall clock's pace."""
    running = start_cell("speed=1.0")
    yield running
    assert running.close() == 0


@pytest.fixture
def down() -> np.ndarray:
    """The gripper's rotation when it points down, yaw 0."""
    return np.diag([1.0, -1.0, -1.0])
