import dataclasses

import numpy as np
import pytest
import torch

from bridge import pose
from sim.expert import PickPlaceExpert
from sim.twin.vector_env import Twin


def play_expert(twin: Twin, seed: int) -> list[np.ndarray]:
    """One scripted episode; returns every physics state on the way."""
    twin.reset(seed)
    expert = PickPlaceExpert(twin.embodiment, seed)
    states = [physics_state(twin)]
    while not twin.ended:
        facts = twin.facts
        action = expert.act(facts.T_base_target, facts.gripper_opening_m, facts.object_pos_m, facts.goal_pos_m)
        twin.step(action)
        states.append(physics_state(twin))
    return states


def physics_state(twin: Twin) -> np.ndarray:
    return twin.env.get_state().numpy().copy()


def put_cube_at(twin: Twin, pos_m) -> None:
    twin.env._object_body.entity_pose = pose_of(pos_m)
    twin.env._object_body.linear_velocity = twin.env._object_body.angular_velocity = np.zeros(3, np.float32)


def is_red(picture: np.ndarray) -> np.ndarray:
    return picture[..., 0] > 1.8 * np.maximum(picture[..., 1], picture[..., 2])


def pose_of(pos_m):
    import sapien

    return sapien.Pose(p=np.asarray(pos_m, dtype=np.float32))


def test_expert_puts_the_cube_on_the_plate(twin):
    successes, lengths = 0, []
    for seed in range(20):
        play_expert(twin, seed)
        successes += twin.facts.success
        lengths.append(twin.steps)
        if twin.facts.success:
            assert all(twin.facts.stages.values()), twin.facts.stages
    assert successes >= 18
    assert np.mean(lengths) < 60


def test_same_seed_same_states_whatever_came_before(twin):
    """Also after contacts of the arm with table, plate and itself, which leave traces in a PhysX scene."""
    wanted = {seed: play_expert(twin, seed) for seed in (5, 6)}
    for number in range(6):
        rng = np.random.default_rng(number)
        push = np.array([*rng.uniform(-0.05, 0.05, 2), -0.05, *rng.uniform(-0.1, 0.1, 3), -1.0])
        twin.reset(number)
        for _ in range(rng.integers(3, 60)):
            twin.step(push + rng.uniform(-0.05, 0.05, 7))
        again = play_expert(twin, 5 + number % 2)
        first = wanted[5 + number % 2]
        assert len(first) == len(again)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True)), number
    assert not np.array_equal(wanted[5][0], wanted[6][0])


def test_looks_do_not_move_the_scene(twin, embodiment):
    """The same seed under other randomization ranges is the same physical scene."""
    fixed = play_expert(twin, 3)[0]
    plain, twin.env.twin.randomization.light = twin.env.twin.randomization.light, 0.5
    try:
        assert np.array_equal(fixed, play_expert(twin, 3)[0])
    finally:
        twin.env.twin.randomization.light = plain


def test_controller_commands_what_the_bridge_integrates(twin):
    rng = np.random.default_rng(0)
    twin.reset(0)
    arm = twin.env.agent.controller.controllers["arm"]
    T = twin.facts.T_base_target
    for step in range(40):
        action = np.append(rng.uniform(-0.02, 0.02, 3), rng.uniform(-0.06, 0.06, 3))
        action[:3] += 0.15 * (np.array([0.45, 0.1, 0.25]) - T[:3, 3])  # wander, but stay within reach
        action = np.append(action, 1.0)
        if step == 20:
            action[1] = 0.4  # beyond the step limit: clipped to 0.1
        twin.step(action)
        clipped = np.clip(action, -0.1, 0.1)
        T = pose.integrate(T, np.append(clipped[:6], 1.0))
        for commanded in (twin.facts.T_base_target, arm.kinematics.forward(arm.q_target)):
            assert np.abs(commanded[:3, 3] - T[:3, 3]).max() < 1e-4
            assert pose.rotation_angle(commanded[:3, :3].T @ T[:3, :3]) < 1e-3
        if step == 20:
            T = twin.facts.T_base_target
            twin.step(np.array([0, -0.1, 0, 0, 0, 0, 1.0]))
            T = pose.integrate(T, [0, -0.1, 0, 0, 0, 0, 1.0])
    for _ in range(10):
        twin.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    driven = np.array([float(joint._objs[0].drive_target[0]) for joint in arm.joints])
    assert np.allclose(driven, arm.q_target, atol=1e-4)
    assert np.abs(twin.facts.T_base_tcp[:3, 3] - T[:3, 3]).max() < 1e-3  # the arm arrives where it was sent


def test_tcp_of_the_scene_is_the_tcp_of_the_kinematics(twin, embodiment):
    twin.reset(1)
    arm = twin.env.agent.controller.controllers["arm"]
    q = twin.env._robot.qpos[:7]
    assert np.allclose(arm.kinematics.forward(q), twin.facts.T_base_tcp, atol=1e-5)
    home = arm.kinematics.forward(np.array(embodiment.home_joint_pos_rad))
    assert np.allclose(home[:3, 3], [0.42, 0.0, 0.25], atol=2e-3)
    assert np.allclose(home[:3, :3], np.diag([1, -1, -1]), atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_wild_actions_leave_a_sane_arm(twin, seed):
    """Limits and inverse kinematics hold for a policy that has learnt nothing."""
    rng = np.random.default_rng(seed)
    bias = rng.uniform(-0.1, 0.1, 7)
    twin.reset(seed)
    while not twin.ended:
        twin.step(bias + rng.uniform(-0.1, 0.1, 7))
        q = twin.env._robot.qpos
        assert np.isfinite(q).all()
        assert np.abs(twin.env._robot.qvel[:7]).max() < 8.0
        lower, upper = twin.config.workspace_lower_m, twin.config.workspace_upper_m
        assert (twin.facts.T_base_target[:3, 3] >= np.array(lower) - 1e-9).all()
        assert (twin.facts.T_base_target[:3, 3] <= np.array(upper) + 1e-9).all()
        R = twin.facts.T_base_target[:3, :3]
        assert np.allclose(R @ R.T, np.eye(3), atol=1e-9)


def test_gripper_command_is_linear_in_opening(twin):
    twin.reset(0)
    for command, opening_m in ((1.0, 0.08), (0.0, 0.04), (-1.0, 0.0)):
        for _ in range(15):
            twin.step(np.array([0, 0, 0, 0, 0, 0, command]))
        assert twin.facts.gripper_opening_m == pytest.approx(opening_m, abs=1e-3)


def test_placements_lie_in_their_rectangles_and_apart(twin):
    cubes, plates = [], []
    for seed in range(40):
        twin.reset(seed)
        cubes.append(twin.facts.object_pos_m)
        plates.append(twin.facts.goal_pos_m)
    cubes, plates = np.array(cubes), np.array(plates)
    assert (np.abs(cubes[:, :2] - [0.40, 0.20]) <= [0.1001, 0.0501]).all()
    assert (np.abs(plates[:, :2] - [0.45, 0.0]) <= [0.0501, 0.0301]).all()
    assert np.allclose(cubes[:, 2], 0.02, atol=1e-4)
    assert cubes[:, 0].std() > 0.03  # and they use the room
    assert np.linalg.norm((cubes - plates)[:, :2], axis=1).min() > 0.09


@pytest.mark.parametrize(
    ("offset_m", "stable", "legacy"),
    [
        ([0.0, 0.0, 0.02], True, True),  # rests on the plate
        ([0.045, 0.0, 0.02], True, True),
        ([0.06, 0.0, 0.02], False, True),  # on the rim: only the looser predicate takes it
        ([0.0, 0.0, 0.05], False, True),  # held 3 cm above
        ([0.0, 0.0, 0.09], False, False),  # held high
        ([0.12, 0.0, 0.02], False, False),
    ],
)
def test_success_predicates(twin, offset_m, stable, legacy):
    twin.reset(0)
    cube = twin.facts.goal_pos_m + offset_m
    plate_centre = twin.facts.goal_pos_m - [0, 0, twin.config.plate_height_m / 2]
    put_cube_at(twin, cube)
    assert twin.env.stable_success(cube, plate_centre) is stable
    assert twin.env.legacy_success(cube, plate_centre) is legacy


def test_a_moving_cube_is_no_stable_success(twin):
    twin.reset(0)
    cube = twin.facts.goal_pos_m + [0, 0, 0.02]
    put_cube_at(twin, cube)
    twin.env._object_body.linear_velocity = np.array([0.1, 0.0, 0.0], np.float32)
    assert not twin.env.stable_success(cube, twin.facts.goal_pos_m - [0, 0, 0.005])


def test_a_cube_held_on_the_plate_counts_only_when_released(twin):
    """Runs the expert up to its release and looks at both predicates on the way."""
    twin.reset(2)
    expert = PickPlaceExpert(twin.embodiment, 2)
    held_legacy = False
    while not twin.ended:
        facts = twin.facts
        action = expert.act(facts.T_base_target, facts.gripper_opening_m, facts.object_pos_m, facts.goal_pos_m)
        twin.step(action)
        plate_centre = twin.facts.goal_pos_m - [0, 0, twin.config.plate_height_m / 2]
        if expert.phase in ("carry", "lower", "rest"):
            assert not twin.facts.success
            held_legacy |= twin.env.legacy_success(twin.facts.object_pos_m, plate_centre)
    assert held_legacy
    assert twin.facts.success


def test_stock_gym_interface_gives_the_same_states(twin):
    """ManiSkill's own reset and step on the same scene: slower, same physics."""
    actions = np.random.default_rng(1).uniform(-0.03, 0.03, (6, 7)).astype(np.float32)
    twin.reset(11)
    direct = []
    for action in actions:
        twin.step(action)
        direct.append(physics_state(twin))
    twin.env.reset(seed=11)
    for action, expected in zip(actions, direct, strict=True):
        _, reward, terminated, _, info = twin.env.step(torch.from_numpy(action)[None])
        assert np.allclose(physics_state(twin), expected, atol=1e-4)  # torch rounds the action to float32
        assert float(reward[0]) == 0.0
        assert not bool(terminated[0])
    assert set(info) >= {"success", "reached", "grasped", "lifted", "over_goal"}


def test_dense_reward_grows_with_progress(twin):
    twin.reset(0)
    expert = PickPlaceExpert(twin.embodiment, 0)
    at_phase = {}
    while not twin.ended:
        facts = twin.facts
        action = expert.act(facts.T_base_target, facts.gripper_opening_m, facts.object_pos_m, facts.goal_pos_m)
        twin.step(action)
        at_phase[expert.phase] = twin.env.dense_reward(twin.facts)
    assert at_phase["approach"] < at_phase["descend"] < at_phase["lift"] < at_phase["lower"] < 1.0
    assert twin.env.dense_reward(twin.facts) == 1.0


def test_pictures_show_the_cube_where_the_contract_projects_it(twin, embodiment):
    for seed in range(4):
        twin.reset(seed)
        cube = twin.facts.object_pos_m
        picture = twin.pictures()["third_person"].astype(int)
        assert picture.shape == (twin.config.picture_height, twin.config.picture_width, 3)
        red = is_red(picture)
        camera = embodiment.cameras["third_person"]
        in_camera = np.linalg.inv(camera.matrix) @ np.append(cube, 1.0)
        uv = (camera.intrinsics @ in_camera[:3])[:2] / in_camera[2]
        scale = np.array([twin.config.picture_width / camera.width, twin.config.picture_height / camera.height])
        expected = (uv + 0.5) * scale - 0.5
        assert red.sum() > 10
        rows, columns = np.nonzero(red)
        assert np.abs(np.array([columns.mean(), rows.mean()]) - expected).max() < 2.0


def test_wrist_camera_moves_with_the_hand(twin, embodiment):
    twin.reset(0)
    for _ in range(25):  # above the cube
        to_go = twin.facts.object_pos_m + [0, 0, 0.12] - twin.facts.T_base_target[:3, 3]
        twin.step(np.array([*np.clip(to_go, -0.03, 0.03), 0, 0, 0, 1.0]))
    picture = twin.pictures()["wrist"].astype(int)
    red = is_red(picture)
    camera = embodiment.cameras["wrist"]
    in_camera = np.linalg.inv(twin.facts.T_base_tcp @ camera.matrix) @ np.append(twin.facts.object_pos_m, 1.0)
    uv = (camera.intrinsics @ in_camera[:3])[:2] / in_camera[2]
    scale = np.array([twin.config.picture_width / camera.width, twin.config.picture_height / camera.height])
    rows, columns = np.nonzero(red)
    assert np.abs(np.array([columns.mean(), rows.mean()]) - ((uv + 0.5) * scale - 0.5)).max() < 2.0


def test_bad_settings_are_refused(embodiment):
    from sim.twin.config import TwinConfig

    with pytest.raises(ValueError, match="success"):
        TwinConfig(success="maybe")
    with pytest.raises(ValueError, match="reward"):
        dataclasses.replace(TwinConfig(), reward="none")
