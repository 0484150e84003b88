"""What goes wrong at the arm, and how it ends: HOLD, a latched FAULT or a refusal, the arm still, the reason published.

Each fault is driven into an arm that moves: the real client library against the stand-in cell's FR3, or the pure layer.
With COTWIN_FAULT_TABLE=FILE (and -m '') the outcomes are written there, one JSON line for each fault;
`python -m tests.robot.fault_table FILE` makes docs/results/robot_faults.json of them.
"""

import json
import os
import threading
import time

import numpy as np
import pytest

from bridge.errors import BridgeTimeout
from bridge.messages import ActionChunk
from robot.arm import ArmDriver
from robot.config import ArmConfig
from robot.safety import SafetyLimits, State, UnsafeAction
from tests.robot.cell import running_cell, wait_for
from tests.robot.test_arm import EMBODIMENT, MS, PERIOD_NS, move
from tests.robot.test_camera import Feeder, reader
from tests.robot.test_runtime import ScriptedPolicy, World

STILL_M, REST_LIMIT_S = 1e-3, 2.4
PATIENCE_S = 10.0
REFLEXES = (
    "cartesian_reflex",
    "joint_reflex",
    "self_collision_avoidance",
    "joint_position_limits",
    "joint_velocity",
    "cartesian_generator_joint_acceleration_discontinuity",
    "communication_constraints",
    "power_limit",
    "instability",
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def row():
    """Notes what a test saw; the table is made of these."""
    seen: dict = {}
    yield seen
    if path := os.environ.get("COTWIN_FAULT_TABLE"):
        with open(path, "a") as file:
            file.write(json.dumps(seen) + "\n")


class Driving:
    """A policy that moves the arm forth and back, an action each tick of the cell's clock, until it is closed."""

    def __init__(self, cell, **settings):
        self.cell = cell
        self.arm = ArmDriver(ArmConfig(host=cell.address, **settings), EMBODIMENT, cell.now_ns)
        self.step = move(0.01)
        self.is_quiet = False
        self.refusals: list[str] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.arm.start()
        wait_for(lambda: self.arm.snapshot().state is not State.DISCONNECTED, PATIENCE_S, "connecting")
        if self.arm.snapshot().state is State.FAULT:
            self.arm.acknowledge().result(PATIENCE_S)
        self.hear(True)
        going = self.arm.home()
        wait_for(lambda: self.hear(True) or going.done(), PATIENCE_S, "home")
        going.result()
        self.hear(False)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._thread.join(5.0)
        self.arm.close()

    def _run(self):
        tick_ns, n = 0, 0
        while not self._closing.wait(0.005):
            if self.cell.now_ns() < tick_ns or self.is_quiet:
                continue
            self.arm.hear_heartbeat()
            tick_ns = (self.cell.now_ns() // PERIOD_NS + 1) * PERIOD_NS
            step = self.step * (1 if n // 8 % 2 == 0 else -1)
            step[6] = 1.0
            try:
                n += self.arm.command(step, tick_ns - PERIOD_NS)
            except UnsafeAction as error:
                self.refusals.append(str(error))

    def hear(self, is_pressed):
        self.arm.hear_heartbeat()
        self.arm.hear_deadman(is_pressed)

    def moving(self):
        before = self.arm.snapshot().num_actions
        wait_for(lambda: self.arm.snapshot().num_actions > before + 1, PATIENCE_S, "motion")
        return self

    def tcp_m(self):
        return self.arm.snapshot().sample.T_base_tcp[:3, 3]

    def wait_s(self, seconds: float) -> float:
        """By the arm's own time, which a busy machine slows down; by the wall's while the arm's stands still. Returns
        what went by."""
        gone_s, last_ns = 0.0, self.cell.now_ns()
        while gone_s < seconds:
            time.sleep(0.01)
            now_ns = self.cell.now_ns()
            gone_s += 1e-9 * (now_ns - last_ns) if now_ns != last_ns else 0.01
            last_ns = now_ns
        return gone_s

    def rests(self) -> tuple[float, float]:
        """Seconds of the arm's time until its TCP stays within `STILL_M` for 0.25 s, and how far it moves in these."""
        seen_m, seen_s = [self.tcp_m()], [0.0]
        while seen_s[-1] < REST_LIMIT_S:
            seen_s.append(seen_s[-1] + self.wait_s(0.025))
            seen_m.append(self.tcp_m())
            lately = [n for n, gone_s in enumerate(seen_s) if gone_s >= seen_s[-1] - 0.25]
            drift_m = max(float(np.linalg.norm(seen_m[n] - seen_m[-1])) for n in lately)
            if seen_s[-1] >= 0.25 and drift_m < STILL_M:
                return seen_s[lately[0]], drift_m
        raise AssertionError(f"after {seen_s[-1]:.1f} s the arm still moves by {1e3 * drift_m:.1f} mm in 0.25 s")

    def ends(self, state: State, row: dict, fault: str, deadline_s: float, words: str = "", layer: str = "arm") -> None:
        """Wait for the state, see the arm stand still in it while actions go on, and note it."""
        began_s = time.monotonic()

        def has_ended():
            snapshot = self.arm.snapshot()
            return snapshot.state is state and words.lower() in snapshot.reason.lower()

        wait_for(has_ended, PATIENCE_S, f"{state} for {words!r} after {fault}, not {self.arm.snapshot().reason!r}")
        took_s, snapshot = time.monotonic() - began_s, self.arm.snapshot()
        rest_s, drift_m = self.rests()
        if state is State.FAULT:
            assert self.arm.snapshot().state is State.FAULT  # nothing clears it by itself, however many actions come
        row.update(layer=layer, fault=fault, ends_in=str(state), reason=snapshot.reason, deadline_s=deadline_s)
        row.update(took_s=round(took_s, 3), rest_s=round(rest_s, 3), drift_mm=round(1e3 * drift_m, 3))

    def recovers(self, row: dict) -> None:
        """By an operator's word alone."""
        self.arm.acknowledge().result(PATIENCE_S)
        assert self.arm.snapshot().state is not State.FAULT
        row["after"] = "moves again once acknowledged"
        self.moving()


@pytest.fixture(scope="module")
def shared_cell():
    with running_cell() as cell:
        yield cell


@pytest.fixture(scope="module")
def shared_driving(shared_cell):
    with Driving(shared_cell) as driving:
        yield driving


@pytest.fixture
def driving(shared_driving):
    """In motion, whatever the test before left."""
    shared_driving.cell.inject("release_user_stop")
    time.sleep(0.05)
    if shared_driving.arm.snapshot().state is State.FAULT:
        shared_driving.arm.acknowledge().result(PATIENCE_S)
    shared_driving.is_quiet = True
    shared_driving.arm.home().result(PATIENCE_S)
    shared_driving.is_quiet = False
    return shared_driving.moving()


@pytest.mark.parametrize("name", [REFLEXES[0], *map(slow, REFLEXES[1:])])
def test_every_reflex_latches(driving, row, name):
    driving.cell.inject("reflex", names=[name])
    driving.ends(State.FAULT, row, f"reflex {name}", 0.2, name.split("generator_")[-1])
    driving.recovers(row)


@pytest.mark.slow  # test_arm.py has one that always runs
def test_user_stop_latches(driving, row):
    driving.cell.inject("user_stop")
    driving.ends(State.FAULT, row, "user stop pressed", 0.2, "user stop")
    with pytest.raises(RuntimeError):
        driving.arm.acknowledge().result(PATIENCE_S)
    driving.cell.inject("release_user_stop")
    time.sleep(0.1)
    assert driving.arm.snapshot().state is State.FAULT
    driving.recovers(row)


@pytest.mark.slow  # test_arm.py has one that always runs
def test_software_stop_latches(driving, row):
    driving.arm.stop()
    driving.ends(State.FAULT, row, "software stop", 0.1, "stop requested")
    driving.recovers(row)


@pytest.mark.slow  # test_arm.py has one that always runs
def test_states_that_pause_for_a_moment_hold(driving, row):
    driving.cell.inject("pause", duration_s=0.95)
    driving.ends(State.HOLD, row, "arm states pause for 0.95 s", 0.35)
    assert "stale arm state" in driving.arm.machine.causes  # beside "no action": the cell's clock stands still too
    driving.moving()
    row["after"] = "goes on by itself"


def test_states_that_stop_latch(driving, row):
    driving.cell.inject("pause", duration_s=2.0)
    driving.ends(State.FAULT, row, "arm states pause for 2 s", 1.5, "lost link")
    time.sleep(1.5)
    wait_for(lambda: driving.arm.acknowledge().exception(PATIENCE_S) is None, PATIENCE_S, "recovery")
    row["after"] = "connects anew once acknowledged"
    driving.moving()


def test_a_stream_of_actions_that_stops_holds(driving, row):
    driving.is_quiet = True
    driving.ends(State.HOLD, row, "actions stop (command deadline)", 0.35, "no action")
    driving.is_quiet = False
    driving.moving()
    row["after"] = "goes on with the next action"


ALWAYS = ("NaN in an action", "late action")
BAD = {
    "NaN in an action": (lambda step: np.append(step[:6], np.nan), 0, "not finite"),
    "infinity in an action": (lambda step: np.append([np.inf], step[1:]), 0, "not finite"),
    "action of six numbers": (lambda step: step[:6], 0, "shape"),
    "late action": (lambda step: step, -600 * MS, "late"),
    "repeated action": (lambda step: step, None, "repeated"),
    "reordered action": (lambda step: step, "reordered", "reordered"),
    "action from the future": (lambda step: step, 5000 * MS, "early"),
}


@pytest.mark.parametrize("fault", [fault if fault in ALWAYS else slow(fault) for fault in BAD])
def test_bad_actions_are_refused_and_lead_to_hold(driving, row, fault):
    make, shift_ns, words = BAD[fault]
    driving.is_quiet = True
    driving.wait_s(0.15)  # the action that may be under way has this moment's stamp, and its step takes 0.1 s
    last_ns = driving.arm._last_action_ns
    stamp_ns = {None: last_ns, "reordered": last_ns - PERIOD_NS}.get(shift_ns)
    if stamp_ns is None:
        stamp_ns = driving.cell.now_ns() + shift_ns
        if shift_ns == -600 * MS:  # newer than the last, and still too old
            wait_for(lambda: driving.cell.now_ns() > last_ns + 700 * MS, PATIENCE_S, "time")
            stamp_ns = last_ns + MS
    before = driving.arm.path.T_target
    with pytest.raises(UnsafeAction, match=words) as refusal:
        driving.arm.command(make(move(0.02)), stamp_ns)
    assert driving.arm.path.T_target is before
    driving.ends(State.HOLD, row, fault, 0.35, "no action")
    row["reason"] = str(refusal.value)
    driving.is_quiet = False
    driving.moving()
    row["after"] = "goes on with the next good action"


@pytest.mark.parametrize(
    ("fault", "step", "limit"),
    [
        slow("actions far out of range", np.array([5.0, 0, 0, 0, 0, 9.0, 1]), "step_dx_m"),
        slow("target driven out of the workspace", np.array([0, 0, -0.04, 0, 0, 0, 1]), "workspace_z_m"),
        ("target pulled to where the arm folds", np.array([-0.04, 0, 0, 0, 0, 0, 1]), "margin_joint_rad"),
        slow("target turned to a joint's end stop", np.array([0, 0, 0, 0, 0, 0.09, 1]), "margin_joint_rad"),
        slow("target driven out of reach", np.array([0.04, 0.04, 0.03, 0, 0, 0, 1]), "reach"),
    ],
)
def test_wild_actions_end_at_a_limit(driving, row, fault, step, limit):
    arm = driving.arm
    driving.is_quiet = True
    wait_for(lambda: arm.snapshot().state is not State.RUNNING, PATIENCE_S, "HOLD")
    arm.home().result(PATIENCE_S)
    before, began_s = arm.snapshot().num_clips[limit], time.monotonic()
    tick_ns = (driving.cell.now_ns() // PERIOD_NS + 1) * PERIOD_NS
    while arm.snapshot().num_clips[limit] == before:
        assert time.monotonic() - began_s < PATIENCE_S
        wait_for(lambda: driving.cell.now_ns() >= tick_ns, PATIENCE_S, "the tick")  # noqa: B023
        arm.command(step, tick_ns)
        tick_ns = max(tick_ns + PERIOD_NS, driving.cell.now_ns() // PERIOD_NS * PERIOD_NS)
    driving.ends(State.HOLD, row, fault, 0.35, "no action")
    row["reason"] = f"clipped: {limit}"
    lower, upper = SafetyLimits().workspace_lower_m, SafetyLimits().workspace_upper_m
    assert np.all(driving.tcp_m() > np.array(lower) - 5e-3)
    assert np.all(driving.tcp_m() < np.array(upper) + 5e-3)
    arm.home().result(PATIENCE_S)
    driving.is_quiet = False
    row["after"] = "moves again"


@pytest.fixture(scope="module")
def own():
    """A cell that may be broken, one for each test that asks."""
    return running_cell


def test_dropped_connections_latch(own, row):
    with own() as cell, Driving(cell) as driving:
        driving.moving().cell.inject("drop_connections")
        driving.ends(State.FAULT, row, "TCP connections dropped", 1.5)
        wait_for(lambda: driving.arm.acknowledge().exception(PATIENCE_S) is None, PATIENCE_S, "recovery")
        row["after"] = "connects anew once acknowledged"


@pytest.mark.parametrize("live", ["deadman", "heartbeat"])
def test_inputs_that_fall_silent_hold(own, row, live):
    with own() as cell, Driving(cell, **{f"{live}_timeout_s": 0.3}) as driving:
        arm, pressed = driving.arm, threading.Event()
        if live == "deadman":
            assert not arm.command(move(0.01), cell.now_ns())  # not before somebody presses it
            pressed.set()

            def press():
                while not driving._closing.wait(0.05):
                    if pressed.is_set():
                        arm.hear_deadman(True)

            threading.Thread(target=press, daemon=True).start()
        driving.moving()
        if live == "deadman":
            pressed.clear()
            arm.hear_deadman(False)
            words, fault, deadline_s = "dead-man released", "dead-man released", 0.15
        else:
            arm.hear_heartbeat = lambda: None
            words, fault, deadline_s = "no heartbeat", "heartbeat stops", 0.45
        driving.ends(State.HOLD, row, fault, deadline_s, words)
        assert arm.snapshot().num_rejected[words] > 0
        if live == "deadman":
            pressed.set()
        else:
            del arm.hear_heartbeat
        driving.moving()
        row["after"] = "goes on when it is heard again"


def test_force_over_the_threshold_latches(own, row):
    """Pressed on the table, with the robot's own reflexes set out of the way and the workspace opened downwards."""
    limits = SafetyLimits(workspace_lower_m=[0.2, -0.45, -0.2], max_force_n=15.0)
    with own() as cell, Driving(cell, limits=limits, collision_force_n=150.0, collision_torque_nm=100.0) as driving:
        driving.is_quiet, tick_ns = True, cell.now_ns() // PERIOD_NS * PERIOD_NS
        while driving.arm.snapshot().state is not State.FAULT:
            tick_ns += PERIOD_NS
            wait_for(lambda: cell.now_ns() >= tick_ns, PATIENCE_S, "the tick")  # noqa: B023
            if tick_ns > cell.now_ns() - 200 * MS:
                driving.arm.command(move(z=-0.012), tick_ns)  # fast, it is pressed past both at once
        driving.ends(State.FAULT, row, "pressed on the table", 0.1, "limit breach: force_n")
        row["after"] = "latched while it presses"


def test_an_arm_that_something_holds_latches(own, row):
    """Soft, and pushed away from where it is sent by less than the threshold of forces."""
    limits = SafetyLimits(max_lag_m=0.02)
    with (
        own() as cell,
        Driving(cell, limits=limits, streaming="impedance", translational_stiffness_n_m=500.0) as driving,
    ):
        driving.moving()
        cell.inject("pull", force_n=[0.0, 25.0, 0.0])
        driving.ends(State.FAULT, row, "pulled aside, softly", 1.0, "limit breach: lag_m")
        row["after"] = "latched while it is pulled"


def test_a_pull_over_the_threshold_latches(own, row):
    with own() as cell, Driving(cell, collision_force_n=150.0, collision_torque_nm=100.0) as driving:
        driving.moving()
        cell.inject("pull", force_n=[0.0, -70.0, 60.0])
        driving.ends(State.FAULT, row, "pulled with 92 N", 0.2, "limit breach: force_n")
        cell.inject("pull", force_n=[0.0, 0.0, 0.0])
        driving.wait_s(0.3)  # what was measured of it fades
        driving.recovers(row)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SAFETY_REJECTED", "safety"),
        slow("SINGULAR_START", "singular"),
        slow("NOT_POSSIBLE", "not possible"),
        slow("INVALID_ARGUMENT", "out of range"),
    ],
)
def test_a_motion_that_the_robot_refuses_latches(driving, row, name, words):
    driving.is_quiet = True
    driving.arm.home().result(PATIENCE_S)  # ends the session: the next action begins another
    driving.cell.inject("move_status", name=name)
    driving.is_quiet = False
    driving.ends(State.FAULT, row, f"motion refused: {name.lower()}", 0.5, words)
    driving.recovers(row)


@pytest.mark.slow  # test_arm.py has one that always runs
def test_a_frozen_hand_latches(own, row):
    gripper = ArmConfig().gripper
    gripper.command_timeout_s = 1.0
    with own() as cell, Driving(cell, gripper=gripper) as driving:
        driving.moving()
        cell.inject("freeze_gripper", frozen=True)
        driving.arm.gripper.command(-1.0)
        driving.ends(State.FAULT, row, "hand does not finish a command", 1.3, "gripper")
        row["after"] = "latched"


@pytest.mark.slow  # test_arm.py has one that always runs
@pytest.mark.parametrize("death", ["freeze", "close"])
def test_a_robot_that_dies_latches(own, row, death):
    with own() as cell, Driving(cell) as driving:
        driving.moving()
        getattr(cell, death)()
        began_s = time.monotonic()
        wait_for(lambda: driving.arm.snapshot().state is State.FAULT, PATIENCE_S, "FAULT")
        snapshot = driving.arm.snapshot()
        assert "lost link" in snapshot.reason
        fault = {"freeze": "robot frozen, sockets open", "close": "robot gone, sockets closed"}[death]
        row.update(layer="arm", fault=fault, ends_in="FAULT", reason=snapshot.reason, deadline_s=1.5)
        row.update(took_s=round(time.monotonic() - began_s, 3), after="latched; needs a robot and an acknowledgement")
        assert driving.arm.acknowledge().exception(PATIENCE_S) is not None
        assert driving.arm.snapshot().state is State.FAULT


@pytest.mark.slow  # test_arm.py has one that always runs
def test_a_recovery_that_never_answers_is_left_behind(own, row):
    with own() as cell, Driving(cell, call_timeout_s=0.7) as driving:
        driving.moving()
        cell.inject("mute", commands=[10])
        cell.inject("reflex", names=["joint_reflex"])
        driving.ends(State.FAULT, row, "recovery is never answered", 0.2, "joint_reflex")
        with pytest.raises(RuntimeError, match="did not return"):
            driving.arm.acknowledge().result(PATIENCE_S)
        assert driving.arm.snapshot().state is State.FAULT
        row["after"] = "latched; the stuck thread is left behind"
        cell.freeze()


def test_a_full_disk_does_not_hold_up_the_fault(own, row, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with own() as cell, Driving(cell, fault_dir=str(blocked)) as driving:
        driving.moving().cell.inject("reflex", names=["joint_reflex"])
        driving.ends(State.FAULT, row, "fault recording cannot be written", 0.2, "joint_reflex")
        wait_for(lambda: "could not be written" in caplog.text, PATIENCE_S, "the message")
        driving.recovers(row)


class Loop:
    """The runtime with a scripted policy on a clock of its own."""

    def __init__(self):
        self.policy = ScriptedPolicy()
        self.world = World(self.policy)
        for _ in range(4):
            self.world.tick()
        assert self.world.runtime.last.source == "policy"

    def holds(self, row, fault, words="", ticks=8, observe=True):
        num_ticks = 0
        while self.world.tick(observe).source != "hold":
            num_ticks += 1
            assert num_ticks < ticks, f"still acting after {fault}"
        sent = len(self.world.sent)
        assert words in self.world.runtime.last.reason
        row.update(layer="policy loop", fault=fault, ends_in="HOLD", reason=self.world.runtime.last.reason)
        row.update(deadline_s=0.1 * ticks, took_s=round(0.1 * (num_ticks + 1), 1))
        self.world.tick(observe)
        assert len(self.world.sent) == sent

    def goes_on(self, row):
        sources = [self.world.tick().source for _ in range(4)]
        assert sources[-1] == "policy"
        row["after"] = "goes on by itself"


def test_a_killed_policy_server_holds(row):
    loop = Loop()
    loop.policy.is_dead = True
    loop.holds(row, "policy server killed", "no chunk")
    loop.policy.is_dead = False
    loop.goes_on(row)


@pytest.mark.parametrize("source", ["every camera", "arm states"])
def test_stale_observations_hold(row, source):
    loop, world = Loop(), None
    world = loop.world
    for _ in range(8):
        world.now_ns += PERIOD_NS
        if source == "arm states":
            world.observer.add_picture("third_person", world.now_ns - 20 * MS, np.zeros((2, 2, 3), np.uint8))
        tick = world.runtime.tick(world.now_ns)
    assert tick.source == "hold"
    assert "stale observation" in tick.reason
    row.update(layer="policy loop", fault=f"{source} stale", ends_in="HOLD", reason=tick.reason)
    loop.goes_on(row)


@pytest.mark.parametrize("fault", ["chunk comes twice", "chunk comes when nobody waits", "chunk comes too late"])
def test_chunks_out_of_place_move_nothing(row, fault):
    loop = Loop()
    executor, world = loop.world.runtime.executor, loop.world
    stamp_ns = world.now_ns - (3000 * MS if fault == "chunk comes too late" else 0)
    wild = ActionChunk(np.full((8, 7), 0.1, np.float32), stamp_ns, PERIOD_NS, policy_version=9)
    if fault == "chunk comes too late":
        executor.clear()
        executor.asked()
        executor._executed.extend((stamp_ns + k * PERIOD_NS, np.zeros(7)) for k in range(30))
        executor.load(wild)
        assert executor.tick(world.now_ns + PERIOD_NS) is None
        assert executor.counts.useless_chunks == 1
    else:
        executor.load(wild)
        if fault == "chunk comes twice":
            executor.load(wild)
        for _ in range(6):
            world.tick()
    assert all(abs(value) != 0.2 for value, _, _ in world.sent)  # 0.1 + 0.1, had one been executed
    assert executor.policy_version != 9
    row.update(layer="policy loop", fault=fault, ends_in="refused", reason="not waited for, or nothing left of it")
    row["after"] = "goes on with the right chunk"


def test_a_fault_ends_the_policys_run(row):
    loop = Loop()
    loop.world.runtime.arm_state("FAULT")
    loop.holds(row, "arm in FAULT while a policy runs", "", ticks=1)
    loop.world.runtime.arm_state("IDLE")
    assert loop.world.tick().source == "hold"
    row["after"] = "only a person starts it again"


def test_a_policy_that_raises_a_bridge_error_holds(row):
    loop = Loop()

    def fail(observation, deadline_s):
        raise BridgeTimeout("handshake refused")

    loop.policy.submit = fail
    loop.holds(row, "policy refuses the handshake", "handshake refused")
    row["after"] = "asks again each tick"


@pytest.mark.parametrize("fault", ["camera unplugged", "camera frozen", "pictures dropped"])
def test_cameras(row, fault):
    feeder, seen = Feeder(), []
    camera = reader(feeder, seen, frame_timeout_s=0.3)
    try:
        for number in range(1, 6):
            feeder.push(number)
            time.sleep(0.01)
        wait_for(lambda: len(seen) == 5, PATIENCE_S, "pictures")
        if fault == "camera frozen":
            for _ in range(6):
                feeder.push(5)
                time.sleep(0.01)
            wait_for(lambda: camera.health.state == "FROZEN", PATIENCE_S, "FROZEN")
            assert len(seen) == 5
        elif fault == "camera unplugged":
            wait_for(lambda: camera.health.state == "LOST", PATIENCE_S, "LOST")
        else:
            feeder.push(9)
            wait_for(lambda: camera.health.num_dropped == 3, PATIENCE_S, "the count")
        state = camera.health.state
        feeder.push(20)
        wait_for(lambda: camera.health.state == "OK" and seen[-1][0] == 20, PATIENCE_S, "its return")
    finally:
        camera.close()
    row.update(layer="camera", fault=fault, ends_in="HOLD of the policy (stale)" if state != "OK" else "counted")
    row.update(reason=state, after="pictures go on by themselves")
