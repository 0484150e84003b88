import numpy as np
import pytest

from bridge.config import load
from sim.scan.arm import Links, Reach, of_wrist
from sim.scan.capture import ROBOT, CaptureConfig
from sim.scan.views import around, look_at
from sim.stand_in.kinematics import ArmKinematics


@pytest.fixture(scope="module")
def embodiment():
    return load("twin-capture", CaptureConfig).embodiment


def test_look_at_has_the_target_in_the_middle_and_up_upwards():
    T = look_at(np.array([1.0, 0.5, 0.7]), np.array([0.4, 0.0, 0.0]))
    target = np.linalg.inv(T) @ [0.4, 0.0, 0.0, 1.0]
    np.testing.assert_allclose(target[:2], 0, atol=1e-12)
    assert target[2] == pytest.approx(np.sqrt(0.36 + 0.25 + 0.49))
    assert T[2, 1] < 0  # the picture's down is downwards
    assert np.linalg.det(T[:3, :3]) == pytest.approx(1.0)


def test_views_fill_their_ranges():
    targets = [[0.4, 0.0, 0.0], [0.5, 0.1, 0.2]]
    views = np.array(around(targets, 200, (0.3, 0.5), (0.5, 1.0), (-1.0, 2.0)))
    out = views[:, :3, 3] - np.array(targets * 100)
    distance = np.linalg.norm(out, axis=1)
    for values, low, high in (
        (distance, 0.3, 0.5),
        (np.arcsin(out[:, 2] / distance), 0.5, 1.0),
        (np.arctan2(out[:, 1], out[:, 0]), -1.0, 2.0),
    ):
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high


def test_the_arm_gets_to_the_views_it_is_said_to_reach(embodiment):
    T_tcp_cam = embodiment.cameras["wrist"].matrix
    reach, arm = Reach(embodiment.home_joint_pos_rad), ArmKinematics()
    asked = around([[0.45, 0.0, 0.0]], 6, (0.25, 0.4), (0.8, 1.3), (-0.8, 0.8))
    views = of_wrist(asked, T_tcp_cam, reach)
    assert len(views) >= 5
    for T in views:
        pos_m, rot = arm.forward(reach.joints(T))
        np.testing.assert_allclose(pos_m, T[:3, 3], atol=1e-5)
        np.testing.assert_allclose(rot, T[:3, :3], atol=1e-5)
        axis, eye = (T @ T_tcp_cam)[:3, 2], (T @ T_tcp_cam)[:3, 3]
        np.testing.assert_allclose((eye + axis * -eye[2] / axis[2])[:2], [0.45, 0.0], atol=1e-6)
    low, far = views[0].copy(), views[0].copy()
    low[2, 3], far[0, 3] = 0.02, 2.0
    assert reach.joints(low) is None
    assert reach.joints(far) is None


def test_links_are_where_the_stand_ins_arm_has_them(embodiment):
    """Twin and stand-in are built from two descriptions of the arm: their TCPs are at the same place."""
    q = np.array(embodiment.home_joint_pos_rad) + 0.1
    pos_m, rot = ArmKinematics().forward(q)
    poses = Links().poses(q, 0.05)
    np.testing.assert_allclose(poses["panda_hand_tcp"][:3, 3], pos_m, atol=1e-9)
    np.testing.assert_allclose(poses["panda_hand_tcp"][:3, :3], rot, atol=1e-9)
    assert set(ROBOT) <= set(poses)
    fingers = [np.linalg.inv(poses["panda_hand"]) @ poses[f"panda_{side}finger"] for side in ("left", "right")]
    assert fingers[0][1, 3] - fingers[1][1, 3] == pytest.approx(0.05)
