"""The arm: deltas in, absolute poses out to an FR3 through franky, with a latched fault for everything that goes wrong.

Threads. `arm` owns `franky.Robot`: it reads states, streams poses, homes and recovers, and may be left behind when a
call into the library does not return (some never do after the robot is gone). `gripper` owns the hand. `arm-watchdog`
looks at both on the steady clock. Everybody else only calls the methods of `ArmDriver`, none of which waits.
"""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import franky
import numpy as np

from bridge.embodiment import Embodiment
from robot.config import ArmConfig
from robot.gripper import FRANKY_ERRORS, GripperDriver
from robot.safety import State, StateMachine, UnsafeAction
from robot.stamps import StampMap
from robot.stream import ROBOT_ERRORS, ImpedanceStream, PositionStream, first_line, has_ended
from robot.target import Streamed, TargetPath

log = logging.getLogger(__name__)

REJOIN_S = 0.5  # between attempts to reach a robot that was never there
AT_HOME_RAD = 0.02
MAX_AHEAD_S = 0.05  # a step may begin so much later than its arrival


@dataclass(frozen=True)
class ArmSample:
    """One state. `stamp_ns`: robot's clock. Wrench: force (N) and torque (Nm) on the TCP, base frame."""

    stamp_ns: int
    q_rad: np.ndarray
    T_base_tcp: np.ndarray
    wrench_base: np.ndarray


@dataclass(frozen=True)
class Snapshot:
    """All that a node publishes, of one moment."""

    state: State
    reason: str
    sample: ArmSample | None
    streamed: Streamed | None
    gripper_opening_m: float | None
    gripper_sent: float
    gripper_requested: float
    num_clips: Counter[str]
    num_rejected: Counter[str]
    num_transitions: int
    num_actions: int
    age_s: float  # of the arm's state, steady clock


@dataclass
class _Requests:
    """What others want the arm's thread to do."""

    home: Future | None = None
    acknowledge: Future | None = None
    closing: threading.Event = field(default_factory=threading.Event)


class ArmDriver:
    """`now_ns` is the robot's clock (ROS time); watchdogs use the steady clock.

    Example:
        arm = ArmDriver(config, embodiment, time.time_ns)
        arm.start()
        arm.home().result(timeout=20)
        arm.command(action, stamp_ns=time.time_ns())
    """

    def __init__(self, config: ArmConfig, embodiment: Embodiment, now_ns: Callable[[], int]):
        limits = config.limits
        limits.max_translation_m = min(limits.max_translation_m, embodiment.max_translation_m)
        limits.max_rotation_rad = min(limits.max_rotation_rad, embodiment.max_rotation_rad)
        self.config, self.embodiment, self.now_ns = config, embodiment, now_ns
        self.machine = StateMachine()
        self.samples: deque[ArmSample] = deque(maxlen=1000)
        self.path: TargetPath | None = None  # from the first state on
        self.gripper: GripperDriver | None = None
        self.lock = threading.RLock()
        self.num_clips: Counter[str] = Counter()
        self.num_rejected: Counter[str] = Counter()
        self.num_actions = 0
        self._last_action_ns = -1
        self._last_action_s = 0.0
        self._closing = threading.Event()
        self._worker = _ArmThread(self)
        self._watchdog = threading.Thread(target=self._watch, name="arm-watchdog", daemon=True)

    def start(self) -> None:
        self._start_gripper()
        self._worker.start()
        self._watchdog.start()

    def close(self) -> None:
        """Stop the motion and leave. Never waits longer than a few seconds."""
        self._closing.set()
        self._worker.requests.closing.set()
        self._worker.join(timeout=2.0)
        if self.gripper is not None:
            self.gripper.close()
        if self._watchdog.is_alive():
            self._watchdog.join(timeout=1.0)

    def command(self, action: np.ndarray, stamp_ns: int) -> bool:
        """One policy step [7] that begins at `stamp_ns`. False when the arm is in no state to move.

        Raises UnsafeAction for wrong shapes, non-finite numbers, and stamps that are late, early, repeated or
        reordered. Nothing of such an action is executed.
        """
        with self.lock:
            now_ns = self.now_ns()
            try:
                self._check_stamp(stamp_ns, now_ns)
                if self.path is None or not self._may_take_actions():
                    self.num_rejected[str(self.machine.state)] += 1
                    return False
                step = self.path.step(action, stamp_ns, now_ns)
            except UnsafeAction as error:
                self.num_rejected[str(error).split(":")[0]] += 1
                raise
            if not self.machine.run():
                self.num_rejected["HOLD"] += 1
                self.path.reset(self.path.at(now_ns).T_base_target)
                return False
            self._last_action_ns, self._last_action_s = stamp_ns, time.monotonic()
            self.num_actions += 1
            self.num_clips.update(clip.limit for clip in step.clips)
            if self.gripper is not None:
                self.gripper.command(float(step.action[6]))
            return True

    def stop(self, reason: str = "stop requested") -> None:
        """Brake now and latch a fault."""
        self.fault(reason)

    def fault(self, reason: str) -> None:
        with self.lock:
            if self.machine.state is not State.FAULT:
                log.error("FAULT: %s", reason)
            self.machine.fault(reason)

    def home(self) -> Future:
        """Go to the embodiment's home joints and open nothing. The future ends with None, or with RuntimeError."""
        return self._ask("home")

    def acknowledge(self) -> Future:
        """Leave FAULT: recover, or connect anew. The future ends with None, or with RuntimeError (still in FAULT)."""
        with self.lock:
            if not self._worker.is_usable:
                self._worker = _ArmThread(self)
                self._worker.start()
        return self._ask("acknowledge")

    def snapshot(self) -> Snapshot:
        with self.lock:
            gripper, path = self.gripper, self.path
            return Snapshot(
                state=self.machine.state,
                reason=self.machine.reason,
                sample=self.samples[-1] if self.samples else None,
                streamed=path.at(self.now_ns()) if path is not None else None,
                gripper_opening_m=gripper.opening_m if gripper is not None else self.embodiment.gripper_open_m,
                gripper_sent=gripper.sent if gripper is not None else 1.0,
                gripper_requested=gripper.requested if gripper is not None else 1.0,
                num_clips=Counter(self.num_clips),
                num_rejected=Counter(self.num_rejected),
                num_transitions=self.machine.num_transitions,
                num_actions=self.num_actions,
                age_s=time.monotonic() - self._worker.fresh_s,
            )

    def _ask(self, what: str) -> Future:
        future: Future = Future()
        with self.lock:
            if getattr(self._worker.requests, what) is not None or not self._worker.is_usable:
                future.set_exception(RuntimeError(f"{what} refused: {self.machine.state}, {self.machine.reason}"))
            else:
                setattr(self._worker.requests, what, future)
        return future

    def _may_take_actions(self) -> bool:
        moving = self._worker.is_homing or self._worker.requests.home is not None
        return not moving and self.machine.state not in (State.FAULT, State.DISCONNECTED)

    def _check_stamp(self, stamp_ns: int, now_ns: int) -> None:
        if stamp_ns <= self._last_action_ns:
            raise UnsafeAction(f"repeated or reordered: stamp {stamp_ns} is not after {self._last_action_ns}")
        age_s = (now_ns - stamp_ns) * 1e-9
        if age_s > self.config.action_max_age_s:
            raise UnsafeAction(f"late: its step began {age_s:.3f} s ago, allowed are {self.config.action_max_age_s} s")
        if age_s < -MAX_AHEAD_S:
            raise UnsafeAction(f"early: its step begins in {-age_s:.3f} s, allowed are {MAX_AHEAD_S} s")

    def _start_gripper(self) -> None:
        if self.config.gripper.enabled and (self.gripper is None or self.gripper.dead):
            self.gripper = GripperDriver(self.config.host, self.config.gripper, self.embodiment, self.fault)
            self.gripper.start()

    def _gripper_ready(self) -> bool:
        return self.gripper is None or self.gripper.opening_m is not None

    def _watch(self) -> None:
        while not self._closing.wait(0.05):
            now_s, worker = time.monotonic(), self._worker
            if self.gripper is not None:
                self.gripper.check(now_s)
            if worker.is_usable and now_s - worker.beat_s > self.config.call_timeout_s:
                worker.leave_behind()
                self.fault(f"lost link: {worker.call} did not return in {self.config.call_timeout_s:.1f} s")
            with self.lock:
                if now_s - self._last_action_s > self.config.action_timeout_s:
                    self.machine.hold("no action")


class _ArmThread(threading.Thread):
    """One owner of `franky.Robot`. A new one takes over after this one was left behind."""

    def __init__(self, driver: ArmDriver):
        super().__init__(name="arm", daemon=True)
        self.driver, self.config = driver, driver.config
        self.requests = _Requests()
        self.beat_s = self.fresh_s = time.monotonic()  # of the last loop, of the last new state
        self.call = "connecting"
        self.is_homing = False
        self.is_usable = True
        self._robot: franky.Robot | None = None
        self._stream: PositionStream | ImpedanceStream | None = None
        self._stamps = StampMap()
        self._robot_ms = -1.0
        self._streams_at_s = 0.0

    def leave_behind(self) -> None:
        """The thread is stuck inside a call: nobody will use it or wait for it again."""
        self.is_usable = False
        self.requests.closing.set()
        for future in (self.requests.home, self.requests.acknowledge):
            if future is not None and not future.done():
                future.set_exception(RuntimeError(f"{self.call} did not return"))

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
                self._end_stream()
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
        self.call = "set_collision_behavior"
        robot.set_collision_behavior(self.config.collision_torque_nm, self.config.collision_force_n)
        self._robot, self._robot_ms, self._stamps = robot, -1.0, StampMap()
        self._read()
        if not first:
            self._recover()

    def _read(self) -> None:
        """The newest state into the ring; judge it and its age."""
        self.call = "reading the state"
        state = self._robot.state
        driver, now_s, robot_ms = self.driver, time.monotonic(), state.time.to_sec() * 1e3
        if robot_ms != self._robot_ms:
            self._robot_ms, self.fresh_s = robot_ms, now_s
            stamp_ns = self._stamps.stamp_ns(robot_ms, driver.now_ns())
            sample = ArmSample(stamp_ns, np.array(state.q), state.O_T_EE.matrix, np.array(state.O_F_ext_hat_K))
            with driver.lock:
                driver.samples.append(sample)
                if driver.path is None:
                    driver.path = TargetPath(sample.T_base_tcp, driver.embodiment.period_s, self.config.limits)
                elif driver.machine.state in (State.IDLE, State.DISCONNECTED) and self._stream is None:
                    driver.path.reset(sample.T_base_tcp)  # an arm that is moved by hand keeps its target with it
        mode = state.robot_mode
        with driver.lock:
            if mode in (franky.RobotMode.Reflex, franky.RobotMode.UserStopped):
                names = state.last_motion_errors if mode == franky.RobotMode.Reflex else "user stop pressed"
                driver.fault(f"{mode.name.lower()}: {names}")
            elif now_s - self.fresh_s > self.config.state_fault_s:
                raise franky.NetworkException(f"no state from the arm for {now_s - self.fresh_s:.1f} s")
            elif now_s - self.fresh_s > self.config.state_hold_s:
                driver.machine.hold("stale arm state")
            else:
                driver.machine.release("stale arm state")
                if driver._gripper_ready():
                    driver.machine.connected()

    def _send(self) -> None:
        """Stream the pose of this moment while actions run or hold; begin a session with the first one."""
        driver, now_s = self.driver, time.monotonic()
        self.call = "streaming"
        if self._stream is None:
            if not driver.machine.may_move:
                return
            kind = PositionStream if self.config.streaming == "position" else ImpedanceStream
            self._stream = kind(self._robot, self.config)
            self._streams_at_s = now_s
        self._stream.check()
        if now_s + 1e-3 < self._streams_at_s:
            return
        self._streams_at_s = max(self._streams_at_s + 1 / self.config.stream_rate_hz, now_s)
        with driver.lock:
            streamed = driver.path.at(driver.now_ns())
            driver.num_clips.update(f"stream_{clip.limit}" for clip in streamed.clips)
        self._stream.send(streamed.T_base_target)

    def _home(self) -> None:
        """Joint motion home. States are read meanwhile, so that every watchdog stays awake."""
        driver, future = self.driver, self.requests.home
        self.is_homing = True
        try:
            self._end_stream()
            with driver.lock:
                driver.machine.idle("going home")
            if driver.gripper is not None and not driver.gripper.knows_its_width:
                driver.gripper.rehome()
            goal_rad = np.array(driver.embodiment.home_joint_pos_rad)
            dynamics = franky.RelativeDynamicsFactor(self.config.home_dynamics_factor)
            self._robot.move(franky.JointMotion(goal_rad.tolist(), relative_dynamics_factor=dynamics), True)
            until_s = time.monotonic() + self.config.home_timeout_s
            self._wait_motion(until_s)
            away_rad = float(np.abs(driver.samples[-1].q_rad - goal_rad).max())
            if driver.machine.state is State.FAULT or away_rad > AT_HOME_RAD:
                raise RuntimeError(f"stopped {away_rad:.3f} rad away from home ({driver.machine.reason})")
            with driver.lock:
                driver.path.reset(driver.samples[-1].T_base_tcp)
                driver.machine.reason = "at home"
            _finish(future, None)
        except ROBOT_ERRORS as error:
            _finish(future, error)
            raise
        finally:
            self.requests.home, self.is_homing = None, False

    def _wait_motion(self, until_s: float) -> None:
        """Until the motion has ended; a fault or a timeout ends it. Raises what the motion ended with."""
        while not has_ended(self._robot):
            self.beat_s = time.monotonic()
            self._read()
            if self.driver.machine.state is State.FAULT or self.beat_s > until_s or self.requests.closing.is_set():
                with suppress(franky.ControlException):  # "Move command preempted!"
                    self._robot.stop()
                    self._robot.join_motion(timeout=1.0)
                return
            time.sleep(0.01)

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
                driver._start_gripper()
                driver.path.reset(driver.samples[-1].T_base_tcp)
                driver.machine.acknowledge()
            log.info("fault acknowledged")
            _finish(future, None)
        except ROBOT_ERRORS as error:
            driver.machine.reason = first_line(error)
            _finish(future, error)
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
                _finish(future, error)
                setattr(self.requests, name, None)

    def _end_stream(self) -> None:
        if self._stream is not None:
            self.call, stream, self._stream = "stopping the motion", self._stream, None
            stream.stop()

    def _leave(self) -> None:
        """Bring the arm to rest before the process ends, if it still answers."""
        if self.is_usable and self._robot is not None:
            try:
                self._end_stream()
            except (*ROBOT_ERRORS, *FRANKY_ERRORS) as error:
                log.warning("while leaving: %s", first_line(error))
            self._robot = None


def _finish(future: Future, error: Exception | None) -> None:
    if future is None or future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(RuntimeError(first_line(error)))
