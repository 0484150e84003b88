"""The loop on the robot: observe, infer, execute, at the policy's rate. No ROS in here.

Each tick has one source: a person's hand if it moves (`teleop`), else the policy's chunk, else nothing (`hold`: the
arm keeps its target). The network is never waited for: a chunk is asked for in one tick and found in a later one.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bridge import pose
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError, StaleObservation
from bridge.messages import ActionChunk, Observation
from robot.config import RuntimeConfig
from robot.executor import Executor
from robot.observer import Observer

log = logging.getLogger(__name__)


class Policy(Protocol):
    """`bridge.policy_client.PolicyClient`, or a stand-in for it."""

    def submit(self, observation: Observation, deadline_s: float) -> int: ...
    def poll(self) -> ActionChunk | None: ...


class Clock(Protocol):
    def now_ns(self) -> int: ...
    def sleep_until(self, until_ns: int, closing: threading.Event) -> bool: ...


@dataclass(frozen=True)
class Tick:
    """What one tick did. `source`: teleop, policy or hold; `reason`: why it holds."""

    source: str
    reason: str = ""
    action: np.ndarray | None = None


@dataclass
class Figures:
    """Of the policy's run since its last start."""

    policy_versions: list[int] = field(default_factory=list)  # in the order in which they took over
    chunk_latency_ms: deque[float] = field(default_factory=lambda: deque(maxlen=2000))
    command_late_ms: deque[float] = field(default_factory=lambda: deque(maxlen=2000))  # behind its tick, when sent
    holds: int = 0  # ticks at which the policy had nothing
    errors: int = 0  # requests without an answer


class TeleopInput:
    """Actions of a person (or a scripted expert) on their way into the grid of ticks.

    Two that fall between the same ticks are composed into one, so no motion is lost or delayed, unless together they
    would be faster than `max_speed_m_s` and `max_turn_rad_s`: then one waits for the next tick, before a limit cuts it.
    """

    def __init__(self, period_s: float, timeout_s: float, max_speed_m_s: float, max_turn_rad_s: float):
        self.timeout_s = timeout_s
        self._max_step_m, self._max_step_rad = max_speed_m_s * period_s, max_turn_rad_s * period_s
        self._lock = threading.Lock()
        self._actions: deque[np.ndarray] = deque(maxlen=20)
        self._heard_s = -1e9

    def add(self, action: np.ndarray) -> None:
        """Seven finite numbers. Raises ValueError."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (pose.ACTION_DIM,) or not np.all(np.isfinite(action)):
            raise ValueError(f"teleop action needs {pose.ACTION_DIM} finite numbers, got {action}")
        with self._lock:
            self._actions.append(action)
            self._heard_s = time.monotonic()

    def take(self) -> np.ndarray | None:
        """The action of this tick."""
        with self._lock:
            if not self._actions:
                return None
            action = self._actions.popleft()
            while self._actions and self._fits(both := pose.compose([action, self._actions[0]])):
                self._actions.popleft()
                action = both
            return action

    @property
    def is_active(self) -> bool:
        return bool(self._actions) or time.monotonic() - self._heard_s < self.timeout_s

    def _fits(self, action: np.ndarray) -> bool:
        turn_rad = float(pose.rotation_angle(pose.matrix_from_rpy(action[3:6])))
        return float(np.linalg.norm(action[:3])) <= self._max_step_m and turn_rad <= self._max_step_rad


class Runtime:
    """`publish(action, stamp_ns, source)` sends one action to the arm. `policy` None: teleoperation only.

    `tick` belongs to the loop's thread; `start`, `stop`, `arm_state` and `teleop.add` may come from others.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        embodiment: Embodiment,
        observer: Observer,
        policy: Policy | None,
        publish: Callable[[np.ndarray, int, str], None],
        now_ns: Callable[[], int],
    ):
        if embodiment.instructions or config.instruction:
            self.instruction = config.instruction or embodiment.instructions[0]
        else:
            self.instruction = ""
        self.config, self.period_ns = config, round(embodiment.period_s * 1e9)
        self.observer, self.policy, self.now_ns = observer, policy, now_ns
        self.executor = Executor(config.num_action_chunks, config.prefetch_ticks, self.period_ns)
        self.teleop = TeleopInput(
            embodiment.period_s, config.teleop_timeout_s, config.teleop_speed_m_s, config.teleop_turn_rad_s
        )
        self.started = config.autostart
        self.arm_ready = True
        self.last = Tick("hold", "not started")
        self._figures = Figures()
        self._publish = publish
        self._asked_s: float | None = None
        self._no_chunk = ""  # why the policy has nothing for us
        self._cleared = True

    def start(self) -> None:
        """Let the policy move the arm, with figures counted from now on."""
        self._figures = Figures()
        self.started = True

    def stop(self) -> None:
        """The policy's last target is held; a person's hand still moves the arm."""
        self.started = False

    def arm_state(self, state: str) -> None:
        """A fault ends the policy's run: after it was acknowledged, somebody has to start it again."""
        self.arm_ready = state not in ("FAULT", "DISCONNECTED")
        if not self.arm_ready:
            self.started = False

    def tick(self, tick_ns: int) -> Tick:
        """One tick of the grid: at most one action is published."""
        action, asks = self.teleop.take(), False
        if action is not None or self.teleop.is_active:
            self._drop_plan()
            tick = Tick("teleop", action=action)
        elif not (self.started and self.policy is not None):
            self._drop_plan()
            reason = "no policy: teleoperation only" if self.policy is None else "not started"
            tick = Tick("hold", reason if self.arm_ready else "the arm is not ready")
        else:
            self._receive()
            asks = self.executor.wants_chunk()
            tick = self._policy_tick(self.executor.tick(tick_ns))
        if tick.action is not None:
            self._cleared = False
            self._publish(tick.action, tick_ns, tick.source)
            self._figures.command_late_ms.append((self.now_ns() - tick_ns) * 1e-6)
        if asks:  # only now: to pack pictures takes milliseconds, for which no command shall wait
            self._ask()
        self.last = tick
        return tick

    def figures(self) -> dict[str, Any]:
        """Since the last start; latencies in ms, by request. Any thread may ask: lists are copied in one go, since the
        loop's thread adds to them meanwhile."""
        figures, counts = self._figures, self.executor.counts
        return {
            "policy_version": self.executor.policy_version,
            "policy_versions": list(figures.policy_versions),
            "chunk_latency_ms": [round(ms, 2) for ms in list(figures.chunk_latency_ms)],
            "command_late_ms": [round(ms, 2) for ms in list(figures.command_late_ms)],
            "holds": figures.holds,
            "errors": figures.errors,
            "late_actions": counts.late_actions,
            "useless_chunks": counts.useless_chunks,
        }

    def _policy_tick(self, action: np.ndarray | None) -> Tick:
        if action is None:
            self._figures.holds += 1
            return Tick("hold", self._no_chunk or "waiting for a chunk")
        version, versions = self.executor.policy_version, self._figures.policy_versions
        if not versions or versions[-1] != version:
            versions.append(version)
        return Tick("policy", action=action)

    def _receive(self) -> None:
        """What came from the policy since the last tick. A timeout frees the way for the next request."""
        try:
            chunk = self.policy.poll()
        except BridgeError as error:
            self._failed(error)
            return
        if chunk is not None:
            if self._asked_s is not None:
                self._figures.chunk_latency_ms.append((time.monotonic() - self._asked_s) * 1e3)
                self._asked_s = None
            self.executor.load(chunk)
            self._no_chunk = ""

    def _ask(self) -> None:
        try:
            observation = self.observer.read(self.now_ns(), self.instruction)
            self.policy.submit(observation, self.config.deadline_s)
        except StaleObservation as error:
            self._no_chunk = f"stale observation: {error}"
        except BridgeError as error:
            self._failed(error)
        else:
            self._asked_s = time.monotonic()
            self.executor.asked()

    def _failed(self, error: BridgeError) -> None:
        self._figures.errors += 1
        self._asked_s = None
        self._no_chunk = f"{type(error).__name__}: {error}"
        self.executor.gave_up()

    def _drop_plan(self) -> None:
        if self._asked_s is not None:  # the answer would be about a world that a person has changed
            try:
                if self.policy.poll() is not None:
                    self._asked_s = None
            except BridgeError:
                self._asked_s = None
        if not self._cleared or self.executor.num_left:
            self.executor.clear()
            self._cleared = True


class GridLoop:
    """Calls `tick` at each multiple of the period on the robot's clock, and measures how late each call was.

    A tick that overruns its period costs the ticks it covered, never the grid: the next one is on time again.
    """

    def __init__(self, period_ns: int, tick: Callable[[int], object], clock: Clock):
        self.period_ns, self._tick, self._clock = period_ns, tick, clock
        self.num_ticks = self.num_overruns = 0
        self._late_ms: deque[float] = deque(maxlen=2000)
        self._took_ms: deque[float] = deque(maxlen=2000)

    def run(self, closing: threading.Event) -> None:
        if not self._clock.sleep_until(1, closing):  # simulated time may begin late, and not at 0
            return
        next_ns = self._after(self._clock.now_ns())
        while self._clock.sleep_until(next_ns, closing):
            began_ns, began_s = self._clock.now_ns(), time.monotonic()
            if began_ns - next_ns > 100 * self.period_ns:  # the clock was set
                next_ns = began_ns // self.period_ns * self.period_ns
            self._late_ms.append((began_ns - next_ns) * 1e-6)
            self._tick(next_ns)
            self._took_ms.append((time.monotonic() - began_s) * 1e3)
            self.num_ticks += 1
            upcoming_ns = self._after(self._clock.now_ns())
            self.num_overruns += max(0, (upcoming_ns - next_ns) // self.period_ns - 1)
            next_ns = max(upcoming_ns, next_ns + self.period_ns)

    def forget(self) -> None:
        """Measure anew."""
        self._late_ms.clear()
        self._took_ms.clear()
        self.num_ticks = self.num_overruns = 0

    def figures(self) -> dict[str, Any]:
        """`tick_jitter_ms`: how late each of the last 2000 ticks began; percentiles of it, and of what a tick took."""
        late_ms, took_ms = list(self._late_ms), list(self._took_ms)
        out: dict[str, Any] = {"ticks": self.num_ticks, "overruns": self.num_overruns}
        out["tick_jitter_ms"] = [round(ms, 2) for ms in late_ms]
        for name, values in (("tick_jitter", late_ms), ("tick_took", took_ms)):
            p50, p99, largest = np.percentile(values, [50, 99, 100]) if values else (0.0, 0.0, 0.0)
            out |= {f"{name}_p50_ms": round(p50, 3), f"{name}_p99_ms": round(p99, 3)}
            out[f"{name}_max_ms"] = round(float(largest), 3)
        return out

    def _after(self, now_ns: int) -> int:
        return (now_ns // self.period_ns + 1) * self.period_ns
