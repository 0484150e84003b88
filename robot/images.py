"""Pictures of ROS messages, as arrays and as JPEG."""

from struct import unpack_from
from typing import Any

import numpy as np
from sensor_msgs.msg import Image

from bridge.codec import Picture
from bridge.pictures import compress


def picture_of(message: Image) -> np.ndarray:
    """uint8 [H, W, 3] without a copy. ValueError for another encoding than packed rgb8."""
    return _picture(message.data, message.height, message.width, message.step, message.encoding)


def picture_of_raw(raw: bytes) -> np.ndarray:
    """The same of a serialised message: its own bytes, read-only. Unpacked by rclpy each picture is copied twice, which
    was a third of what a recorder's own thread did (measured)."""
    order, body = "<" if raw[1] & 1 else ">", memoryview(raw)[4:]  # CDR aligns from behind the four bytes of its kind
    at = _aligned(12 + unpack_from(f"{order}I", body, 8)[0])  # behind stamp and frame
    height, width, length = unpack_from(f"{order}3I", body, at)
    encoding = bytes(body[at + 12 : at + 11 + length]).decode()
    at = _aligned(at + 13 + length)  # behind the byte order of the pixels
    step, size = unpack_from(f"{order}2I", body, at)
    return _picture(body[at + 8 : at + 8 + size], height, width, step, encoding)


def _aligned(at: int) -> int:
    return at + -at % 4


def _picture(data: Any, height: int, width: int, step: int, encoding: str) -> np.ndarray:
    if encoding != "rgb8" or step != 3 * width:
        raise ValueError(f"picture in {encoding!r} with step {step}: expected packed rgb8")
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def jpeg_of(message: Image, quality: int) -> bytes:
    picture = compress(picture_of(message), "jpeg", quality)
    assert isinstance(picture, Picture)
    return bytes(picture.data)
