"""A scripted pick-and-place expert that speaks the contract's action; the twin and the stand-in cell share it.

It sees the commanded target, the measured gripper opening and where cube and plate are, and nothing else. Steps count
from the last commanded target, so a lagging arm changes nothing but the short waits; the gripper is waited for by its
measured opening. If someone else moves the target (noise injected while recording), the next step heads back.
"""

import numpy as np

from bridge import pose
from bridge.embodiment import Embodiment

UP = np.array([0.0, 0.0, 1.0])
R_DOWN = np.diag([1.0, -1.0, -1.0])  # gripper points down, yaw 0: the fingers close along base y
PHASES = ("approach", "descend", "settle", "close", "lift", "carry", "lower", "rest", "open", "retreat", "done")

CUBE_SIZE_M = 0.04
MAX_SPEED_M_S = 0.3
MAX_ACCELERATION_M_S2 = 1.2
SETTLE_S = 0.1  # for a measured pose that trails the target
GRIPPER_TIMEOUT_S = 1.5
GRIPPER_STILL_M_S = 0.004
GRASP_MIN_OPENING_M = 0.006  # below it the fingers hold nothing


class PickPlaceExpert:
    """Phase machine: above the cube, down, close, up, across, down, open, up. 5-6 s on the default scene.

    Each phase is a point for the target to reach, or a condition to wait for; the first that is unmet makes the action.
    An empty gripper while lifting or carrying starts again from the approach, with the cube's current position.
    """

    def __init__(self, embodiment: Embodiment, seed: int = 0):
        self.embodiment = embodiment
        self.period_s = 1.0 / embodiment.policy_rate_hz
        self.max_step_m = min(MAX_SPEED_M_S * self.period_s, embodiment.max_translation_m)
        self.max_step_change_m = MAX_ACCELERATION_M_S2 * self.period_s**2
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start a new demonstration. The same seed gives the same small variations of path and speed."""
        rng = np.random.default_rng([seed, 3])  # the scene of this seed draws from others
        self._hover_height_m = rng.uniform(0.08, 0.12)
        self._carry_height_m = rng.uniform(0.11, 0.15)
        self._retreat_height_m = rng.uniform(0.07, 0.10)
        self._via_offset_m = np.append(rng.uniform(-0.01, 0.01, 2), 0.0)  # where the hover points lie over their goals
        self._grasp_offset_m = np.append(rng.uniform(-0.004, 0.004, 1), [0.0, rng.uniform(0.0, 0.005)])
        self._place_offset_m = np.append(rng.uniform(-0.01, 0.01, 2), rng.uniform(0.002, 0.005))
        self._speed_share = rng.uniform(0.9, 1.0)
        self.R_grasp = R_DOWN  # may be set at any time, for objects that want another yaw
        self._cube_in_tcp_m = np.zeros(3)  # cube minus target when the fingers closed, base frame
        self._step_m = self._start_m = np.zeros(3)
        self._last_opening_m = self._release_opening_m = 0.0
        self.restarts = 0
        self._enter("approach")

    @property
    def done(self) -> bool:
        return self.phase == "done"

    def act(
        self, T_base_target: np.ndarray, gripper_opening_m: float, cube_pos_m: np.ndarray, plate_pos_m: np.ndarray
    ) -> np.ndarray:
        """The next action, float32 [7].

        `T_base_target` [4, 4] is the last commanded target; `cube_pos_m` [3] the cube's centre and
        `plate_pos_m` [3] the centre of the plate's upper side, in base. Once `done`, holds still with the gripper open.
        """
        cube_pos_m, plate_pos_m = np.asarray(cube_pos_m, dtype=np.float64), np.asarray(plate_pos_m, dtype=np.float64)
        while not self.done and self._is_met(T_base_target, gripper_opening_m, cube_pos_m, plate_pos_m):
            if self.phase == "close":
                self._cube_in_tcp_m = cube_pos_m - T_base_target[:3, 3]
            if self.phase == "rest":
                self._release_opening_m = gripper_opening_m
            self._enter(PHASES[PHASES.index(self.phase) + 1])
            self._start_m = np.array(T_base_target[:3, 3])
        if self.phase in ("lift", "carry") and gripper_opening_m < GRASP_MIN_OPENING_M:
            self.restarts += 1
            self._enter("approach")
        self._last_opening_m = gripper_opening_m
        self._phase_steps += 1
        return self._action_towards(self._goal(cube_pos_m, plate_pos_m), T_base_target)

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._phase_steps = 0

    def _goal(self, cube_pos_m: np.ndarray, plate_pos_m: np.ndarray) -> np.ndarray | None:
        """Where the target should be at this phase's end, or None to stay."""
        place_m = plate_pos_m + 0.5 * CUBE_SIZE_M * UP - self._cube_in_tcp_m + self._place_offset_m
        match self.phase:
            case "approach":
                return cube_pos_m + self._via_offset_m + self._hover_height_m * UP
            case "descend":
                return cube_pos_m + self._grasp_offset_m
            case "lift":
                return self._start_m + self._carry_height_m * UP
            case "carry":
                return place_m + self._via_offset_m + self._carry_height_m * UP
            case "lower":
                return place_m
            case "retreat":
                return self._start_m + self._retreat_height_m * UP
        return None

    def _is_met(self, T_base_target, gripper_opening_m, cube_pos_m, plate_pos_m) -> bool:
        waited_s = self._phase_steps * self.period_s
        match self.phase:
            case "settle" | "rest":
                return waited_s >= SETTLE_S
            case "close":
                closing = gripper_opening_m < 0.8 * self.embodiment.gripper_open_m
                still = abs(gripper_opening_m - self._last_opening_m) <= GRIPPER_STILL_M_S * self.period_s
                return (closing and still and self._phase_steps >= 2) or waited_s >= GRIPPER_TIMEOUT_S
            case "open":
                opened = gripper_opening_m > self._release_opening_m + 0.01
                return (opened and self._phase_steps >= 2) or waited_s >= GRIPPER_TIMEOUT_S
        # Points that are only passed get a wide tolerance, so that the arm does not stop at them.
        tolerance_m = 0.003 if self.phase in ("descend", "lower", "retreat") else 0.015
        return bool(np.linalg.norm(self._goal(cube_pos_m, plate_pos_m) - T_base_target[:3, 3]) <= tolerance_m)

    def _action_towards(self, goal_m: np.ndarray | None, T_base_target: np.ndarray) -> np.ndarray:
        action = np.zeros(pose.ACTION_DIM)
        self._step_m = np.zeros(3) if goal_m is None else self._next_step(goal_m - T_base_target[:3, 3])
        action[:3] = self._step_m
        dR = T_base_target[:3, :3].T @ self.R_grasp
        limit = 0.5 * self.embodiment.max_rotation_rad
        action[3:6] = np.clip(pose.rpy_from_matrix(dR), -limit, limit)
        action[6] = -1.0 if self.phase in ("close", "lift", "carry", "lower", "rest") else 1.0
        return action.astype(np.float32)

    def _next_step(self, to_go_m: np.ndarray) -> np.ndarray:
        """Speed- and braking-limited step towards a point `to_go_m` away; acceleration limited as a vector."""
        distance = float(np.linalg.norm(to_go_m))
        a = self.max_step_change_m
        braking = 0.5 * (np.sqrt(a * a + 8 * a * distance) - a)  # longest step that can still stop in time
        length = min(self._speed_share * self.max_step_m, max(braking, 0.004), distance)
        change = to_go_m * (length / max(distance, 1e-9)) - self._step_m
        return self._step_m + change * min(1.0, a / max(float(np.linalg.norm(change)), 1e-9))
