"""Two ways to make an arm follow a stream of absolute poses. Each is used by the thread that owns the robot alone.

Measured against a lock-step FR3: `position` trails by 55 to 75 ms with 0.3 to 0.5 mm rms, `impedance` by 80 ms with
0.15 mm, and stays soft in contact. Relative targets are never used: each is resolved against the commanded pose of
the moment it arrives and loses millimetres.
"""

import time
from collections.abc import Callable

import franky
import numpy as np

from robot.config import ArmConfig

# franky's own errors, and what it throws beside them: planner failures and dead connections are RuntimeErrors.
ROBOT_ERRORS = (franky.Exception, franky.InvalidMotionTypeException, franky.MotionReuseException, RuntimeError)
STOP_TIMEOUT_S = 1.5
# Each sent pose preempts the last, and the planner fails (-111) on preempting itself by a few micrometres at rest.
SAME = 5e-5  # m, and rad


class PositionStream:
    """Franka's own position control, fed with jerk-limited motions that preempt each other within one session."""

    def __init__(self, robot: franky.Robot, config: ArmConfig):
        self._robot = robot
        self._last: np.ndarray | None = None

    def check(self) -> None:
        """Raises what ended the session, if something did."""
        if self._last is not None and has_ended(self._robot):
            raise RuntimeError("the arm ended the motion by itself")

    def send(self, T_base_target: np.ndarray) -> None:
        if self._last is not None and np.abs(T_base_target - self._last).max() < SAME:
            return
        # With the default `return_when_finished` a small step would end the session before the next one comes.
        motion = franky.CartesianMotion(franky.Affine(T_base_target), return_when_finished=False)
        self._robot.move(motion, asynchronous=True)
        self._last = np.array(T_base_target)

    def stop(self, meanwhile: Callable[[], None]) -> None:
        """Brake and end the session, calling `meanwhile` often. Raises what the session ended with instead."""
        if self._last is not None and not has_ended(self._robot):
            self._robot.move(franky.CartesianStopMotion(), asynchronous=True)
            _wait_for_end(self._robot, meanwhile)


class ImpedanceStream:
    """franky's Cartesian impedance tracker: torque control around the target, the more tolerant of the two."""

    def __init__(self, robot: franky.Robot, config: ArmConfig):
        self._robot = robot
        self._tracker = franky.CartesianImpedanceTracker(
            robot,
            translational_stiffness=config.translational_stiffness_n_m,
            rotational_stiffness=config.rotational_stiffness_nm_rad,
        )

    def check(self) -> None:
        if has_ended(self._robot):
            raise RuntimeError("the arm ended the motion by itself")

    def send(self, T_base_target: np.ndarray) -> None:
        self._tracker.set_target(franky.Affine(T_base_target))

    def stop(self, meanwhile: Callable[[], None]) -> None:
        if not has_ended(self._robot):
            self._robot.move(franky.TorqueStopMotion(), asynchronous=True)
            _wait_for_end(self._robot, meanwhile)


def has_ended(robot: franky.Robot) -> bool:
    """Whether no motion runs. Raises what the last one ended with. (franky's `poll_motion` says the opposite of its
    documentation, so this asks `join_motion`.)"""
    return robot.join_motion(timeout=0.0)


def _wait_for_end(robot: franky.Robot, meanwhile: Callable[[], None]) -> None:
    """Joining waits for ever when the robot has gone; this does not. The arm's time to come to rest counts on its own
    clock, which may be slow (an emulated one) but must go on."""
    began_s = robot_s = robot.state.time.to_sec()
    heard_s = time.monotonic()
    while not has_ended(robot):
        if robot_s - began_s > STOP_TIMEOUT_S or time.monotonic() - heard_s > STOP_TIMEOUT_S:
            raise RuntimeError(f"the arm did not come to rest in {STOP_TIMEOUT_S} s")
        meanwhile()
        time.sleep(0.005)
        if (now_s := robot.state.time.to_sec()) != robot_s:
            robot_s, heard_s = now_s, time.monotonic()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
