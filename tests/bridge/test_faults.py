"""What goes wrong on a link, and how it ends: in the documented error or in recovery, never in a wrong answer.

With COTWIN_FAULT_TABLE=FILE the outcomes are written there as JSON, one row for each channel and fault.
"""

import errno
import json
import os
import shutil
import time

import numpy as np
import pytest

from bridge import checkpoint_fetch, demo_stream, policy_client, sockets
from bridge.checkpoint import latest_bundle, verify_bundle
from bridge.checkpoint_stream import CheckpointSubscriber
from bridge.codec import encode
from bridge.dataset import read_episode
from bridge.errors import BridgeError, BridgeTimeout
from bridge.transfer import Assembly
from tests.bridge.faulty_link import MESSAGE_FAULTS, FaultyConnection, FaultyMessages
from tests.bridge.small_episodes import write_episode
from tests.bridge.test_checkpoint import EMBODIMENT as TINY
from tests.bridge.test_checkpoint import bundle, publishing, subscribing, wait_for
from tests.bridge.test_demo_stream import pq_rows, receiving, sending, stored
from tests.bridge.test_infer import client_of, observation, serving


@pytest.fixture
def row(request):
    """Notes what a test saw; the table is made of these."""
    seen: dict = {}
    yield seen
    if path := os.environ.get("COTWIN_FAULT_TABLE"):
        with open(path, "a") as file:
            file.write(json.dumps(seen) + "\n")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint_fetch, "BLOCK_SILENCE_S", 0.1)
    monkeypatch.setattr(checkpoint_fetch, "SILENCE_S", 0.2)
    monkeypatch.setattr(checkpoint_fetch, "BACK_OFF_S", 0.1)
    monkeypatch.setattr(demo_stream, "OFFER_AGAIN_S", 0.2)
    monkeypatch.setattr(demo_stream, "BUSY_S", 0.1)


@pytest.mark.parametrize("fault", MESSAGE_FAULTS)
def test_infer_answers_rightly_or_times_out(fault, row):
    with serving() as server:
        link = FaultyMessages(server.endpoint, fault, share=0.3)
        try:
            with client_of(link.endpoint) as client:
                outcomes = {"chunk": 0}
                for value in range(1, 26):
                    try:
                        chunk = client.infer(observation(value), 0.1)
                        assert (chunk.actions == value).all()  # never another request's answer
                        outcomes["chunk"] += 1
                    except BridgeError as error:
                        outcomes[type(error).__name__] = outcomes.get(type(error).__name__, 0) + 1
                assert link.harmed >= 5
                assert outcomes["chunk"] > 5
                assert set(outcomes) <= {"chunk", "BridgeTimeout"}, outcomes
                link.share = 0.0
                wait_for(lambda: _answers(client))
            row.update(channel="infer", fault=fault, harmed=link.harmed, outcomes=outcomes, after="answers again")
        finally:
            link.close()


def _answers(client) -> bool:
    try:
        return bool((client.infer(observation(77), 0.3).actions == 77).all())
    except BridgeTimeout:
        return False


@pytest.mark.parametrize("fault", MESSAGE_FAULTS)
def test_a_bundle_arrives_whole(fault, row, tmp_path):
    bundle(tmp_path / "from", 1, size=200_000)
    with publishing(tmp_path / "from") as publisher:
        publisher.announce(1)
        link = FaultyMessages(publisher.fetch_endpoint, fault, share=0.25, seed=1)
        subscriber = CheckpointSubscriber(publisher.announce_endpoint, link.endpoint, tmp_path / "to", TINY)
        try:
            info = verify_bundle(wait_for(subscriber.poll, 20))
            assert info == verify_bundle(tmp_path / "from/000001")
            damaged = subscriber.stats()["damaged"]
        finally:
            subscriber.close()
            link.close()
    outcomes = {"verified bundle": 1, "blocks or bundles begun again": damaged}
    row.update(channel="checkpoints", fault=fault, harmed=link.harmed, outcomes=outcomes, after="version 1 ready")


@pytest.mark.parametrize("fault", MESSAGE_FAULTS)
def test_episodes_arrive_once_and_whole(fault, row, tmp_path):
    folders = [write_episode(tmp_path / f"{k}", num_rows=4, seed=k) for k in range(3)]
    with receiving(tmp_path / "data") as receiver:
        link = FaultyMessages(receiver.endpoint, fault, share=0.25, seed=2)
        try:
            with sending(link.endpoint, tmp_path / "spool") as sender:
                for folder in folders:
                    sender.enqueue(folder)
                sender.flush(30)
                offers = sender.stats()["offers"]
        finally:
            link.close()
    held = stored(tmp_path / "data")
    assert len(held) == 3
    for folder in folders:
        index = held[json.loads((folder / "episode.json").read_text())["uuid"]]
        np.testing.assert_array_equal(read_episode(tmp_path / "data", index)["action"], pq_rows(folder)["action"])
    outcomes = {"stored once": 3, "offers": offers}
    row.update(channel="demos", fault=fault, harmed=link.harmed, outcomes=outcomes, after="spool empty")


def test_a_half_open_connection_is_left_and_made_anew(row, monkeypatch):
    monkeypatch.setattr(sockets, "HEARTBEAT_MS", 250)
    monkeypatch.setattr(sockets, "HEARTBEAT_TIMEOUT_MS", 1000)
    with serving() as server:
        link = FaultyConnection(server.endpoint)
        try:
            with client_of(link.endpoint) as client:
                client.infer(observation(1), 5.0)
                link.freeze()  # no bytes, no FIN: only the heartbeat can tell
                with pytest.raises(BridgeTimeout):
                    client.infer(observation(2), 0.2)
                wait_for(lambda: _answers(client), 15)
                assert client.stats()["handshakes"] == 2
            row.update(
                channel="infer", fault="half-open connection", outcomes={"BridgeTimeout": 1}, after="reconnected"
            )
        finally:
            link.close()


def test_a_cut_connection_is_made_anew(row):
    with serving() as server:
        link = FaultyConnection(server.endpoint)
        try:
            with client_of(link.endpoint) as client:
                client.infer(observation(1), 5.0)
                link.cut()
                wait_for(lambda: _answers(client), 15)
            row.update(channel="infer", fault="connection cut", outcomes={}, after="reconnected")
        finally:
            link.close()


def test_a_robot_that_does_not_read_does_not_hold_up_another(row):
    with serving(max_batch=1) as server:
        slow_link = FaultyConnection(server.endpoint, bytes_per_s=20_000)
        try:
            with client_of(slow_link.endpoint) as slow, client_of(server.endpoint) as quick:
                slow.wait_ready(10)
                slow.submit(observation(1), 60.0)
                slow.submit(observation(2), 60.0)
                for value in range(20):
                    assert quick.infer(observation(value), 5.0).actions[0, 0] == value
            row.update(channel="infer", fault="slow reader", outcomes={"chunks of the other robot": 20}, after="-")
        finally:
            slow_link.close()


def test_a_clock_that_jumps_is_not_noticed(row, monkeypatch):
    """Deadlines count on the monotonic clock of each side, so the wall clock may be set at any time."""
    with serving() as server, client_of(server.endpoint) as client:
        client.infer(observation(1), 5.0)
        true_time = time.time
        monkeypatch.setattr(time, "time", lambda: true_time() - 86_400)
        monkeypatch.setattr(time, "time_ns", lambda: int((true_time() + 1e6) * 1e9))
        assert client.infer(observation(2), 5.0).actions[0, 0] == 2
    row.update(channel="infer", fault="wall clock jumps", outcomes={"chunk": 1}, after="-")


def test_a_robot_whose_monotonic_clock_is_elsewhere_is_served(row, monkeypatch):
    """Two machines booted at different times; then one that claims to have asked long ago is not believed for ever."""
    with serving() as server, client_of(server.endpoint) as client:
        encode_as_before = policy_client.encode

        def from_another_boot(kind, body):
            return encode_as_before(kind, body | ({"sent_ns": body["sent_ns"] - 10**15} if "sent_ns" in body else {}))

        monkeypatch.setattr(policy_client, "encode", from_another_boot)
        monkeypatch.setattr("bridge.handshake.encode", lambda kind, body: from_another_boot(kind, body))
        for value in range(3):
            assert client.infer(observation(value), 1.0).actions[0, 0] == value
    row.update(channel="infer", fault="clocks of two machines", outcomes={"chunk": 3}, after="-")


def test_a_full_disk_pauses_a_delivery(row, tmp_path, monkeypatch):
    bundle(tmp_path / "from", 1)
    full, write = [True], Assembly._write

    def write_or_full(self, sha, data):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, sha, data)

    monkeypatch.setattr(Assembly, "_write", write_or_full)
    with publishing(tmp_path / "from") as publisher, subscribing(publisher, tmp_path / "to") as subscriber:
        publisher.announce(1)
        wait_for(lambda: subscriber.stats()["disk_errors"] > 1)
        assert latest_bundle(tmp_path / "to") is None
        full[0] = False
        assert verify_bundle(wait_for(subscriber.poll)).version == 1
    row.update(channel="checkpoints", fault="full disk", outcomes={"waits": 1}, after="version 1 ready")


def test_a_spool_that_cannot_be_written_says_so(row, tmp_path, monkeypatch):
    folder = write_episode(tmp_path / "a")
    with sending("tcp://127.0.0.1:1", tmp_path / "spool") as sender:
        monkeypatch.setattr(shutil, "copyfile", _full)
        monkeypatch.setattr(os, "link", _full)
        with pytest.raises(OSError, match="No space left"):
            sender.enqueue(folder)
        assert sender.pending() == 0
        assert not list((tmp_path / "spool").iterdir())
    row.update(channel="demos", fault="full disk at the robot", outcomes={"OSError": 1}, after="nothing half-stored")


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_message_of_another_channel_is_ignored():
    with serving() as server, client_of(server.endpoint) as client:
        client.wait_ready(5)
        client._end.send(encode("want", {"hashes": ["x"]}))
        client._end.send(encode("infer", {"id": "seven"}))
        assert client.infer(observation(1), 5.0).actions[0, 0] == 1
        assert server.stats()["corrupt"] == 2
