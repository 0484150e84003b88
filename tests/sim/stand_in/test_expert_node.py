"""The scripted person as a ROS node, and the cell's `/clock`: real rclpy, a domain of its own."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from bridge.pose import ACTION_NAMES, integrate, pose
from sim.stand_in.expert_node import TargetEstimate
from tests.sim.stand_in.conftest import RunningCell, start_cell


def actions(*steps_m: float) -> list[np.ndarray]:
    return [np.array([step, 0, 0, 0, 0, 0, 1.0]) for step in steps_m]


def test_target_estimate_counts_along_a_trailing_stream():
    start = pose([0.4, 0.0, 0.3], np.diag([1.0, -1.0, -1.0]))
    estimate, targets = TargetEstimate(start), [start, start]
    for action in actions(0.01, 0.02, 0.03, 0.03):
        np.testing.assert_allclose(estimate.correct(targets[-2]), targets[-1], atol=1e-12)  # a whole step behind
        estimate.add(action)
        targets.append(integrate(targets[-1], action))


def test_target_estimate_believes_the_stream_when_it_leaves_the_way_or_rests():
    start = pose([0.4, 0.0, 0.3], np.eye(3))
    estimate = TargetEstimate(start)
    estimate.correct(start)
    estimate.add(actions(0.03)[0])
    pushed = pose([0.415, 0.02, 0.3], np.eye(3))
    np.testing.assert_array_equal(estimate.correct(pushed), pushed)
    for _ in range(6):
        estimate.add(actions(0.0)[0])
        T = estimate.correct(pose([0.418, 0.02, 0.3], np.eye(3)))
    np.testing.assert_allclose(T[0, 3], 0.418)


@pytest.fixture
def ros_cell(monkeypatch):
    monkeypatch.setenv("ROS_DOMAIN_ID", str(random.randrange(1, 100)))
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    cell = start_cell("ros=true", "speed=1.0")
    yield cell
    assert cell.close() == 0


def test_the_node_acts_on_the_cells_clock(ros_cell: RunningCell, tmp_path):
    """Started, it teleoperates at the policy rate of simulated time; stopped, it is quiet."""
    import rclpy
    from geometry_msgs.msg import PoseStamped
    from rclpy.qos import qos_profile_sensor_data
    from rosgraph_msgs.msg import Clock
    from sensor_msgs.msg import JointState
    from std_srvs.srv import Trigger

    command = [sys.executable, "-m", "sim.stand_in.expert_node", "--ros-args", "-p", "use_sim_time:=true"]
    command += ["-p", f"cell_control:={ros_cell.client.endpoint}", "-p", "seed:=4"]
    process = subprocess.Popen(command, env=os.environ.copy())
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("test", context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        clock_s, heard = [], []
        node.create_subscription(
            Clock, "/clock", lambda m: clock_s.append(m.clock.sec + m.clock.nanosec * 1e-9), qos_profile_sensor_data
        )
        node.create_subscription(JointState, "teleop/action", heard.append, 10)
        targets = node.create_publisher(PoseStamped, "target_pose", 10)
        message = PoseStamped()
        message.pose.position.x, message.pose.position.z, message.pose.orientation.x = 0.42, 0.25, 1.0
        start = node.create_client(Trigger, "expert_node/start")
        stop = node.create_client(Trigger, "expert_node/stop")

        def call(client):
            assert client.wait_for_service(20.0)
            future = client.call_async(Trigger.Request())
            executor.spin_until_future_complete(future, 5.0)
            return future.result()

        def spin(seconds: float, until) -> None:
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                targets.publish(message)
                executor.spin_once(0.02)
                if until():
                    return

        assert start.wait_for_service(20.0)
        refused = call(start)
        assert not refused.success, "without a target there is nothing to start from"
        spin(20, lambda: targets.get_subscription_count() and len(clock_s) > 20)
        spin(0.3, lambda: False)
        answer = call(start)
        assert answer.success, answer.message
        spin(20, lambda: len(heard) >= 5)
        assert len(heard) >= 5
        assert tuple(heard[0].name) == ACTION_NAMES
        assert len(heard[0].position) == 7
        stamps_s = [m.header.stamp.sec + m.header.stamp.nanosec * 1e-9 for m in heard]
        assert np.median(np.diff(stamps_s)) == pytest.approx(0.1, abs=0.021)
        assert clock_s[0] - 0.01 <= stamps_s[0] <= clock_s[-1] + 0.01
        np.testing.assert_allclose(np.array(clock_s) * 200, np.round(np.array(clock_s) * 200), atol=1e-6)
        assert call(stop).success
        spin(0.2, lambda: False)
        count = len(heard)
        spin(0.5, lambda: False)
        assert len(heard) == count
    finally:
        process.terminate()
        assert process.wait(10) is not None
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
