"""The stand-in cell: an emulated FR3 with hand over its own network protocol, cube, plate, cameras and `/clock`.

Time is simulated. It follows the wall clock (`speed`), and stands still while a robot client owes a command or a camera
client owes pictures; lost time is not caught up.
"""

import signal
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import zmq

from bridge.config import command_line
from bridge.embodiment import Embodiment
from sim.stand_in.config import CellConfig, scene_hash
from sim.stand_in.errors import ResetRefused
from sim.stand_in.fci import RobotServer
from sim.stand_in.frames import FrameFeed
from sim.stand_in.gripper import GripperServer
from sim.stand_in.protocol import Command, MoveStatus
from sim.stand_in.world import World

MAX_LATE_S = 0.02  # behind schedule by more than this, the schedule moves
SERVE_EVERY_MS = 5
MARK_EVERY_MS = 500


@dataclass
class CellServerConfig:
    """`cotwin cell`. The robot listens on `address` at 1337 and 1338: its ports are fixed."""

    embodiment: Embodiment = field(default_factory=Embodiment)
    cell: CellConfig = field(default_factory=CellConfig)
    address: str = "127.0.0.1"
    control_endpoint: str = "tcp://127.0.0.1:5610"
    frames_endpoint: str = "tcp://127.0.0.1:5611"
    speed: float = 1.0  # simulated seconds a wall second; 0: as fast as possible
    ros: bool = True  # publish /clock
    clock_rate_hz: float = 200.0
    collision_reflex: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.speed < 0:
            raise ValueError(f"speed {self.speed}: allowed are 0 (as fast as possible) and up")
        if not 1.0 <= self.clock_rate_hz <= 1000.0:
            raise ValueError(f"clock_rate_hz {self.clock_rate_hz}: allowed are 1 to 1000")


class Cell:
    """Everything of one cell, in one thread: `run` until `stop`. Ports are open once it is constructed."""

    def __init__(self, config: CellServerConfig):
        self.config = config
        self.world = World(config.cell, config.embodiment)
        self.world.reset(config.seed)
        self.robot = RobotServer(self.world, config.address, config.collision_reflex)
        self.hand = GripperServer(self.world, config.address)
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.REP)
        self._control.setsockopt(zmq.LINGER, 0)
        self._control.bind(config.control_endpoint)
        self.control_endpoint = self._control.getsockopt_string(zmq.LAST_ENDPOINT)
        expected = scene_hash(config.cell, config.embodiment)
        self.frames = FrameFeed(self._context, config.frames_endpoint, self.world, expected, config.cell.camera_rate_hz)
        self._clock = None
        if config.ros:
            from sim.stand_in.clock import RosClock  # rclpy only where it is wanted

            self._clock = RosClock()
        self._clock_every_ms = round(1000 / config.clock_rate_hz)
        self.time_ms = 0
        self._paused_until_s = 0.0
        self._stopping = False
        self._marks = deque([(time.monotonic(), 0)], maxlen=4)  # (wall s, simulated ms), for the real-time factor

    def run(self) -> None:
        """The main loop, one millisecond a turn."""
        period_s = 0.001 / self.config.speed if self.config.speed else 0.0
        due_s = time.monotonic()
        while not self._stopping:
            if period_s:
                now_s = time.monotonic()
                if now_s < due_s:
                    time.sleep(due_s - now_s)
                elif now_s - due_s > MAX_LATE_S:
                    due_s = now_s
                due_s += period_s
            self.tick()

    def tick(self) -> None:
        self.robot.serve()
        self.hand.serve()
        while not self.robot.control():
            self.robot.wait()
            self.hand.repeat_state()
            self._answer_control()
            if self._stopping:
                return
        self.hand.control()
        self.world.step()
        self.time_ms += 1
        self.robot.publish(self.time_ms)
        self.hand.publish(self.time_ms)
        if self.time_ms >= self.frames.due_ms:
            self._emit_frame()
        if self.time_ms % self._clock_every_ms == 0 and self._clock is not None:
            self._clock.publish(self.time_ms)
        if self.time_ms % SERVE_EVERY_MS == 0:
            self.frames.serve()
            self._answer_control()
            self._stand_still()
        if self.time_ms % MARK_EVERY_MS == 0:
            self._marks.append((time.monotonic(), self.time_ms))

    def stop(self) -> None:
        """End `run` after this millisecond. Safe from signal handlers and other threads."""
        self._stopping = True

    def close(self) -> None:
        """Close every socket; clients see the link end."""
        self.robot.link.close()
        self.hand.link.close()
        self.frames.close()
        self._control.close()
        self._context.term()
        if self._clock is not None:
            self._clock.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _emit_frame(self) -> None:
        while not self.frames.emit(self.time_ms) and not self._stopping:
            self.frames.wait(0.1)
            self.robot.repeat_state()
            self.hand.repeat_state()
            self._answer_control()

    def _stand_still(self) -> None:
        """A paused state stream: nothing moves, nothing is sent; control still answers."""
        while time.monotonic() < self._paused_until_s and not self._stopping:
            self._control.poll(10)
            self._answer_control()

    def _answer_control(self) -> None:
        while self._control.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            try:
                message = msgpack.unpackb(self._control.recv())
                answer: dict[str, Any] = {"value": self._answer(**message)}
            except (ResetRefused, ValueError, TypeError, KeyError) as error:  # refused, or a request without sense
                answer = {"error": type(error).__name__, "message": str(error)}
            self._control.send(msgpack.packb(answer))

    def _answer(self, request: str, **arguments: Any) -> Any:
        if request == "reset":
            self.world.reset(**arguments)
            return self._poses()
        if request == "poses":
            return self._poses()
        if request == "success":
            return self.world.success()
        if request == "stats":
            return self._stats()
        if request == "inject":
            return self._inject(arguments["fault"], **arguments["details"])
        raise ValueError(f"unknown request {request!r}: known are reset, poses, success, stats and inject")

    def _poses(self) -> dict[str, Any]:
        poses: dict[str, Any] = {name: T.ravel().tolist() for name, T in self.world.poses().items()}
        return poses | {"gripper_opening_m": self.world.width_m, "time_s": self.time_ms / 1000}

    def _stats(self) -> dict[str, Any]:
        now = (time.monotonic(), self.time_ms)
        wall_s, simulated_ms = now[0] - self._marks[0][0], now[1] - self._marks[0][1]
        return {
            "time_s": self.time_ms / 1000,
            "real_time_factor": simulated_ms / 1000 / wall_s if wall_s > 0 else 0.0,
            "late_answers": self.robot.late_answers,
            "cameras_dropped": self.frames.clients_dropped,
            "motion": self.robot.motion is not None,
            "robot_connected": self.robot.link.is_connected,
        }

    def _inject(self, fault: str, **details: Any) -> None:
        if fault == "reflex":
            self.robot.inject_reflex(details["names"])
        elif fault == "user_stop":
            self.robot.press_user_stop()
        elif fault == "release_user_stop":
            self.robot.release_user_stop()
        elif fault == "pause":
            self._paused_until_s = time.monotonic() + float(details["duration_s"])
        elif fault == "drop_connections":
            self.robot.drop()
            self.hand.drop()
        elif fault == "freeze_gripper":
            self.hand.frozen = bool(details["frozen"])
        elif fault == "mute":
            self.robot.muted = {Command(number) for number in details["commands"]}
        elif fault == "pull":
            force_n = np.array(details["force_n"], dtype=np.float64)
            if force_n.shape != (3,) or not np.isfinite(force_n).all():
                raise ValueError(f"force_n {details['force_n']}: three finite numbers are needed (N, base frame)")
            self.world.pull(force_n)
        elif fault == "move_status":
            self.robot.next_move_status = MoveStatus[details["name"]]
        else:
            raise ValueError(f"unknown fault {fault!r}")


def main(argv: list[str]) -> int | None:
    config = command_line("cell", CellServerConfig, argv, __doc__ or "")
    try:
        cell = Cell(config)
    except (OSError, zmq.ZMQError) as error:
        print(f"error: {config.address} or a cell endpoint cannot be listened on ({error}): does another cell run?")
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: cell.stop())
    print(
        f"stand-in cell ready: robot {config.address}, control {cell.control_endpoint}, frames {cell.frames.endpoint}",
        flush=True,
    )
    try:
        cell.run()
    finally:
        cell.close()
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
