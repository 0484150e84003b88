"""What stamped ROS messages say: when, and where."""

import struct
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped

from bridge import pose


def stamp_ns(message: Any) -> int:
    return message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec


def stamp_ns_of_raw(raw: bytes) -> int:
    """Of a serialised message that begins with a header: CDR puts it after four bytes with the byte order."""
    sec, nanosec = struct.unpack_from("<iI" if raw[1] & 1 else ">iI", raw, 4)
    return sec * 1_000_000_000 + nanosec


def matrix_of(message: PoseStamped) -> np.ndarray:
    """float64 [4, 4]."""
    p, q = message.pose.position, message.pose.orientation
    return pose.pose([p.x, p.y, p.z], pose.matrix_from_quat_xyzw([q.x, q.y, q.z, q.w]))
