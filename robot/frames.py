"""TF: where the TCP and the cameras are. Topics are relative, so that each of two arms has a tree of its own.

`tf` and `tf_static` need the package tf2_msgs, which comes with a ROS installation and not from PyPI. Without it the
same transforms go to `transforms` and `transforms_static` as geometry_msgs/TransformStamped, which Foxglove draws too.
"""

import importlib
from typing import Any

import numpy as np
from geometry_msgs.msg import TransformStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile

from bridge.pose import quat_xyzw_from_matrix

try:
    TFMessage: Any = importlib.import_module("tf2_msgs.msg").TFMessage
except ImportError:
    TFMessage = None


class Frames:
    """Publishes transforms. `is_static`: they are sent once, and whoever joins later hears them too."""

    def __init__(self, node: Node, is_static: bool = False):
        durability = DurabilityPolicy.TRANSIENT_LOCAL if is_static else DurabilityPolicy.VOLATILE
        qos, end = QoSProfile(depth=100, durability=durability), "_static" if is_static else ""
        kind, name = (TransformStamped, "transforms") if TFMessage is None else (TFMessage, "tf")
        self._publisher = node.create_publisher(kind, name + end, qos)

    def publish(self, transforms: list[TransformStamped]) -> None:
        messages = transforms if TFMessage is None else [TFMessage(transforms=transforms)]
        for message in messages:
            self._publisher.publish(message)


def transform(parent: str, child: str, T: np.ndarray, stamp_ns: int) -> TransformStamped:
    """`T` [4, 4] maps child to parent."""
    message = TransformStamped(child_frame_id=child)
    message.header.frame_id = parent
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
    shift, turn = message.transform.translation, message.transform.rotation
    shift.x, shift.y, shift.z = T[:3, 3].tolist()
    turn.x, turn.y, turn.z, turn.w = quat_xyzw_from_matrix(T[:3, :3]).tolist()
    return message
