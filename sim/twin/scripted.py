"""Scripted behaviours in the twin: what the tasks are tried with, and what their success predicates are judged by.

`expert` does the task; `hold` carries the object to the goal and presses it there; `shove` pushes it along the table
against the goal with closed fingers. Only the first ever lets go.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from bridge.pose import matrix_from_rpy, rpy_from_matrix
from sim.expert import CUBE_SIZE_M, R_DOWN, PickPlaceExpert
from sim.twin.worker import Twin

Behaviour = Callable[[], np.ndarray]
BEHAVIOURS = ("expert", "hold", "shove")
ALIGNED_RAD = 1e-3
HOVER_M = 0.12  # over the object, while the hand turns
MAX_STEP_M = 0.03


def behaviour(name: str, twin: Twin, seed: int) -> Behaviour:
    """Gives the next action [7] of the episode that the twin is in. Raises KeyError for an unknown name."""
    return {"expert": expert, "hold": hold, "shove": shove}[name](twin, seed)


def expert(twin: Twin, seed: int) -> Behaviour:
    return _expert(twin, PickPlaceExpert(twin.embodiment, seed))


def hold(twin: Twin, seed: int) -> Behaviour:
    scripted = PickPlaceExpert(twin.embodiment, seed)
    act, pressed_steps = _expert(twin, scripted), 0

    def hold_down() -> np.ndarray:
        nonlocal pressed_steps
        if scripted.phase not in ("rest", "open"):
            return act()
        pressed_steps += 1
        down_m = -0.002 if pressed_steps <= 5 else 0.0  # until it touches
        return np.array([0, 0, down_m, 0, 0, 0, -1.0], dtype=np.float32)

    return hold_down


def shove(twin: Twin, seed: int) -> Behaviour:
    """Closed fingers go behind the object, seen from the goal, and push it there."""
    rng = np.random.default_rng([seed, 2])
    height_m = 0.022 + rng.uniform(0.0, 0.01)
    state = {"down": False}

    def act() -> np.ndarray:
        facts = twin.facts
        to_goal = facts.goal_pos_m[:2] - facts.object_pos_m[:2]
        away = to_goal / max(float(np.linalg.norm(to_goal)), 1e-6)
        behind = np.append(facts.object_pos_m[:2] - 0.07 * away, height_m)
        target = facts.T_base_target[:3, 3]
        if not state["down"]:
            across = np.linalg.norm(target[:2] - behind[:2])
            goal_m = behind if across < 0.02 else behind + [0, 0, 0.12]
            state["down"] = across < 0.02 and target[2] < height_m + 0.01
        else:
            goal_m = np.append(facts.goal_pos_m[:2], height_m)
        step = np.clip(goal_m - target, -0.02, 0.02)
        return np.array([*step, 0, 0, 0, -1.0], dtype=np.float32)

    return act


@dataclass(frozen=True)
class Judged:
    """One episode, watched to its time limit or until the behaviour is done. `legacy`: the peer's predicate held after
    some step; `stable`: ours did."""

    seed: int
    legacy: bool
    stable: bool
    steps: int


def judge(twin: Twin, name: str, seeds: Iterable[int]) -> list[Judged]:
    """Run the behaviour past what would have ended its episodes, and ask both predicates after every step."""
    return [_judge(twin, name, seed) for seed in seeds]


def _judge(twin: Twin, name: str, seed: int) -> Judged:
    twin.reset(seed)
    act = behaviour(name, twin, seed)
    legacy = stable = False
    steps = 0
    while steps < twin.config.max_steps and not stable:
        twin.facts = twin.env.policy_step(np.asarray(act(), dtype=np.float64))
        object_pos_m = twin.facts.object_pos_m
        goal_pos_m = twin.facts.goal_pos_m - [0, 0, twin.env.goal_top_m]
        legacy |= twin.env.legacy_success(object_pos_m, goal_pos_m)
        stable |= twin.env.stable_success(object_pos_m, goal_pos_m)
        steps += 1
    return Judged(seed, legacy, stable, steps)


def _expert(twin: Twin, scripted: PickPlaceExpert) -> Behaviour:
    """The stand-in cell's expert, which keeps one orientation, once the hand has turned to the object."""
    limit_rad, yaw_rad = twin.embodiment.max_rotation_rad, twin.facts.object_yaw_rad
    yaw_rad = (yaw_rad + np.pi / 2) % np.pi - np.pi / 2  # fingers do not mind half a turn
    turned = abs(yaw_rad) < ALIGNED_RAD
    scripted.R_grasp = R_DOWN if turned else matrix_from_rpy([0.0, 0.0, yaw_rad]) @ R_DOWN

    def act() -> np.ndarray:
        nonlocal turned
        facts = twin.facts
        if not turned:
            to_turn_rad = rpy_from_matrix(facts.T_base_target[:3, :3].T @ scripted.R_grasp)
            turned = bool(np.abs(to_turn_rad).max() < 0.5 * limit_rad)
        if not turned:
            to_hover_m = facts.object_pos_m + [0.0, 0.0, HOVER_M] - facts.T_base_target[:3, 3]
            step_m = np.clip(to_hover_m, -MAX_STEP_M, MAX_STEP_M)
            return np.array([*step_m, *np.clip(to_turn_rad, -limit_rad, limit_rad), 1.0], dtype=np.float32)
        # It takes objects for cubes; of flat ones it grasps the air above their centre, where fingers clear the table.
        lift_m = np.array([0.0, 0.0, max(CUBE_SIZE_M / 2 - twin.env.rest_height_m, 0.0)])
        over_floor_m = lift_m + [0.0, 0.0, twin.env.rest_height_m - CUBE_SIZE_M / 2]
        return scripted.act(
            facts.T_base_target, facts.gripper_opening_m, facts.object_pos_m + lift_m, facts.goal_pos_m + over_floor_m
        )

    return act
