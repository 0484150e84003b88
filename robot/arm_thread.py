"""The one thread that owns `franky.Robot`: connects, reads, streams, homes, recovers. See `robot.arm`."""

import logging
import os
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import franky
import numpy as np

from robot.body import Body
from robot.safety import State, limit_lag, limit_wrench
from robot.stamps import StampMap
from robot.stream import (
    ROBOT_ERRORS,
    ImpedanceStream,
    PositionStream,
    brake_in_joint_space,
    first_line,
    has_ended,
    set_joint_limits,
    time_ms,
)
from robot.target import TargetPath

if TYPE_CHECKING:
    from robot.arm import ArmDriver

log = logging.getLogger(__name__)

REJOIN_S = 0.5  # between attempts to reach a robot that was never there
AT_HOME_RAD = 0.02


@dataclass(frozen=True)
class ArmSample:
    """One state. `stamp_ns`: robot's clock. Wrench: force (N) and torque (Nm) on the TCP, base frame."""

    stamp_ns: int
    q_rad: np.ndarray
    T_base_tcp: np.ndarray
    wrench_base: np.ndarray


@dataclass
class Requests:
    """What others want the arm's thread to do."""

    home: Future | None = None
    acknowledge: Future | None = None
    closing: threading.Event = field(default_factory=threading.Event)


class ArmThread(threading.Thread):
    """One owner of `franky.Robot`. A new one takes over after this one was left behind."""

    def __init__(self, driver: "ArmDriver"):
        super().__init__(name="arm", daemon=True)
        self.driver, self.config = driver, driver.config
        self.requests = Requests()
        self.beat_s = self.fresh_s = time.monotonic()  # of the last loop, of the last new state
        self.call = "connecting"
        self.is_homing = False
        self.is_usable = True
        self._robot: franky.Robot | None = None
        self._stream: PositionStream | ImpedanceStream | None = None
        self._body: Body | None = None  # this thread's own: a body is no two threads' at a time
        self._stamps = StampMap()
        self._robot_ms = -1.0
        self._streams_at_s = 0.0

    def leave_behind(self) -> None:
        """The thread is stuck inside a call: nobody will use it or wait for it again."""
        with self.driver.lock:  # an acknowledgement has either cleared the fault by now or never will
            self.is_usable = False
            self.requests.closing.set()
            for future in (self.requests.home, self.requests.acknowledge):
                finish(future, RuntimeError(f"{self.call} did not return"))
        # It may spin for ever, it and the robot's control thread, and under SCHED_FIFO 99 take all cores: only what
        # nobody else wants is left to them.
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(ProcessLookupError, PermissionError):
                if thread == self.native_id or os.sched_getscheduler(thread) == os.SCHED_FIFO:
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

    def run(self) -> None:
        next_s, period_s = time.monotonic(), 1 / self.config.poll_rate_hz
        while not self.requests.closing.is_set():
            self.beat_s = time.monotonic()
            self._cycle()
            next_s = max(next_s + period_s, time.monotonic())
            self.requests.closing.wait(next_s - time.monotonic())
        self._leave()

    def _cycle(self) -> None:
        """One look at the robot. Whatever it reports as wrong becomes a latched fault."""
        driver = self.driver
        try:
            if self._robot is None:
                if driver.machine.state is State.DISCONNECTED or self.requests.acknowledge is not None:
                    self._connect()
                return
            self._read()
            if driver.machine.state is State.FAULT:
                with suppress(franky.ControlException):  # a motion that a reflex ended says so: we know
                    self._end_stream()
                self._refuse_home()
                if self.requests.acknowledge is not None:
                    self._recover()
            elif self.requests.home is not None:
                self._home()
            else:
                self._send()
        except ROBOT_ERRORS as error:
            self._fail(error)

    def _connect(self) -> None:
        """A fresh robot. One never reached yet is tried again; after a fault only an operator's word leads here."""
        self.call, first = "connecting", self.driver.machine.state is State.DISCONNECTED
        try:
            robot = franky.Robot(self.config.host, realtime_config=franky.RealtimeConfig.Ignore)
        except ROBOT_ERRORS as error:
            if isinstance(error, franky.IncompatibleVersionException) or not first:
                raise
            self.driver.machine.reason = first_line(error)
            self.requests.closing.wait(REJOIN_S)
            return
        finally:
            # The constructor puts this thread under SCHED_FIFO 99 if it may, and its control thread inherits that.
            if not self.config.realtime:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        robot.relative_dynamics_factor = self.config.dynamics_factor
        set_joint_limits(robot)
        self.call = "set_collision_behavior"
        robot.set_collision_behavior(self.config.collision_torque_nm, self.config.collision_force_n)
        self.call, limits = "reading the robot's description", self.config.limits
        urdf, T_flange_tcp = robot.model_urdf, np.array(robot.state.F_T_EE.matrix)
        share = self.config.dynamics_factor if self.config.streaming == "position" else 1.0
        self.driver.body, self._body = (Body(urdf, T_flange_tcp, limits, share) for _ in range(2))
        self.driver.black_box.facts |= {"urdf": urdf, "T_flange_tcp": T_flange_tcp.tolist()}
        self._robot, self._robot_ms, self._stamps = robot, -1.0, StampMap()
        self._read()
        if not first:
            self._recover()

    def _read(self) -> None:
        """The newest state into the ring; judge it and its age."""
        self.beat_s, self.call = time.monotonic(), "reading the state"
        state = self._robot.state
        driver, now_s, robot_ms = self.driver, time.monotonic(), time_ms(state)
        if robot_ms != self._robot_ms:
            self._robot_ms, self.fresh_s = robot_ms, now_s
            stamp_ns = self._stamps.stamp_ns(robot_ms, driver.now_ns())
            sample = ArmSample(stamp_ns, np.array(state.q), state.O_T_EE.matrix, np.array(state.O_F_ext_hat_K))
            with driver.lock:
                driver.samples.append(sample)
                if driver.path is None:
                    period_s, stream_period_s = driver.embodiment.period_s, 1 / self.config.stream_rate_hz
                    driver.path = TargetPath(sample.T_base_tcp, period_s, self.config.limits, stream_period_s)
                elif driver.machine.state in (State.IDLE, State.DISCONNECTED) and self._stream is None:
                    driver.path.reset(sample.T_base_tcp)  # an arm that is moved by hand keeps its target with it
                opening_m = (driver.gripper.opening_m if driver.gripper is not None else None) or np.nan
                row = (sample.q_rad, sample.T_base_tcp, sample.wrench_base, driver.path.T_streamed, opening_m)
                driver.black_box.add_state(stamp_ns, driver.machine.state, *row)
                clip = limit_wrench(sample.wrench_base, self.config.limits)
                if clip is None and self._stream is not None:
                    clip = limit_lag(sample.T_base_tcp, driver.path.T_streamed, self.config.limits)
                if clip is not None:
                    driver.fault(f"limit breach: {clip.limit} {clip.requested:.3g}, allowed are {clip.allowed:g}")
        mode = state.robot_mode
        with driver.lock:
            if mode in (franky.RobotMode.Reflex, franky.RobotMode.UserStopped):
                names = state.last_motion_errors if mode == franky.RobotMode.Reflex else "user stop pressed"
                driver.fault(f"{mode.name.lower()}: {names}")
            elif now_s - self.fresh_s > self.config.state_hold_s:
                driver.machine.hold("stale arm state")
            else:
                driver.machine.release("stale arm state")
                if driver.gripper_is_ready():
                    driver.machine.connected()

    def _send(self) -> None:
        """Stream the pose of this moment while actions run or hold; begin a session with the first one."""
        driver, now_s = self.driver, time.monotonic()
        self.call = "streaming"
        if self._stream is None:
            if not driver.machine.may_move:
                return
            kind = PositionStream if self.config.streaming == "position" else ImpedanceStream
            self._stream = kind(self._robot, self.config, self._body)
            self._streams_at_s = now_s
        self._stream.check()
        if now_s + 1e-3 < self._streams_at_s or not self._stream.is_settled(self._robot_ms):
            return
        self._streams_at_s = max(self._streams_at_s + 1 / self.config.stream_rate_hz, now_s)
        with driver.lock:
            streamed = driver.path.stream(driver.now_ns())
        self._stream.send(streamed.T_base_target)

    def _home(self) -> None:
        """Joint motion home. States are read meanwhile, so that every watchdog stays awake."""
        driver, future = self.driver, self.requests.home
        self.is_homing = True
        try:
            self._end_stream()
            with driver.lock:
                driver.machine.idle("going home")
                if why := self._why_stand():  # since it was asked for; to end a stream takes its time
                    return self._stay(f"home refused: {why}")
                if driver.gripper is not None and not driver.gripper.knows_its_width:
                    driver.gripper.rehome()
            goal_rad = np.array(driver.embodiment.home_joint_pos_rad)
            dynamics = franky.RelativeDynamicsFactor(self.config.home_dynamics_factor)
            self._robot.move(franky.JointMotion(goal_rad.tolist(), relative_dynamics_factor=dynamics), True)
            why = self._wait_motion(time.monotonic() + self.config.home_timeout_s)
            away_rad = float(np.abs(driver.samples[-1].q_rad - goal_rad).max())
            if driver.machine.state is State.FAULT or away_rad > AT_HOME_RAD:
                text = f"stopped {away_rad:.3f} rad away from home ({why or driver.machine.reason})"
                if why:
                    return self._stay(text)
                raise RuntimeError(text)
            with driver.lock:
                driver.path.reset(driver.samples[-1].T_base_tcp)
                driver.machine.reason = "at home"
            finish(future, None)
        except ROBOT_ERRORS as error:
            finish(future, error)
            raise
        finally:
            self.requests.home, self.is_homing = None, False

    def _why_stand(self) -> str:
        """What forbids a motion: a fault, or an input that is not heard; "": nothing."""
        machine = self.driver.machine
        return machine.reason if machine.state is State.FAULT else self.driver.lost_input()

    def _stay(self, text: str) -> None:
        """Not home, for a fault that is latched already or for an input, which is no fault."""
        with self.driver.lock:
            if self.driver.machine.state is not State.FAULT:
                self.driver.machine.reason = text
        finish(self.requests.home, RuntimeError(text))

    def _refuse_home(self) -> None:
        """What was asked for just before a fault."""
        future, self.requests.home = self.requests.home, None
        finish(future, RuntimeError(self.driver.machine.reason))

    def _wait_motion(self, until_s: float) -> str:
        """Until the motion has ended; a fault, an input that is lost or a timeout ends it. Returns `_why_stand` of what
        ended it. Raises what the motion ended with."""
        while not has_ended(self._robot):
            self.beat_s = time.monotonic()
            self._read()
            if (why := self._why_stand()) or self.beat_s > until_s or self.requests.closing.is_set():
                brake_in_joint_space(self._robot, self._read)
                return why
            time.sleep(0.01)
        return ""

    def _recover(self) -> None:
        """An operator has acknowledged: clear the robot's error, then ours."""
        driver, future = self.driver, self.requests.acknowledge
        self.call = "recover_from_errors"
        try:
            if self._robot.has_errors or self._robot.state.robot_mode != franky.RobotMode.Idle:
                self._robot.recover_from_errors()
            mode = self._robot.state.robot_mode
            if mode != franky.RobotMode.Idle:
                raise RuntimeError(f"the robot is still in mode {mode.name}")
            with driver.lock:
                if future.done():  # refused meanwhile: by a stop, or since this took too long
                    return
                driver.start_gripper()
                driver.path.reset(driver.samples[-1].T_base_tcp)
                driver.machine.acknowledge()
                finish(future, None)
            log.info("fault acknowledged")
        except ROBOT_ERRORS as error:
            driver.machine.reason = first_line(error)
            finish(future, error)
            if isinstance(error, franky.NetworkException) or "Net Exception" in str(error):
                raise
        finally:
            self.requests.acknowledge = None

    def _fail(self, error: Exception) -> None:
        """A call into the robot failed. After a network error the object is dead and dropped (measured)."""
        reason, self._stream = first_line(error), None
        link_is_lost = self._robot is None or isinstance(error, franky.NetworkException) or "Net Exc" in str(error)
        self.driver.fault(f"lost link: {reason}" if link_is_lost else reason)
        if link_is_lost:
            self.call, self._robot = "dropping the connection", None
        for name in ("home", "acknowledge"):
            if (future := getattr(self.requests, name)) is not None:
                finish(future, error)
                setattr(self.requests, name, None)

    def _end_stream(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.stop(self._read)

    def _leave(self) -> None:
        """Bring the arm to rest before the process ends, if it still answers."""
        if self.is_usable and self._robot is not None:
            try:
                self._end_stream()
            except ROBOT_ERRORS as error:
                log.warning("while leaving: %s", first_line(error))
            self._robot = None


def finish(future: Future | None, error: Exception | None) -> None:
    """Answer whoever asked; the first answer counts. Any thread."""
    if future is None:
        return
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(RuntimeError(first_line(error)))
