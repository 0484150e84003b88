"""The commanded target of the arm, and the way to it: deltas in, poses to stream out. No robot, no ROS, no clock."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from bridge import pose
from robot import motion_limit, safety
from robot.motion_limit import MotionLimit
from robot.safety import Clip, SafeStep, SafetyLimits

MAX_STREAM_GAP_S = 0.1  # no longer pause is caught up at once, and no longer step back of the clock waited for
SPEED_SLACK = 1.01  # a step at the speed limit is not to be clipped again by the jitter of the clock
UNITS = {"speed": ("speed_m_s", "turn_rad_s"), "acceleration": ("acceleration_m_s2", "turn_rad_s2")}
UNITS["jerk"] = ("jerk_m_s3", "turn_rad_s3")
# (last target, next target, actions of it) -> next target that the body of the arm can take, and what was cut
Cuts = dict[str, tuple[float, float]]
BodyCheck = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, list[Clip]]]


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
    repeated. The walk is counted on a grid of `stream_period_s`, on which speed, acceleration and jerk keep their
    limits and from every point of which there is a way to rest inside the workspace and outside the keep-out boxes;
    within the limits it goes through each step's straight line exactly.
    """

    def __init__(self, T_base_tcp: np.ndarray, period_s: float, limits: SafetyLimits, stream_period_s: float = 0.02):
        self.period_ns, self._grid_period_ns = round(period_s * 1e9), round(stream_period_s * 1e9)
        self.limits = limits = with_chord_margin(limits, stream_period_s)
        self._boxes = limits.keep_out_boxes
        self.num_clips: Counter[str] = Counter()
        self._moving = MotionLimit(
            SPEED_SLACK * limits.max_speed_m_s, limits.max_acceleration_m_s2, limits.max_jerk_m_s3, stream_period_s
        )
        self._turning = MotionLimit(
            SPEED_SLACK * limits.max_turn_rad_s, limits.max_turn_rad_s2, limits.max_turn_rad_s3, stream_period_s
        )
        self.reset(T_base_tcp)

    def reset(self, T_base_tcp: np.ndarray) -> None:
        """Start anew, at rest, from a pose, for instance the measured one after a stop."""
        T = np.array(T_base_tcp, dtype=np.float64)
        self.T_target = self._T_from = self._T_now = self._T_next = T
        self._T_requested = self._T_requested_from = T
        self._start_ns = self._end_ns = self._grid_ns = 0
        self.T_streamed, self._passed = T, []  # what the arm got last; the grid's poses after it
        self._is_braking = False
        self._velocity, self._acceleration = np.zeros((2, 3)), np.zeros((2, 3))  # of position and rotation, base frame
        self._num_still = 2  # steps of the grid in a row without speed and acceleration
        # Whoever starts outside may come back.
        self._lower_m = np.minimum(self.limits.workspace_lower_m, T[:3, 3]) - 1e-9
        self._upper_m = np.maximum(self.limits.workspace_upper_m, T[:3, 3]) + 1e-9

    def step(self, action: np.ndarray, stamp_ns: int, now_ns: int, body: BodyCheck | None = None) -> SafeStep:
        """Take an action [7] whose step began at `stamp_ns`. Raises UnsafeAction."""
        streamed = self.at(now_ns)
        if self._is_at_rest(now_ns):
            self._grid_ns = now_ns - self._grid_period_ns  # the first step of the walk begins now
        if self._is_braking:
            self._stand_where_it_stops()
        step = safety.safe_step(self.T_target, action, self.period_ns * 1e-9, self.limits, body)
        self._is_braking = False
        # What is committed already stays; the new walk goes on from there.
        self._T_from, self._T_requested_from = self._T_next, streamed.T_base_requested
        self._start_ns = self._grid_ns + self._grid_period_ns
        soonest_ns = max(now_ns, self._start_ns) + self.period_ns // 2
        self._end_ns = max(stamp_ns + self.period_ns, soonest_ns)
        self.T_target = step.T_target
        self._T_requested = pose.integrate(self._T_requested, action)
        return step

    def halt(self, now_ns: int) -> None:
        """Come to rest as soon as the limits let it; the target is then where that is."""
        self.at(now_ns)
        if not self._is_at_rest(now_ns):
            self._is_braking = True
            self._stand_where_it_stops()

    def at(self, now_ns: int) -> Streamed:
        """The poses of this moment. Time that was never asked for is not caught up at once; when the clock is set back,
        the walk goes on from that time instead of standing still until it comes again."""
        clips = []
        # A little back, the walk waits: else a clock that trembles would hurry it on.
        if (back_ns := self._grid_ns - now_ns) > MAX_STREAM_GAP_S * 1e9:
            self._grid_ns, self._start_ns, self._end_ns = now_ns, self._start_ns - back_ns, self._end_ns - back_ns
        if self._is_at_rest(now_ns):
            self._grid_ns = max(now_ns, self._grid_ns)
            self._T_now = self._T_next
        else:
            self._grid_ns = max(self._grid_ns, now_ns - round(MAX_STREAM_GAP_S * 1e9))
        while now_ns - self._grid_ns >= self._grid_period_ns:
            clips += self._advance()
        T, T_requested = self._T_next, self._T_requested
        if self._T_now is not self._T_next:
            T = pose.interpolate(self._T_now, T, max(0.0, (now_ns - self._grid_ns) / self._grid_period_ns))
        if (share := self._share(now_ns)) < 1:
            T_requested = pose.interpolate(self._T_requested_from, self._T_requested, share)
        return Streamed(T, T_requested, clips)

    def stream(self, now_ns: int) -> Streamed:
        """`at`, for the arm, which goes straight from pose to pose: into no keep-out box. After a delay so long that it
        would, the poses of the grid in between come first, one a call."""
        streamed = self.at(now_ns)
        ways = [*self._passed, streamed.T_base_target]
        start_m, n = self.T_streamed[:3, 3], len(ways) - 1
        while n > 0 and safety.enters(start_m, ways[n][:3, 3], self._boxes):
            n -= 1
        self.T_streamed, self._passed = ways[n], self._passed[n + 1 :]
        return replace(streamed, T_base_target=ways[n])

    def _is_at_rest(self, now_ns: int) -> bool:
        # A walk that begins now takes the place of the step under way: the one before must have been still, too.
        return self._T_next is self.T_target and now_ns >= self._end_ns and self._num_still >= 2

    def _advance(self) -> list[Clip]:
        """Commit the next step of the grid: from `_T_next`, which is reached at its beginning."""
        self._grid_ns += self._grid_period_ns
        self._T_now, T, h = self._T_next, self._T_next, self._moving.period_s
        if len(self._boxes):
            self._passed.append(T)
        if self._is_braking:
            cuts, velocity = [{}, {}], self._braked()
            T_goal = None
        else:
            share = self._share(self._grid_ns + self._grid_period_ns)
            T_goal = self.T_target if share >= 1 else pose.interpolate(self._T_from, self.T_target, share)
            velocity, cuts, is_exact = self._towards(T, T_goal)
            T_goal = T_goal if is_exact else None
        self._acceleration = (velocity - self._velocity) / h
        self._velocity = velocity
        self._num_still = 0 if velocity.any() or self._acceleration.any() else self._num_still + 1
        if T_goal is not None:
            self._T_next = T_goal
        elif self._is_braking and not velocity.any():
            self._T_next = self.T_target  # as foreseen, without the rounding of a hundred steps
        else:
            self._T_next = pose.pose(T[:3, 3] + h * velocity[0], rotation_of(h * velocity[1]) @ T[:3, :3])
        clips = [Clip(UNITS[name][n] if name in UNITS else name, *cut) for n in (0, 1) for name, cut in cuts[n].items()]
        self.num_clips.update(clip.limit for clip in clips)
        return clips

    def _towards(self, T: np.ndarray, T_goal: np.ndarray) -> tuple[np.ndarray, list[Cuts], bool]:
        """Velocities [2, 3] of the next step, what was cut, and whether it ends at the goal. Where no way out would be
        left, the last one is taken."""
        velocity, cuts, limits = np.empty((2, 3)), [], (self._moving, self._turning)
        ways = (T_goal[:3, 3] - T[:3, 3], vector_of(T_goal[:3, :3] @ T[:3, :3].T))
        left = (
            np.linalg.norm(self.T_target[:3, 3] - T[:3, 3]),
            pose.rotation_angle(self.T_target[:3, :3] @ T[:3, :3].T),
        )
        for n, limit in enumerate(limits):
            v, a = self._velocity[n], self._acceleration[n]
            velocity[n], cut = motion_limit.towards(ways[n], float(left[n]), v, a, limit)
            rest = motion_limit.stopping_way(velocity[n], (velocity[n] - v) / limit.period_s, limit)
            if rest is None or (n == 0 and not self._is_free(T[:3, 3], limit.period_s * velocity[0], rest)):
                cut = {("stop_m_s", "stop_rad_s")[n]: (float(np.linalg.norm(velocity[n])), 0.0)}
                velocity[n] = motion_limit.brake(v, a, limit)
            cuts.append(cut)
        return velocity, cuts, all(np.array_equal(velocity[n], ways[n] / limits[n].period_s) for n in (0, 1))

    def _is_free(self, pos_m: np.ndarray, step_m: np.ndarray, rest_m: np.ndarray) -> bool:
        """Whether a step and the way to rest after it stay in the workspace and out of the boxes."""
        points = np.vstack([pos_m, pos_m + step_m, pos_m + step_m + rest_m])
        if np.any(points[1:] < self._lower_m) or np.any(points[1:] > self._upper_m):
            return False
        return not any(safety.enters(start, end, self._boxes) for start, end in pairwise(points))

    def _braked(self) -> np.ndarray:
        pairs = zip(self._velocity, self._acceleration, (self._moving, self._turning), strict=True)
        return np.array([motion_limit.brake(*pair) for pair in pairs])

    def _stand_where_it_stops(self) -> None:
        T = self._T_next.copy()
        move, turn = (
            motion_limit.stopping_way(v, a, limit)
            for v, a, limit in zip(self._velocity, self._acceleration, (self._moving, self._turning), strict=True)
        )
        assert move is not None, "every committed step leaves a way to rest"
        assert turn is not None
        T[:3, 3] += move[-1] if len(move) else 0.0
        for step in np.diff(turn, axis=0, prepend=np.zeros((1, 3))):
            T[:3, :3] = rotation_of(step) @ T[:3, :3]
        self.T_target = self._T_from = self._T_requested = self._T_requested_from = T
        self._start_ns = self._end_ns = 0

    def _share(self, now_ns: int) -> float:
        if now_ns >= self._end_ns:
            return 1.0
        return max(0.0, (now_ns - self._start_ns) / (self._end_ns - self._start_ns))


def with_chord_margin(limits: SafetyLimits, stream_period_s: float) -> SafetyLimits:
    """Also keep away from the boxes by what the straight line between two poses a period apart can cut off a path that
    turns between them: a quarter of the change of speed, times the period."""
    turn_m_s = min(limits.max_acceleration_m_s2 * stream_period_s, 2 * SPEED_SLACK * limits.max_speed_m_s)
    margin_m = turn_m_s * stream_period_s / 4
    wider = limits.keep_out_boxes + margin_m * np.array([[-1.0], [1.0]])
    # The boxes themselves stay, too, for whoever starts between the two.
    return replace(limits, keep_out_m=[*wider.ravel().tolist(), *limits.keep_out_m])


def vector_of(R: np.ndarray) -> np.ndarray:
    """Rotation vector [3] of a rotation by less than pi."""
    skew = 0.5 * np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
    sine = float(np.linalg.norm(skew))
    return skew if sine < 1e-12 else skew * (float(pose.rotation_angle(R)) / sine)


def rotation_of(vector: np.ndarray) -> np.ndarray:
    """Inverse of `vector_of` (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-15:
        return np.eye(3)
    x, y, z = vector / angle
    K = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * (K @ K)
