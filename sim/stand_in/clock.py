"""The cell's time for ROS nodes that run with `use_sim_time:=true`."""

import rclpy
from rclpy.qos import qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock


class RosClock:
    """Publishes `/clock`. Owns its rclpy context, so that a process may hold several cells or nodes of its own."""

    def __init__(self):
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node("stand_in_cell", context=self._context, enable_rosout=False)
        self._publisher = self._node.create_publisher(Clock, "/clock", qos_profile_sensor_data)
        self._message = Clock()

    def publish(self, time_ms: int) -> None:
        stamp = self._message.clock
        stamp.sec, stamp.nanosec = time_ms // 1000, time_ms % 1000 * 1_000_000
        self._publisher.publish(self._message)

    def close(self) -> None:
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)
