import io

import numpy as np
import pytest
from PIL import Image

from bridge.codec import decode, encode
from bridge.errors import CorruptData
from bridge.pictures import compress, open_picture
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
    for data, coding, shape in [
        (good.data[:100], "jpeg", (48, 64, 3)),
        (b"", "png", (48, 64, 3)),
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
