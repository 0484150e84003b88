"""The scene without any client: seeds, the judgement of success, the arm's geometry, the cameras' geometry."""

import mujoco
import numpy as np
import pytest

from bridge.pose import matrix_from_rpy, pose
from sim.stand_in.config import scene_hash
from sim.stand_in.errors import ResetRefused
from sim.stand_in.kinematics import ArmKinematics
from sim.stand_in.scene import PictureMaker, build_model
from sim.stand_in.world import World


def place_cube(world: World, offset_m: list[float]) -> None:
    """Put the cube beside the plate's centre and let it settle."""
    world.data.qpos[9:12] = world.data.mocap_pos[0] + [*offset_m, 0.0] + [0, 0, 0.0205]
    world.data.qvel[9:] = 0
    mujoco.mj_step1(world.model, world.data)
    for _ in range(300):
        world.step()


def test_same_seed_gives_the_same_scene_to_the_last_bit(world, config):
    other = World(config.cell, config.embodiment)
    for _ in range(20):
        other.step()
    world.reset(11)
    other.reset(5)
    other.reset(11)
    assert world.data.qpos[9:].tobytes() == other.data.qpos[9:].tobytes()
    assert world.data.mocap_pos.tobytes() == other.data.mocap_pos.tobytes()
    world.reset(12)
    assert world.data.qpos[9:].tobytes() != other.data.qpos[9:].tobytes()


def test_resets_stay_within_the_layout(world):
    cubes, plates = [], []
    for seed in range(200):
        world.reset(seed)
        poses = world.poses()
        cubes.append(poses["cube"][:3, 3])
        plates.append(poses["plate"][:3, 3])
    cubes, plates = np.array(cubes), np.array(plates)
    assert np.abs(cubes[:, 0] - 0.40).max() <= 0.10 < np.abs(cubes[:, 0] - 0.40).max() + 0.005
    assert np.abs(cubes[:, 1] - 0.20).max() <= 0.05
    np.testing.assert_allclose(cubes[:, 2], 0.02, atol=1e-12)
    assert np.abs(plates[:, 0] - 0.45).max() <= 0.05
    assert np.abs(plates[:, 1]).max() <= 0.03


def test_the_arm_holds_home_without_sag(world, config):
    for _ in range(500):
        world.step()
    np.testing.assert_allclose(world.q, config.embodiment.home_joint_pos_rad, atol=1e-4)
    np.testing.assert_allclose(world.poses()["tcp"][:3, 3], [0.42, 0.0, 0.25], atol=1e-3)
    np.testing.assert_allclose(world.poses()["tcp"][:3, :3], np.diag([1.0, -1.0, -1.0]), atol=1e-3)


@pytest.mark.parametrize(("offset_m", "placed"), [([0.0, 0.0], True), ([0.045, 0.0], True), ([0.0, 0.055], False)])
def test_success_asks_for_the_plates_middle(world, offset_m, placed):
    place_cube(world, offset_m)
    assert world.success() is placed


def test_no_success_on_the_table_or_in_motion_or_touched(world):
    world.reset(0)
    assert not world.success()
    place_cube(world, [0.0, 0.0])
    world.data.qvel[9] = 0.1
    assert not world.success()
    world.data.qvel[9] = 0.0
    assert world.success()
    # A finger that still touches: bring the cube to the open hand's left fingertip, and the plate under it.
    tip = world.data.geom_xpos[world.model.geom("left_tip").id]
    world.data.qpos[9:12] = tip + [0.0, -0.0235 if tip[1] > 0 else 0.0235, 0.0]
    world.data.mocap_pos[0] = world.data.qpos[9:12] - [0, 0, 0.02]
    mujoco.mj_step1(world.model, world.data)
    assert not world.success()


def test_a_reset_into_the_arm_is_refused_and_changes_nothing(world, config):
    kinematics = ArmKinematics()
    q = np.array(config.embodiment.home_joint_pos_rad)
    world.reset(3)
    cube = world.poses()["cube"][:3, 3].copy()
    world.reset(4)
    before = world.data.qpos[9:].copy()
    for _ in range(50):  # the hand's palm to where seed 3 puts the cube
        kinematics.solve(q, cube + [0, 0, -0.05], np.diag([1.0, -1.0, -1.0]), None)
    world.q[:] = q
    with pytest.raises(ResetRefused, match="home"):
        world.reset(3)
    np.testing.assert_array_equal(world.data.qpos[9:], before)
    world.reset(3, force=True)
    np.testing.assert_array_equal(world.poses()["cube"][:3, 3], cube)


def test_inverse_kinematics_meets_pose_and_elbow(config):
    kinematics = ArmKinematics()
    home = np.array(config.embodiment.home_joint_pos_rad)
    goal = pose([0.5, 0.1, 0.2], np.diag([1.0, -1.0, -1.0]) @ matrix_from_rpy([0.1, -0.2, 0.3]))
    for elbow in (None, 0.25):
        q = home.copy()
        for _ in range(20):
            kinematics.solve(q, goal[:3, 3], goal[:3, :3], elbow)
        pos_m, rot = kinematics.forward(q)
        np.testing.assert_allclose(pos_m, goal[:3, 3], atol=1e-5)
        np.testing.assert_allclose(rot, goal[:3, :3], atol=1e-5)
        assert elbow is None or q[2] == pytest.approx(elbow, abs=1e-5)


def test_a_point_appears_where_the_pinhole_camera_says(config):
    """The cube's picture against K and T of the embodiment, with the configured camera error put on top."""
    embodiment, cell = config.embodiment, config.cell
    model = build_model(cell, embodiment)
    data = mujoco.MjData(model)
    data.qpos[:7], data.qpos[7:9], data.qpos[12] = embodiment.home_joint_pos_rad, 0.04, 1.0
    data.qpos[9:12] = [0.42, 0.08, 0.02]
    mujoco.mj_forward(model, data)
    maker = PictureMaker(model)
    maker.set_state(data.qpos, np.array([0.45, -0.3, 0.006]))
    T_base_tcp = pose(data.site("ee").xpos, data.site("ee").xmat.reshape(3, 3))
    for name, camera in embodiment.cameras.items():
        error = cell.camera_errors[name]
        T_base_cam = camera.matrix @ pose(error.pos_m, matrix_from_rpy(error.rpy_rad))
        if camera.mount == "tcp":
            T_base_cam = T_base_tcp @ T_base_cam
        corners = np.array([[x, y, z] for x in (0.40, 0.44) for y in (0.06, 0.10) for z in (0.0, 0.04)])
        in_cam = (corners - T_base_cam[:3, 3]) @ T_base_cam[:3, :3]
        f = camera.fx * error.focal_scale
        u = f * in_cam[:, 0] / in_cam[:, 2] + camera.cx + error.principal_px[0]
        v = f * in_cam[:, 1] / in_cam[:, 2] + camera.cy + error.principal_px[1]
        picture = np.empty((camera.height, camera.width, 3), np.uint8)
        maker.render(name, picture)
        r, g, b = np.moveaxis(picture.astype(int), -1, 0)
        rows, columns = np.nonzero((r > 60) & (r > 3 * g) & (r > 3 * b))
        inside = (u.min() > 0) and (u.max() < camera.width - 1) and (v.min() > 0) and (v.max() < camera.height - 1)
        assert inside, f"{name}: the test's cube is not in the picture"
        found = [columns.min(), columns.max(), rows.min(), rows.max()]
        np.testing.assert_allclose(found, [u.min(), u.max(), v.min(), v.max()], atol=1.5, err_msg=name)
    maker.close()


def test_scene_hash_tells_scenes_apart(config):
    from copy import deepcopy

    other = deepcopy(config.cell)
    other.bodies.cube_mass_kg += 0.01
    assert scene_hash(config.cell, config.embodiment) == scene_hash(deepcopy(config.cell), config.embodiment)
    assert scene_hash(other, config.embodiment) != scene_hash(config.cell, config.embodiment)
