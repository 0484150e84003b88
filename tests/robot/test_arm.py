"""The arm driver with the real franky client against the stand-in cell's FR3."""

import os
import threading
import time

import franky
import numpy as np
import pytest

from bridge import pose
from bridge.embodiment import Embodiment
from robot.arm import ArmDriver
from robot.config import ArmConfig
from robot.safety import State, UnsafeAction
from tests.robot.cell import RunningCell, loopback, running_cell, wait_for

MS = 1_000_000
PERIOD_NS = 100 * MS
REST_M = 3e-4  # a session counts from where the arm rests, which is that near to where it was told to (test_target.py
# holds the integration itself to 1e-9)
EMBODIMENT = Embodiment()
OPEN, CLOSE = 1.0, -1.0
PATIENCE_S = 20.0  # of a machine that does ten other things


def move(x=0.0, y=0.0, z=0.0, yaw=0.0, gripper=OPEN):
    return np.array([x, y, z, 0.0, 0.0, yaw, gripper])


@pytest.fixture(scope="module")
def cell():
    with running_cell() as cell:
        yield cell


def connect(cell, **settings) -> ArmDriver:
    config = ArmConfig(host=cell.address, **settings)
    arm = ArmDriver(config, EMBODIMENT, cell.now_ns)
    arm.start()
    wait_for(lambda: arm.snapshot().state is not State.DISCONNECTED, PATIENCE_S, "connecting")
    return arm


@pytest.fixture
def arm(cell):
    cell.inject("release_user_stop")
    arm = connect(cell)
    if arm.snapshot().state is State.FAULT:
        arm.acknowledge().result(PATIENCE_S)
    arm.home().result(PATIENCE_S)
    yield arm
    arm.close()


def play(arm, cell, actions) -> np.ndarray:
    """Send one action each period of the cell's clock; returns the integration of them all."""
    T = arm.snapshot().streamed.T_base_target
    tick_ns = (cell.now_ns() // PERIOD_NS + 1) * PERIOD_NS
    for action in actions:
        wait_for(lambda: cell.now_ns() >= tick_ns, PATIENCE_S, "the next tick")  # noqa: B023
        assert arm.command(action, tick_ns)
        T = pose.integrate(T, action)
        tick_ns += PERIOD_NS
    wait_for(lambda: cell.now_ns() >= tick_ns + 3 * PERIOD_NS, PATIENCE_S, "the end of the last step")
    return T


@pytest.mark.parametrize("streaming", ["position", "impedance"])
def test_targets_are_the_integration_of_the_actions_and_the_arm_gets_there(cell, streaming):
    arm = connect(cell, streaming=streaming)
    try:
        arm.home().result(PATIENCE_S)
        expected = play(arm, cell, [move(0.02, 0.01, 0.01, 0.05)] * 6 + [move(-0.02, 0, -0.01, -0.03)] * 4)
        snapshot = arm.snapshot()
        T = snapshot.streamed.T_base_target
        assert np.allclose(T[:3, 3], expected[:3, 3], atol=REST_M)
        assert pose.rotation_angle(T[:3, :3].T @ expected[:3, :3]) < 1e-3
        tolerance_m = 0.002 if streaming == "position" else 0.005  # the impedance is a spring
        off_m = lambda: np.linalg.norm(arm.snapshot().sample.T_base_tcp[:3, 3] - expected[:3, 3])  # noqa: E731
        wait_for(lambda: off_m() < tolerance_m, 5.0, "arriving")
        assert snapshot.num_clips == {}
        assert snapshot.num_actions == 10
        stamps = np.diff([sample.stamp_ns for sample in arm.samples])
        assert stamps.min() > 0
    finally:
        arm.close()


def test_the_arm_holds_without_actions_and_goes_on_with_the_next(arm, cell):
    expected = play(arm, cell, [move(0.02)] * 3)
    wait_for(lambda: arm.snapshot().state is State.HOLD, PATIENCE_S, "HOLD")
    assert arm.snapshot().reason == "no action"
    later = arm.snapshot().streamed.T_base_target
    assert np.allclose(later[:3, 3], expected[:3, 3], atol=REST_M)  # the last delta is not repeated
    play(arm, cell, [move(-0.02)])
    assert arm.snapshot().num_actions == 4


def test_bad_actions_change_nothing(arm, cell):
    play(arm, cell, [move(0.01)])
    before, now_ns = arm.snapshot(), cell.now_ns()
    for action, stamp_ns in [
        (move(np.nan), now_ns),
        (np.zeros(6), now_ns),
        (move(0.01), arm._last_action_ns),  # again
        (move(0.01), arm._last_action_ns - MS),  # out of order
        (move(0.01), now_ns + 10_000 * MS),  # from the future
    ]:
        with pytest.raises(UnsafeAction):
            arm.command(action, stamp_ns)
    wait_for(lambda: cell.now_ns() > now_ns + 400 * MS, PATIENCE_S, "time")
    with pytest.raises(UnsafeAction, match="late"):
        arm.command(move(0.01), now_ns)
    after = arm.snapshot()
    assert np.allclose(before.streamed.T_base_target, after.streamed.T_base_target)
    assert sum(after.num_rejected.values()) == 6


def test_steps_in_a_hurry_are_refused(arm, cell):
    """Their stamps are new, and neither late nor early; each would still be a whole step of the target."""
    play(arm, cell, [move(0.01)])
    before_m, start_ns = arm.path.T_target[:3, 3], cell.now_ns()
    assert arm.command(move(0.01), start_ns)
    for n in range(1, 20):
        with pytest.raises(UnsafeAction, match="too soon"):
            arm.command(move(0.01), start_ns + 2 * n * MS)
    assert arm.path.T_target[:3, 3] - before_m == pytest.approx([0.01, 0, 0], abs=REST_M)
    assert arm.snapshot().num_rejected["too soon"] == 19
    wait_for(lambda: cell.now_ns() >= start_ns + 95 * MS, PATIENCE_S, "the next step")
    assert arm.command(move(0.01), start_ns + 95 * MS)


def test_limits_hold_on_the_way_to_the_arm(arm, cell):
    """A policy gone wild pulls back at full step: the arm never goes faster than 0.5 m/s."""
    tick_ns = (cell.now_ns() // PERIOD_NS + 1) * PERIOD_NS
    for _ in range(4):
        wait_for(lambda: cell.now_ns() >= tick_ns, PATIENCE_S, "the next tick")  # noqa: B023
        arm.command(move(x=-5.0, z=0.02), tick_ns)
        tick_ns += PERIOD_NS
    clips = arm.snapshot().num_clips
    assert clips["step_dx_m"] == 4
    assert clips["speed_m_s"] >= 1
    x = [sample.T_base_tcp[0, 3] for sample in arm.samples]
    assert min(x) > 0.42 - 4 * 0.05 - 0.01


def test_the_hand_closes_opens_and_ignores_the_middle(arm, cell):
    play(arm, cell, [move(gripper=CLOSE)] * 2)
    wait_for(lambda: arm.snapshot().gripper_opening_m < 0.01, PATIENCE_S, "closing")
    play(arm, cell, [move(gripper=0.05)] * 2)
    assert arm.snapshot().gripper_sent == -1.0
    assert arm.snapshot().gripper_requested == 0.05
    play(arm, cell, [move(gripper=0.5)] * 2)
    wait_for(lambda: abs(arm.snapshot().gripper_opening_m - 0.06) < 0.003, PATIENCE_S, "three quarters open")


def test_a_hand_that_changes_its_mind_finishes_first(arm, cell, monkeypatch):
    """Two commands at once corrupt the client library's memory (see robot.gripper)."""
    hand, under_way, accept = cell.cell.hand, [], cell.cell.hand._accept

    def accept_and_note(number, request_id, body):
        under_way.append(hand._goal is not None)
        accept(number, request_id, body)

    monkeypatch.setattr(hand, "_accept", accept_and_note)
    play(arm, cell, [move(gripper=CLOSE), move(gripper=OPEN), move(gripper=CLOSE), move(gripper=OPEN)])
    wait_for(lambda: len(under_way) == 2 and arm.snapshot().gripper_opening_m > 0.075, PATIENCE_S, "opening")
    assert not any(under_way)


def test_a_stop_leaves_the_hand_what_it_does_and_nothing_after_it(arm, cell, monkeypatch):
    hand, begun, accept = cell.cell.hand, [], cell.cell.hand._accept

    def accept_and_note(number, request_id, body):
        begun.append(number)
        accept(number, request_id, body)

    monkeypatch.setattr(hand, "_accept", accept_and_note)
    arm.gripper.command(OPEN)
    wait_for(lambda: arm.gripper._doing is not None and arm.gripper._future is None, PATIENCE_S, "an open hand")
    begun.clear()
    arm.gripper.command(CLOSE)
    wait_for(lambda: len(begun) == 1, PATIENCE_S, "closing")
    arm.gripper.command(OPEN)  # queued
    arm.stop()
    assert arm.snapshot().gripper_sent == CLOSE
    wait_for(lambda: arm.gripper._future is None, PATIENCE_S, "the end of it")
    looked_s = arm.gripper._beat_s
    wait_for(lambda: arm.gripper._beat_s > looked_s + 0.2, PATIENCE_S, "more looks at what is wanted")
    assert len(begun) == 1
    assert arm.snapshot().gripper_opening_m < 0.01
    arm.acknowledge().result(PATIENCE_S)
    play(arm, cell, [move(gripper=OPEN)])
    wait_for(lambda: arm.snapshot().gripper_opening_m > 0.075, PATIENCE_S, "opening")


def test_the_thread_that_constructs_the_robot_does_not_stay_real_time(arm):
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    for thread in threading.enumerate():
        assert os.sched_getscheduler(thread.native_id) == os.SCHED_OTHER, thread.name


def test_reflex_is_latched_until_acknowledged(arm, cell):
    play(arm, cell, [move(0.01)] * 2)
    cell.inject("reflex", names=["cartesian_reflex"])
    wait_for(lambda: arm.snapshot().state is State.FAULT, PATIENCE_S, "FAULT")
    assert "cartesian_reflex" in arm.snapshot().reason
    assert not arm.command(move(0.01), cell.now_ns())
    assert arm.snapshot().num_rejected["FAULT"] == 1
    at_fault = arm.snapshot().sample.T_base_tcp
    arm.acknowledge().result(PATIENCE_S)
    assert arm.snapshot().state is State.IDLE
    assert np.linalg.norm(arm.snapshot().sample.T_base_tcp[:3, 3] - at_fault[:3, 3]) < 0.01
    play(arm, cell, [move(0.01)] * 2)
    assert arm.snapshot().state is not State.FAULT


def test_user_stop_cannot_be_acknowledged_while_it_is_pressed(arm, cell):
    play(arm, cell, [move(0.01)])
    cell.inject("user_stop")
    wait_for(lambda: arm.snapshot().state is State.FAULT, PATIENCE_S, "FAULT")
    with pytest.raises(RuntimeError):
        arm.acknowledge().result(PATIENCE_S)
    assert arm.snapshot().state is State.FAULT
    cell.inject("release_user_stop")
    time.sleep(0.1)
    arm.acknowledge().result(PATIENCE_S)
    assert arm.snapshot().state is State.IDLE


def test_stop_ends_the_motion_and_needs_an_acknowledgement(arm, cell):
    play(arm, cell, [move(0.03)] * 2)
    arm.stop()
    assert arm.snapshot().state is State.FAULT
    wait_for(lambda: cell.cell.robot.motion is None, PATIENCE_S, "the end of the motion")
    with pytest.raises(RuntimeError):
        arm.home().result(PATIENCE_S)
    arm.acknowledge().result(PATIENCE_S)
    arm.home().result(PATIENCE_S)


class Watched:
    """The real robot, which notes the motions that it is given, and calls `at_brake` when it is to brake."""

    def __init__(self, robot, at_brake):
        self._robot, self._at_brake, self.motions = robot, at_brake, []

    def __getattr__(self, name):
        return getattr(self._robot, name)

    def move(self, motion, *args, **settings):
        self.motions.append(type(motion))
        if isinstance(motion, franky.JointStopMotion):
            self._at_brake()
        return self._robot.move(motion, *args, **settings)


def test_no_motion_home_begins_when_a_stop_came_first(arm, cell):
    arm._worker._robot = watched = Watched(arm._worker._robot, arm.stop)  # before its stream begins
    play(arm, cell, [move(0.03)] * 2)
    first = len(watched.motions)
    assert arm.home().exception(PATIENCE_S) is not None
    wait_for(lambda: not arm._worker.is_homing, PATIENCE_S, "the end of it")
    assert watched.motions[first:] == [franky.JointStopMotion]  # the stream's own
    assert arm.snapshot().state is State.FAULT


@pytest.mark.parametrize("name", ["deadman", "heartbeat"])
def test_the_way_home_needs_the_inputs_too(arm, cell, name):
    play(arm, cell, [move(0.03)] * 4)
    live, pos_m = getattr(arm, name), lambda: arm.snapshot().sample.T_base_tcp[:3, 3]
    live.timeout_s, begun_m = 1000.0, pos_m()
    with pytest.raises(RuntimeError, match=f"refused: {live.name}"):
        arm.home().result(PATIENCE_S)
    live.hear(True, time.monotonic())
    going = arm.home()
    wait_for(lambda: bool(np.linalg.norm(pos_m() - begun_m) > 0.01), PATIENCE_S, "a motion home")
    live.hear(False, time.monotonic())
    with pytest.raises(RuntimeError, match=f"away from home .{live.name}"):
        going.result(PATIENCE_S)
    assert cell.cell.robot.motion is None
    assert arm.snapshot().state is State.IDLE  # to let go is no fault
    live.hear(True, time.monotonic())
    arm.home().result(PATIENCE_S)


class SlowToRecover:
    """The real robot, whose recovery begins and returns when the test lets it."""

    has_errors = True

    def __init__(self, robot):
        self._robot, self.begun, self.go_on = robot, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._robot, name)

    def recover_from_errors(self):
        self.begun.set()
        self.go_on.wait(PATIENCE_S)


def test_a_stop_during_an_acknowledgement_keeps_the_fault(arm):
    arm.stop("the first stop")
    worker, robot = arm._worker, arm._worker._robot
    worker._robot = slow = SlowToRecover(robot)
    answer = arm.acknowledge()
    assert slow.begun.wait(PATIENCE_S)
    arm.stop("the second stop")
    slow.go_on.set()
    assert str(answer.exception(PATIENCE_S)) == "the second stop"
    wait_for(lambda: worker.requests.acknowledge is None, PATIENCE_S, "the end of the recovery")
    assert arm.snapshot().state is State.FAULT
    worker._robot = robot
    arm.acknowledge().result(PATIENCE_S)
    assert arm.snapshot().state is State.IDLE


def test_an_acknowledgement_that_took_too_long_clears_nothing_later():
    with running_cell() as cell:
        arm = connect(cell, call_timeout_s=0.7)
        try:
            arm.stop()
            worker = arm._worker
            worker._robot = slow = SlowToRecover(worker._robot)
            with pytest.raises(RuntimeError, match="recover_from_errors did not return"):
                arm.acknowledge().result(PATIENCE_S)
            slow.go_on.set()
            worker.join(PATIENCE_S)
            assert not worker.is_alive()
            assert arm.snapshot().state is State.FAULT
        finally:
            arm.close()


def test_a_short_pause_of_the_states_holds_and_goes_on(arm, cell):
    play(arm, cell, [move(0.01)] * 2)
    cell.inject("pause", duration_s=0.4)
    wait_for(lambda: "stale arm state" in arm.machine.causes or arm.machine.state is State.HOLD, 5.0, "HOLD")
    play(arm, cell, [move(0.01)] * 2)
    assert arm.snapshot().state is not State.FAULT


def test_a_stop_on_the_way_home_brakes_the_arm(arm, cell):
    play(arm, cell, [move(0.03)] * 4)
    pos_m = lambda: arm.snapshot().sample.T_base_tcp[:3, 3]  # noqa: E731
    begun_m, going = pos_m(), arm.home()
    wait_for(lambda: np.linalg.norm(pos_m() - begun_m) > 0.01, PATIENCE_S, "a motion home")
    arm.stop()
    with pytest.raises(RuntimeError, match="away from home"):
        going.result(PATIENCE_S)
    assert cell.cell.robot.motion is None
    assert (arm.snapshot().state, arm.snapshot().reason) == (State.FAULT, "stop requested")
    arm.acknowledge().result(PATIENCE_S)


@pytest.mark.parametrize("death", ["freeze", pytest.param("close", marks=pytest.mark.slow)])
def test_a_dead_robot_is_a_lost_link_and_comes_back_by_acknowledgement(death):
    address = loopback()
    cell = RunningCell(address, EMBODIMENT)
    arm = connect(cell)
    try:
        arm.home().result(PATIENCE_S)
        play(arm, cell, [move(0.01)] * 2)
        getattr(cell, death)()
        wait_for(lambda: arm.snapshot().state is State.FAULT, 5.0, "FAULT")
        assert "lost link" in arm.snapshot().reason
        cell.close()
        with pytest.raises(RuntimeError):
            arm.acknowledge().result(PATIENCE_S)  # nothing there
        cell = RunningCell(address, EMBODIMENT)
        arm.now_ns = cell.now_ns
        time.sleep(0.5)
        assert arm.snapshot().state is State.FAULT  # nothing comes back by itself
        arm.acknowledge().result(PATIENCE_S)
        arm._last_action_ns = -1  # the new cell's clock begins anew
        arm.home().result(PATIENCE_S)
        play(arm, cell, [move(0.01)] * 2)
    finally:
        arm.close()
        cell.close()


def test_a_hand_that_freezes_is_a_fault_and_the_arm_is_not_held_up():
    with running_cell() as cell:
        arm = connect(cell)
        try:
            arm.gripper.config.command_timeout_s = 1.0
            arm.home().result(PATIENCE_S)
            cell.inject("freeze_gripper", frozen=True)
            play(arm, cell, [move(0.01, gripper=CLOSE)] * 3)  # the arm goes on meanwhile
            assert arm.snapshot().num_actions == 3
            wait_for(lambda: arm.snapshot().state is State.FAULT, PATIENCE_S, "FAULT")
            assert "gripper" in arm.snapshot().reason
        finally:
            arm.close()


def test_a_robot_that_never_answers_a_call_is_left_behind():
    with running_cell() as cell:
        cell.inject("mute", commands=[3])  # SetCollisionBehavior: the call spins for ever
        arm = ArmDriver(ArmConfig(host=cell.address, call_timeout_s=0.7), EMBODIMENT, cell.now_ns)
        arm.start()
        try:
            wait_for(lambda: arm.snapshot().state is State.FAULT, PATIENCE_S, "FAULT")
            assert "did not return" in arm.snapshot().reason
        finally:
            arm.close()
    # The call spins on, and must not keep others from working.
    policies = {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}
    assert os.SCHED_IDLE in policies
    assert os.SCHED_FIFO not in policies


def test_nothing_listening_is_no_fault_but_disconnected():
    arm = ArmDriver(ArmConfig(host=loopback()), EMBODIMENT, time.time_ns)
    arm.start()
    try:
        wait_for(lambda: "refused" in arm.snapshot().reason, PATIENCE_S, "a refusal")
        assert arm.snapshot().state is State.DISCONNECTED
        with pytest.raises(RuntimeError):
            arm.home().result(1.0)
    finally:
        arm.close()
