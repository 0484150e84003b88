"""Messages on the wire: a checked msgpack header and raw frames. No pickle, and no copy of anything large.

A message is `[header, frame, ...]`. The header is a CRC-32 (4 bytes, little endian) and a msgpack list
`[protocol version, kind, body]`. In the body, small arrays are msgpack extensions that hold their bytes (so the CRC
covers every action); large arrays and blobs are extensions that name one of the raw frames, which travel and arrive
without a copy. What a stranger can send is bounded before anything is allocated for it: see `Limits`.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from bridge.errors import CorruptData, SchemaMismatch
from bridge.messages import PROTOCOL_VERSION, Observation

INLINE_BYTES = 16 * 1024  # arrays up to this size travel inside the header
ARRAY_INLINE, ARRAY_FRAME, BLOB_FRAME, PICTURE_FRAME = 1, 2, 3, 4
DTYPES = ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
ITEM_BYTES = {name: np.dtype(name).itemsize for name in DTYPES}
SCALARS = frozenset((str, bytes, int, float, bool, type(None), np.ndarray, memoryview))


@dataclass(frozen=True)
class Limits:
    """What one message may be. `items` bounds every list and map, so that a header of a few bytes cannot ask for
    gigabytes: msgpack allocates at most depth x items pointers (its own depth limit is 1024)."""

    header_bytes: int = 256 * 1024
    frames: int = 32
    frame_bytes: int = 64 * 1024 * 1024
    items: int = 1024
    depth: int = 12


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Message:
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Blob:
    """Bytes that travel as a frame of their own (decoded as a memoryview)."""

    data: bytes | memoryview


@dataclass(frozen=True)
class Picture:
    """An image that was compressed for a slow link; `decode` gives the array back (`bridge.pictures`)."""

    data: bytes
    coding: str
    shape: tuple[int, ...]


def encode(kind: str, body: dict[str, Any]) -> list[Any]:
    """Header bytes and raw frames (memoryviews of the caller's arrays: leave those unchanged until they are sent).

    Raises ValueError for what has no place on the wire (object arrays, sets, unknown classes).
    """
    frames: list[Any] = []

    def extension(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value)
            if array.dtype.str not in ITEM_BYTES:
                raise ValueError(f"array of dtype {array.dtype}: allowed on the wire are {sorted(DTYPES)}")
            if array.nbytes <= INLINE_BYTES:
                packed = msgpack.packb((array.dtype.str, value.shape, array.tobytes()))
                return msgpack.ExtType(ARRAY_INLINE, packed)
            frames.append(memoryview(array).cast("B"))
            return msgpack.ExtType(ARRAY_FRAME, msgpack.packb((len(frames) - 1, array.dtype.str, value.shape)))
        if isinstance(value, Blob):
            frames.append(value.data)
            return msgpack.ExtType(BLOB_FRAME, msgpack.packb((len(frames) - 1, len(value.data))))
        if isinstance(value, Picture):
            frames.append(value.data)
            return msgpack.ExtType(PICTURE_FRAME, msgpack.packb((len(frames) - 1, value.coding, value.shape)))
        if isinstance(value, np.generic):
            return value.item()
        raise ValueError(f"a {type(value).__name__} cannot travel; use numbers, text, bytes, lists, maps and arrays")

    header = msgpack.packb([PROTOCOL_VERSION, kind, body], default=extension)
    return [zlib.crc32(header).to_bytes(4, "little") + header, *frames]


def decode(
    frames: Sequence[Any],
    limits: Limits = DEFAULT_LIMITS,
    open_picture: Callable[[memoryview, str, tuple[int, ...]], np.ndarray] | None = None,
) -> Message:
    """The message in `frames` (bytes, memoryviews or ZeroMQ frames). Arrays are read-only views of the frames.

    `open_picture(data, coding, shape)` decodes compressed pictures; without it they are refused.
    Raises CorruptData for anything that is damaged, too large or malformed, SchemaMismatch for another protocol.
    """
    views = [memoryview(getattr(frame, "buffer", frame)) for frame in frames]
    if not views or len(views) - 1 > limits.frames:
        raise CorruptData(f"a message of {len(views)} frames; allowed are 1 to {limits.frames + 1}")
    if not 4 < views[0].nbytes <= limits.header_bytes:
        raise CorruptData(f"header of {views[0].nbytes} bytes; allowed are 5 to {limits.header_bytes}")
    if too_large := [view.nbytes for view in views[1:] if view.nbytes > limits.frame_bytes]:
        raise CorruptData(f"frame of {too_large[0]} bytes; allowed are {limits.frame_bytes}")
    header = views[0][4:]
    if zlib.crc32(header) != int.from_bytes(views[0][:4], "little"):
        raise CorruptData("the header fails its checksum")
    frames_left = dict(enumerate(views[1:]))

    def take(index: Any) -> memoryview:
        if not isinstance(index, int) or index not in frames_left:
            raise CorruptData(f"the header names frame {index!r}, which is absent or already taken")
        return frames_left.pop(index)

    def extension(code: int, data: bytes) -> Any:
        parts = _unpack(data, items=8)
        if code == BLOB_FRAME and isinstance(parts, list) and len(parts) == 2:
            blob = take(parts[0]).toreadonly()
            if blob.nbytes != parts[1]:
                raise CorruptData(f"a frame of {blob.nbytes} bytes where {parts[1]} were sent")
            return blob
        if not isinstance(parts, list) or len(parts) != 3:
            raise CorruptData(f"malformed extension {code}")
        if code == ARRAY_INLINE:
            dtype, shape, raw = parts
            return array_from(raw, dtype, shape)
        if code == ARRAY_FRAME:
            index, dtype, shape = parts
            return array_from(take(index), dtype, shape)
        if code == PICTURE_FRAME and open_picture is not None:
            index, coding, shape = parts
            _check_shape(shape)
            if math.prod(shape) > limits.frame_bytes:
                raise CorruptData(f"a picture of shape {shape} exceeds {limits.frame_bytes} bytes")
            return open_picture(take(index), coding, tuple(shape))
        raise CorruptData(f"extension {code} is not understood here")

    content = _unpack(header, limits.items, extension)
    if not isinstance(content, list) or len(content) != 3:
        raise CorruptData("the header is not [version, kind, body]")
    version, kind, body = content
    if type(version) is not int or version != PROTOCOL_VERSION:  # an array would answer == with an array
        theirs = repr(version)[:40]
        raise SchemaMismatch(f"protocol version: ours {PROTOCOL_VERSION}, theirs {theirs}. Update the older side.")
    if not isinstance(kind, str) or not isinstance(body, dict):
        raise CorruptData("the header is not [version, kind, body]")
    _check_tree(body, limits.depth)
    if frames_left:
        raise CorruptData(f"{len(frames_left)} frames that the header does not name")
    return Message(kind, body)


def _unpack(data: Any, items: int, extension: Callable[[int, bytes], Any] | None = None) -> Any:
    try:
        return msgpack.unpackb(data, ext_hook=extension or _no_extension, max_array_len=items, max_map_len=items)
    except (ValueError, msgpack.UnpackException) as error:  # what msgpack raises for any malformed bytes
        raise CorruptData(f"not a valid header: {error}") from error


def _no_extension(code: int, data: bytes) -> Any:
    raise CorruptData(f"extension {code} inside an extension")


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, list) or len(shape) > 8:
        raise CorruptData(f"array shape {shape!r}")
    for n in shape:
        if type(n) is not int or n < 0:
            raise CorruptData(f"array shape {shape!r}")


def array_from(raw: Any, dtype: Any, shape: Any) -> np.ndarray:
    """A read-only view of `raw`. Raises CorruptData unless dtype and shape are ours and fit the bytes."""
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CorruptData(f"array dtype {dtype!r}; allowed are {sorted(DTYPES)}")
    if not isinstance(raw, bytes | memoryview):
        raise CorruptData(f"array data of type {type(raw).__name__}")
    _check_shape(shape)
    if math.prod(shape) * ITEM_BYTES[dtype] != len(raw):
        raise CorruptData(f"array of shape {shape} and dtype {dtype} in {len(raw)} bytes")
    array = np.frombuffer(raw, dtype=dtype).reshape(shape)
    array.flags.writeable = False
    return array


def _check_tree(body: dict[str, Any], depth: int) -> None:
    """Level by level: a call for each value would be a third of what it costs to decode an observation."""
    level: list[Any] = [body]
    while level:
        below: list[Any] = []
        for value in level:
            if type(value) is dict:
                below.extend(value.values())
            elif type(value) is list:
                below.extend(value)
            elif type(value) not in SCALARS:
                raise CorruptData(f"a {type(value).__name__} in the body")
        if below and depth == 0:
            raise CorruptData("the body is nested too deeply")
        level, depth = below, depth - 1


def field(body: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """`body[name]`, checked. Raises CorruptData naming the field when it is absent or of another type."""
    value = body.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise CorruptData(f"field {name!r} is {value!r:.80}; expected {kind}")
    return value


def text(body: dict[str, Any], name: str) -> str:
    """`body[name]` if it is text, else "": a stranger's list or array must not reach a comparison or a dict lookup."""
    value = body.get(name)
    return value if isinstance(value, str) else ""


def observation_body(observation: Observation) -> dict[str, Any]:
    return {
        "images": observation.images,
        "state": np.asarray(observation.state, dtype=np.float32),
        "instruction": observation.instruction,
        "stamp_ns": int(observation.stamp_ns),
        "age_ns": observation.age_ns,
    }


def observation_from_body(body: dict[str, Any], cameras: Sequence[str]) -> Observation:
    """Raises SchemaMismatch when the observation is not the contract's (section 2): cameras, shapes, types."""
    images, state = body.get("images"), body.get("state")
    if not isinstance(images, dict) or set(images) != set(cameras):
        found = sorted(map(str, images)) if isinstance(images, dict) else _describe(images)
        raise SchemaMismatch(f"images: expected {sorted(cameras)}, got {found}")
    for name, image in images.items():
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise SchemaMismatch(f"images[{name!r}]: expected uint8 [H, W, 3], got {_describe(image)}")
        if not image.size:
            raise SchemaMismatch(f"images[{name!r}] is empty: {_describe(image)}")
    if not isinstance(state, np.ndarray) or state.dtype != np.float32 or state.shape != (7,):
        raise SchemaMismatch(f"state: expected float32 [7], got {_describe(state)}")
    if not np.isfinite(state).all():
        raise CorruptData(f"state holds numbers that are not finite: {state.tolist()}")
    age_ns = field(body, "age_ns", dict)
    if not all(isinstance(name, str) and type(age) is int for name, age in age_ns.items()):
        raise CorruptData("field 'age_ns' is not a map from names to integers")
    return Observation(images, state, field(body, "instruction", str), field(body, "stamp_ns", int), age_ns)


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
