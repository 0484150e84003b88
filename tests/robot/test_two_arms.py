"""Two real-time graphs on one computer, each against an emulated FR3 of its own: what moves one leaves the other."""

import io
import json
import os
import random
import re
import time

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from websockets.sync.client import connect

from bridge.pose import ACTION_NAMES
from robot.up import Graph
from tests.robot.cell import running_cell

PATIENCE_S = 60.0


def page_of(side: str, output: str) -> str:
    """The socket behind the address that a console printed."""
    url = re.search(rf"\[{side}/console\] open (\S+)", output)[1]
    return url.replace("http", "ws").replace("/?", "/socket?")


def news(page):
    page.send('{"next": true}')
    return json.loads(page.recv(10.0))


@pytest.mark.slow  # two cells and two graphs; test_launch.py reads the launch file
@pytest.mark.timeout(180)
def test_an_action_for_one_arm_leaves_the_other_where_it_is():
    domain = random.randint(1, 100)
    os.environ["ROS_DOMAIN_ID"], os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = str(domain), "LOCALHOST"
    with running_cell() as left, running_cell() as right:
        args = {"left_host": left.address, "right_host": right.address, "left_cameras": "false"}
        args |= {"right_cameras": "false", "console": "true", "left_port": "0", "right_port": "0"}
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
        node = Node("probe", context=context, enable_rosout=False)
        executor = EventsExecutor(context=context)
        executor.add_node(node)
        states, targets = {}, {}

        def keep_state(side, message):
            states[side] = next(pair.value for pair in message.values if pair.key == "state")

        def keep_target(side, message):
            p = message.pose.position
            targets[side] = np.array([p.x, p.y, p.z])

        for side in ("left", "right"):
            status, target = f"/{side}/safety_state", f"/{side}/target_pose"
            node.create_subscription(DiagnosticStatus, status, lambda m, s=side: keep_state(s, m), 10)
            node.create_subscription(PoseStamped, target, lambda m, s=side: keep_target(s, m), 10)
        teleop = node.create_publisher(JointState, "/left/teleop/action", 10)

        def wait(ready, what):
            until_s = time.monotonic() + PATIENCE_S
            while not ready():
                assert not graph.ended(), graph.ended()
                assert time.monotonic() < until_s, (what, states, graph._out.getvalue())
                executor.spin_once(timeout_sec=0.05)

        with Graph("launch/two_arms.launch.yaml", args, io.StringIO()) as graph:
            wait(lambda: states == {"left": "IDLE", "right": "IDLE"} and len(targets) == 2, "both arms")
            home = node.create_client(Trigger, "/left/home")
            wait(home.service_is_ready, "the service")
            future = home.call_async(Trigger.Request())
            wait(future.done, "home")
            assert future.result().success
            before = dict(targets)
            wait(lambda: teleop.get_subscription_count() > 0, "the left runtime")

            def moved():
                action = [0.0, 0.01, 0, 0, 0, 0, 1.0]
                teleop.publish(JointState(name=list(ACTION_NAMES), position=action))
                time.sleep(0.05)
                return targets["left"][1] - before["left"][1] > 0.03

            wait(moved, "motion")
            assert np.allclose(targets["right"], before["right"], atol=1e-3)
            assert states["right"] == "IDLE"
            with connect(page_of("left", graph._out.getvalue())) as page:
                wait(lambda: len(news(page)["health"]) == 2, "diagnostics")
                shown = news(page)
                assert {part["name"] for part in shown["health"]} == {
                    "left/arm_node: arm",
                    "left/runtime_node: runtime",
                }
                page.send('{"call": "stop"}')
                wait(lambda: states["left"] == "FAULT", "the stop")
            executor.spin_once(timeout_sec=0.5)
            assert states["right"] == "IDLE"
        executor.remove_node(node)
        node.destroy_node()
        rclpy.shutdown(context=context)
