"""The stand-in cell in lock step: the scenes and the physics of the cell behind its protocol."""

import dataclasses

import numpy as np
import pytest

from sim.stand_in.lockstep import LockStepCell
from sim.stand_in.world import World
from sim.twin.demos import TwinDemosConfig, demonstrate
from sim.twin.scripted import behaviour

SEEDS = range(3)


@pytest.fixture(scope="module")
def lockstep(config):
    return LockStepCell(config.cell, config.embodiment, picture_size=(96, 128))


def states(cell, seed, actions):
    cell.reset(seed)
    seen = [cell.state]
    for action in actions:
        cell.step(action)
        seen.append(cell.state)
    return np.stack(seen), cell.facts.object_pos_m


def test_same_seed_same_states_whatever_was_before(lockstep):
    actions = np.random.default_rng(0).uniform(-0.03, 0.03, (8, 7))
    first, cube_m = states(lockstep, 3, actions)
    states(lockstep, 4, -actions)
    again, cube_again_m = states(lockstep, 3, actions)
    assert np.array_equal(first, again)
    assert np.array_equal(cube_m, cube_again_m)


def test_a_seed_is_the_scene_that_the_cell_has_for_it(lockstep, config):
    world = World(config.cell, config.embodiment)
    for seed in SEEDS:
        lockstep.reset(seed)
        world.reset(seed)
        assert np.allclose(lockstep.facts.object_pos_m, world.poses()["cube"][:3, 3], atol=1e-6)
        assert np.allclose(lockstep.facts.goal_pos_m, world.poses()["plate"][:3, 3], atol=1e-6)


# Measured on the cell behind its protocol, arm's time, position streaming with its defaults: along y, about z.
@pytest.mark.parametrize(("speed", "lag_s"), [(0.03, 0.036), (0.08, 0.046), (0.15, 0.058), (0.23, 0.073), (0.3, 0.086)])
def test_the_arm_trails_an_even_motion_as_the_cell_behind_its_protocol_does(lockstep, speed, lag_s):
    lockstep.reset(0)
    for _ in range(8):
        lockstep.step(np.array([0, 0.1 * speed, 0, 0, 0, 0, 1.0]))
    behind_m = lockstep.facts.T_base_target[1, 3] - lockstep.facts.T_base_tcp[1, 3]
    assert behind_m / speed == pytest.approx(lag_s, rel=0.06)
    for _ in range(3):
        lockstep.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert np.allclose(lockstep.facts.T_base_tcp, lockstep.facts.T_base_target, atol=1e-3)


@pytest.mark.parametrize(("speed", "lag_s"), [(0.3, 0.050), (0.8, 0.079)])
def test_and_an_even_turn(lockstep, speed, lag_s):
    lockstep.reset(0)
    for _ in range(8):
        lockstep.step(np.array([0, 0, 0, 0, 0, 0.1 * speed, 1.0]))
    behind = lockstep.facts.T_base_tcp[:3, :3].T @ lockstep.facts.T_base_target[:3, :3]
    assert np.arctan2(behind[1, 0], behind[0, 0]) / speed == pytest.approx(lag_s, rel=0.06)


def test_turns_are_made_in_the_frame_of_the_tcp_and_the_workspace_holds(lockstep):
    lockstep.reset(0)
    R = lockstep.facts.T_base_tcp[:3, :3]
    for _ in range(5):
        lockstep.step(np.array([0, 0, -0.2, 0, 0, 0.1, 1.0]))  # 0.2 m is cut to the step limit of 0.1
    for _ in range(3):
        lockstep.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    yaw = (R.T @ lockstep.facts.T_base_tcp[:3, :3])[:2, :2]
    assert np.arctan2(yaw[1, 0], yaw[0, 0]) == pytest.approx(0.5, abs=2e-3)
    assert lockstep.facts.T_base_target[2, 3] == pytest.approx(0.018)


def test_the_wrist_camera_sees_the_fingers(lockstep):
    lockstep.reset(0)
    opened = lockstep.pictures()
    for _ in range(12):
        lockstep.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    changed = np.abs(lockstep.pictures()["wrist"].astype(int) - opened["wrist"]).max(-1) > 30
    assert changed.mean() > 0.03


def test_the_expert_places_the_cube_and_the_time_limit_ends_an_episode(lockstep):
    for seed in SEEDS:
        lockstep.reset(seed)
        act = behaviour("expert", lockstep, seed)
        while not lockstep.ended:
            lockstep.step(act())
        assert lockstep.facts.success, seed
    lockstep.reset(0)
    while not lockstep.ended:
        _, terminated, truncated = lockstep.step(np.zeros(7))
    assert (lockstep.steps, terminated, truncated) == (100, False, True)


def test_demonstrations_of_it_carry_its_name(lockstep, config, tmp_path):
    settings = TwinDemosConfig(world="stand_in", embodiment=config.embodiment, start_range_m=0.0, action_noise_m=0.0)
    attempt = demonstrate(lockstep, settings, 7, tmp_path / "episode")
    assert attempt.success
    assert '"stand_in"' in (tmp_path / "episode" / "episode.json").read_text()
    with pytest.raises(ValueError, match="'moon'"):
        dataclasses.replace(settings, world="moon")
