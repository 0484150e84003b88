"""Pictures out of serialised ROS messages."""

import numpy as np
import pytest
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image

from robot.images import picture_of, picture_of_raw
from robot.stamped import stamp_ns_of_raw


def message_of(picture, frame="", **changes):
    height, width = picture.shape[:2]
    fields = {"height": height, "width": width, "encoding": "rgb8", "step": 3 * width, "data": picture.tobytes()}
    message = Image(**(fields | changes))
    message.header.frame_id, message.header.stamp.sec, message.header.stamp.nanosec = frame, 7, 5
    return message


@pytest.mark.parametrize("frame", ["", "a", "ab", "abc", "abcd", "third_person_optical_frame"])
def test_the_view_of_a_serialised_picture_is_the_picture(frame):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    message = message_of(picture, frame)
    raw = serialize_message(message)
    assert np.array_equal(picture_of_raw(raw), picture)
    assert np.array_equal(picture_of(message), picture)
    assert stamp_ns_of_raw(raw) == 7_000_000_005


def test_another_encoding_and_padded_rows_are_refused():
    picture = np.zeros((2, 4, 3), np.uint8)
    for changes in ({"encoding": "bgr8"}, {"encoding": "mono16"}, {"step": 16}):
        with pytest.raises(ValueError, match="expected packed rgb8"):
            picture_of_raw(serialize_message(message_of(picture, **changes)))
