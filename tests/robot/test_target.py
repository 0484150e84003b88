import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import pose
from robot.safety import SafetyLimits, UnsafeAction
from robot.target import TargetPath

MS = 1_000_000
PERIOD_NS = 100 * MS
START = pose.pose(np.array([0.45, 0.0, 0.3]), pose.matrix_from_rpy([np.pi, 0, 0.3]))
FREE = SafetyLimits(workspace_lower_m=[-10.0] * 3, workspace_upper_m=[10.0] * 3, max_speed_m_s=1.7, max_turn_rad_s=2.5)


def follow(path: TargetPath, actions, first_ns=1000 * MS, late_ns=0):
    """Each action arrives `late_ns` after its stamp; the stream is sampled each 20 ms."""
    sent = []
    for n, action in enumerate(actions):
        stamp_ns = first_ns + n * PERIOD_NS
        path.step(action, stamp_ns, stamp_ns + late_ns)
        for k in range(5):
            sent.append(path.at(stamp_ns + late_ns + k * 20 * MS))
    sent.append(path.at(first_ns + len(actions) * PERIOD_NS + late_ns))
    return sent


small = st.lists(st.floats(-0.05, 0.05), min_size=7, max_size=7)


@settings(deadline=None, max_examples=50)
@given(st.lists(small, min_size=1, max_size=20), st.integers(0, 20))
def test_targets_are_the_contracts_integration_of_the_actions(actions, late_ms):
    path = TargetPath(START, 0.1, FREE)
    expected, n = START, 0
    sent = follow(path, actions, late_ns=late_ms * MS)
    for n, action in enumerate(actions):
        expected = pose.integrate(expected, action)
        if n + 1 < len(actions):
            reached = sent[5 * (n + 1)].T_base_target  # when the next step begins
            assert np.allclose(reached[:3, 3], expected[:3, 3], atol=1e-4)
            assert pose.rotation_angle(reached[:3, :3].T @ expected[:3, :3]) < 1e-3
    assert np.allclose(path.T_target, expected, atol=1e-9)
    assert np.allclose(sent[-1].T_base_target, expected, atol=1e-4)
    assert np.allclose(sent[-1].T_base_requested, expected, atol=1e-9)


def test_the_stream_walks_straight_and_stands_still_after_the_last_step():
    path = TargetPath(START, 0.1, FREE)
    path.step([0.02, 0, 0, 0, 0, 0.1, 1], 1000 * MS, 1000 * MS)
    assert path.at(1050 * MS).T_base_target[0, 3] == pytest.approx(0.46)
    half = path.at(1050 * MS).T_base_target[:3, :3]
    assert pose.rotation_angle(START[:3, :3].T @ half) == pytest.approx(0.05)
    for later_ms in (1100, 1200, 5000):  # a delta is never repeated
        assert path.at(later_ms * MS).T_base_target[0, 3] == pytest.approx(0.47)


def test_a_late_step_ends_on_time():
    path = TargetPath(START, 0.1, FREE)
    path.step([0.02, 0, 0, 0, 0, 0, 1], 1000 * MS, 1030 * MS)
    assert path.at(1030 * MS).T_base_target[0, 3] == pytest.approx(0.45)
    assert path.at(1065 * MS).T_base_target[0, 3] == pytest.approx(0.46)
    assert path.at(1100 * MS).T_base_target[0, 3] == pytest.approx(0.47)


def test_the_stream_keeps_the_speed_limit_when_steps_come_in_a_hurry():
    limits = SafetyLimits(max_speed_m_s=0.3)
    path = TargetPath(START, 0.1, limits)
    path.at(1000 * MS)
    path.step([0.03, 0, 0, 0, 0, 0, 1], 1000 * MS, 1080 * MS)  # 20 ms are left: it gets half a period
    last, num_clips = path.at(1080 * MS).T_base_target, 0
    for now_ms in range(1090, 1300, 10):
        streamed = path.at(now_ms * MS)
        assert np.linalg.norm(streamed.T_base_target[:3, 3] - last[:3, 3]) <= 0.0031
        last, num_clips = streamed.T_base_target, num_clips + len(streamed.clips)
    assert num_clips > 0
    assert last[0, 3] == pytest.approx(0.48)


def test_what_was_asked_for_goes_on_where_the_target_is_stopped():
    path = TargetPath(START, 0.1, SafetyLimits())
    sent = follow(path, [[0, 0, -0.04, 0, 0, 0, 1]] * 10)
    assert sent[-1].T_base_target[2, 3] == pytest.approx(0.018)  # the floor of the workspace
    z = [s.T_base_requested[2, 3] for s in sent[::5]]
    assert np.allclose(np.diff(z), -0.04)


def test_a_refused_action_changes_nothing():
    path = TargetPath(START, 0.1, FREE)
    with pytest.raises(UnsafeAction):
        path.step([np.nan] * 7, 0, 0)
    assert np.allclose(path.at(10**9).T_base_target, START)
    path.step([0.01, 0, 0, 0, 0, 0, 1], 10**9, 10**9)
    assert np.allclose(path.T_target, pose.integrate(START, [0.01, 0, 0, 0, 0, 0, 1]))
