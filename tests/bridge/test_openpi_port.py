"""A client that speaks openpi's protocol, written here from its description, against our policy server."""

import re
import threading
import urllib.request

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from bridge.errors import CorruptData
from bridge.openpi_port import OpenpiPort, pack, unpack
from tests.bridge.test_infer import EMBODIMENT, serving


@pytest.fixture
def port():
    with serving() as server:
        port = OpenpiPort("127.0.0.1", 0, server.endpoint, EMBODIMENT)
        thread = threading.Thread(target=port.serve_forever)
        thread.start()
        yield port
        port.close()
        thread.join(5)


def sent(value=0.5, **changes):
    image = np.zeros((224, 224, 3), np.uint8)
    observation = {"observation/image": image, "observation/wrist_image": image, "prompt": "pick up the cube"}
    return observation | {"observation/state": np.full(7, value, np.float32)} | changes


def talk(port, **headers):
    uri = f"ws://127.0.0.1:{port.port}"
    return connect(uri, compression=None, max_size=None, additional_headers=headers or None)


def test_observation_in_actions_out(port):
    with talk(port) as connection:
        metadata = unpack(connection.recv())
        assert metadata["contract_hash"] == EMBODIMENT.contract_hash
        for value in (0.5, -1.0):
            connection.send(pack(sent(value)))
            answer = unpack(connection.recv())
            np.testing.assert_array_equal(answer["actions"], np.full((5, 7), value, np.float32))
            assert answer["server_timing"]["infer_ms"] > 0
            assert answer["policy_version"] == 4


def test_an_array_is_a_map_with_bytes_keys():
    raw = msgpack.unpackb(pack({"a": np.float32([[1, 2]])}))
    expected = {b"__ndarray__": True, b"data": np.float32([1, 2]).tobytes(), b"dtype": "<f4", b"shape": [1, 2]}
    assert raw == {"a": expected}
    assert unpack(pack({"n": np.float64(2.5), "i": np.int64(3)})) == {"n": 2.5, "i": 3}
    with pytest.raises(ValueError, match="dtype object"):
        pack({"a": np.array([object()])})
    for damaged in (
        {"a": expected | {b"dtype": "|O"}},
        {"a": expected | {b"shape": [3, 2]}},
        {"a": {b"__ndarray__": True}},
    ):
        with pytest.raises(CorruptData):
            unpack(msgpack.packb(damaged))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (pack({"prompt": "x"}), "SchemaMismatch: the observation lacks"),
        (pack([1, 2]), "CorruptData: a list where a dict"),
        (b"\xc1", "CorruptData: not openpi's encoding"),
        ("text", "CorruptData: a text frame"),
        (pack(sent(**{"observation/state": np.zeros(8, np.float32)})), r"SchemaMismatch.*float32 \[8\]"),
    ],
)
def test_an_error_is_a_text_frame_and_then_the_end(port, wrong, said):
    with talk(port) as connection:
        connection.recv()
        connection.send(wrong)
        assert re.match(said, connection.recv())
        with pytest.raises(ConnectionClosed):
            connection.recv()
    with talk(port) as another:  # one client's mistake is nobody else's
        another.recv()
        another.send(pack(sent()))
        assert "actions" in unpack(another.recv())


def test_health_and_api_key(port):
    assert urllib.request.urlopen(f"http://127.0.0.1:{port.port}/healthz").read() == b"OK\n"
    port._api_key = "secret"
    with pytest.raises(InvalidStatus), talk(port):
        pass
    with talk(port, Authorization="Api-Key secret") as connection:
        assert "contract_hash" in unpack(connection.recv())
    with pytest.raises(ValueError, match="set api_key, or bind 127.0.0.1"):
        OpenpiPort("0.0.0.0", 0, "tcp://127.0.0.1:1", EMBODIMENT)
