"""The commanded target of the arm, and the way to it: deltas in, poses to stream out. No robot, no ROS, no clock."""

from dataclasses import dataclass

import numpy as np

from bridge import pose
from robot import safety
from robot.safety import Clip, SafeStep, SafetyLimits

MAX_STREAM_GAP_S = 0.1  # the speed limit lets no longer pause be caught up at once


@dataclass(frozen=True)
class Streamed:
    """What is sent now, and where the same actions would have led without limits since `reset` (base to TCP, [4, 4]):
    the differences of the second over time are what was asked for."""

    T_base_target: np.ndarray
    T_base_requested: np.ndarray
    clips: list[Clip]


class TargetPath:
    """Integrates actions from the last *target* and walks to each new target in a straight line within its step.

    A step that arrives a little late still ends on time; after its end the target stands still. A delta is never
    repeated.
    """

    def __init__(self, T_base_tcp: np.ndarray, period_s: float, limits: SafetyLimits):
        self.period_ns = round(period_s * 1e9)
        self.limits = limits
        self.reset(T_base_tcp)

    def reset(self, T_base_tcp: np.ndarray) -> None:
        """Start anew from a pose, for instance the measured one after a stop."""
        T = np.array(T_base_tcp, dtype=np.float64)
        self.T_target = self._T_from = self._T_sent = T
        self._T_requested = self._T_requested_from = T
        self._start_ns = self._end_ns = self._sent_ns = 0

    def step(self, action: np.ndarray, stamp_ns: int, now_ns: int) -> SafeStep:
        """Take an action [7] whose step began at `stamp_ns`. Raises UnsafeAction."""
        step = safety.safe_step(self.T_target, action, self.period_ns * 1e-9, self.limits)
        streamed = self.at(now_ns)
        self._T_from, self._T_requested_from = streamed.T_base_target, streamed.T_base_requested
        self._start_ns = now_ns
        self._end_ns = max(stamp_ns + self.period_ns, now_ns + self.period_ns // 2)
        self.T_target = step.T_target
        self._T_requested = pose.integrate(self._T_requested, action)
        return step

    def at(self, now_ns: int) -> Streamed:
        """The poses of this moment; the speed limits hold between one call and the next."""
        if self._sent_ns == 0:
            self._sent_ns = now_ns
        share = self._share(now_ns)
        T = self.T_target if share >= 1 else pose.interpolate(self._T_from, self.T_target, share)
        T_requested = self._T_requested
        if share < 1:
            T_requested = pose.interpolate(self._T_requested_from, self._T_requested, share)
        if T is self._T_sent:  # arrived: nothing to limit
            self._sent_ns = max(now_ns, self._sent_ns)
            return Streamed(T, T_requested, [])
        gap_s = min(MAX_STREAM_GAP_S, max(0.0, (now_ns - self._sent_ns) * 1e-9))
        # A hundredth of slack: a step at the speed limit is not to be clipped again by the jitter of this clock.
        limits = self.limits
        T, clips = safety.limit_speed(self._T_sent, T, gap_s, 1.01 * limits.max_speed_m_s, 1.01 * limits.max_turn_rad_s)
        self._T_sent, self._sent_ns = T, max(now_ns, self._sent_ns)
        return Streamed(T, T_requested, clips)

    def _share(self, now_ns: int) -> float:
        if now_ns >= self._end_ns:
            return 1.0
        return max(0.0, (now_ns - self._start_ns) / (self._end_ns - self._start_ns))
