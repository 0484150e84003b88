"""Well-formed messages with the wrong things in them: every kind, every field, every type. Nobody dies of it."""

import itertools
import threading

import numpy as np
import pytest
import zmq

from bridge.checkpoint_stream import CheckpointPublisher, CheckpointSubscriber
from bridge.codec import Blob, decode, encode
from bridge.dataset import DatasetStore
from bridge.demo_stream import DemoReceiver, DemoSender
from bridge.errors import BridgeError
from bridge.handshake import CallerEnd
from tests.bridge.small_episodes import FPS, small_embodiment, write_episode
from tests.bridge.test_checkpoint import EMBODIMENT as TINY
from tests.bridge.test_checkpoint import bundle, verify_bundle, wait_for
from tests.bridge.test_infer import EMBODIMENT, client_of, observation, serving

VALUES = [None, True, -1, 2**64 - 1, 0.5, float("nan"), "", "x" * 100, "0" * 64, b"", [], [[]], {}, {"a": [1]}]
VALUES += [np.zeros(3), np.zeros((0, 0, 3), np.uint8), np.zeros(9000), Blob(b"x")]
KINDS = ("hello", "infer", "want", "current", "confirm", "offer", "block", "nonsense")
FIELDS = ("id", "budget_s", "sent_ns", "images", "state", "age_ns", "instruction", "hashes", "version", "uuid")
FIELDS += ("sha256", "hash", "data", "manifest", "role", "uid", "contract_hash", "policy_version", "name")
ANSWERS = ("welcome", "mismatch", "refused", "who", "chunk", "error", "current", "block", "absent", "want", "stored")
ANSWER_FIELDS = ("id", "error", "message", "actions", "start_ns", "period_ns", "policy_version", "contract", "reason")
ANSWER_FIELDS += ("announcement", "signature", "pictures", "hash", "data", "hashes", "uuid")


def strange_bodies(kinds, fields, **good):
    for kind, name, value in itertools.product(kinds, fields, VALUES):
        yield encode(kind, good | {name: value})


def bother(endpoint, channel, role, embodiment, **good):
    """Send everything strange as a welcomed caller."""
    end = CallerEnd(endpoint, channel, embodiment, role=role)
    for frames in strange_bodies(KINDS, FIELDS, **good):
        while not end.send(frames):  # a strange hello was refused, so introduce ourselves again
            try:
                end.receive(0.01)
            except BridgeError:
                continue
    end.close()


def test_a_policy_server_lives_on():
    with serving() as server:
        good = {"id": 1, "budget_s": 5.0, "sent_ns": 0, "state": np.zeros(7, np.float32), "stamp_ns": 1, "age_ns": {}}
        good |= {"images": observation().images, "instruction": "x"}
        bother(server.endpoint, "infer", "robot", EMBODIMENT, **good)
        with client_of(server.endpoint) as client:
            assert client.infer(observation(1), 10.0).actions[0, 0] == 1


def test_a_publisher_lives_on(tmp_path):
    bundle(tmp_path / "from", 1)
    publisher = CheckpointPublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", tmp_path / "from")
    bother(publisher.fetch_endpoint, "checkpoints", "server", None)
    publisher.announce(1)
    subscriber = CheckpointSubscriber(publisher.announce_endpoint, publisher.fetch_endpoint, tmp_path / "to", TINY)
    assert verify_bundle(wait_for(subscriber.poll)).version == 1
    subscriber.close()
    publisher.close()


def test_a_demo_receiver_lives_on(tmp_path):
    store = DatasetStore.create(tmp_path / "data", "lab/cube", small_embodiment(), FPS)
    receiver, stop = DemoReceiver("tcp://127.0.0.1:*", store), threading.Event()
    thread = threading.Thread(target=receiver.serve_forever, args=(stop,))
    thread.start()
    bother(receiver.endpoint, "demos", "robot", small_embodiment(), uuid="a" * 32)
    sender = DemoSender(receiver.endpoint, small_embodiment(), tmp_path / "spool")
    sender.enqueue(write_episode(tmp_path / "a"))
    sender.flush(20)
    sender.close()
    stop.set()
    thread.join(10)


class StrangeListener:
    """Answers every message with one strange answer after the other, and knows no order."""

    def __init__(self):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self._socket.last_endpoint.decode()
        self.answers = list(strange_bodies(ANSWERS, ANSWER_FIELDS, id=1, uuid="a" * 32))
        self.sent, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            if self._socket.poll(20):
                route, *frames = self._socket.recv_multipart()
                decode(frames)
                self._socket.send_multipart([route, *encode("welcome", {})])
                for answer in self.answers[self.sent : self.sent + 60]:
                    self._socket.send_multipart([route, *answer])
                self.sent += 60

    @property
    def done(self):
        return self.sent >= len(self.answers)

    def close(self):
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)


@pytest.fixture
def strange():
    listener = StrangeListener()
    yield listener
    listener.close()


def test_a_robot_lives_on(strange):
    with client_of(strange.endpoint) as client:
        while not strange.done:
            try:
                client.infer(observation(), 0.02)
            except BridgeError:
                continue


def test_a_subscriber_lives_on(strange, tmp_path):
    subscriber = CheckpointSubscriber("tcp://127.0.0.1:1", strange.endpoint, tmp_path, TINY)
    try:
        for _ in range(100):
            try:
                assert subscriber.poll() is None
            except BridgeError:
                continue
            subscriber.confirm(1)  # makes it speak, and so be answered
            subscriber._stop.wait(0.02)
        assert subscriber._thread.is_alive()
    finally:
        subscriber.close()


def test_a_sender_lives_on(strange, tmp_path):
    sender = DemoSender(strange.endpoint, small_embodiment(), tmp_path / "spool")
    sender.enqueue(write_episode(tmp_path / "a"))
    with pytest.raises(BridgeError):
        sender.flush(3.0)
    assert sender._thread.is_alive()
    assert sender.pending() == 1
    sender.close()
