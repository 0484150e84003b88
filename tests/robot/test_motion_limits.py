"""Our stream of commands before another's judge: `franka-sim` with the FR3's motion limits enforced, which answers a
signal that breaks them as the robot does, by ending the motion with the reflex's name. It pins other versions of what
we use, so it gets an environment of its own, and it is not in lock step, so it needs a real-time priority."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from bridge.embodiment import Embodiment
from robot.arm import ArmDriver
from robot.config import ArmConfig, GripperConfig
from robot.safety import SafetyLimits, State
from tests.robot.cell import loopback, wait_for

FRANKA_SIM = "franka-sim==1.1.7"
SERVE = """
import logging, sys
from franka_sim import FrankaSimServer
logging.basicConfig(level=logging.INFO)
FrankaSimServer(host=sys.argv[1], enable_gripper=False, enforce_motion_limits=True).start()
"""
PERIOD_NS = 100_000_000
PATIENCE_S = 60.0


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
    command = ["chrt", "-f", "50", python, "-c", SERVE, address]
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_motion_limit_is_broken_by_the_impedance_stream(judge):
    """Twenty seconds of everything a policy may ask for: walks, turns, reversals, full steps, silence."""
    address, log, server = judge
    # Speeds and accelerations as launch/robot.launch.yaml sets them for a real arm.
    limits = SafetyLimits(max_speed_m_s=0.3, max_acceleration_m_s2=9.0, max_turn_rad_s2=17.0)
    no_hand = GripperConfig(enabled=False)
    config = ArmConfig(
        host=address, streaming="impedance", gripper=no_hand, limits=limits, realtime=True, dynamics_factor=0.3
    )
    arm = ArmDriver(config, Embodiment(), time.time_ns)
    arm.start()
    rng, states = np.random.default_rng(5), set()
    try:
        wait_for(lambda: arm.snapshot().state is not State.DISCONNECTED, PATIENCE_S, "connecting")
        arm.home().result(PATIENCE_S)
        T_home = arm.snapshot().streamed.T_base_target
        tick_ns = (time.time_ns() // PERIOD_NS + 1) * PERIOD_NS
        for step in range(200):
            if step % 10 == 0:
                way = rng.uniform(-1, 1, 6) * [0.03, 0.03, 0.02, 0.04, 0.04, 0.08] * rng.choice([0.3, 1.0, 2.0])
            away_m = arm.snapshot().streamed.T_base_target[:3, 3] - T_home[:3, 3]
            way[:3] = np.where(np.abs(away_m) > 0.08, -np.sign(away_m) * np.abs(way[:3]), way[:3])
            time.sleep(max(0.0, (tick_ns - time.time_ns()) * 1e-9))
            if step % 50 < 45:  # then half a second of silence: HOLD
                arm.command(np.append(way, 1.0), tick_ns)
            tick_ns = max(tick_ns + PERIOD_NS, time.time_ns() // PERIOD_NS * PERIOD_NS)  # a busy machine costs a tick
            states.add(arm.snapshot().state)
            assert arm.snapshot().state is not State.FAULT, f"{arm.snapshot().reason}\n{log.read_text()[-2000:]}"
        assert states >= {State.RUNNING, State.HOLD}
        assert arm.snapshot().num_actions > 150
        assert server.poll() is None
    finally:
        arm.close()
