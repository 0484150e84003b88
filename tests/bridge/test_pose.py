import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from bridge import pose

angles = st.lists(st.floats(-3.1, 3.1), min_size=3, max_size=3)
ATOL = 1e-9


@given(angles)
def test_rotations_agree_with_scipy(rpy):
    R = pose.matrix_from_rpy(rpy)
    reference = Rotation.from_euler("xyz", rpy)  # lower case: extrinsic
    assert np.allclose(R, reference.as_matrix(), atol=ATOL)
    quat = pose.quat_xyzw_from_matrix(R)
    assert np.allclose(pose.matrix_from_quat_xyzw(quat), R, atol=ATOL)
    assert abs(quat @ reference.as_quat()) == pytest.approx(1.0, abs=ATOL)
    assert np.allclose(pose.matrix_from_rpy(pose.rpy_from_matrix(R)), R, atol=1e-7)
    assert pose.rotation_angle(R) == pytest.approx(reference.magnitude(), abs=1e-7)


def test_integrate_by_hand():
    # Gripper points down (roll pi). 1 cm along base x, then a quarter turn about the TCP's own z.
    T = pose.pose(np.array([0.4, 0.0, 0.2]), pose.matrix_from_rpy([np.pi, 0, 0]))
    T = pose.integrate(T, [0.01, 0, 0, 0, 0, np.pi / 2, 1])
    assert np.allclose(T[:3, 3], [0.41, 0.0, 0.2], atol=ATOL)
    # The TCP's x axis was base x; turning by +90 degrees about a z that points down takes it to base -y.
    assert np.allclose(T[:3, 0], [0, -1, 0], atol=ATOL)


@given(angles, angles, st.floats(0, 1))
def test_delta_inverts_integrate_and_rows_compose(rpy, step, share):
    T = pose.pose(np.array([0.4, 0.1, 0.2]), pose.matrix_from_rpy(rpy))
    action = np.array([0.02, -0.01, 0.03, *(0.03 * np.array(step)), 1.0])
    T_next = pose.integrate(T, action)
    assert np.allclose(pose.delta(T, T_next), action[:6], atol=1e-8)
    T_mid = pose.interpolate(T, T_next, share)
    two = pose.integrate(pose.integrate(T, [*pose.delta(T, T_mid), 1]), [*pose.delta(T_mid, T_next), 1])
    assert np.allclose(two, T_next, atol=1e-8)


def test_batch_axes():
    T = np.broadcast_to(np.eye(4), (5, 3, 4, 4))
    action = np.full((5, 3, 7), 0.01)
    assert pose.integrate(T, action).shape == (5, 3, 4, 4)
    assert pose.delta(T, pose.integrate(T, action)).shape == (5, 3, 6)


def test_one_rotation_is_what_a_batch_of_it_is():
    turns = Rotation.random(200, rng=np.random.default_rng(3)).as_matrix()
    halves = [np.diag([1.0, -1, -1]), np.diag([-1.0, 1, -1]), np.diag([-1.0, -1, 1]), np.eye(3)]
    for R in [*turns, *halves]:
        (quat,), (angle,) = pose.quat_xyzw_from_matrix(R[None]), pose.rotation_angle(R[None])
        assert np.allclose(pose.quat_xyzw_from_matrix(R), quat, atol=1e-15)
        assert np.allclose(pose.matrix_from_quat_xyzw(2 * quat), pose.matrix_from_quat_xyzw(quat[None])[0], atol=1e-15)
        assert pose.rotation_angle(R) == pytest.approx(angle, abs=1e-15)


def test_state_roll_is_continuous_for_a_gripper_that_points_down():
    states = [
        pose.state_vector(pose.pose(np.zeros(3), pose.matrix_from_rpy([roll, 0, 0])), 0.04)
        for roll in (np.pi - 0.01, np.pi + 0.01)
    ]
    assert abs(states[0][3] - states[1][3]) == pytest.approx(0.02, abs=1e-6)
