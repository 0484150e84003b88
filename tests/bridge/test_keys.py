"""Keys, roles and signatures: who is let in, and whose checkpoints count."""

import os
import threading
import time

import pytest
import zmq

from bridge import keys_command
from bridge.announcement import open_announcement, pack_announcement
from bridge.checkpoint import latest_bundle
from bridge.checkpoint_stream import CheckpointPublisher, CheckpointSubscriber
from bridge.codec import encode
from bridge.errors import BridgeTimeout, Refused
from bridge.keys import Keys
from bridge.messages import CheckpointInfo
from bridge.policy_client import PolicyClient
from bridge.sockets import Transport
from bridge.telemetry import TelemetryPublisher, TelemetrySubscriber
from tests.bridge.test_checkpoint import EMBODIMENT as TINY
from tests.bridge.test_checkpoint import bundle, nothing_comes, wait_for
from tests.bridge.test_infer import EMBODIMENT, client_of, observation, serving

INFO = CheckpointInfo(1, 0, 10, "a" * 64, "b" * 64)


@pytest.fixture
def people(tmp_path):
    """One key folder for each role, each knowing all others; and a stranger that knows them, but whom nobody knows."""
    made = {role: Keys.new(tmp_path / role, f"the-{role}", role) for role in ("robot", "server", "learner", "viewer")}
    stranger = Keys.new(tmp_path / "stranger", "stranger", "robot")
    for keys in (*made.values(), stranger):
        for other in made.values():
            if other is not keys:
                keys.allow(other.me)
    return made | {"stranger": stranger}


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    Keys.new(tmp_path, "me", "robot")
    path = tmp_path / "identity.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(ValueError, match=r"mode 0o644: others could read the secret key. Fix: chmod 600"):
        Keys(tmp_path)
    with pytest.raises(ValueError, match="exists; move it away"):
        Keys.new(tmp_path, "me", "robot")
    with pytest.raises(ValueError, match="cotwin keys new"):
        Keys(tmp_path / "nowhere")


def test_the_command_makes_shows_allows_and_revokes(tmp_path, capsys):
    ours, theirs = f"folder={tmp_path}/ours", f"folder={tmp_path}/theirs"
    assert keys_command.main(["new", ours, "name=arm", "role=robot"]) == 0
    assert keys_command.main(["new", theirs, "name=gpu", "role=learner"]) == 0
    assert keys_command.main(["allow", ours, f"card={tmp_path}/theirs/gpu.public.json"]) == 0
    capsys.readouterr()
    assert keys_command.main(["show", ours]) == 0
    shown = capsys.readouterr().out
    assert "arm (robot)" in shown
    assert "gpu (learner)" in shown
    assert "secret" not in shown
    assert keys_command.main(["revoke", ours, "name=gpu"]) == 0
    assert keys_command.main(["revoke", ours, "name=gpu"]) == 1
    assert "no key named 'gpu'" in capsys.readouterr().err
    for wrong, said in [
        (["new", ours], "needs name="),
        (["allow", ours, "card=/x"], "not a public key card"),
        ([], "say what"),
    ]:
        assert keys_command.main(wrong) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="allowed are robot, server, learner, viewer"):
        Keys.new(tmp_path / "x", "x", "king")


def test_an_encrypted_round_trip(people):
    with (
        serving(keys=people["server"]) as server,
        client_of(server.endpoint, keys=people["robot"]) as client,
    ):
        assert client.infer(observation(3), 5.0).actions[0, 0] == 3


def test_an_unknown_key_and_clear_text_get_nothing(people):
    with serving(keys=people["server"]) as server:
        for keys in (people["stranger"], None):
            with client_of(server.endpoint, keys=keys) as client, pytest.raises(BridgeTimeout):
                client.infer(observation(), 0.5)
        assert server.stats()["received"] == 0


def test_a_role_does_not_open_other_channels(people):
    with serving(keys=people["server"]) as server:
        with client_of(server.endpoint, keys=people["viewer"]) as viewer, pytest.raises(BridgeTimeout):
            viewer.infer(observation(), 0.5)  # refused below our messages, by the allow-list
        assert server.stats()["received"] == 0


def test_a_server_is_known_by_its_key(people, tmp_path):
    impostor = Keys.new(tmp_path / "impostor", "the-server", "server")
    impostor.allow(people["robot"].me)
    with (
        serving(keys=impostor) as server,
        client_of(server.endpoint, keys=people["robot"]) as client,
        pytest.raises(BridgeTimeout),
    ):
        client.infer(observation(), 0.5)
    people["robot"].revoke("the-server")
    with pytest.raises(ValueError, match="exactly one allowed key of role server; found none"):
        PolicyClient("tcp://127.0.0.1:1", EMBODIMENT, keys=people["robot"])


def test_revoking_works_on_a_connection_that_exists(people):
    with serving(keys=people["server"]) as server, client_of(server.endpoint, keys=people["robot"]) as client:
        client.infer(observation(), 5.0)
        people["server"].revoke("the-robot")
        with pytest.raises(Refused, match="revoked"):
            client.infer(observation(), 5.0)


def test_a_half_saved_allow_list_lets_nobody_in_until_it_is_whole(people):
    path, packed = people["server"].folder / "allowed.json", pack_announcement(INFO, 1, people["learner"])
    whole = path.read_text()
    with (
        serving(keys=people["server"]) as server,
        client_of(server.endpoint, keys=people["robot"], max_in_flight=4) as client,
    ):
        client.infer(observation(), 5.0)
        path.write_text(whole[:40])
        for _ in range(2):  # a request, and the hello that follows
            with pytest.raises(Refused):
                client.infer(observation(), 5.0)
        with pytest.raises(Refused):
            open_announcement(packed, people["server"])
        with pytest.raises(ValueError, match="Unterminated|Expecting|delimiter"):
            people["server"].revoke("the-robot")  # would write a list without the others
        path.write_text(whole)
        assert client.infer(observation(2), 5.0).actions[0, 0] == 2
    assert open_announcement(packed, people["server"]) == (INFO, 1)


def test_telemetry_is_for_those_with_a_key(people):
    publisher = TelemetryPublisher("tcp://127.0.0.1:*", keys=people["server"])
    with pytest.raises(ValueError, match="found the-robot, the-server"):  # which of the two publishes there?
        TelemetrySubscriber(publisher.endpoint, keys=people["viewer"])
    viewer = TelemetrySubscriber(publisher.endpoint, keys=Keys(people["viewer"].folder, peer="the-server"))
    stranger = TelemetrySubscriber(publisher.endpoint, keys=Keys(people["stranger"].folder, peer="the-server"))
    try:
        heard = []
        until_s = time.monotonic() + 10
        while not heard and time.monotonic() < until_s:
            publisher.send("x", {"a": 1})
            heard = viewer.poll(0.05)
        assert heard
        assert stranger.poll(0.3) == []
    finally:
        for end in (publisher, viewer, stranger):
            end.close()


def test_only_a_learners_signature_counts(people):
    for role in ("robot", "server", "viewer"):
        with pytest.raises(Refused, match="not signed by any allowed key of role learner"):
            open_announcement(pack_announcement(INFO, 1, people[role]), people["server"])
    packed = pack_announcement(INFO, 1, people["learner"])
    assert open_announcement(packed, people["server"]) == (INFO, 1)
    altered = packed["announcement"].replace(b'"version": 1', b'"version": 9')
    assert altered != packed["announcement"]
    with pytest.raises(Refused):
        open_announcement(packed | {"announcement": altered}, people["server"])
    with pytest.raises(Refused):
        open_announcement(packed | {"signature": b""}, people["server"])


def test_a_stolen_transport_key_cannot_push_weights(people, tmp_path):
    """Somebody with the learner's CURVE key, but not its signing key, announces and even serves a bundle."""
    thief_folder = tmp_path / "thief"
    other = Keys.new(thief_folder, "thief", "learner")
    stolen = other._identity | {key: people["learner"]._identity[key] for key in ("curve_public", "curve_secret")}
    other._identity = stolen
    for role in ("server", "robot"):
        other.allow(people[role].me)
    bundle(tmp_path / "evil", 7)
    with_subscriber(people["server"], other, tmp_path, announce=7, accepted=False)
    bundle(tmp_path / "good", 8)
    with_subscriber(people["server"], people["learner"], tmp_path, announce=8, accepted=True)


def with_subscriber(server_keys, learner_keys, tmp_path, announce, accepted):
    root = tmp_path / ("good" if accepted else "evil")
    publisher = CheckpointPublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", root, keys=learner_keys)
    publisher.announce(announce)
    subscriber = CheckpointSubscriber(
        publisher.announce_endpoint, publisher.fetch_endpoint, tmp_path / "to", TINY, keys=server_keys
    )
    try:
        if accepted:
            assert wait_for(subscriber.poll).name == f"{announce:06d}"
        else:
            wait_for(lambda: subscriber.stats()["refused"] > 0)
            nothing_comes(subscriber)
            assert latest_bundle(tmp_path / "to") is None
    finally:
        subscriber.close()
        publisher.close()


def test_a_recorded_announcement_is_refused_even_after_a_restart(people, tmp_path):
    bundle(tmp_path / "from", 1)
    bundle(tmp_path / "from", 2)
    publisher = CheckpointPublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", tmp_path / "from", keys=people["learner"])
    ends = publisher.announce_endpoint, publisher.fetch_endpoint
    try:
        publisher.announce(2)
        publisher.rollback(1)
        recorded = publisher._announced  # genuine, signed, and soon out of date
        publisher.announce(2)
        for _ in range(2):
            subscriber = CheckpointSubscriber(*ends, tmp_path / "to", TINY, keys=people["server"])
            try:
                assert wait_for(subscriber.poll).name == "000002"
                subscriber._consider(recorded)
                assert subscriber.stats()["refused"] == 1
                nothing_comes(subscriber, 0.2)
            finally:
                subscriber.close()
    finally:
        publisher.close()


def test_garbage_on_an_open_port_is_survived():
    with serving() as server:
        transport = Transport()
        raw = transport.connect(zmq.DEALER, server.endpoint, "infer")
        raw.setsockopt(zmq.SNDTIMEO, 5000)
        for frames in ([b""], [os.urandom(5000)], [b"x"] * 200, encode("infer", {"id": 1}), encode("hello", {})):
            raw.send_multipart(frames)
        with client_of(server.endpoint) as client:
            assert client.infer(observation(1), 5.0).actions[0, 0] == 1
        stats = server.stats()
        assert (stats["corrupt"], stats["refused"]) == (3, 1)
        transport.close()
    assert threading.active_count() < 20
