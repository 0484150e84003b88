"""Streams of any actions through the real driver and client library, judged by the FR3's motion limits.

Two judges. The emulated arm, in lock step, keeps each command that it gets, one a millisecond; differences are held
to the limits of the data sheet. `franka-sim` with its limits enforced answers a signal that breaks them as the robot
does, by ending the motion with the reflex's name. It pins other versions of what we use, so it gets an environment of
its own. It does not wait for the client: the command that a busy machine brings too late is made up by the judge, and
what it makes up breaks the limits (3 of 6 single motions of the library at a tenth of the limits did). So it is made to
wait for each command as the emulated arm does, and its clock runs at half the wall's.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bridge.embodiment import Embodiment
from robot.arm import ArmDriver
from robot.config import ArmConfig, GripperConfig
from robot.safety import SafetyLimits, State
from tests.robot.cell import loopback, running_cell, wait_for
from tests.robot.test_target import wild

FRANKA_SIM = "franka-sim==1.1.7"
SLOWER = 2
SERVE = """
import logging, sys, time, types
import franka_sim.mujoco_franka_sim as physics, franka_sim.server.motion_session as session
import franka_sim.server.state_stream as states
from franka_sim import FrankaSimServer
slower, patience_s = float(sys.argv[2]), 0.1
physics.time = session.time = states.time = types.SimpleNamespace(
    perf_counter=lambda: time.perf_counter() / slower, monotonic=lambda: time.monotonic() / slower,
    sleep=lambda duration_s: time.sleep(slower * duration_s), time=time.time)
wait = FrankaSimServer._drain_gate  # for the answer to the last state
FrankaSimServer._DRAIN_GATE_TIMEOUT = patience_s
FrankaSimServer._drain_gate = lambda self, answer_deadline=0.0: wait(self, session.time.perf_counter() + patience_s)
logging.basicConfig(level=logging.INFO)
FrankaSimServer(host=sys.argv[1], enable_gripper=False, enforce_motion_limits=True).start()
"""
PERIOD_NS = 100_000_000
PATIENCE_S = 60.0
ACCELERATION_RAD_S2, JERK_RAD_S3 = 10.0, 5000.0  # of every joint of an FR3
# As launch/robot.launch.yaml sets them for a real arm, and as they are without it: what no arm can follow.
REAL = SafetyLimits(max_speed_m_s=0.3, max_acceleration_m_s2=3.0, max_turn_rad_s2=8.0)
step = st.floats(-0.05, 0.05)
actions = st.lists(st.lists(wild | step, min_size=7, max_size=7), min_size=1, max_size=8)
any_stream = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # the arm goes on from where it is, so a failure cannot be made smaller
    suppress_health_check=list(HealthCheck),
)


def arm_model(path: Path) -> Path:
    """franky-sim's FR3 without its meshes, geoms and hand: seven joints."""
    spec = importlib.util.find_spec("franky_sim")
    if spec is None or spec.origin is None:
        pytest.skip("franky-sim is not installed")
    root = ET.parse(Path(spec.origin).parent / "assets/fr3.xml").getroot()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("geom", "mesh", "material") or (child.tag == "body" and "hand" in child.get("name", "")):
                parent.remove(child)
    for tag in ("equality", "tendon", "keyframe", "contact", "sensor"):
        for element in root.findall(tag):
            root.remove(element)
    for actuators in root.findall("actuator"):
        for actuator in list(actuators):
            if "joint" not in actuator.attrib or "finger" in actuator.get("joint", ""):
                actuators.remove(actuator)
    ET.ElementTree(root).write(path)
    return path


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The address of a running franka-sim, and its output."""
    folder = tmp_path_factory.mktemp("franka_sim")
    if shutil.which("uv") is None or shutil.which("chrt") is None:
        pytest.skip("uv makes the environment, chrt gives the priority")
    if subprocess.run(["chrt", "-f", "50", "true"], check=False).returncode:
        pytest.skip("no real-time priority for this user")
    python = folder / "env/bin/python"
    subprocess.run(["uv", "venv", "-q", "--python", sys.executable, folder / "env"], check=True, timeout=100)
    install = ["uv", "pip", "install", "-q", "--python", python, FRANKA_SIM]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if installed.returncode:
        pytest.skip(f"no package index: {installed.stderr.strip()[-300:]}")
    address = loopback()
    command = ["chrt", "-f", "50", python, "-c", SERVE, address, str(SLOWER)]
    environment = os.environ | {"FR3_MJCF": str(arm_model(folder / "fr3.xml"))}
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    yield address, folder / "log.txt", server
    server.send_signal(signal.SIGINT)
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextmanager
def connected(address, now_ns, **changes):
    """A driver, homed."""
    config = ArmConfig(
        host=address,
        gripper=GripperConfig(enabled=False),
        action_timeout_s=1.0,
        state_hold_s=1.0,
        state_fault_s=4.0,
        **changes,
    )
    arm = ArmDriver(config, Embodiment(), now_ns)
    arm.start()
    try:
        wait_for(lambda: arm.snapshot().state is not State.DISCONNECTED, PATIENCE_S, "connecting")
        arm.home().result(PATIENCE_S)
        yield arm
    finally:
        arm.close()


def drive(arm, stream, why=lambda: ""):
    """One action each period of the arm's clock, then three periods of silence."""
    tick_ns = (arm.now_ns() // PERIOD_NS + 1) * PERIOD_NS
    for action in [*stream, None, None, None]:
        wait_for(lambda: arm.now_ns() >= tick_ns, PATIENCE_S, "the next tick")  # noqa: B023
        if action is not None:
            assert arm.command(np.array(action), tick_ns), f"{arm.snapshot().reason} {arm.num_rejected}\n{why()}"
        # A busy machine costs a tick.
        tick_ns = max(tick_ns + PERIOD_NS, arm.now_ns() // PERIOD_NS * PERIOD_NS)
    assert arm.snapshot().state is not State.FAULT, f"{arm.snapshot().reason}\n{why()}"


class Commands:
    """What the emulated arm is told, one a millisecond: a list of joints [7] for each motion, from rest to rest."""

    def __init__(self, robot):
        self.motions, self._robot, self._motion, self._apply = [[]], robot, None, robot.tracker.apply
        robot.tracker.apply = self._keep

    def clear(self):
        self.motions = [[]]

    def _keep(self, generator, command):
        robot, motions = self._robot, self.motions
        if robot.motion is not self._motion:
            self._motion = robot.motion
            motions[-1] += motions[-1][-1:] * 3
            motions.append([robot.state.value.q_d.copy()] * 3)
            # On a machine so busy that the first answers a state that has passed, what follows until the client has
            # caught up is lost: an arm with such a client would jump, too. What counts begins after that.
            if command["message_id"] != robot.state.message_id:
                motions[-1] = []
                self._apply(generator, command)
                return
        motions[-1].append(command["q"].copy())
        self._apply(generator, command)


@pytest.fixture(scope="module")
def emulated():
    """A driver at the emulated arm, and all commands that this gets."""
    with running_cell() as cell:
        commands = Commands(cell.cell.robot)
        high = SafetyLimits(workspace_lower_m=[0.25, -0.45, 0.25])  # above the table: contacts are another reflex
        with connected(cell.address, cell.now_ns, limits=high) as arm:
            yield arm, commands


def check_commands(arm, commands):
    """By differences of the commands themselves."""
    motions = [np.array(motion) for motion in commands.motions if len(motion) > 3]
    for number, q_rad in enumerate(motions):
        speed, acceleration, jerk = (np.diff(q_rad, n=n, axis=0) * 1e3**n for n in (1, 2, 3))
        where = f"motion {number} of {[len(motion) for motion in motions]}"
        assert np.abs(acceleration).max() <= ACCELERATION_RAD_S2, where
        assert np.abs(jerk).max() <= JERK_RAD_S3, (where, np.argwhere(np.abs(jerk) > JERK_RAD_S3))
        allowed = np.array([arm.body.speed_limits(q, v) for q, v in zip(q_rad[1::10], speed[::10], strict=True)])
        assert np.all(np.abs(speed[::10]) <= allowed), where
    assert sum(map(len, motions)) > 100


def test_the_commands_of_one_wild_stream_keep_every_joint_limit(emulated):
    arm, commands = emulated
    commands.clear()
    drive(arm, [[0.1, -9.0, 0.1, 0.1, 5e5, -0.1, 1.0]] * 4 + [[-0.1, 9.0, -0.1, -0.1, -5e5, 0.1, 1.0]] * 5)
    check_commands(arm, commands)


def test_a_session_that_ends_in_full_motion_or_when_it_has_just_begun_keeps_every_joint_limit(emulated):
    arm, commands = emulated
    commands.clear()
    for num_steps in (3, 1, 1):
        arm.home().result(PATIENCE_S)
        for _ in range(num_steps):
            last_ns = arm._last_action_ns
            wait_for(lambda: arm.now_ns() >= last_ns + PERIOD_NS, PATIENCE_S, "the last step's end")  # noqa: B023
            wait_for(lambda: arm.command(np.array([0, 0.05, 0, 0, 0.1, 0, 1.0]), arm.now_ns()), PATIENCE_S, "a step")
        wait_for(lambda: arm.now_ns() > arm._last_action_ns + 30_000_000, PATIENCE_S, "time")
    arm.home().result(PATIENCE_S)
    check_commands(arm, commands)
    assert len(commands.motions) > 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_any_stream_keep_every_joint_limit(emulated):
    arm, commands = emulated

    @settings(any_stream, max_examples=30)
    @given(actions)
    def run(stream):
        commands.clear()
        arm.home().result(PATIENCE_S)  # else turn after turn leads to contacts, which are another reflex
        drive(arm, stream)
        check_commands(arm, commands)

    run()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("streaming", "limits"), [("position", REAL), ("position", SafetyLimits()), ("impedance", REAL)]
)
def test_no_stream_makes_the_enforced_limits_of_franka_sim_end_the_motion(judge, streaming, limits):
    address, log, server = judge
    began_ns = time.time_ns()
    now_ns = lambda: began_ns + (time.time_ns() - began_ns) // SLOWER  # noqa: E731
    changes = {"streaming": streaming, "limits": limits, "realtime": True}
    with connected(address, now_ns, **changes) as arm:

        @settings(any_stream, max_examples=30)
        @given(actions)
        def run(stream):
            drive(arm, stream, lambda: log.read_text()[-2000:])

        run()
        assert arm.num_actions > 60
    assert server.poll() is None
