"""The arm: deltas in, absolute poses out to an FR3 through franky, with a latched fault for everything that goes wrong.

Threads. `arm` owns `franky.Robot`: it reads states, streams poses, homes and recovers, and may be left behind when a
call into the library does not return (some never do after the robot is gone). `gripper` owns the hand. `arm-watchdog`
looks at both on the steady clock. Everybody else only calls the methods of `ArmDriver`, none of which waits.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bridge.embodiment import Embodiment
from robot.arm_thread import ArmSample, ArmThread, finish
from robot.black_box import AFTER_S, BlackBox
from robot.body import Body
from robot.config import ArmConfig
from robot.gripper import GripperDriver
from robot.safety import Clip, LiveInput, State, StateMachine, UnsafeAction, check_action
from robot.target import Streamed, TargetPath

log = logging.getLogger(__name__)

MAX_AHEAD_S = 0.05  # a step may begin so much later than its arrival
MIN_SPACING = 0.9  # of a period, between the stamps of two steps: in a hurry the target would run ahead of the arm


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
    num_missed: int  # stamps of the grid that no action came for, between one action and the next
    age_s: float  # of the arm's state, steady clock


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
        self.num_actions = self.num_missed = 0
        self.body: Body | None = None  # from the first connection on
        self.deadman = LiveInput("dead-man released", config.deadman_timeout_s)
        self.heartbeat = LiveInput("no heartbeat", config.heartbeat_timeout_s)
        facts = {"limits": asdict(limits), "period_s": embodiment.period_s, "contract": embodiment.contract_hash}
        self.black_box = BlackBox(config.poll_rate_hz, facts)
        self._save_at_s = np.inf  # when the black box is to be written
        self._last_action_ns = -1
        self._last_action_s = 0.0
        self._closing = threading.Event()
        self._worker = ArmThread(self)
        self._watchdog = threading.Thread(target=self._watch, name="arm-watchdog", daemon=True)

    def start(self) -> None:
        self.start_gripper()
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
        if self._save_at_s < np.inf:
            self._save_black_box()

    def hear_deadman(self, is_pressed: bool) -> None:
        self.deadman.hear(is_pressed, time.monotonic())

    def hear_heartbeat(self) -> None:
        self.heartbeat.hear(True, time.monotonic())

    def command(self, action: np.ndarray, stamp_ns: int) -> bool:
        """One policy step [7] that begins at `stamp_ns`. False when the arm is in no state to move.

        Raises UnsafeAction for wrong shapes, non-finite numbers, and stamps that are late, early, repeated, reordered
        or less than a step after the last. Nothing of such an action is executed.
        """
        with self.lock:
            now_ns = self.now_ns()
            try:
                self._check_stamp(stamp_ns, now_ns)
                if self.path is None or not self._may_take_actions():
                    self.num_rejected[str(self.machine.state)] += 1
                    return False
                action = check_action(action)
                if lost := self.lost_input():
                    self.num_rejected[lost] += 1
                    return False
                if not self.machine.run():
                    self.num_rejected["HOLD"] += 1
                    return False
                T_before, q_rad = self.path.T_target, self.samples[-1].q_rad
                step = self.path.step(action, stamp_ns, now_ns, self._limit_body)
            except UnsafeAction as error:
                self.num_rejected[str(error).split(":")[0]] += 1
                self.black_box.add_event(now_ns, f"action refused: {error}")
                raise
            # Before a pause the grid starts anew: only between actions of one motion are stamps missing.
            gap = round((stamp_ns - self._last_action_ns) / self.path.period_ns) - 1
            if gap * self.path.period_ns <= self.config.action_timeout_s * 1e9:
                self.num_missed += max(0, gap)
            T_after = self.path.T_target
            self.black_box.add_action(now_ns, stamp_ns, action, q_rad, T_before, T_after)
            self._last_action_ns, self._last_action_s = stamp_ns, time.monotonic()
            self.num_actions += 1
            self.num_clips.update(clip.limit for clip in step.clips)
            if self.gripper is not None:
                self.gripper.command(float(step.action[6]))
            return True

    def stop(self, reason: str = "stop requested") -> None:
        """Brake now and latch a fault, that of an acknowledgement under way, too."""
        with self.lock:
            self.fault(reason)
            finish(self._worker.requests.acknowledge, RuntimeError(reason))

    def fault(self, reason: str) -> None:
        with self.lock:
            if self.machine.state is not State.FAULT:
                log.error("FAULT: %s", reason)
                self.black_box.add_event(self.now_ns(), f"FAULT: {reason}")
                if self.config.fault_dir:
                    self._save_at_s = time.monotonic() + AFTER_S
            self.machine.fault(reason)
            if self.gripper is not None:
                self.gripper.forget()

    def home(self) -> Future:
        """Go to the embodiment's home joints and open nothing. The future ends with None, or with RuntimeError: so it
        does, without a fault, when the dead-man is released or the heartbeat is lost, before it or on the way."""
        return self._ask("home")

    def acknowledge(self) -> Future:
        """Leave FAULT: recover, or connect anew. The future ends with None, or with RuntimeError (still in FAULT)."""
        with self.lock:
            if not self._worker.is_usable:
                self._worker = ArmThread(self)
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
                num_clips=self.num_clips + Counter({f"stream_{n}": k for n, k in path.num_clips.items()})
                if path is not None
                else Counter(),
                num_rejected=Counter(self.num_rejected),
                num_transitions=self.machine.num_transitions,
                num_actions=self.num_actions,
                num_missed=self.num_missed,
                age_s=time.monotonic() - self._worker.fresh_s,
            )

    def _ask(self, what: str) -> Future:
        future: Future = Future()
        with self.lock:
            allowed = (State.FAULT,) if what == "acknowledge" else (State.IDLE, State.RUNNING, State.HOLD)
            is_busy = getattr(self._worker.requests, what) is not None or not self._worker.is_usable
            if is_busy or self.machine.state not in allowed:
                finish(future, RuntimeError(f"{what} refused: {self.machine.state}, {self.machine.reason}"))
            elif what == "home" and (lost := self.lost_input()):
                finish(future, RuntimeError(f"home refused: {lost}"))
            else:
                setattr(self._worker.requests, what, future)
        return future

    def _may_take_actions(self) -> bool:
        moving = self._worker.is_homing or self._worker.requests.home is not None
        return not moving and self.machine.state not in (State.FAULT, State.DISCONNECTED)

    def lost_input(self) -> str:
        """Name of an input without which the arm shall not move, and which is not heard; "": none."""
        return next((live.name for live in self._inputs if live.is_lost(time.monotonic())), "")

    @property
    def _inputs(self) -> tuple[LiveInput, LiveInput]:
        return self.deadman, self.heartbeat

    def _limit_body(self, T_from: np.ndarray, T_to: np.ndarray) -> tuple[np.ndarray, list[Clip]]:
        if self.body is None or self.path is None:
            return T_to, []
        return self.body.limit(T_from, T_to, self.samples[-1].q_rad, self.path.period_ns * 1e-9)

    def _check_stamp(self, stamp_ns: int, now_ns: int) -> None:
        if stamp_ns <= self._last_action_ns:
            raise UnsafeAction(f"repeated or reordered: stamp {stamp_ns} is not after {self._last_action_ns}")
        age_s = (now_ns - stamp_ns) * 1e-9
        if age_s > self.config.action_max_age_s:
            raise UnsafeAction(f"late: its step began {age_s:.3f} s ago, allowed are {self.config.action_max_age_s} s")
        if age_s < -MAX_AHEAD_S:
            raise UnsafeAction(f"early: its step begins in {-age_s:.3f} s, allowed are {MAX_AHEAD_S} s")
        spacing_s, period_s = (stamp_ns - self._last_action_ns) * 1e-9, self.embodiment.period_s
        if self._last_action_ns >= 0 and spacing_s < MIN_SPACING * period_s:
            raise UnsafeAction(f"too soon: its step begins {spacing_s:.3f} s after the last, which takes {period_s} s")

    def start_gripper(self) -> None:
        if self.gripper is not None and self.gripper.is_silent:
            self.gripper.dead = True  # it would say so itself only after this fault was acknowledged
        if self.config.gripper.enabled and (self.gripper is None or self.gripper.dead):
            self.gripper = GripperDriver(self.config.host, self.config.gripper, self.embodiment, self.fault)
            self.gripper.start()

    def gripper_is_ready(self) -> bool:
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
                age_s, is_linked = now_s - worker.fresh_s, self.machine.state not in (State.DISCONNECTED, State.FAULT)
                if is_linked and age_s > self.config.state_fault_s:
                    self.fault(f"lost link: no state from the arm for {age_s:.1f} s")
                if now_s - self._last_action_s > self.config.action_timeout_s:
                    self.machine.hold("no action")
                for live in self._inputs:
                    if not live.is_lost(now_s):
                        self.machine.release(live.name)
                    elif self.path is not None and live.name not in self.machine.causes:
                        self.path.halt(self.now_ns())  # not where the last step was going to: now
                        self.machine.hold(live.name)
            if now_s >= self._save_at_s:
                threading.Thread(target=self._save_black_box, name="black-box", daemon=True).start()

    def _save_black_box(self) -> None:
        self._save_at_s = np.inf
        try:
            path = self.black_box.save(Path(self.config.fault_dir), self.machine.reason)
            log.info("the last seconds before the fault are in %s", path)
        except OSError as error:
            log.error("the last seconds before the fault could not be written: %s", error)
