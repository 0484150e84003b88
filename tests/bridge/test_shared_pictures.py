"""Pictures through shared memory: the same bytes, given up with their request; nothing opened that is not offered."""

import os
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

from bridge.errors import BridgeTimeout, CorruptData
from bridge.messages import Observation
from bridge.policy_client import PolicyClient
from bridge.shared_pictures import PictureReader, PictureWriter
from tests.bridge.test_infer import EMBODIMENT, client_of, observation, serving


def pictures(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"third_person": rng.integers(0, 256, (48, 64, 3), np.uint8), "wrist": np.full((5, 7, 3), seed, np.uint8)}


@pytest.fixture
def writer():
    writer = PictureWriter(slots=2, slot_bytes=20_000)
    yield writer
    writer.close()


def test_the_reader_sees_what_was_written_and_cannot_write(writer):
    reader, shown = PictureReader(writer.offer()), pictures(3)
    seen = reader.read(7, writer.write(7, shown))
    for name, picture in shown.items():
        np.testing.assert_array_equal(seen[name], picture)
        with pytest.raises(ValueError, match="read-only"):
            seen[name][0] = 0


def test_a_slot_is_given_up_with_its_request(writer):
    reader = PictureReader(writer.offer())
    first = writer.write(1, pictures(1))
    assert writer.write(2, pictures(2))
    assert writer.write(3, pictures(3)) is None  # both slots are in use: this one goes by the socket
    writer.release(1)
    assert writer.write(4, pictures(4))["slot"] == first["slot"]
    with pytest.raises(CorruptData, match="request 1 has given up"):
        reader.read(1, first)


def test_what_does_not_fit_goes_by_the_socket(writer):
    assert writer.write(1, {"wrist": np.zeros((480, 640, 3), np.uint8)}) is None


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"slot": 16},
        {"slot": -16, "places": {}},
        {"slot": 10**12, "places": {}},
        {"slot": 16, "places": {"wrist": [32, 48, 64]}},
        {"slot": 16, "places": {"wrist": [32, 48, 64, -3]}},
        {"slot": 16, "places": {"wrist": [32, 4800, 6400, 3]}},
        {"slot": 16, "places": {"wrist": "32"}},
    ],
)
def test_places_outside_the_memory_are_refused(writer, told):
    reader = PictureReader(writer.offer())
    writer.write(0, pictures())
    with pytest.raises(CorruptData):
        reader.read(0, told)


def test_only_the_memory_that_was_meant_is_opened(writer, tmp_path):
    offer, other = writer.offer(), PictureWriter(slots=1, slot_bytes=20_000)
    assert PictureReader.attach(offer) is not None
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(offer["size"])
        bare = os.memfd_create("cotwin-pictures", os.MFD_ALLOW_SEALING)
        os.ftruncate(bare, offer["size"])
        wrong = [
            offer | {"proof": bytes(16)},  # another's memory
            offer | {"proof": None},
            offer | {"size": offer["size"] - 1},
            offer | {"fd": file.fileno()},  # a file
            offer | {"fd": bare},  # could be cut short under the reader
            offer | {"fd": 10_000},
            offer | {"pid": 2**30},
            offer | {"pid": "self"},
            other.offer() | {"proof": offer["proof"]},
            {},
            "memory",
            None,
        ]
        assert [PictureReader.attach(case) for case in wrong] == [None] * len(wrong)
        os.close(bare)
    other.close()


@pytest.mark.parametrize(
    ("options", "shared"), [({"shared_pictures": True}, True), ({"shared_pictures": False}, False)]
)
def test_a_policy_sees_the_same_pictures_either_way(options, shared):
    seen = []

    def look(observations):
        seen.extend(o.images["wrist"].copy() for o in observations)
        return np.zeros((len(observations), 5, 7), np.float32), 1

    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    shown = Observation({"third_person": picture[::-1], "wrist": picture[:, ::-1]}, np.zeros(7, np.float32), "look", 1)
    with serving(look) as server, client_of(server.endpoint, **options) as client:
        client.wait_ready(5)
        assert client.stats()["shared_pictures"] == shared
        for _ in range(5):
            client.infer(shown, 5.0)
    assert len(seen) == 5
    assert all(np.array_equal(one, picture[:, ::-1]) for one in seen)


@pytest.mark.parametrize("proof", [{"proof": b"elsewhere"}, {}])
def test_pictures_stay_on_the_socket_where_the_memory_cannot_be_reached(monkeypatch, proof):
    monkeypatch.setattr(PictureWriter, "offer", lambda self: {"pid": 1, "fd": 0, "size": 100} | proof)
    with serving() as server, client_of(server.endpoint, shared_pictures=True) as client:
        client.wait_ready(5)
        assert not client.stats()["shared_pictures"]
        assert client.infer(observation(0.5), 5.0).actions[0, 0] == 0.5


def test_a_late_request_gives_its_slot_back():
    gate = threading.Event()

    def slow(observations):
        gate.wait(5)
        return np.zeros((len(observations), 5, 7), np.float32), 1

    with serving(slow) as server, client_of(server.endpoint, max_in_flight=1, shared_pictures=True) as client:
        client.wait_ready(5)
        for _ in range(3):
            with pytest.raises(BridgeTimeout):
                client.infer(observation(), 0.05)
        gate.set()
        assert client.infer(observation(), 5.0).policy_version == 1
        assert server.stats()["expired"] + server.stats()["answered"] >= 1


def test_a_server_that_was_restarted_opens_the_memory_again():
    with serving() as server:
        endpoint = server.endpoint
        client = PolicyClient(endpoint, EMBODIMENT)
        client.wait_ready(5)
        client.infer(observation(1), 5.0)
    with serving(endpoint=endpoint), closing(client):
        assert client.infer(observation(2), 10.0).actions[0, 0] == 2.0
        stats = client.stats()
        assert stats["shared_pictures"]
        assert stats["handshakes"] == 2
        assert stats["answered"] == 2


def test_the_memory_ends_with_its_process():
    script = """
import os, signal
from bridge.shared_pictures import PictureWriter
writer = PictureWriter(2, 1000)
print(writer.offer()["fd"], flush=True)
signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    path = f"/proc/{process.pid}/fd/{process.stdout.readline().strip()}"
    assert os.readlink(path).startswith("/memfd:cotwin-pictures")
    process.kill()
    process.wait()
    assert not os.path.exists(path)
    assert not [name for name in os.listdir("/dev/shm") if "cotwin-pictures" in name]
