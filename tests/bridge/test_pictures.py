import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bridge.codec import decode, encode
from bridge.errors import CorruptData
from bridge.pictures import PictureFormat, area_resize, compress, open_picture
from tests.bridge.test_infer import client_of, observation, serving


def smooth(height=48, width=64):
    return np.uint8(np.linspace(0, 250, width)[None, :, None] * np.ones((height, 1, 3)))


@pytest.mark.parametrize(("coding", "largest_error"), [("raw", 0), ("png", 0), ("jpeg", 6)])
def test_pictures_come_back_through_a_message(coding, largest_error):
    frames = encode("infer", {"image": compress(smooth(480, 640), coding)})
    assert coding == "raw" or len(frames[1]) < 200_000
    back = decode([bytes(frame) for frame in frames], open_picture=open_picture).body["image"]
    assert back.shape == (480, 640, 3)
    assert np.abs(back.astype(int) - smooth(480, 640)).max() <= largest_error


def test_what_does_not_decode_is_corrupt_data():
    good = compress(smooth(), "jpeg")
    gif = io.BytesIO()
    Image.fromarray(smooth()).save(gif, format="GIF")
    whole = bytes(compress(smooth(), "png").data)
    gamma = struct.pack(">I", 0) + b"gAMA" + struct.pack(">I", zlib.crc32(b"gAMA"))  # a chunk without its number
    for data, coding, shape in [
        (good.data[:100], "jpeg", (48, 64, 3)),
        (b"", "png", (48, 64, 3)),
        (whole[:-12] + gamma + whole[-12:], "png", (48, 64, 3)),
        (good.data, "png", (48, 64, 3)),
        (good.data, "jpeg", (48, 65, 3)),  # the data's own header says another size
        (good.data, "jpeg", (48, 64)),
        (gif.getvalue(), "gif", (48, 64, 3)),
    ]:
        with pytest.raises(CorruptData):
            open_picture(memoryview(data), coding, shape)
    with pytest.raises(ValueError, match="allowed are raw, jpeg, png"):
        compress(smooth(), "webp")


def test_a_policy_sees_the_picture_that_was_sent():
    seen = []

    def infer(observations):
        seen.append({name: image.copy() for name, image in observations[0].images.items()})
        return np.zeros((1, 5, 7), np.float32), 1

    with serving(infer) as server, client_of(server.endpoint, picture_coding="png") as client:
        sent = observation(9)
        client.infer(sent, 5.0)
    for name, image in sent.images.items():
        np.testing.assert_array_equal(seen[0][name], image)


def test_a_robot_prepares_its_pictures_as_the_server_says_and_follows_a_change():
    seen = []

    def infer(observations):
        seen.append(observations[0].images["wrist"].copy())
        return np.zeros((1, 5, 7), np.float32), 1

    sent = observation(9)
    with serving(infer) as server, client_of(server.endpoint, resize_pictures=True) as client:
        client.infer(sent, 5.0)  # the server names no size: pictures stay as they are
        server.pictures = PictureFormat(24, 32, padded=False)
        client.infer(sent, 5.0)  # its answer tells
        client.infer(sent, 5.0)
        server.pictures = PictureFormat(20, 20, padded=True)
        client.infer(sent, 5.0)
        client.infer(sent, 5.0)
    assert [image.shape[:2] for image in seen] == [(48, 64), (48, 64), (24, 32), (24, 32), (20, 20)]
    with serving(infer, pictures=PictureFormat(24, 32, padded=False)) as server:
        with client_of(server.endpoint, resize_pictures=True) as client:
            client.wait_ready(5.0)
            client.infer(sent, 5.0)  # the welcome told
        np.testing.assert_array_equal(seen[-1], area_resize(sent.images["wrist"][None], (24, 32))[0])
        with client_of(server.endpoint) as client:
            client.infer(sent, 5.0)
            client.infer(sent, 5.0)
    assert seen[-1].shape == (48, 64, 3)  # it was not asked to


def test_resizing_by_hand():
    block = np.repeat(np.repeat(np.uint8([[10, 30], [50, 90]]), 2, 0), 2, 1)[..., None] * np.uint8([1, 0, 1])
    half = PictureFormat(2, 2, padded=False).apply(block)
    np.testing.assert_array_equal(half[..., 0], [[10, 30], [50, 90]])  # each is the mean of four equal pixels
    assert not half[..., 1].any()
    wide = np.full((2, 4, 3), 200, np.uint8)
    padded = PictureFormat(4, 4, padded=True).apply(wide)
    np.testing.assert_array_equal(padded[..., 0], [[0] * 4, [200] * 4, [200] * 4, [0] * 4])
    line = PictureFormat(4, 4, padded=True).apply(np.full((1, 100, 3), 200, np.uint8))
    np.testing.assert_array_equal(line[..., 0], [[0] * 4, [200] * 4, [0] * 4, [0] * 4])


@pytest.mark.parametrize(
    "content", [[], 7, {}, {"height": 0, "width": 5}, {"height": 1e3, "width": 5}, {"height": 9999}]
)
def test_a_nonsensical_format_is_corrupt_data(content):
    with pytest.raises(CorruptData, match="picture format"):
        PictureFormat.from_message(content)
