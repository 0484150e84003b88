"""Pictures of ROS messages, as arrays and as JPEG."""

import numpy as np
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import Image

from bridge.codec import Picture
from bridge.pictures import compress


def picture_of(message: Image) -> np.ndarray:
    """uint8 [H, W, 3] without a copy. ValueError for another encoding than packed rgb8."""
    if message.encoding != "rgb8" or message.step != 3 * message.width:
        raise ValueError(f"picture in {message.encoding!r} with step {message.step}: expected packed rgb8")
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)


def picture_of_raw(raw: bytes) -> np.ndarray:
    """The same of a serialised message."""
    return picture_of(deserialize_message(raw, Image))


def jpeg_of(message: Image, quality: int) -> bytes:
    picture = compress(picture_of(message), "jpeg", quality)
    assert isinstance(picture, Picture)
    return bytes(picture.data)
