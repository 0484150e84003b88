"""The infer channel over real sockets: answers, deadlines, restarts, contracts, fairness."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from bridge import handshake
from bridge.embodiment import Camera, Embodiment
from bridge.errors import BridgeError, BridgeTimeout, Refused, SchemaMismatch
from bridge.messages import Observation
from bridge.policy_client import PolicyClient
from bridge.policy_server import PolicyServer

EMBODIMENT = Embodiment(cameras={"third_person": Camera(), "wrist": Camera()})


def observation(value: float = 0.0, stamp_ns: int = 7) -> Observation:
    images = {name: np.full((48, 64, 3), int(value) % 256, np.uint8) for name in EMBODIMENT.cameras}
    return Observation(images, np.full(7, value, np.float32), "put the cube on the plate", stamp_ns, {"wrist": 3})


def echo(observations: list[Observation]) -> tuple[np.ndarray, int]:
    """Actions that say which observation they came from."""
    return np.stack([np.tile(o.state, (5, 1)) for o in observations]), 4


@contextmanager
def serving(infer=echo, endpoint="tcp://127.0.0.1:*", embodiment=EMBODIMENT, **options):
    server = PolicyServer(endpoint, embodiment, infer, **{"max_batch": 4} | options)
    stop = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(stop,))
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join(5)
        assert not thread.is_alive()


@contextmanager
def client_of(endpoint, **options):
    client = PolicyClient(endpoint, EMBODIMENT, **{"shared_pictures": False} | options)
    try:
        yield client
    finally:
        client.close()


def poll_until(client, timeout_s=5.0):
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        if (chunk := client.poll()) is not None:
            return chunk
        time.sleep(0.002)
    raise AssertionError("no chunk")


def test_an_observation_becomes_its_chunk():
    with serving() as server, client_of(server.endpoint) as client:
        chunk = client.infer(observation(0.25, stamp_ns=123), deadline_s=5.0)
        assert chunk.actions.dtype == np.float32
        np.testing.assert_array_equal(chunk.actions, np.full((5, 7), 0.25, np.float32))
        assert (chunk.start_ns, chunk.period_ns, chunk.policy_version) == (123, 100_000_000, 4)
        assert client.policy_version == 4
        assert client.poll() is None  # each chunk once


def test_poll_returns_the_newest_and_counts_the_superseded():
    gate = threading.Event()

    def gated(observations):
        gate.wait(5)
        return echo(observations)

    with serving(gated) as server, client_of(server.endpoint) as client:
        client.wait_ready(5)
        client.submit(observation(1), 5.0)
        client.submit(observation(2), 5.0)
        with pytest.raises(BridgeError, match="2 requests are in flight"):
            client.submit(observation(3), 5.0)
        gate.set()
        while server.stats()["answered"] < 2:
            time.sleep(0.005)
        time.sleep(0.05)
        assert poll_until(client).actions[0, 0] == 2
        assert client.poll() is None
        assert client.stats()["superseded"] == 1


def test_a_passed_deadline_is_reported_once_and_its_late_answer_dropped():
    release = threading.Event()

    def slow(observations):
        release.wait(5)
        return echo(observations)

    with serving(slow) as server, client_of(server.endpoint) as client:
        client.wait_ready(5)
        with pytest.raises(BridgeTimeout):
            client.infer(observation(1), deadline_s=0.1)
        release.set()
        until_s = time.monotonic() + 5
        while client.stats()["late"] == 0 and time.monotonic() < until_s:
            assert client.poll() is None  # neither a chunk nor a second timeout
            time.sleep(0.005)
        assert client.stats()["late"] == 1
        assert client.infer(observation(2), 5.0).actions[0, 0] == 2


def test_a_server_that_was_away_is_found_again_without_a_new_client():
    with client_of("tcp://127.0.0.1:1") as nobody, pytest.raises(BridgeTimeout, match="not connected"):
        nobody.infer(observation(), 0.1)
    with serving() as server:
        endpoint = server.endpoint
        client = PolicyClient(endpoint, EMBODIMENT)
        assert client.infer(observation(1), 5.0).actions[0, 0] == 1
    with pytest.raises(BridgeTimeout):
        client.infer(observation(2), 0.2)
    with serving(endpoint=endpoint, policy_version=9) as server:
        assert client.infer(observation(3), 5.0).actions[0, 0] == 3
        # What was asked while the server was away never reaches the new one.
        assert server.stats()["requests"] == 1
        assert client.stats()["handshakes"] == 2
    client.close()


def test_requests_past_their_deadline_are_not_computed():
    release, seen = threading.Event(), []

    def infer(observations):
        seen.extend(float(o.state[0]) for o in observations)
        release.wait(5)
        return echo(observations)

    with serving(infer, max_batch=1) as server, client_of(server.endpoint, max_in_flight=3) as client:
        client.wait_ready(5)
        client.submit(observation(1), 5.0)
        client.submit(observation(2), 0.05)
        client.submit(observation(3), 5.0)
        time.sleep(0.2)
        release.set()
        with pytest.raises(BridgeTimeout):
            poll_until(client)
        assert poll_until(client).actions[0, 0] in (1, 3)
        while server.stats()["answered"] < 2:
            time.sleep(0.005)
        assert seen == [1, 3]
        assert server.stats()["expired"] == 1


def test_batches_are_fair_to_a_quiet_robot():
    gate, batches = threading.Event(), []

    def infer(observations):
        gate.wait(5)
        batches.append([float(o.state[0]) for o in observations])
        return echo(observations)

    with (
        serving(infer, max_batch=2) as server,
        client_of(server.endpoint, max_in_flight=6) as busy,
        client_of(server.endpoint) as quiet,
    ):
        busy.wait_ready(5)
        quiet.wait_ready(5)
        for value in range(6):
            busy.submit(observation(value), 10.0)
        while server.stats()["requests"] < 1:
            time.sleep(0.005)
        quiet.submit(observation(100), 10.0)
        time.sleep(0.1)
        gate.set()
        assert poll_until(quiet).actions[0, 0] == 100
        first_with_quiet = next(i for i, batch in enumerate(batches) if 100 in batch)
        assert first_with_quiet <= 1, batches  # at most the batch that was running already came first


@pytest.mark.parametrize("error", [ValueError("bad pose"), RuntimeError("out of memory")])
def test_an_error_of_the_policy_reaches_the_robot_by_id_and_the_server_lives(error):
    failing = threading.Event()
    failing.set()

    def infer(observations):
        if failing.is_set():
            raise error
        return echo(observations)

    with serving(infer) as server, client_of(server.endpoint) as client:
        with pytest.raises(BridgeError, match=str(error)):
            client.infer(observation(), 5.0)
        failing.clear()
        assert client.infer(observation(6), 5.0).actions[0, 0] == 6


def test_an_observation_outside_the_contract_is_answered_not_computed():
    with serving() as server, client_of(server.endpoint) as client:
        good = observation()
        for wrong, said in [
            (Observation({"wrist": good.images["wrist"]}, good.state, "x", 0), "images: expected"),
            (Observation(good.images, np.zeros(6, np.float32), "x", 0), "state: expected"),
        ]:
            with pytest.raises(SchemaMismatch, match=said):
                client.infer(wrong, 5.0)


def test_actions_that_are_not_finite_never_reach_the_robot():
    nan = lambda observations: (np.full((1, 5, 7), np.nan, np.float32), 1)  # noqa: E731
    with serving(nan) as server, client_of(server.endpoint) as client, pytest.raises(BridgeError, match="not finite"):
        client.infer(observation(), 5.0)


def test_another_contract_is_refused_by_field_with_both_values():
    other = Embodiment(cameras=EMBODIMENT.cameras, policy_rate_hz=20.0)
    with serving(embodiment=other) as server:
        with (
            client_of(server.endpoint) as client,
            pytest.raises(SchemaMismatch, match=r"policy_rate_hz: ours 10.0, theirs 20.0"),
        ):
            client.infer(observation(), 5.0)
        with client_of(server.endpoint, allow_contract_mismatch=["policy_rate_hz"]) as knowingly:
            assert knowingly.infer(observation(2), 5.0).actions[0, 0] == 2


def test_roles_are_checked():
    with pytest.raises(ValueError, match="role 'viewer' may not call the infer channel"):
        PolicyClient("tcp://127.0.0.1:1", EMBODIMENT, role="viewer")
    with serving() as server, client_of(server.endpoint) as client:
        client._end.role = "viewer"  # a caller that lies about what its own code checks
        with pytest.raises(Refused, match="may not call"):
            client.infer(observation(), 5.0)


def test_no_clear_text_leaves_the_machine():
    with pytest.raises(ValueError, match="no keys were given"):
        PolicyClient("tcp://192.0.2.1:5601", EMBODIMENT)
    with pytest.raises(ValueError, match="no keys were given"):
        PolicyServer("tcp://*:5601", EMBODIMENT, echo, max_batch=1)


def test_callers_that_have_gone_leave_room_and_the_quiet_come_back(monkeypatch):
    monkeypatch.setattr(handshake, "MAX_CALLERS", 2)
    with serving() as server:
        for _ in range(2):
            with client_of(server.endpoint) as gone:
                gone.wait_ready(5)
        with (
            client_of(server.endpoint) as first,
            client_of(server.endpoint) as second,
            client_of(server.endpoint) as third,
        ):
            for client in (first, second, third):
                assert client.infer(observation(1), 5.0).actions[0, 0] == 1
            assert len(server._end.callers) == 2
            assert first.infer(observation(2), 5.0).actions[0, 0] == 2  # its place went to the third
            assert first.stats()["handshakes"] == 2
