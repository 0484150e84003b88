"""The wire format: exact round trips, no copies, and nothing that a stranger sends does harm."""

import tracemalloc
import zlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bridge import codec
from bridge.codec import Blob, Limits, decode, encode, observation_body, observation_from_body
from bridge.errors import BridgeError, CorruptData, SchemaMismatch
from bridge.messages import PROTOCOL_VERSION, Observation

SMALL = Limits(header_bytes=4096, frames=4, frame_bytes=100_000, items=64, depth=6)


def header(content, *, crc=True) -> bytes:
    data = content if isinstance(content, bytes) else msgpack.packb(content)
    return (zlib.crc32(data) if crc else 0).to_bytes(4, "little") + data


def as_bytes(frames):
    return [bytes(frame) for frame in frames]


scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=9)
)
bodies = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        scalars | st.binary(max_size=50),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    ),
    max_size=5,
)


@given(bodies)
def test_plain_values_come_back(body):
    message = decode(as_bytes(encode("test", body)))
    assert (message.kind, message.body) == ("test", body)


@given(
    npst.arrays(
        st.sampled_from([np.dtype(name) for name in sorted(codec.DTYPES)]),
        npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
    )
)
def test_arrays_come_back_bit_for_bit(array):
    back = decode(as_bytes(encode("test", {"a": array}))).body["a"]
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


def test_large_arrays_are_not_copied_on_either_side():
    image = np.arange(480 * 640 * 3, dtype=np.uint8).reshape(480, 640, 3)
    frames = encode("test", {"image": image, "blob": Blob(b"x" * 20_000)})
    assert len(frames) == 3
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), image)
    received = as_bytes(frames)
    body = decode(received).body
    assert np.shares_memory(body["image"], np.frombuffer(received[1], np.uint8))
    assert body["blob"] == received[2]
    np.testing.assert_array_equal(body["image"], image)


def test_a_view_with_strides_is_sent_as_what_it_shows():
    image = np.arange(200 * 200 * 3, dtype=np.uint8).reshape(200, 200, 3)
    for view in (image[::2], image[:, ::-1], image.transpose(1, 0, 2)):
        np.testing.assert_array_equal(decode(as_bytes(encode("t", {"a": view}))).body["a"], view)


def test_actions_lie_under_the_checksum():
    frames = encode("chunk", {"actions": np.ones((50, 7), np.float32)})
    assert len(frames) == 1
    for position in range(4, len(frames[0]), 97):
        damaged = bytearray(frames[0])
        damaged[position] ^= 1
        with pytest.raises(CorruptData, match="checksum"):
            decode([bytes(damaged)])


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["x"]), np.array([1j]), {1, 2}, object()])
def test_what_has_no_place_on_the_wire_is_refused_when_sent(value):
    with pytest.raises(ValueError, match="dtype|cannot travel"):
        encode("test", {"value": value})


def test_another_protocol_version_is_named():
    with pytest.raises(SchemaMismatch, match=f"ours {PROTOCOL_VERSION}, theirs 99"):
        decode([header([99, "hello", {}])])


def test_a_protocol_version_of_another_type_is_no_version():
    """Found by fuzzing: an array compared with a number is no truth value."""
    array = msgpack.ExtType(codec.ARRAY_INLINE, msgpack.packb(("|u1", (2,), b"ab")))
    for version in (array, True, 1.0, "1", None, [1]):
        with pytest.raises(SchemaMismatch, match="protocol version"):
            decode([header([version, "hello", {}])])


def extension(code, *parts):
    return msgpack.ExtType(code, msgpack.packb(parts if len(parts) != 1 else parts[0]))


MALFORMED = {
    "no frames": [],
    "empty header": [b""],
    "bad checksum": [header([1, "x", {}], crc=False)],
    "header too large": [header([1, "x", {"a": "y" * 5000}])],
    "not msgpack": [header(b"\xc1\xc1")],
    "truncated": [header(msgpack.packb([1, "x", {"a": [1, 2, 3]}])[:-2])],
    "trailing bytes": [header(msgpack.packb([1, "x", {}]) + b"\x00")],
    "not a list": [header({"v": 1})],
    "body is a list": [header([1, "x", [1]])],
    "kind is a number": [header([1, 2, {}])],
    "key is a number": [header([1, "x", {1: 2}])],
    "a billion items": [header(b"\x93\x01\xa1x\x81\xa1a\xdd\x3b\x9a\xca\x00")],
    "a billion bytes": [header(b"\x93\x01\xa1x\x81\xa1a\xc6\x3b\x9a\xca\x00")],
    "a billion pairs": [header(b"\x93\x01\xa1x\xdf\x3b\x9a\xca\x00")],
    "deep lists": [header(b"\x93\x01\xa1x\x81\xa1a" + b"\x91" * 900 + b"\xc0")],
    "deeper than msgpack": [header(b"\x91" * 3000)],
    "deep maps": [header([1, "x", {"a": {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}}])],
    "timestamp": [header([1, "x", {"t": msgpack.Timestamp(1, 2)}])],
    "unknown extension": [header([1, "x", {"a": msgpack.ExtType(77, b"")}])],
    "nested extension": [header([1, "x", {"a": extension(1, extension(1, "<f4", [0], b""), [1], b"")}])],
    "object dtype": [header([1, "x", {"a": extension(1, "|O", [1], b"12345678")}])],
    "big-endian": [header([1, "x", {"a": extension(1, ">f4", [1], b"1234")}])],
    "shape too large": [header([1, "x", {"a": extension(1, "<f4", [2**40, 2**40], b"1234")}])],
    "negative shape": [header([1, "x", {"a": extension(1, "<f4", [-1], b"1234")}])],
    "shape overflows": [header([1, "x", {"a": extension(1, "|u1", [2**63, 2], b"")}])],
    "nine axes": [header([1, "x", {"a": extension(1, "|u1", [1] * 9, b"1")}])],
    "shape of floats": [header([1, "x", {"a": extension(1, "|u1", [1.0], b"1")}])],
    "frame absent": [header([1, "x", {"a": extension(2, 0, "|u1", [4])}])],
    "frame twice": [header([1, "x", {"a": [extension(2, 0, "|u1", [4])] * 2}]), b"1234"],
    "frame too short": [header([1, "x", {"a": extension(2, 0, "|u1", [5])}]), b"1234"],
    "frame unused": [header([1, "x", {}]), b"1234"],
    "frame too large": [header([1, "x", {"a": extension(2, 0, "|u1", [100_001])}]), bytes(100_001)],
    "too many frames": [header([1, "x", {}])] + [b""] * 5,
    "picture": [header([1, "x", {"a": extension(4, 0, "jpeg", [9, 9, 3])}]), b"1234"],
    "frame index is a list": [header([1, "x", {"a": extension(2, [0], "|u1", [4])}]), b"1234"],
}


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_messages_are_corrupt_data(frames):
    with pytest.raises(CorruptData):
        decode(frames, SMALL)


mutations = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8)


def survives(frames) -> None:
    """Decoding ends in a message or a BridgeError, and takes little memory either way."""
    tracemalloc.start()
    try:
        observation_from_body(decode(frames, SMALL).body, ("wrist",))
    except BridgeError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000


def valid_frames() -> list[bytes]:
    observation = Observation(
        {"wrist": np.zeros((100, 100, 3), np.uint8)}, np.zeros(7, np.float32), "x", 1, {"wrist": 2}
    )
    return as_bytes(encode("infer", observation_body(observation)))


@given(mutations, st.integers(0, 600))
def test_damaged_messages_are_survived(changes, cut):
    frames = valid_frames()
    data = bytearray(frames[0][4:])
    for position, value in changes:
        data[position % len(data)] = value
    data = bytes(data[: len(data) - cut % 5 * (cut % len(data)) // 5])
    survives([header(data), *frames[1:]])  # with a good checksum: the attacker can compute one


@given(st.binary(max_size=4000), st.lists(st.binary(max_size=64), max_size=5))
def test_random_bytes_are_survived(data, frames):
    survives([header(data), *frames])
    survives([data, *frames])


def test_observations_are_checked_field_by_field():
    body = decode(valid_frames()).body
    assert observation_from_body(body, ("wrist",)).age_ns == {"wrist": 2}
    for change, error, said in [
        ({"images": {"wrist": np.zeros((4, 4), np.uint8)}}, SchemaMismatch, r"expected uint8 \[H, W, 3\], got uint8"),
        ({"images": {"wrist": np.zeros((4, 4, 3), np.float32)}}, SchemaMismatch, "got float32"),
        ({"images": {"left": body["images"]["wrist"]}}, SchemaMismatch, r"expected \['wrist'\], got \['left'\]"),
        ({"state": None}, SchemaMismatch, r"state: expected float32 \[7\], got NoneType"),
        ({"stamp_ns": 1.5}, CorruptData, "'stamp_ns' is 1.5"),
        ({"stamp_ns": True}, CorruptData, "'stamp_ns' is True"),
    ]:
        with pytest.raises(error, match=said):
            observation_from_body(body | change, ("wrist",))
