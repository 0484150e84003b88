"""Two ways to make an arm follow a stream of absolute poses. Each is used by the thread that owns the robot alone.

`position` plans in joint space, where the FR3's limits are: a Cartesian plan within its own limits came out of the
inverse kinematics with five times the joint acceleration and seven times the jerk that the arm allows (measured, see
docs/safety.md). `impedance` is softer in contact. Relative targets are never used: each is resolved against the
commanded pose of the moment it arrives and loses millimetres.
"""

import time
from collections.abc import Callable
from contextlib import suppress

import franky
import numpy as np

from robot.body import Body
from robot.config import ArmConfig

# franky's own errors, and what it throws beside them: planner failures and dead connections are RuntimeErrors.
ROBOT_ERRORS = (franky.Exception, franky.InvalidMotionTypeException, franky.MotionReuseException, RuntimeError)
STOP_TIMEOUT_S = 1.5
DAMPED_S = 0.25  # of the arm's time: most of the speed is gone then, the rest takes 0.3 to 0.5 s more
# Each sent pose preempts the last, and the planner fails (-111) on preempting itself by a few micrometres at rest.
SAME = 5e-5  # m, and rad
# franky's own joint limits are the older arm's, up to twice the FR3's 10 rad/s2 and 5000 rad/s3. Its plans start from
# the mean velocity of the last millisecond as if it were the newest, so each preemption takes half of the acceleration
# away for a millisecond: a jerk of 9.1 / 2 / 0.001, and a sixth of the plan's own, are 4950 at a dynamics factor of 1.
JOINT_ACCELERATION_RAD_S2, JOINT_JERK_RAD_S3 = 9.1, 2400.0
NO_FILTER_HZ = 1000.0  # its low-pass makes that velocity older still: 5265 rad/s3 where 4950 were without
MIN_SHARE = 0.01
SETTLED_MS = 5.0  # of the arm's time: a plan on the heels of another begins with the acceleration of neither


class PositionStream:
    """Joint positions, fed with jerk-limited motions that preempt each other within one session."""

    def __init__(self, robot: franky.Robot, config: ArmConfig, body: Body):
        self._robot, self._body = robot, body
        self._q_rad = self._q_start_rad = np.array(robot.state.q)
        self._speed_rad_s = config.dynamics_factor * np.array(robot.joint_velocity_limit.get())
        self._last: np.ndarray | None = None
        self._sent_ms = 0.0  # of the arm's time
        self._is_open = False

    def check(self) -> None:
        """Raises what ended the session, if something did."""
        if self._last is not None and has_ended(self._robot):
            raise RuntimeError("the arm ended the motion by itself")

    def is_settled(self, now_ms: float) -> bool:
        """Whether the last plan has run for long enough, at the time of the arm's newest state, to be followed."""
        if self._last is None:
            return True
        if not self._is_open and now_ms != self._sent_ms:  # the first plan begins with the first state of the session,
            self._sent_ms, self._is_open = now_ms, True  # which takes its time to open: till then none is given
        return self._is_open and now_ms - self._sent_ms >= SETTLED_MS

    def send(self, T_base_target: np.ndarray) -> None:
        if self._last is not None and np.abs(T_base_target - self._last).max() < SAME:
            return
        q_rad = self._body.follow(T_base_target, self._q_rad, self._q_start_rad)
        if q_rad is None:  # between two targets that can be reached: stand until the stream can be followed again
            return
        # The nearer an end stop the slower towards it, as the arm demands.
        state = self._robot.state
        way_rad = q_rad - np.array(state.q)
        share = float(
            (self._body.speed_limits(q_rad, way_rad) / self._speed_rad_s)[np.abs(way_rad) > SAME].min(initial=1)
        )
        dynamics = franky.RelativeDynamicsFactor(min(1.0, max(share, MIN_SHARE)), 1.0, 1.0)
        # With the default `return_when_finished` a small step would end the session before the next one comes.
        motion = franky.JointMotion(q_rad.tolist(), relative_dynamics_factor=dynamics, return_when_finished=False)
        self._robot.move(motion, asynchronous=True, cutoff_frequency=NO_FILTER_HZ)
        self._last, self._q_rad, self._sent_ms = np.array(T_base_target), q_rad, time_ms(state)

    def stop(self, meanwhile: Callable[[], None]) -> None:
        """Brake and end the session, calling `meanwhile` often. Raises what the session ended with instead."""
        if self._last is None:
            return
        robot = self._robot
        _wait(robot, lambda: has_ended(robot) or self.is_settled(time_ms(robot.state)), meanwhile)
        brake_in_joint_space(robot, meanwhile)


class ImpedanceStream:
    """franky's Cartesian impedance tracker: torque control around the target, the more tolerant of the two."""

    def __init__(self, robot: franky.Robot, config: ArmConfig, body: Body):
        self._robot = robot
        self._tracker = franky.CartesianImpedanceTracker(
            robot,
            translational_stiffness=config.translational_stiffness_n_m,
            rotational_stiffness=config.rotational_stiffness_nm_rad,
        )

    def check(self) -> None:
        if has_ended(self._robot):
            raise RuntimeError("the arm ended the motion by itself")

    def is_settled(self, now_ms: float) -> bool:
        return True

    def send(self, T_base_target: np.ndarray) -> None:
        self._tracker.set_target(franky.Affine(T_base_target))

    def stop(self, meanwhile: Callable[[], None]) -> None:
        """Torques only damp: an arm that is pulled gives way without an end, so the robot's own brake takes over.

        Only here, since libfranka may crash on `Robot.stop`: this thread's request and the control thread's answer to
        what it does change one table, each outside its lock.
        """
        robot = self._robot
        if has_ended(robot):
            return
        robot.move(franky.TorqueStopMotion(), asynchronous=True)
        try:
            _wait(robot, lambda: has_ended(robot), meanwhile, DAMPED_S)
        except NotAtRest:
            with suppress(franky.ControlException, franky.CommandException):  # preempted, or it has just ended
                robot.stop()
                robot.join_motion(timeout=STOP_TIMEOUT_S)


def brake_in_joint_space(robot: franky.Robot, meanwhile: Callable[[], None]) -> None:
    """Brake a motion in joint space and wait for its end. Raises what it ended with instead."""
    if not has_ended(robot):
        robot.move(franky.JointStopMotion(), asynchronous=True, cutoff_frequency=NO_FILTER_HZ)
        _wait(robot, lambda: has_ended(robot), meanwhile)


def set_joint_limits(robot: franky.Robot) -> None:
    """Let no plan in joint space ask for more than the FR3 allows."""
    for limit, most in (
        (robot.joint_acceleration_limit, JOINT_ACCELERATION_RAD_S2),
        (robot.joint_jerk_limit, JOINT_JERK_RAD_S3),
    ):
        limit.set(np.minimum(limit.max, most))


def time_ms(state: franky.RobotState) -> float:
    """The arm's own time of one of its states."""
    return state.time.to_sec() * 1e3


def has_ended(robot: franky.Robot) -> bool:
    """Whether no motion runs. Raises what the last one ended with. (franky's `poll_motion` says the opposite of its
    documentation, so this asks `join_motion`.)"""
    return robot.join_motion(timeout=0.0)


class NotAtRest(RuntimeError):
    """A stop has not ended in time."""


def _wait(
    robot: franky.Robot, until: Callable[[], bool], meanwhile: Callable[[], None], patience_s: float = STOP_TIMEOUT_S
) -> None:
    """Joining waits for ever when the robot has gone; this does not. The arm's time to come to rest counts on its own
    clock, which may be slow (an emulated one) but must go on."""
    began_ms = robot_ms = time_ms(robot.state)
    heard_s = time.monotonic()
    while not until():
        if robot_ms - began_ms > 1e3 * patience_s or time.monotonic() - heard_s > STOP_TIMEOUT_S:
            raise NotAtRest(f"the arm did not come to rest in {patience_s} s")
        meanwhile()
        time.sleep(0.005)
        if (now_ms := time_ms(robot.state)) != robot_ms:
            robot_ms, heard_s = now_ms, time.monotonic()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
