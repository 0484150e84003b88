"""What may reach the arm: pure checks of numbers, and the arm's safety states.

Nothing here knows a policy, a network or a robot. Every limit returns what it lets through and a list of what it cut
(`Clip`), so a runtime can publish and a recorder can store both. Source: docs/contract.md, sections 1 and 7.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from bridge import pose


class UnsafeAction(ValueError):
    """An action that cannot be clipped into a safe one: wrong shape, not finite, late or out of order. Not executed."""


@dataclass(frozen=True)
class Clip:
    """One quantity that a limit cut. `requested` and `allowed` have the unit that ends the name of `limit`."""

    limit: str
    requested: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.limit}: {self.requested:.4g} cut to {self.allowed:.4g}"


@dataclass
class SafetyLimits:
    """Where and how fast the TCP may go (base frame)."""

    max_translation_m: float = field(
        default=0.1, metadata={"about": "largest translation of one policy step, each axis (m)", "range": (1e-4, 0.1)}
    )
    max_rotation_rad: float = field(
        default=0.1, metadata={"about": "largest rotation of one policy step, each angle (rad)", "range": (1e-4, 0.1)}
    )
    max_speed_m_s: float = field(
        default=0.5, metadata={"about": "speed limit of the TCP target (m/s)", "range": (0.01, 1.7)}
    )
    max_turn_rad_s: float = field(
        default=1.5, metadata={"about": "turning limit of the TCP target (rad/s)", "range": (0.01, 2.5)}
    )
    max_acceleration_m_s2: float = field(
        default=30.0, metadata={"about": "acceleration limit of the streamed target (m/s2)", "range": (0.1, 200.0)}
    )
    max_jerk_m_s3: float = field(
        default=4500.0, metadata={"about": "jerk limit of the streamed target (m/s3)", "range": (10.0, 20000.0)}
    )
    max_turn_rad_s2: float = field(
        default=90.0, metadata={"about": "angular acceleration limit of the streamed target", "range": (0.1, 500.0)}
    )
    max_turn_rad_s3: float = field(
        default=8500.0, metadata={"about": "angular jerk limit of the streamed target", "range": (10.0, 50000.0)}
    )
    joint_margin_rad: float = field(
        default=0.05, metadata={"about": "least distance of every joint from its end stop (rad)", "range": (0.0, 0.5)}
    )
    self_collision_margin_m: float = field(
        default=0.02, metadata={"about": "least distance of the arm's links from each other (m)", "range": (0.0, 0.2)}
    )
    max_force_n: float = field(
        default=80.0, metadata={"about": "a larger external force on the TCP is a fault (N)", "range": (1.0, 200.0)}
    )
    max_torque_nm: float = field(
        default=40.0, metadata={"about": "a larger external torque on the TCP is a fault (Nm)", "range": (0.5, 100.0)}
    )
    max_lag_m: float = field(
        default=0.2,
        metadata={"about": "an arm so far from the pose it was sent is a fault (m)", "range": (0.01, 0.5)},
    )
    max_lag_rad: float = field(
        default=0.8,
        metadata={"about": "an arm turned so far from the pose that it was sent is a fault", "range": (0.05, 2.0)},
    )
    workspace_lower_m: list[float] = field(
        default_factory=lambda: [0.20, -0.45, 0.018],
        metadata={"about": "lower corner x y z of the box in which the TCP target must stay, base frame (m)"},
    )
    workspace_upper_m: list[float] = field(
        default_factory=lambda: [0.75, 0.45, 0.75],
        metadata={"about": "upper corner x y z of the box in which the TCP target must stay, base frame (m)"},
    )
    keep_out_m: list[float] = field(
        default_factory=list,
        metadata={"about": "boxes that the TCP target must not enter: six numbers each, lower and upper corner (m)"},
    )

    def __post_init__(self):
        if len(self.workspace_lower_m) != 3 or len(self.workspace_upper_m) != 3:
            raise ValueError("workspace_lower_m and workspace_upper_m need 3 numbers each")
        if not np.all(np.less(self.workspace_lower_m, self.workspace_upper_m)):
            raise ValueError(f"workspace is empty: {self.workspace_lower_m} is not below {self.workspace_upper_m}")
        if len(self.keep_out_m) % 6:
            raise ValueError(f"keep_out_m needs six numbers for each box, got {len(self.keep_out_m)}")
        for lower, upper in self.keep_out_boxes:
            if not np.all(lower < upper):
                raise ValueError(f"keep-out box is empty: {lower} is not below {upper}")

    @property
    def keep_out_boxes(self) -> np.ndarray:
        """float64 [N, 2, 3]: lower and upper corners."""
        return np.array(self.keep_out_m, dtype=np.float64).reshape(-1, 2, 3)


@dataclass(frozen=True)
class SafeStep:
    """One policy step after all limits. `T_requested` is where it would have gone; `action` is what became of it."""

    T_target: np.ndarray
    T_requested: np.ndarray
    action: np.ndarray
    clips: list[Clip]


def safe_step(
    T_target: np.ndarray,
    action: np.ndarray,
    period_s: float,
    limits: SafetyLimits,
    body: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, list[Clip]]] | None = None,
) -> SafeStep:
    """The next target from the last *target* and an action [7]. Raises UnsafeAction for what must not be executed.

    `body(T_target, T_next)` may cut further: see `robot.body`.
    """
    action = check_action(action)
    allowed, clips = limit_step(action, limits.max_translation_m, limits.max_rotation_rad)
    T_next = pose.integrate(T_target, allowed)
    T_next, cut = limit_workspace(T_target, T_next, limits.workspace_lower_m, limits.workspace_upper_m)
    clips += cut
    T_next, cut = limit_speed(T_target, T_next, period_s, limits.max_speed_m_s, limits.max_turn_rad_s)
    clips += cut
    T_next, cut = limit_keep_out(T_target, T_next, limits.keep_out_boxes)
    clips += cut
    if body is not None:
        T_next, cut = body(T_target, T_next)
        clips += cut
    sent = np.append(pose.delta(T_target, T_next), allowed[6])
    return SafeStep(T_next, pose.integrate(T_target, action), sent, clips)


def check_action(action: np.ndarray) -> np.ndarray:
    """float64 [7] out of anything array-like. Raises UnsafeAction for another shape and for NaN or infinity."""
    try:
        action = np.asarray(action, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UnsafeAction(f"action is not seven numbers: {error}") from error
    if action.shape != (pose.ACTION_DIM,):
        raise UnsafeAction(f"action has shape {action.shape}, needed is ({pose.ACTION_DIM},)")
    if not np.all(np.isfinite(action)):
        bad = [name for name, value in zip(pose.ACTION_NAMES, action, strict=True) if not np.isfinite(value)]
        raise UnsafeAction(f"action is not finite in {', '.join(bad)}")
    return action


def limit_step(action: np.ndarray, max_translation_m: float, max_rotation_rad: float) -> tuple[np.ndarray, list[Clip]]:
    """Clip each translation, each angle and the gripper command of an action [7] to its range."""
    bounds = np.array([max_translation_m] * 3 + [max_rotation_rad] * 3 + [1.0])
    allowed = np.clip(action, -bounds, bounds)
    cut = np.flatnonzero(allowed != action)
    return allowed, [Clip(f"step_{pose.ACTION_NAMES[i]}", float(action[i]), float(allowed[i])) for i in cut]


def limit_workspace(
    T_from: np.ndarray, T_to: np.ndarray, lower_m: list[float], upper_m: list[float]
) -> tuple[np.ndarray, list[Clip]]:
    """Keep the target in a box. A target that starts outside may come back or stay, but not go further out: putting it
    inside at once would move an arm that nobody asked to move."""
    lower = np.minimum(lower_m, T_from[:3, 3])
    upper = np.maximum(upper_m, T_from[:3, 3])
    T = T_to.copy()
    T[:3, 3] = np.clip(T_to[:3, 3], lower, upper)
    cut = np.flatnonzero(T[:3, 3] != T_to[:3, 3])
    return T, [Clip(f"workspace_{'xyz'[i]}_m", float(T_to[i, 3]), float(T[i, 3])) for i in cut]


def limit_speed(
    T_from: np.ndarray, T_to: np.ndarray, duration_s: float, max_speed_m_s: float, max_turn_rad_s: float
) -> tuple[np.ndarray, list[Clip]]:
    """Shorten a motion of `duration_s`, straight line and rotation each, to what the speeds allow."""
    distance = float(np.linalg.norm(T_to[:3, 3] - T_from[:3, 3]))
    angle = float(pose.rotation_angle(T_from[:3, :3].T @ T_to[:3, :3]))
    clips, T = [], T_to
    if distance > (reach := max_speed_m_s * duration_s):
        T = T_to.copy()
        T[:3, 3] = T_from[:3, 3] + reach / distance * (T_to[:3, 3] - T_from[:3, 3])
        clips.append(Clip("speed_m_s", distance / duration_s if duration_s > 0 else np.inf, max_speed_m_s))
    if angle > (reach := max_turn_rad_s * duration_s):
        T = T.copy()
        T[:3, :3] = pose.interpolate(T_from, T_to, reach / angle)[:3, :3]
        clips.append(Clip("turn_rad_s", angle / duration_s if duration_s > 0 else np.inf, max_turn_rad_s))
    return T, clips


def limit_keep_out(T_from: np.ndarray, T_to: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, list[Clip]]:
    """Stop the straight line where it would enter one of the boxes [N, 2, 3]. From inside a box every way is free."""
    share, start, way = 1.0, T_from[:3, 3], T_to[:3, 3] - T_from[:3, 3]
    for lower, upper in boxes:
        if np.all((start > lower) & (start < upper)):
            continue
        share = min(share, _entry(start, way, lower, upper))
    if share >= 1.0:
        return T_to, []
    T = T_to.copy()
    T[:3, 3] = start + share * way
    length = float(np.linalg.norm(way))
    return T, [Clip("keep_out_m", length, share * length)]


def limit_wrench(wrench: np.ndarray, limits: SafetyLimits) -> Clip | None:
    """What an external force and torque [6] (N, Nm) exceed, if they do."""
    force_n, torque_nm = float(np.linalg.norm(wrench[:3])), float(np.linalg.norm(wrench[3:]))
    if not force_n <= limits.max_force_n:  # so that NaN is no way through
        return Clip("force_n", force_n, limits.max_force_n)
    return None if torque_nm <= limits.max_torque_nm else Clip("torque_nm", torque_nm, limits.max_torque_nm)


def limit_lag(T_base_tcp: np.ndarray, T_base_sent: np.ndarray, limits: SafetyLimits) -> Clip | None:
    """By what the arm is too far from where it was sent [4, 4], if it is: something holds it, or it cannot follow. What
    it was sent it would still do, later and all at once."""
    away_m = float(np.linalg.norm(T_base_sent[:3, 3] - T_base_tcp[:3, 3]))
    if not away_m <= limits.max_lag_m:
        return Clip("lag_m", away_m, limits.max_lag_m)
    turned_rad = float(pose.rotation_angle(T_base_tcp[:3, :3].T @ T_base_sent[:3, :3]))
    return None if turned_rad <= limits.max_lag_rad else Clip("lag_rad", turned_rad, limits.max_lag_rad)


def enters(start_m: np.ndarray, end_m: np.ndarray, boxes: np.ndarray) -> bool:
    """Whether a straight line from outside leads into one of the boxes [N, 2, 3]."""
    way = end_m - start_m
    near = (np.maximum(start_m, end_m) > boxes[:, 0]) & (np.minimum(start_m, end_m) < boxes[:, 1])
    return any(
        not np.all((start_m > lower) & (start_m < upper)) and _entry(start_m, way, lower, upper) < 1.0
        for lower, upper in boxes[near.all(axis=1)]
    )


def _entry(start: np.ndarray, way: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """Share of `way` at which a line enters the open box (slab method); 1.0 when it does not. A hair (1 um) is kept."""
    first, last = 0.0, 1.0
    for axis in range(3):
        if abs(way[axis]) < 1e-12:
            if not lower[axis] < start[axis] < upper[axis]:
                return 1.0
            continue
        near, far = sorted(((lower[axis] - start[axis]) / way[axis], (upper[axis] - start[axis]) / way[axis]))
        first, last = max(first, near), min(last, far)
    if first >= last:
        return 1.0
    return max(0.0, first - 1e-6 / float(np.linalg.norm(way)))


class LiveInput:
    """Something that has to be heard again and again while the arm moves: a dead-man switch, a heartbeat.

    `timeout_s` 0: not asked for, never lost. Times are of the steady clock.
    """

    def __init__(self, name: str, timeout_s: float):
        self.name, self.timeout_s = name, timeout_s
        self._good_s = -np.inf

    def hear(self, is_good: bool, now_s: float) -> None:
        self._good_s = now_s if is_good else -np.inf

    def is_lost(self, now_s: float) -> bool:
        return self.timeout_s > 0 and now_s - self._good_s > self.timeout_s


class State(StrEnum):
    DISCONNECTED = "DISCONNECTED"
    IDLE = "IDLE"
    RUNNING = "RUNNING"
    HOLD = "HOLD"
    FAULT = "FAULT"


TRANSITIONS = {
    State.DISCONNECTED: {State.IDLE, State.FAULT},
    State.IDLE: {State.RUNNING, State.FAULT, State.DISCONNECTED},
    State.RUNNING: {State.HOLD, State.IDLE, State.FAULT, State.DISCONNECTED},
    State.HOLD: {State.RUNNING, State.IDLE, State.FAULT, State.DISCONNECTED},
    State.FAULT: {State.IDLE},  # by `acknowledge` alone
}


class StateMachine:
    """The arm's safety state, why it is in it, and how it got there.

    HOLD has causes and ends by itself when the last one has gone. FAULT keeps its first reason until `acknowledge`.
    """

    def __init__(self):
        self.state = State.DISCONNECTED
        self.reason = "not connected yet"
        self.causes: set[str] = set()
        self.num_transitions = 0

    @property
    def may_move(self) -> bool:
        return self.state is State.RUNNING

    def connected(self) -> None:
        if self.state is State.DISCONNECTED:
            self._to(State.IDLE, "connected")

    def idle(self, reason: str) -> None:
        """The session of actions is over (home, stop of a program); a fault stays."""
        if self.state in (State.RUNNING, State.HOLD):
            self.causes.clear()
            self._to(State.IDLE, reason)

    def run(self) -> bool:
        """An action came. True when it may be executed."""
        self.causes.discard("no action")
        if self.state is State.IDLE or (self.state is State.HOLD and not self.causes):
            self._to(State.RUNNING, "actions arrive")
        return self.may_move

    def hold(self, cause: str) -> None:
        if self.state in (State.RUNNING, State.HOLD):
            self.causes.add(cause)
            if self.state is State.RUNNING:
                self._to(State.HOLD, cause)
            else:
                self.reason = ", ".join(sorted(self.causes))

    def release(self, cause: str) -> None:
        """A cause of HOLD has gone. `no action` goes by an action (`run`)."""
        if cause in self.causes:
            self.causes.discard(cause)
            if self.state is State.HOLD and not self.causes:
                self._to(State.RUNNING, f"no more: {cause}")
            elif self.state is State.HOLD:
                self.reason = ", ".join(sorted(self.causes))

    def fault(self, reason: str) -> None:
        if self.state is not State.FAULT:
            self.causes.clear()
            self._to(State.FAULT, reason)

    def acknowledge(self) -> bool:
        """An operator has looked. False when there was nothing to acknowledge."""
        if self.state is not State.FAULT:
            return False
        self._to(State.IDLE, "fault acknowledged")
        return True

    def _to(self, state: State, reason: str) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state, self.reason = state, reason
        self.num_transitions += 1
