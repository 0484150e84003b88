"""`/diagnostics` as ROS's tools expect it: what a node says of its parts, once a second, named `node: part`."""

from collections.abc import Callable

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile

PERIOD_S = 1.0
LONGEST = 200  # characters: lists of every tick are for those who ask the node's own topic


class Diagnostics:
    """Publishes what `look` says; the name of each status gets the node's (with its namespace) in front."""

    def __init__(self, node: Node, look: Callable[[], list[DiagnosticStatus]]):
        self._node, self._look = node, look
        self._name = node.get_fully_qualified_name().strip("/")
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        node.create_timer(PERIOD_S, self._publish, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def _publish(self) -> None:
        message = DiagnosticArray(status=self._look())
        message.header.stamp = self._node.get_clock().now().to_msg()
        for status in message.status:
            status.name = f"{self._name}: {status.name}"
            status.values = [pair for pair in status.values if len(pair.value) <= LONGEST]
        self._publisher.publish(message)
