import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import pose
from robot import safety
from robot.safety import SafetyLimits, State, StateMachine, UnsafeAction

LIMITS = SafetyLimits(keep_out_m=[0.5, 0.1, 0.0, 0.6, 0.3, 0.3])
PERIOD_S = 0.1
EPSILON = 1e-9


def down_at(x, y, z):
    return pose.pose(np.array([x, y, z]), pose.matrix_from_rpy([np.pi, 0, 0]))


wild = st.floats(-1e6, 1e6, allow_subnormal=False)
small = st.floats(-0.2, 0.2)
actions = st.lists(st.lists(st.one_of(wild, small), min_size=7, max_size=7), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(actions)
def test_no_stream_of_actions_leaves_the_limits(stream):
    check_stream(stream)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=10_000, deadline=None)
@given(actions)
def test_none_of_ten_thousand_streams_leaves_the_limits(stream):
    check_stream(stream)


def check_stream(stream):
    T = down_at(0.45, 0.0, 0.3)
    (lower, upper) = LIMITS.keep_out_boxes[0]
    for action in stream:
        step = safety.safe_step(T, action, PERIOD_S, LIMITS)
        moved = step.T_target[:3, 3] - T[:3, 3]
        assert np.linalg.norm(moved) <= LIMITS.max_speed_m_s * PERIOD_S + EPSILON
        assert np.all(np.abs(moved) <= LIMITS.max_translation_m + EPSILON)
        turn = pose.rotation_angle(T[:3, :3].T @ step.T_target[:3, :3])
        assert turn <= LIMITS.max_turn_rad_s * PERIOD_S + 1e-6
        p = step.T_target[:3, 3]
        assert np.all(p >= np.array(LIMITS.workspace_lower_m) - EPSILON)
        assert np.all(p <= np.array(LIMITS.workspace_upper_m) + EPSILON)
        assert not np.all((p > lower) & (p < upper))
        assert abs(step.action[6]) <= 1
        assert np.allclose(pose.integrate(T, step.action), step.T_target, atol=1e-9)  # `action` tells what was done
        changed = not np.allclose(step.action[:6], action[:6], atol=1e-6)
        assert bool(step.clips) or not changed
        T = step.T_target


def test_a_step_within_the_limits_passes_unchanged():
    T = down_at(0.45, 0.0, 0.3)
    action = np.array([0.01, -0.02, 0.015, 0.02, 0.0, -0.05, 0.7])
    step = safety.safe_step(T, action, PERIOD_S, LIMITS)
    assert step.clips == []
    assert np.allclose(step.T_target, pose.integrate(T, action), atol=1e-12)
    assert np.allclose(step.T_requested, step.T_target, atol=1e-12)


def test_each_limit_names_what_it_cut():
    names = [clip.limit for clip in safety.safe_step(down_at(0.45, 0, 0.3), [0.3, 0, 0, 0, 0, 2, 3], 0.1, LIMITS).clips]
    assert names == ["step_dx_m", "step_dyaw_rad", "step_gripper", "speed_m_s"]
    step = safety.safe_step(down_at(0.45, 0, 0.03), [0, 0, -0.03, 0, 0, 0, 0], 0.1, LIMITS)
    assert [c.limit for c in step.clips] == ["workspace_z_m"]
    assert step.T_target[2, 3] == pytest.approx(0.018)
    assert step.T_requested[2, 3] == pytest.approx(0.0, abs=1e-9)  # what was asked for stays visible


def test_keep_out_stops_at_the_face_and_does_not_tunnel():
    box = np.array([[[0.5, -0.1, 0.0], [0.51, 0.1, 0.5]]])  # a thin wall
    T, clips = safety.limit_keep_out(down_at(0.45, 0, 0.2), down_at(0.6, 0, 0.2), box)
    assert T[0, 3] == pytest.approx(0.5, abs=2e-6)
    assert T[0, 3] <= 0.5
    assert clips[0].limit == "keep_out_m"
    _, clips = safety.limit_keep_out(down_at(0.45, 0, 0.2), down_at(0.45, 0.3, 0.2), box)
    assert clips == []
    T, clips = safety.limit_keep_out(down_at(0.505, 0, 0.2), down_at(0.4, 0, 0.2), box)  # already inside: may leave
    assert clips == []


def test_a_target_outside_the_workspace_is_not_moved_by_itself():
    T = down_at(0.1, 0.0, 0.3)  # 10 cm in front of the box
    still = safety.safe_step(T, np.zeros(7), PERIOD_S, LIMITS)
    assert np.allclose(still.T_target, T)
    further = safety.safe_step(T, [-0.02, 0, 0, 0, 0, 0, 0], PERIOD_S, LIMITS)
    assert further.T_target[0, 3] == pytest.approx(0.1)
    back = safety.safe_step(T, [0.02, 0, 0, 0, 0, 0, 0], PERIOD_S, LIMITS)
    assert back.T_target[0, 3] == pytest.approx(0.12)


@pytest.mark.parametrize("bad", [[np.nan] + [0] * 6, [0] * 6 + [np.inf], [0] * 6, [[0] * 7], "abc", None, ["x"] * 7])
def test_what_cannot_be_clipped_is_refused(bad):
    with pytest.raises(UnsafeAction):
        safety.safe_step(down_at(0.45, 0, 0.3), bad, PERIOD_S, LIMITS)


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="workspace is empty"):
        SafetyLimits(workspace_lower_m=[0.5, 0, 0], workspace_upper_m=[0.4, 1, 1])
    with pytest.raises(ValueError, match="six numbers"):
        SafetyLimits(keep_out_m=[0.0] * 5)


def test_hold_resumes_when_its_last_cause_has_gone():
    machine = StateMachine()
    machine.connected()
    assert machine.run()
    machine.hold("stale state")
    machine.hold("no action")
    assert not machine.run()  # an action alone does not help while the state is stale
    machine.release("stale state")
    assert machine.state is State.RUNNING
    machine.hold("no action")
    assert machine.run()


def test_hold_names_all_its_causes():
    machine = StateMachine()
    machine.connected()
    machine.run()
    machine.hold("no action")
    machine.hold("dead-man released")
    assert machine.reason == "dead-man released, no action"
    machine.release("dead-man released")
    assert machine.reason == "no action"


@pytest.mark.parametrize(
    ("wrench", "limit"),
    [([0, 0, 79, 0, 0, 0], None), ([60, 60, 0, 0, 0, 0], "force_n"), ([0, 0, 0, 0, 50, 0], "torque_nm")],
)
def test_forces_and_torques_over_the_threshold(wrench, limit):
    clip = safety.limit_wrench(np.array(wrench, float), LIMITS)
    assert (clip.limit if clip else None) == limit
    assert safety.limit_wrench(np.full(6, np.nan), LIMITS) is not None


@pytest.mark.parametrize(
    ("away_m", "turned_rad", "limit"), [(0.199, 0.79, None), (0.201, 0.0, "lag_m"), (0.0, 0.81, "lag_rad")]
)
def test_an_arm_that_is_not_where_it_was_sent(away_m, turned_rad, limit):
    T_sent = pose.pose(np.array([0.4, 0.1, 0.3]), pose.matrix_from_rpy([0.1, 0.2, 0.3]))
    T_tcp = pose.pose(T_sent[:3, 3] + [0, away_m, 0], T_sent[:3, :3] @ pose.matrix_from_rpy([0, turned_rad, 0]))
    clip = safety.limit_lag(T_tcp, T_sent, LIMITS)
    assert (clip.limit if clip else None) == limit
    assert safety.limit_lag(np.full((4, 4), np.nan), T_sent, LIMITS) is not None


def test_an_input_is_lost_when_it_falls_silent_or_says_no():
    switch = safety.LiveInput("dead-man released", 0.3)
    assert switch.is_lost(10.0)  # nobody has pressed it yet
    switch.hear(True, 10.0)
    assert not switch.is_lost(10.25)
    assert switch.is_lost(10.31)
    switch.hear(True, 11.0)
    switch.hear(False, 11.01)
    assert switch.is_lost(11.02)
    assert not safety.LiveInput("off", 0.0).is_lost(99.0)


def test_fault_is_latched_and_keeps_its_first_reason():
    machine = StateMachine()
    machine.connected()
    machine.run()
    machine.fault("cartesian_reflex")
    machine.fault("lost link")
    machine.connected()
    machine.release("stale state")
    machine.idle("homed")
    assert not machine.run()
    assert (machine.state, machine.reason) == (State.FAULT, "cartesian_reflex")
    assert machine.acknowledge()
    assert machine.state is State.IDLE
    assert not machine.acknowledge()


@settings(deadline=None)
@given(st.lists(st.sampled_from(["connected", "idle", "run", "hold", "release", "fault", "acknowledge"]), max_size=40))
def test_only_acknowledge_leaves_fault_and_only_run_or_release_start_motion(events):
    machine = StateMachine()
    for event in events:
        before = machine.state
        argument = {"idle": ["homed"], "hold": ["stale state"], "release": ["stale state"], "fault": ["x"]}
        getattr(machine, event)(*argument.get(event, []))
        assert machine.state is before or machine.state in safety.TRANSITIONS[before]
        if before is State.FAULT and event != "acknowledge":
            assert machine.state is State.FAULT
        if machine.state is State.RUNNING and before is not State.RUNNING:
            assert event in ("run", "release")
