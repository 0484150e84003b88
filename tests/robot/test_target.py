from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridge import pose
from robot import safety
from robot.safety import SafetyLimits, UnsafeAction
from robot.target import TargetPath

MS = 1_000_000
PERIOD_NS = 100 * MS
START = pose.pose(np.array([0.45, 0.0, 0.3]), pose.matrix_from_rpy([np.pi, 0, 0.3]))
FREE = SafetyLimits(
    workspace_lower_m=[-10.0] * 3,
    workspace_upper_m=[10.0] * 3,
    max_speed_m_s=1.7,
    max_turn_rad_s=2.5,
    max_acceleration_m_s2=1e6,
    max_jerk_m_s3=1e9,
    max_turn_rad_s2=1e6,
    max_turn_rad_s3=1e9,
)


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


def test_a_clock_that_is_set_back_in_mid_step_does_not_freeze_the_walk():
    """It ends in time, and nothing is left of it for when that time comes again."""
    path = TargetPath(START, 0.1, FREE)
    path.step([0.02, 0, 0, 0, 0, 0, 1], 5000 * MS, 5000 * MS)
    assert path.at(5040 * MS).T_base_target[0, 3] == pytest.approx(0.458)
    assert path.at(5030 * MS).T_base_target[0, 3] == pytest.approx(0.458)  # back by a little: it waits
    assert path.at(5040 * MS).T_base_target[0, 3] == pytest.approx(0.458)
    for since_ms, x_m in ((0, 0.458), (20, 0.462), (60, 0.47), (1000, 0.47), (2960, 0.47), (3060, 0.47)):
        assert path.at((2040 + since_ms) * MS).T_base_target[0, 3] == pytest.approx(x_m), since_ms
    path.step([0.02, 0, 0, 0, 0, 0, 1], 2000 * MS, 2000 * MS)  # at rest, back once more
    assert path.at(2100 * MS).T_base_target[0, 3] == pytest.approx(0.49)


def test_a_late_step_ends_on_time():
    path = TargetPath(START, 0.1, FREE)
    path.step([0.02, 0, 0, 0, 0, 0, 1], 1000 * MS, 1030 * MS)
    assert path.at(1030 * MS).T_base_target[0, 3] == pytest.approx(0.45)
    assert path.at(1065 * MS).T_base_target[0, 3] == pytest.approx(0.46)
    assert path.at(1110 * MS).T_base_target[0, 3] == pytest.approx(0.47)  # the next point of the stream's grid


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


AT_CORNER = pose.pose(np.array([0.46, 0.03, 0.3]), START[:3, :3])
WALL = [0.5, 0.05, 0.0, 0.55, 0.3, 0.6]
wild = st.one_of(st.floats(-1e6, 1e6, allow_subnormal=False), st.floats(-0.1, 0.1))
streams = st.lists(st.tuples(st.lists(wild, min_size=7, max_size=7), st.integers(1, 300)), min_size=1, max_size=15)
bounds = st.tuples(st.floats(0.3, 60.0), st.floats(10.0, 9000.0), st.floats(0.5, 100.0), st.floats(20.0, 9000.0))


def check_stream(stream, limits, halt_after=None):
    """Targets as they are sent, each 20 ms, keep every limit, whatever comes whenever."""
    path, sent, now_ms = TargetPath(START, 0.1, limits), [START], 1000
    path.at(now_ms * MS)
    for n, (action, wait_ms) in enumerate(stream):
        if n == halt_after:
            path.halt(now_ms * MS)
        else:
            path.step(action, now_ms * MS, now_ms * MS)
        for later_ms in range(now_ms, now_ms + wait_ms + 1):
            if (later_ms - 1000) % 20 == 0 and later_ms > 1000 + 20 * (len(sent) - 1):
                sent.append(path.at(later_ms * MS).T_base_target)
        now_ms += wait_ms
    for k in range(len(sent), len(sent) + 150):
        sent.append(path.at((1000 + 20 * k) * MS).T_base_target)
    position = np.array([T[:3, 3] for T in sent])
    turns = [pose.matrix_from_rpy([0, 0, 0])] + [b[:3, :3] @ a[:3, :3].T for a, b in pairwise(sent)]
    skew = [0.5 * np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) for R in turns]
    vectors = [s * pose.rotation_angle(R) / max(np.linalg.norm(s), 1e-15) for s, R in zip(skew, turns, strict=True)]
    for steps, most in (
        (
            np.diff(position, axis=0, prepend=position[:1]),
            (limits.max_speed_m_s, limits.max_acceleration_m_s2, limits.max_jerk_m_s3),
        ),
        (np.array(vectors), (limits.max_turn_rad_s, limits.max_turn_rad_s2, limits.max_turn_rad_s3)),
    ):
        rates = steps / 0.02
        for order, limit in enumerate(most):
            values = np.diff(rates, n=order, axis=0, prepend=np.zeros((order, 3))) / 0.02**order
            assert np.linalg.norm(values, axis=1).max() <= (1.01 if order == 0 else 1.0001) * limit + 1e-6 * 50**order
    assert np.all(position >= np.array(limits.workspace_lower_m) - 1e-8)
    assert np.all(position <= np.array(limits.workspace_upper_m) + 1e-8)
    boxes = limits.keep_out_boxes
    assert not any(safety.enters(a, b, boxes) for a, b in pairwise(position))
    return path, sent


def limits_of(acceleration, jerk, turn_acceleration, turn_jerk):
    return SafetyLimits(
        keep_out_m=WALL,
        max_acceleration_m_s2=acceleration,
        max_jerk_m_s3=jerk,
        max_turn_rad_s2=turn_acceleration,
        max_turn_rad_s3=turn_jerk,
    )


# A walk that begins in the very step in which the last one came to rest.
ONE_AFTER_ANOTHER = [([0, 0, 0, 0, 0, 0.0625, 0], 120), ([0, 0, 0, 0, 0, 1.0, 0], 1)]


@settings(max_examples=60, deadline=None)
@example(ONE_AFTER_ANOTHER, (1.0, 10.0, 32.0, 1582.0), None)
@given(streams, bounds, st.one_of(st.none(), st.integers(0, 14)))
def test_no_stream_of_targets_leaves_the_limits(stream, bound, halt_after):
    check_stream(stream, limits_of(*bound), halt_after)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=10_000, deadline=None)
@given(streams, bounds, st.one_of(st.none(), st.integers(0, 14)))
def test_none_of_ten_thousand_streams_of_targets_leaves_the_limits(stream, bound, halt_after):
    check_stream(stream, limits_of(*bound), halt_after)


def test_a_target_keeps_off_a_box_by_what_a_chord_may_cut():
    """30 m/s2 over 20 ms turn 0.6 m/s; a quarter of it over 20 ms are 3 mm. 10 m/s2: 1 mm."""
    for acceleration, margin_m in ((30.0, 0.003), (10.0, 0.001)):
        path = TargetPath(AT_CORNER, 0.1, SafetyLimits(keep_out_m=WALL, max_acceleration_m_s2=acceleration))
        path.step([0, 0.03, 0, 0, 0, 0, 1], 1000 * MS, 1000 * MS)  # to y = 0.06, beside the wall
        for n in range(1, 5):
            path.step([0.04, 0, 0, 0, 0, 0, 1], (1000 + 200 * n) * MS, (1000 + 200 * n) * MS)
        assert path.at(9000 * MS).T_base_target[:2, 3] == pytest.approx([0.5 - margin_m, 0.06], abs=2e-6)
        assert path.at(9100 * MS).clips == []  # it rests there


def test_a_late_sender_is_led_round_a_corner():
    """Five poses are due at once; the straight line to the last of them leads through the box."""
    path = TargetPath(AT_CORNER, 0.1, SafetyLimits(keep_out_m=WALL))
    path.stream(1000 * MS)
    now_ms, asked = 1000, ([0, -0.04, 0], [0.05, 0, 0], [0.05, 0, 0])  # past the corner at x = 0.5, y = 0.05 ...
    for way in (*asked, [0.02, 0, 0], [0, 0.05, 0], [0, 0.05, 0]):
        path.step([*way, 0, 0, 0, 1], now_ms * MS, now_ms * MS)
        now_ms += 100
        path.at(now_ms * MS)  # others look; the arm hears nothing
    sent = [AT_CORNER[:3, 3]] + [path.stream((now_ms + 20 * n) * MS).T_base_target[:3, 3] for n in range(30)]
    assert safety.enters(sent[0], sent[-1], SafetyLimits(keep_out_m=WALL).keep_out_boxes)
    assert not any(safety.enters(a, b, SafetyLimits(keep_out_m=WALL).keep_out_boxes) for a, b in pairwise(sent))
    assert sent[-1] == pytest.approx(path.T_target[:3, 3])


near = st.lists(st.floats(-0.05, 0.05), min_size=7, max_size=7)
looks = st.lists(st.tuples(near, st.lists(st.integers(1, 60), min_size=1, max_size=6)), min_size=1, max_size=15)


@settings(max_examples=200, deadline=None)
@given(looks, st.floats(0.5, 200.0), st.booleans())
def test_no_straight_line_between_streamed_poses_enters_a_box(stream, acceleration, starts_in_margin):
    """At any times, late ones among them, round the corner of a box."""
    limits = SafetyLimits(keep_out_m=WALL, max_acceleration_m_s2=acceleration)
    T, now_ms = AT_CORNER.copy(), 1000
    T[0, 3] = 0.4999 if starts_in_margin else 0.48
    path, boxes = TargetPath(T, 0.1, limits), limits.keep_out_boxes
    last = path.stream(now_ms * MS).T_base_target[:3, 3]
    for action, waits_ms in stream:
        path.step(action, now_ms * MS, now_ms * MS)
        for wait_ms in waits_ms:
            now_ms += wait_ms
            here = path.stream(now_ms * MS).T_base_target[:3, 3]
            assert not safety.enters(last, here, boxes)
            last = here


@pytest.mark.parametrize("bound", [(30.0, 4500.0, 90.0, 8500.0), (9.0, 4500.0, 17.0, 8500.0), (2.0, 20.0, 3.0, 60.0)])
def test_the_target_is_reached_under_any_limits(bound):
    stream = [([0.03, 0.01, 0, 0, 0, 0.05, 1], 100)] * 6 + [([-0.03, 0, 0.01, 0, 0.03, 0, 1], 100)] * 6
    path, sent = check_stream(stream, limits_of(*bound))
    assert np.allclose(sent[-1], path.T_target, atol=1e-6)
    turning_m = 0.3**2 / (2 * bound[0]) + 0.3 * bound[0] / bound[1]  # what it takes to turn round
    assert np.max([T[0, 3] for T in sent]) <= 0.45 + 6 * 0.03 + turning_m


def test_what_the_scripted_person_does_passes_uncut():
    """0.3 m/s, and 1.2 m/s2 from step to step: 0.12 m/s at once."""
    path, speed, clips = TargetPath(START, 0.1, SafetyLimits()), 0.0, []
    for n in range(12):
        speed = min(0.3, speed + 0.12) if n < 6 else max(0.0, speed - 0.12)
        path.step([0, 0.1 * speed, 0, 0, 0, 0, 1], (1000 + 100 * n) * MS, (1000 + 100 * n) * MS)
        clips += [c for k in range(5) for c in path.at((1000 + 100 * n + 20 * k) * MS).clips]
    assert clips == []
    assert path.at(3000 * MS).T_base_target[1, 3] == pytest.approx(path.T_target[1, 3])


def test_halt_stops_within_the_limits_and_the_next_step_begins_there():
    path = TargetPath(START, 0.1, SafetyLimits(max_acceleration_m_s2=5.0))
    path.step([0.04, 0, 0, 0, 0, 0, 1], 1000 * MS, 1000 * MS)
    sent = [path.at((1000 + 20 * k) * MS).T_base_target[0, 3] for k in range(4)]
    path.halt(1060 * MS)
    sent += [path.at((1080 + 20 * k) * MS).T_base_target[0, 3] for k in range(20)]
    assert sent[-1] == pytest.approx(path.T_target[0, 3])
    assert sent[-1] < 0.485  # not where the step was going
    assert abs(np.diff(sent, n=2)).max() / 0.02**2 <= 5.0001
    path.step([0.01, 0, 0, 0, 0, 0, 1], 2000 * MS, 2000 * MS)
    assert path.T_target[0, 3] == pytest.approx(sent[-1] + 0.01)
