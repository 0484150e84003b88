"""Pictures compressed for slow links: JPEG, or PNG where every bit counts.

Raw pictures are faster on loopback and gigabit (compressing costs more than sending); on Wi-Fi two 640x480 pictures at
20 Hz would need 300 Mbit/s. libjpeg-turbo (`simplejpeg`) is used where it is installed, Pillow otherwise.
"""

import functools
import importlib
import io
from types import ModuleType

import numpy as np

from bridge.codec import Picture
from bridge.errors import CorruptData

CODINGS = ("raw", "jpeg", "png")
JPEG_QUALITY = 90


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
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise CorruptData(f"a picture that does not decode: {error}") from error


@functools.cache
def _library(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
