"""The scripted expert in a kinematic world: the cube sticks to fingers that hold it, the gripper takes its time."""

import numpy as np
import pytest

from bridge import pose
from bridge.embodiment import Embodiment
from sim.expert import CUBE_SIZE_M, R_DOWN, PickPlaceExpert

EMBODIMENT = Embodiment()


def play(seed: int, gripper_speed_m_s: float = 0.1, noise_m: float = 0.0, lose_cube_at: int | None = None):
    """Returns expert, actions [n, 7] and the cube's final offset from where it belongs (m, base)."""
    rng = np.random.default_rng(seed)
    expert = PickPlaceExpert(EMBODIMENT, seed)
    T = pose.pose([0.42, 0.0, 0.25], R_DOWN)
    cube = np.array([0.4 + rng.uniform(-0.1, 0.1), 0.2 + rng.uniform(-0.05, 0.05), 0.5 * CUBE_SIZE_M])
    plate = np.array([0.45 + rng.uniform(-0.05, 0.05), rng.uniform(-0.03, 0.03), 0.01])
    opening, held, actions = EMBODIMENT.gripper_open_m, None, []
    while not expert.done and len(actions) < 150:
        action = expert.act(T, opening, cube, plate)
        actions.append(action)
        T = pose.integrate(T, action + np.array([*rng.normal(0, noise_m, 3), 0, 0, 0, 0]))
        near = held is not None or np.linalg.norm(cube - T[:3, 3]) < 0.02
        lost = lose_cube_at is not None and len(actions) >= lose_cube_at and expert.restarts == 0
        near = near and not lost
        goal = EMBODIMENT.gripper_open_m if action[6] > 0 else CUBE_SIZE_M * near
        step = gripper_speed_m_s * expert.period_s
        opening += float(np.clip(goal - opening, -step, step))
        holds = action[6] < 0 and near and opening <= CUBE_SIZE_M + 1e-9
        held = (cube - T[:3, 3] if held is None else held) if holds else None
        if held is not None:
            cube = T[:3, 3] + held
        else:
            on_plate = np.linalg.norm((cube - plate)[:2]) < 0.07
            cube = np.array([*cube[:2], 0.5 * CUBE_SIZE_M + (plate[2] if on_plate else 0.0)])
    return expert, np.array(actions), cube - plate - [0, 0, 0.5 * CUBE_SIZE_M]


@pytest.mark.parametrize("gripper_speed_m_s", [0.04, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_puts_the_cube_on_the_plate_within_the_limits(seed, gripper_speed_m_s):
    expert, actions, offset_m = play(seed, gripper_speed_m_s)
    assert expert.done
    assert expert.restarts == 0
    assert np.linalg.norm(offset_m[:2]) < 0.02
    assert offset_m[2] == pytest.approx(0.0, abs=1e-9)
    steps_m = np.linalg.norm(actions[:, :3], axis=1)
    assert steps_m.max() <= 0.035
    assert np.linalg.norm(np.diff(actions[:, :3], axis=0), axis=1).max() < 0.018  # no jumps in speed
    assert set(actions[:, 6]) == {-1.0, 1.0}
    assert np.abs(actions[:, 3:6]).max() < 1e-6  # starts upright, stays upright


def test_same_seed_same_actions_and_another_seed_differs():
    _, first, _ = play(3)
    _, again, _ = play(3)
    assert np.array_equal(first, again)
    T, cube, plate = pose.pose([0.42, 0, 0.25], R_DOWN), np.array([0.4, 0.2, 0.02]), np.array([0.45, 0.0, 0.01])
    actions = [PickPlaceExpert(EMBODIMENT, seed).act(T, 0.08, cube, plate) for seed in (1, 2)]
    assert not np.array_equal(*actions)


def test_variations_say_nothing_of_the_scene_of_the_same_seed():
    """A scene places its cube by the first numbers of its seed, its plate by the third and fourth."""
    scenes, variations = [], []
    for seed in range(400):
        expert = PickPlaceExpert(EMBODIMENT, seed)
        scenes.append(np.random.default_rng(seed).random(4))
        variations.append([expert._hover_height_m, expert._carry_height_m, expert._retreat_height_m])
    between = np.corrcoef(np.array(scenes).T, np.array(variations).T)[:4, 4:]
    assert np.abs(between).max() < 0.2  # four standard deviations of no correlation


def test_corrects_noise_on_the_target():
    expert, _, offset_m = play(0, noise_m=0.002)
    assert expert.done
    assert np.linalg.norm(offset_m[:2]) < 0.03


def test_turns_a_tilted_target_back():
    tilted = pose.pose([0.42, 0, 0.25], R_DOWN @ pose.matrix_from_rpy([0.03, -0.02, 0.04]))
    action = PickPlaceExpert(EMBODIMENT).act(tilted, 0.08, np.array([0.4, 0.2, 0.02]), np.array([0.45, 0.0, 0.01]))
    assert np.allclose(pose.integrate(tilted, action)[:3, :3], R_DOWN, atol=1e-6)


def test_starts_again_when_the_cube_is_lost():
    expert, actions, offset_m = play(0, gripper_speed_m_s=1.0, lose_cube_at=25)
    assert expert.restarts >= 1
    assert expert.done
    assert np.linalg.norm(offset_m[:2]) < 0.02
    assert len(actions) < 120
