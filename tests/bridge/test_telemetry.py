import time

import pytest

from bridge.telemetry import TelemetryPublisher, TelemetrySubscriber


@pytest.fixture
def publisher():
    publisher = TelemetryPublisher("tcp://127.0.0.1:*")
    yield publisher
    publisher.close()


@pytest.fixture
def subscriber(publisher):
    subscriber = TelemetrySubscriber(publisher.endpoint)
    yield subscriber
    subscriber.close()


def until_heard(publisher, subscriber):
    for _ in range(200):
        publisher.send("hello", {})
        if subscriber.poll(0.02):
            return
    raise AssertionError("never connected")


def test_what_was_sent_arrives(publisher, subscriber):
    until_heard(publisher, subscriber)
    before_ns = time.time_ns()
    publisher.send("runtime", {"tick_p99_ms": 0.5, "state": "RUNNING", "queues": [1, 2]})
    name, fields, stamp_ns = next(entry for entry in subscriber.poll(5.0) if entry[0] == "runtime")
    assert (name, fields) == ("runtime", {"tick_p99_ms": 0.5, "state": "RUNNING", "queues": [1, 2]})
    assert before_ns <= stamp_ns <= time.time_ns()


def test_a_slow_listener_loses_messages_and_delays_nobody(publisher, subscriber):
    until_heard(publisher, subscriber)
    payload = {"text": "x" * 50_000}
    for _ in range(2000):  # 100 MB that nobody reads: had `send` waited or kept them, this would not end
        publisher.send("flood", payload)
    heard = 0
    while taken := subscriber.poll(0.5):
        heard += len(taken)
    assert 0 < heard < 2000
    publisher.send("after", {})
    while not any(name == "after" for name, _, _ in subscriber.poll(5.0)):
        pass
    assert subscriber.missed == 2000 - heard


def test_too_much_is_refused_where_it_is_sent(publisher):
    with pytest.raises(ValueError, match="more than 65536 bytes"):
        publisher.send("big", {"text": "x" * 70_000})
