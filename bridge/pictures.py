"""Pictures at a policy's size, and compressed for slow links: JPEG, or PNG where every bit counts.

A policy makes its input from a camera picture by `area_resize` or by `pad_resize` (the contract's
`image_preprocessing`); a robot may do that before it sends (`PictureFormat.apply`) and the policy then changes nothing.

Raw pictures are faster on loopback and gigabit (compressing costs more than sending); on Wi-Fi two 640x480 pictures at
20 Hz would need 300 Mbit/s. libjpeg-turbo (`simplejpeg`) is used where it is installed, Pillow otherwise.
"""

import functools
import importlib
import io
import struct
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from bridge.codec import Picture
from bridge.errors import CorruptData

CODINGS = ("raw", "jpeg", "png")
JPEG_QUALITY = 90
MAX_SIDE = 4096


@dataclass(frozen=True)
class PictureFormat:
    """How a policy wants its pictures: height and width, and whether they are padded there (undistorted) or resized."""

    height: int
    width: int
    padded: bool

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [height, width, 3]."""
        resize = pad_resize if self.padded else area_resize
        return resize(picture[None], (self.height, self.width))[0]

    def to_dict(self) -> dict[str, Any]:
        return {"height": self.height, "width": self.width, "padded": self.padded}

    @classmethod
    def from_message(cls, content: Any) -> "PictureFormat | None":
        """What a server said, None where it said nothing. Raises CorruptData for nonsense."""
        if content is None:
            return None
        sides = [content.get("height"), content.get("width")] if isinstance(content, dict) else []
        if not sides or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
            raise CorruptData(f"picture format {content!r:.100}")
        return cls(*sides, bool(content.get("padded")))


def area_resize(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [N, H, W, 3] -> uint8 [N, *size, 3], `size` (height, width); the contract's `area_resize`.

    Data cache, policy server, rollouts and robots all come through here, so a picture means the same in all of them.
    """
    if pictures.shape[1:3] == size:
        return pictures
    cv2 = _cv2()
    out = np.empty((len(pictures), *size, 3), np.uint8)
    for index, picture in enumerate(pictures):
        cv2.resize(picture, (size[1], size[0]), dst=out[index], interpolation=cv2.INTER_AREA)
    return out


def pad_resize(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [N, H, W, 3] -> uint8 [N, *size, 3]: undistorted, bilinear, centred on black; the resize of pi0
    (`learner.vision.pad_resize`), rounded."""
    if pictures.shape[1:3] == size:
        return pictures
    cv2 = _cv2()
    height, width = pictures.shape[1:3]
    ratio = max(width / size[1], height / size[0])
    rows, columns = max(1, int(height / ratio)), max(1, int(width / ratio))  # also of a line of pixels
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    out = np.zeros((len(pictures), *size, 3), np.uint8)
    for index, picture in enumerate(pictures):
        small = cv2.resize(picture.astype(np.float32), (columns, rows), interpolation=cv2.INTER_LINEAR)
        out[index, top : top + rows, left : left + columns] = np.rint(small)
    return out


def compress(image: np.ndarray, coding: str, quality: int = JPEG_QUALITY) -> np.ndarray | Picture:
    """uint8 [H, W, 3] RGB to what goes into a message. ValueError for an unknown coding."""
    if coding == "raw":
        return image
    if coding not in CODINGS:
        raise ValueError(f"picture coding {coding!r}: allowed are {', '.join(CODINGS)}")
    image = np.ascontiguousarray(image)
    if coding == "jpeg" and (simplejpeg := _library("simplejpeg")):
        return Picture(simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB"), coding, image.shape)
    if (pillow := _library("PIL.Image")) is None:
        raise ValueError("compressed pictures need Pillow: pip install pillow, or send them raw (picture_coding: raw)")
    buffer = io.BytesIO()
    options = {"quality": quality} if coding == "jpeg" else {"compress_level": 1}
    pillow.fromarray(image).save(buffer, format=coding.upper(), **options)
    return Picture(buffer.getvalue(), coding, image.shape)


def open_picture(data: memoryview, coding: str, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `compress`; the size in the data's own header is compared before anything is decoded.

    Raises CorruptData.
    """
    if coding not in ("jpeg", "png") or len(shape) != 3 or shape[2] != 3:
        raise CorruptData(f"a picture of coding {coding!r:.20} and shape {shape}")
    if (pillow := _library("PIL.Image")) is None:
        raise CorruptData("compressed pictures cannot be read here: Pillow is not installed")
    try:
        with pillow.open(io.BytesIO(data), formats=[coding.upper()]) as picture:
            if picture.size != (shape[1], shape[0]) or picture.mode != "RGB":
                raise CorruptData(f"a {picture.mode} picture of size {picture.size} that claims shape {shape}")
            if coding == "jpeg" and (simplejpeg := _library("simplejpeg")):
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
            return np.asarray(picture)
    except (OSError, ValueError, SyntaxError, IndexError, struct.error, pillow.DecompressionBombError) as error:
        raise CorruptData(f"a picture that does not decode: {error}") from error


def _cv2() -> Any:
    if (cv2 := _library("cv2")) is None:
        raise ValueError("pictures are resized by OpenCV: pip install opencv-python-headless")
    return cv2


@functools.cache
def _library(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
