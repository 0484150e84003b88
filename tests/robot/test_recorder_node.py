"""The recorder as a process of its own, fed over real topics."""

import array
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from bridge import pose
from bridge.dataset import DatasetStore, decode_frames, read_episode, video_path
from bridge.demo_stream import DemoReceiver
from bridge.keys import Keys
from tests.bridge.small_episodes import HEIGHT, WIDTH, small_embodiment

rclpy = pytest.importorskip("rclpy")
from geometry_msgs.msg import PoseStamped  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402
from sensor_msgs.msg import Image, JointState  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402

LIMIT_S = 20.0


class Cell:
    """Publishes what cameras and arm would, on time stamps of its own, as fast as one asks."""

    def __init__(self, domain_id: int):
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain_id)
        self.node = rclpy.create_node("cell", context=self.context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        many = QoSProfile(depth=1000)
        self.images = {c: self.node.create_publisher(Image, f"{c}/image_raw", many) for c in ("third_person", "wrist")}
        names = ("tcp_pose", "target_pose", "requested_pose")
        self.poses = {name: self.node.create_publisher(PoseStamped, name, many) for name in names}
        self.joints = self.node.create_publisher(JointState, "joint_states", many)
        self.gripper = self.node.create_publisher(JointState, "gripper_command", many)
        self.tick = 0

    def stamp(self, message):
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(50_000_000_000 + self.tick * 16_666_667, 10**9)
        return message

    def run(self, ticks: int) -> None:
        """60 Hz states, a picture every second tick."""
        for _ in range(ticks):
            x_m = 0.4 + 0.001 * self.tick
            for publisher in self.poses.values():
                message = self.stamp(PoseStamped())
                message.pose.position.x, message.pose.orientation.x, message.pose.orientation.w = x_m, 1.0, 0.0
                publisher.publish(message)
            self.joints.publish(self.stamp(JointState(name=["j", "gripper_opening"], position=[0.0, 0.02])))
            self.gripper.publish(self.stamp(JointState(name=["sent", "requested"], position=[-1.0, -0.5])))
            if self.tick % 2 == 0:
                for camera, publisher in self.images.items():
                    shade = 20 + self.tick // 2 + (100 if camera == "wrist" else 0)
                    image = Image(height=HEIGHT, width=WIDTH, step=3 * WIDTH, encoding="rgb8")
                    image.data = array.array("B", bytes([shade]) * (HEIGHT * WIDTH * 3))
                    publisher.publish(self.stamp(image))
            self.tick += 1
            time.sleep(0.002)
        time.sleep(0.2)  # until all has arrived

    def call(self, kind, name, **fields):
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(LIMIT_S), f"no service {name}"
        future = client.call_async(kind.Request(**fields))
        self.executor.spin_until_future_complete(future, LIMIT_S)
        self.node.destroy_client(client)
        assert future.done(), f"no answer of {name}"
        return future.result()

    def close(self) -> None:
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def ros(monkeypatch):
    domain_id = random.randint(1, 100)
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setenv("ROS_DOMAIN_ID", str(domain_id))
    cells, processes = [], []

    def make_cell() -> Cell:
        cells.append(Cell(domain_id))
        return cells[-1]

    def start(**parameters) -> subprocess.Popen:
        settings = [word for key, value in parameters.items() for word in ("-p", f"{key}:={value}")]
        command = [sys.executable, "-m", "robot.recorder_node", "--ros-args", *settings]
        processes.append(subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield make_cell, start
    for cell in cells:
        cell.close()
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def settings(tmp_path):
    small_embodiment().save(tmp_path / "contract.json")
    folders = {"spool_dir": tmp_path / "spool", "dataset_root": tmp_path / "data"}
    return folders | {"embodiment": tmp_path / "contract.json", "domain": "stand_in"}


def wait_for_streams(cell: Cell) -> None:
    limit_s = time.monotonic() + LIMIT_S
    topics = [*cell.images.values(), *cell.poses.values(), cell.joints, cell.gripper]
    while not all(topic.get_subscription_count() for topic in topics):
        assert time.monotonic() < limit_s
        time.sleep(0.05)


@pytest.mark.slow  # it waits as long as the recorder does
def test_no_episode_starts_without_its_streams(ros, settings):
    make_cell, start = ros
    start(**settings)
    cell = make_cell()
    answer = cell.call(Trigger, "start_episode")
    assert not answer.success
    assert "no tcp_pose, target_pose, requested_pose, opening, gripper in 5.0 s" in answer.message


def test_episodes_survive_kill_9(ros, settings):
    make_cell, start = ros
    process, cell = start(**settings), make_cell()
    wait_for_streams(cell)
    client = cell.node.create_client(Trigger, "start_episode")
    assert client.wait_for_service(LIMIT_S)
    started = client.call_async(Trigger.Request())
    cell.executor.spin_once(timeout_sec=0.3)
    assert not started.done()  # it waits until all streams are heard
    cell.run(6)
    cell.executor.spin_until_future_complete(started, LIMIT_S)
    assert started.result().success
    cell.run(30)
    first_tick = cell.tick
    assert not cell.call(Trigger, "start_episode").success
    assert cell.call(Trigger, "end_episode").success
    cell.run(10)  # a person thinks about how it went
    answer = cell.call(SetBool, "save_episode", data=True)
    assert answer.success, answer.message
    figures = json.loads(answer.message)
    num = figures["rows"]
    assert 15 <= num <= 18  # of the ticks after the answer, and of those before, as soon as it has heard all streams
    assert figures["episode"] == "0"
    assert "start one first" in cell.call(SetBool, "save_episode", data=True).message

    assert cell.call(Trigger, "start_episode").success
    cell.run(12)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(settings["spool_dir"].glob("recordings/*.partial"))

    start(**settings)
    cell = make_cell()  # the old one would go on asking the dead process until its lease ends
    wait_for_streams(cell)
    cell.run(6)
    assert cell.call(Trigger, "start_episode").success
    cell.run(20)
    assert json.loads(cell.call(SetBool, "save_episode", data=False).message)["episode"] == "1"
    assert not list((settings["spool_dir"] / "recordings").iterdir())
    (interrupted,) = (settings["spool_dir"] / "interrupted").iterdir()
    assert (interrupted / "rows.journal").stat().st_size > 0  # for `cotwin data repair`

    root = settings["dataset_root"]
    assert [(e["success"], e["domain"]) for e in DatasetStore.open(root).episodes()] == [
        (True, "stand_in"),
        (False, "stand_in"),
    ]
    rows = read_episode(root, 0)
    np.testing.assert_allclose(np.diff(rows["capture_stamp_ns"]), 33_333_334, atol=2)
    np.testing.assert_allclose(rows["action"][:-1, 0], 0.002, atol=1e-6)
    np.testing.assert_allclose(rows["action"][:, 6], -1.0)
    np.testing.assert_allclose(rows["requested_action"][:, 6], -0.5)
    expected = pose.state_vector(pose.pose([0.4, 0, 0], pose.matrix_from_quat_xyzw(np.array([1.0, 0, 0, 0]))), 0.02)
    np.testing.assert_allclose(rows["observation.state"][:, 1:], np.tile(expected[1:], (num, 1)), atol=1e-6)
    shades = [round(frame.mean()) for frame in decode_frames(video_path(root, "wrist", 0))]
    last = 120 + (first_tick - 1) // 2
    assert shades == pytest.approx(range(last - num + 1, last + 1), abs=2)


def test_episodes_travel_to_a_learner(ros, settings, tmp_path):
    make_cell, start = ros
    store = DatasetStore.create(tmp_path / "learner", "lab/cube", small_embodiment(), 30)
    learner, robot = (Keys.new(tmp_path / f"{role}-keys", role, role) for role in ("learner", "robot"))
    learner.allow(robot.me)
    robot.allow(learner.me)
    receiver, stop = DemoReceiver("tcp://127.0.0.1:*", store, keys=learner), threading.Event()
    thread = threading.Thread(target=receiver.serve_forever, args=(stop,))
    thread.start()
    try:
        start(**settings, demos_endpoint=receiver.endpoint, keys=robot.folder)
        cell = make_cell()
        wait_for_streams(cell)
        cell.run(6)
        assert cell.call(Trigger, "start_episode").success
        cell.run(20)
        answer = cell.call(SetBool, "save_episode", data=True)
        assert answer.success, answer.message
        limit_s = time.monotonic() + LIMIT_S
        while receiver.stats()["stored"] < 1:
            assert time.monotonic() < limit_s
            time.sleep(0.05)
    finally:
        stop.set()
        thread.join()
    assert len(read_episode(tmp_path / "learner", 0)["action"]) == json.loads(answer.message)["rows"] == 10
    assert not settings["dataset_root"].exists()


def test_settings_that_make_no_sense_end_with_one_line(ros, settings):
    _, start = ros
    without = {key: value for key, value in settings.items() if key != "dataset_root"}
    process = start(**without)
    assert process.wait(LIMIT_S) == 2
    assert "dataset_root" in process.stderr.read()
