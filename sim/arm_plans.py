"""How the robot side's position streaming moves the joints, without a robot: each target of the stream begins a new
plan in joint space, the shortest that ends there at rest. Ruckig makes it, with which franky plans, too.

So the arm trails its target the more the faster it goes, and leaves a straight line where joints differ in speed: at
0.3 m/s by some millimetres. Nothing here is fitted but the delay.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from ruckig import InputParameter, Result, Ruckig, RuckigError, Trajectory

STREAM_PERIOD_S = 0.02
STREAM_DELAY_S = 0.012  # with it the lag of even motions is the emulated arm's within 2 ms, from 0.03 to 0.3 m/s
# What robot/stream.py lets plans ask for, at the default dynamics factor.
ACCELERATION_RAD_S2, JERK_RAD_S3 = 0.9 * 9.1, 0.9 * 2400.0
SPEED_RAD_S = 0.9 * np.array([2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26])  # the FR3's, less near its end stops
SAME_RAD = 5e-5  # a stream that stands sends nothing
EPS_S = 1e-9


class ArmPlans:
    """Seven joints. `q_rad`, `dq_rad_s` and `ddq_rad_s2` are lists, of the time up to which `follow` has come."""

    def __init__(self, acceleration_rad_s2: float = ACCELERATION_RAD_S2):
        self._planner, self._wanted = Ruckig(7), InputParameter(7)
        self._wanted.max_velocity = SPEED_RAD_S.tolist()
        self._wanted.max_jerk = [JERK_RAD_S3] * 7
        self.set_acceleration(acceleration_rad_s2)
        self.hold(np.zeros(7))

    def set_acceleration(self, acceleration_rad_s2: float) -> None:
        self._wanted.max_acceleration = [acceleration_rad_s2] * 7

    def hold(self, q_rad: Sequence[float] | np.ndarray) -> None:
        """Stand there, with a stream that begins now."""
        self._aimed = np.array(q_rad, dtype=np.float64)
        self.q_rad, self.dq_rad_s, self.ddq_rad_s2 = self._aimed.tolist(), [0.0] * 7, [0.0] * 7
        self._time_s = self._stream_s = self._planned_s = 0.0
        self._plan: Trajectory | None = None
        self._goals = deque([(0.0, self._aimed)])

    def follow(self, q_goal_rad: np.ndarray, duration_s: float) -> None:
        """Go on for `duration_s`, in which the target moves evenly to joint angles [7]."""
        end_s = self._time_s + duration_s
        self._goals.append((end_s, np.asarray(q_goal_rad)))
        while self._stream_s < end_s - EPS_S:
            self._move(self._stream_s)
            self._aim(self._goal(self._stream_s - STREAM_DELAY_S))
            self._stream_s += STREAM_PERIOD_S
        self._move(end_s)

    def _goal(self, time_s: float) -> np.ndarray:
        goals = self._goals
        while len(goals) > 2 and goals[1][0] <= time_s:
            goals.popleft()
        (from_s, q_from), (to_s, q_to) = goals[0], goals[1]
        share = min(max((time_s - from_s) / (to_s - from_s), 0.0), 1.0)
        return q_from + share * (q_to - q_from)

    def _aim(self, q_rad: np.ndarray) -> None:
        if np.abs(q_rad - self._aimed).max() < SAME_RAD:
            return
        wanted = self._wanted
        wanted.current_position, wanted.current_velocity = self.q_rad, self.dq_rad_s
        wanted.current_acceleration, wanted.target_position = self.ddq_rad_s2, q_rad.tolist()
        plan = Trajectory(7)
        try:
            result = self._planner.calculate(wanted, plan)
        except RuckigError:  # seen only at rest at the target, which is left out above: not worth an episode
            return
        assert result in (Result.Working, Result.Finished), result
        self._plan, self._planned_s, self._aimed = plan, self._time_s, q_rad

    def _move(self, time_s: float) -> None:
        self._time_s = time_s
        if self._plan is not None:
            self.q_rad, self.dq_rad_s, self.ddq_rad_s2 = self._plan.at_time(time_s - self._planned_s)
