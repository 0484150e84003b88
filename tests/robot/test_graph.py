"""The whole robot side as processes: stand-in cell, cameras, arm and runtime, with a policy server that dies."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from bridge.pose import ACTION_NAMES
from bridge.telemetry import TelemetrySubscriber
from robot.launch_file import ROOT
from robot.up import Graph
from tests.robot.cell import loopback

PATIENCE_S = 60.0
UP_AND_DOWN = """
import sys, threading
import numpy as np
from bridge.policy_server import PolicyServer
from robot.params import load_embodiment

def infer(observations):
    up = [0.004 if o.state[2] < 0.35 else -0.004 for o in observations]
    actions = np.zeros((len(up), 8, 7), np.float32)
    actions[:, :, 2], actions[:, :, 6] = np.array(up)[:, None], 1.0
    return actions, 3

PolicyServer(sys.argv[1], load_embodiment("fr3_tabletop"), infer, max_batch=1).serve_forever(threading.Event())
"""


class Probe:
    """Listens to everything, and pulls the levers."""

    def __init__(self, domain: int, graph: Graph):
        self.graph = graph
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
        self.node = Node("probe", context=self.context, enable_rosout=False)
        self.executor = EventsExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.status, self.stamps, self.target_z, self.last, self.clients = {}, {}, [], {}, {}
        for topic in ("safety_state", "runtime_status"):
            self.node.create_subscription(DiagnosticStatus, topic, lambda m, t=topic: self._on_status(t, m), 10)
        for camera in ("third_person", "wrist"):
            topics = ((Image, f"{camera}/image_raw"), (CameraInfo, f"{camera}/camera_info"))
            for kind, topic in topics:
                self.node.create_subscription(
                    kind, topic, lambda m, t=topic: self._on_stamped(t, m), QoSProfile(depth=60)
                )
        for kind, topic in ((PoseStamped, "target_pose"), (JointState, "joint_states"), (JointState, "action")):
            self.node.create_subscription(kind, topic, lambda m, t=topic: self._on_stamped(t, m), 50)
        self.teleop = self.node.create_publisher(JointState, "teleop/action", 10)

    def close(self):
        self.executor.remove_node(self.node)
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def _on_status(self, topic, message):
        self.status[topic] = {pair.key: pair.value for pair in message.values}

    def _on_stamped(self, topic, message):
        stamp = message.header.stamp
        self.stamps.setdefault(topic, []).append(stamp.sec + stamp.nanosec * 1e-9)
        self.last[topic] = message

    def output(self):
        return self.graph._out.getvalue()

    def state(self, topic="safety_state"):
        return self.status.get(topic, {}).get("state", "")

    def num_refused(self):
        """Of the actions that the arm refused for their stamps."""
        return sum(int(self.status["safety_state"].get(f"refused.{reason}", 0)) for reason in ("early", "late"))

    def source(self):
        return self.last["action"].header.frame_id if "action" in self.last else ""

    def target_m(self):
        p = self.last["target_pose"].pose.position
        return np.array([p.x, p.y, p.z])

    def wait(self, condition, what, timeout_s=PATIENCE_S):
        until_s = time.monotonic() + timeout_s
        while not condition():
            assert not self.graph.ended(), f"{self.graph.ended()} {self.output()[-3000:]}"
            assert time.monotonic() < until_s, f"{what}: not within {timeout_s} s; {self.status}"
            self.executor.spin_once(timeout_sec=0.05)

    def spin(self, duration_s):
        until_s = time.monotonic() + duration_s
        while time.monotonic() < until_s:
            self.executor.spin_once(timeout_sec=0.05)

    def call(self, service):
        if (client := self.clients.get(service)) is None:
            client = self.clients[service] = self.node.create_client(Trigger, service)
            self.wait(client.service_is_ready, service)
            self.spin(0.5)  # the node's way back is found apart from ours to it, and an answer before that is lost
        future = client.call_async(Trigger.Request())
        self.wait(future.done, f"an answer of {service}")
        return future.result()

    def send_teleop(self, *action):
        self.teleop.publish(JointState(name=list(ACTION_NAMES), position=list(map(float, action))))


@pytest.fixture(scope="module")
def endpoints():
    port = random.randint(20_000, 32_000)  # the kernel gives those from 32768 on to whoever connects
    return [f"tcp://127.0.0.1:{port + n}" for n in range(4)]


@pytest.fixture(scope="module")
def probe(endpoints):
    domain = random.randint(1, 100)
    os.environ["ROS_DOMAIN_ID"], os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = str(domain), "LOCALHOST"
    control, frames, policy, telemetry = endpoints
    args = {"host": loopback(), "cell_control": control, "cell_frames": frames, "policy_endpoint": policy}
    args["telemetry"] = telemetry
    with Graph("launch/cell.launch.yaml", args, io.StringIO()) as graph:
        probe = Probe(domain, graph)
        probe.wait(lambda: probe.state() == "IDLE" and probe.state("runtime_status"), "the graph's start")
        yield probe
        probe.close()


@pytest.fixture
def policy_server(endpoints):
    running = []

    def start():
        running.append(subprocess.Popen([sys.executable, "-c", UP_AND_DOWN, endpoints[2]], cwd=ROOT))
        return running[-1]

    yield start
    for child in running:
        child.kill()
        child.wait()


def test_pictures_and_states_arrive_complete_and_evenly_stamped(probe):
    assert probe.call("home").success
    probe.stamps.clear()
    probe.wait(lambda: len(probe.stamps.get("wrist/image_raw", [])) >= 40, "40 pictures")
    probe.wait(lambda: "wrist/camera_info" in probe.last, "the calibration")
    for camera in ("third_person", "wrist"):
        gaps_s = np.diff(probe.stamps[f"{camera}/image_raw"])
        assert np.all(np.abs(gaps_s - 1 / 30) < 2e-3), (gaps_s.tolist(), probe.output())  # none lost, none twice
    image, info = probe.last["wrist/image_raw"], probe.last["wrist/camera_info"]
    assert (image.encoding, image.width, image.height, len(image.data)) == ("rgb8", 640, 480, 640 * 480 * 3)
    assert np.asarray(image.data).std() > 5  # something is to be seen
    assert info.k[0] == 462.0
    assert image.header.frame_id == "wrist_optical_frame"
    assert np.all(np.diff(probe.stamps["joint_states"]) > 0)
    joints = probe.last["joint_states"]
    assert joints.name[-1] == "gripper_opening"
    assert len(joints.position) == 8


def test_a_hand_at_the_device_moves_the_target_by_exactly_what_it_says(probe):
    probe.call("home")
    for _ in range(3):  # where the clock's messages reach the arm late it refuses an action as early
        probe.spin(0.5)
        before, refused = probe.target_m(), probe.num_refused()
        for _ in range(5):
            probe.send_teleop(0.01, 0.004, 0, 0, 0, 0, 1)
            probe.spin(0.12)
        moved = lambda: np.allclose(probe.target_m() - before, [0.05, 0.02, 0.0], atol=1e-3)  # noqa: B023, E731
        probe.wait(lambda: moved() or probe.num_refused() > refused, "arriving", 20.0)  # noqa: B023
        probe.spin(0.5)
        if probe.num_refused() == refused:
            break
    assert probe.target_m() - before == pytest.approx([0.05, 0.02, 0.0], abs=1e-3)
    assert probe.last["action"].header.frame_id == "teleop"
    probe.wait(lambda: probe.state() == "HOLD", "HOLD")


@pytest.mark.slow  # test_runtime.py has the rule, the test before this one the way through the graph
def test_teleop_takes_the_arm_from_a_policy_and_gives_it_back(probe, policy_server, tmp_path):
    """`cotwin teleop` plays a recorded device: twelve readings with the clutch held, 1.5 cm to the left in all."""
    policy_server()
    probe.call("home")
    assert probe.call("runtime_node/start").success
    probe.wait(lambda: probe.source() == "policy", "the policy")
    held = {"motion": [0, 0.125, 0, 0, 0, 0], "clutch": True, "deadman": True, "pressed": []}
    idle = held | {"motion": [0] * 6, "clutch": False}
    readings = [idle] * 40 + [held] * 12 + [idle | {"pressed": ["success"]}]  # first time for all to find the device
    path = tmp_path / "device.jsonl"
    path.write_text("".join(json.dumps(reading) + "\n" for reading in readings))
    marks, sources = [], []
    probe.node.create_subscription(String, "teleop/mark", lambda m: marks.append(m.data), 10)
    keep = lambda m: sources.append((m.header.frame_id, m.position[1]))  # noqa: E731
    probe.node.create_subscription(JointState, "action", keep, 50)
    command = [sys.executable, "-m", "cotwin", "teleop", "device=playback", f"path={path}", "use_sim_time=true"]
    with subprocess.Popen(command, cwd=ROOT) as teleop:
        try:
            probe.wait(lambda: marks == ["success"], "the mark")
            probe.wait(lambda: sources[-1][0] == "policy", "handing back")
        finally:
            teleop.terminate()
    by_hand = [dy for source, dy in sources if source == "teleop"]
    assert sum(by_hand) == pytest.approx(12 * 0.125 * 0.5 * 0.2 * 0.1)
    first = next(n for n, (source, _) in enumerate(sources) if source == "teleop")
    last = max(n for n, (source, _) in enumerate(sources) if source == "teleop")
    assert all(source == "teleop" for source, _ in sources[first : last + 1])  # the policy waited meanwhile
    assert probe.call("runtime_node/stop").success


def test_a_killed_policy_server_means_hold_and_its_return_means_motion(probe, policy_server, endpoints):
    server = policy_server()
    probe.call("home")
    assert probe.call("runtime_node/start").success
    probe.wait(lambda: probe.state("runtime_status") == "RUNNING", "the policy's start")
    probe.wait(lambda: probe.source() == "policy", "the first action")
    z = probe.target_m()[2]
    probe.wait(lambda: abs(probe.target_m()[2] - z) > 0.01, "motion")
    server.kill()
    probe.wait(lambda: probe.state("runtime_status") == "HOLD", "HOLD of the runtime")
    probe.wait(lambda: probe.state() == "HOLD", "HOLD of the arm")
    held = probe.target_m()
    probe.spin(1.0)
    assert np.allclose(probe.target_m(), held, atol=1e-6)
    assert "BridgeTimeout" in probe.status["runtime_status"]["reason"]
    policy_server()
    probe.wait(lambda: probe.state("runtime_status") == "RUNNING", "going on")
    probe.wait(lambda: not np.allclose(probe.target_m(), held, atol=0.005), "motion")
    assert probe.status["runtime_status"]["policy_versions"] == "[3]"
    viewer, heard = TelemetrySubscriber(endpoints[3]), {}
    until_s = time.monotonic() + 10.0
    while len(heard) < 2 and time.monotonic() < until_s:
        heard |= {name: fields for name, fields, _ in viewer.poll(1.0)}
    viewer.close()
    assert heard["runtime"]["state"] == "RUNNING"
    assert heard["runtime"]["tick_jitter_ms_p99"] >= 0.0
    assert heard["policy_client"]["policy_version"] == 3
    assert probe.call("runtime_node/stop").success
    probe.wait(lambda: probe.state("runtime_status") == "IDLE", "the stop")


def test_stop_latches_and_the_policy_does_not_start_by_itself_again(probe, policy_server):
    policy_server()
    probe.call("home")
    probe.call("runtime_node/start")
    probe.wait(lambda: probe.state() == "RUNNING", "motion")
    assert probe.call("stop").success
    probe.wait(lambda: probe.state() == "FAULT", "FAULT")
    assert not probe.call("home").success
    assert not probe.call("runtime_node/start").success
    assert probe.call("acknowledge").success
    probe.wait(lambda: probe.state() == "IDLE", "IDLE")
    probe.spin(0.7)  # without a motion the target is where the arm is, and that comes to rest
    held = probe.target_m()
    probe.spin(1.0)
    assert np.allclose(probe.target_m(), held, atol=1e-3)
    assert probe.state("runtime_status") == "IDLE"


def test_a_killed_cell_ends_the_graph_with_its_name(probe):
    """Last in this file: the graph is gone afterwards."""
    os.kill(probe.graph.pid("cell"), signal.SIGKILL)
    assert probe.graph.wait() == ("cell", -signal.SIGKILL)
    began_s = time.monotonic()
    probe.graph.stop()
    assert time.monotonic() - began_s < 15.0
    assert set(probe.graph.ended()) == {"cell", "camera_node", "arm_node", "runtime_node"}
