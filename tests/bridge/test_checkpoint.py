"""Checkpoint bundles and their delivery over real sockets."""

import errno
import json
import shutil
import time
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from bridge import checkpoint_fetch, durable, transfer
from bridge.announcement import pack_announcement
from bridge.checkpoint import bundle_path, latest_bundle, prune_bundles, read_manifest, verify_bundle, write_bundle
from bridge.checkpoint_fetch import bundle_to_run
from bridge.checkpoint_stream import CheckpointPublisher, CheckpointSubscriber, Rate
from bridge.embodiment import Camera, Embodiment
from bridge.errors import BridgeTimeout, CorruptData, Refused, SchemaMismatch
from bridge.messages import CheckpointInfo
from bridge.transfer import BLOCK_BYTES, Assembly, BlockSource, describe

EMBODIMENT = Embodiment(cameras={"wrist": Camera()})
EVALUATION = {"success": 0.5, "trials": 20}


def weights(expert: float, size: int = 1000) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "vlm.embed": rng.standard_normal((9, size)).astype(np.float32),
        "vlm.norm": np.ones(size, np.float32),
        "expert.head": np.full((1, size), expert, np.float32),
    }


def bundle(root, version, expert=None, embodiment=EMBODIMENT, size=1000):
    tensors = weights(version if expert is None else expert, size)
    files = {"model.safetensors": save(tensors), "config.json": b'{"type": "tiny"}'}
    return write_bundle(bundle_path(root, version), files, embodiment, version, version - 1, 100 * version, EVALUATION)


@contextmanager
def publishing(root, announce="tcp://127.0.0.1:*", fetch="tcp://127.0.0.1:*", **options):
    publisher = CheckpointPublisher(announce, fetch, root, **options)
    try:
        yield publisher
    finally:
        publisher.close()


@contextmanager
def subscribing(publisher, root, embodiment=EMBODIMENT, **options):
    subscriber = CheckpointSubscriber(
        publisher.announce_endpoint, publisher.fetch_endpoint, root, embodiment, **options
    )
    try:
        yield subscriber
    finally:
        subscriber.close()


def wait_for(condition, timeout_s=10.0):
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def nothing_comes(subscriber, seconds=0.4):
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        assert subscriber.poll() is None
        time.sleep(0.02)


# --- bundles ---------------------------------------------------------------------------------------------------------


def test_a_bundle_says_what_it_is(tmp_path):
    info = bundle(tmp_path, 3)
    assert info == verify_bundle(tmp_path / "000003")
    assert (info.version, info.parent_version, info.training_step) == (3, 2, 300)
    assert info.contract_hash == EMBODIMENT.contract_hash
    manifest = json.loads((tmp_path / "000003/manifest.json").read_text())
    assert manifest["evaluation"] == EVALUATION
    assert set(manifest["files"]) == {"contract.json", "config.json", "model.safetensors"}
    assert (tmp_path / "000003/done").read_bytes() == b""
    assert load_file(tmp_path / "000003/model.safetensors")["expert.head"][0, 0] == 3


def test_every_tensor_is_a_block_of_its_own(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(save(weights(1)))
    (tmp_path / "b.safetensors").write_bytes(save(weights(2)))
    first, second = describe(tmp_path / "a.safetensors"), describe(tmp_path / "b.safetensors")
    assert len(first.blocks) == 1 + 3  # header and tensors
    differing = [a[0] for a, b in zip(first.blocks, second.blocks, strict=True) if a != b]
    assert differing == [4000]  # expert.head alone
    (tmp_path / "large.bin").write_bytes(bytes(BLOCK_BYTES + 5))
    assert [size for size, _ in describe(tmp_path / "large.bin").blocks] == [BLOCK_BYTES, 5]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "done").unlink(), "done is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_bytes(b'{"type": "tinY"}'), r"config.json is not what"),
        (lambda f: (f / "config.json").write_bytes(b"{}"), "config.json has 2 bytes; the manifest says 16"),
        (lambda f: (f / "extra.py").write_bytes(b""), "extra.py"),
        (lambda f: (f / "manifest.json").write_bytes(b"{}"), "not a bundle's manifest"),
    ],
)
def test_a_damaged_bundle_is_refused_by_name(tmp_path, damage, said):
    bundle(tmp_path, 1)
    damage(tmp_path / "000001")
    with pytest.raises(CorruptData, match=said):
        verify_bundle(tmp_path / "000001")


def test_a_manifest_cannot_leave_its_folder(tmp_path):
    with pytest.raises(ValueError, match="flat names"):
        write_bundle(tmp_path / "000001", {"../x": b""}, EMBODIMENT, 1, 0, 0, {})
    bundle(tmp_path, 1)
    manifest = json.loads((tmp_path / "000001/manifest.json").read_text())
    for name in ("../x", "/etc/passwd", ".hidden", "a/b"):
        manifest["files"] = {name: next(iter(manifest["files"].values()))}
        (tmp_path / "000001/manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CorruptData, match="flat names"):
            verify_bundle(tmp_path / "000001")


def test_latest_and_prune(tmp_path):
    assert latest_bundle(tmp_path / "nowhere") is None
    for version in (1, 2, 10):
        bundle(tmp_path, version)
    (tmp_path / "000011").mkdir()  # unfinished
    assert latest_bundle(tmp_path) == tmp_path / "000010"
    assert prune_bundles(tmp_path, keep=1, protect={1}) == [tmp_path / "000002"]
    with pytest.raises(ValueError, match="exists; bundles are never changed"):
        bundle(tmp_path, 10)


# --- assembling ------------------------------------------------------------------------------------------------------


def test_an_assembly_resumes_from_what_lies_there(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from/data.bin").write_bytes(np.random.default_rng(1).bytes(3 * BLOCK_BYTES + 10))
    files, source = {"data.bin": describe(tmp_path / "from/data.bin")}, BlockSource()
    source.add(tmp_path / "from", files)
    first = Assembly(tmp_path / "to", files)
    asked = first.wants(2)
    assert first.put(asked[0], source.get(asked[0])) is True
    assert first.put(asked[0], source.get(asked[0])) is False  # sent twice
    assert first.put("0" * 64, b"unknown") is False
    assert first.put(asked[1], b"damaged") is False
    first.close()  # as after a kill: nothing but the file remains
    second = Assembly(tmp_path / "to", files)
    assert second.bytes_here == BLOCK_BYTES
    rest = second.wants(10)
    assert len(rest) == 3
    assert asked[0] not in rest
    for sha in rest:
        second.put(sha, source.get(sha))
    assert second.complete
    second.finish()
    assert (tmp_path / "to/data.bin").read_bytes() == (tmp_path / "from/data.bin").read_bytes()


def test_a_blocks_name_is_its_blake3():
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"  # from the BLAKE3 paper's vectors
    assert transfer.block_hash(b"") == f"b3-{empty}"


# --- delivery --------------------------------------------------------------------------------------------------------


def test_an_announced_bundle_arrives_verified_and_is_confirmed(tmp_path):
    info = bundle(tmp_path / "from", 1)
    with publishing(tmp_path / "from") as publisher, subscribing(publisher, tmp_path / "to") as subscriber:
        nothing_comes(subscriber, 0.2)
        publisher.announce(1)
        folder = wait_for(subscriber.poll)
        assert verify_bundle(folder) == info
        assert subscriber.poll() is None  # each once
        with pytest.raises(BridgeTimeout, match="confirmed by 0 of 1"):
            publisher.wait_confirmed(1, timeout_s=0.1)
        subscriber.confirm(1)
        assert len(publisher.wait_confirmed(1, timeout_s=10)) == 1


def test_only_changed_tensors_travel(tmp_path):
    for version in (1, 2):
        bundle(tmp_path / "from", version, size=100_000)
    with publishing(tmp_path / "from") as publisher, subscribing(publisher, tmp_path / "to") as subscriber:
        publisher.announce(1)
        wait_for(subscriber.poll)
        before = subscriber.stats()["bytes_fetched"]
        publisher.announce(2)
        assert verify_bundle(wait_for(subscriber.poll)).version == 2
        stats = subscriber.stats()
        assert stats["bytes_fetched"] - before == 400_000  # expert.head alone: every other block was here
        assert stats["bytes_reused"] > 3_900_000


def test_a_late_subscriber_learns_the_current_version(tmp_path):
    bundle(tmp_path / "from", 4)
    with publishing(tmp_path / "from") as publisher:
        publisher.announce(4)
        with subscribing(publisher, tmp_path / "to") as subscriber:
            assert wait_for(subscriber.poll).name == "000004"
        with subscribing(publisher, tmp_path / "to") as again:  # after a restart, from its own disk
            assert wait_for(again.poll).name == "000004"
            assert again.stats()["bytes_fetched"] == 0
        with subscribing(publisher, tmp_path / "to", current_version=4) as running:
            nothing_comes(running)
            assert publisher.wait_confirmed(4, timeout_s=10)


def test_a_full_disk_keeps_no_server_from_starting_again(tmp_path, monkeypatch):
    bundle(tmp_path / "from", 1)
    with publishing(tmp_path / "from") as publisher:
        publisher.announce(1)
        with subscribing(publisher, tmp_path / "to") as subscriber:
            wait_for(subscriber.poll)
        monkeypatch.setattr(durable, "write_text", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with subscribing(publisher, tmp_path / "to", current_version=1) as again:
            nothing_comes(again)
            assert publisher.wait_confirmed(1, timeout_s=10)


def test_versions_move_forward_unless_it_is_a_rollback(tmp_path):
    for version in (1, 2):
        bundle(tmp_path / "from", version)
    with publishing(tmp_path / "from") as publisher, subscribing(publisher, tmp_path / "to") as subscriber:
        publisher.announce(2)
        wait_for(subscriber.poll)
        subscriber.confirm(2)
        with pytest.raises(ValueError, match="version 1 is not newer than 2"):
            publisher.announce(1)
        publisher.rollback(1)
        assert wait_for(subscriber.poll).name == "000001"
        subscriber.confirm(1)
        publisher.announce(2)  # and forward again, from the disk
        assert wait_for(subscriber.poll).name == "000002"


def test_a_server_starts_with_what_was_rolled_back_to(tmp_path):
    assert bundle_to_run(tmp_path / "to") is None
    for version in (1, 2):
        bundle(tmp_path / "from", version)
    with publishing(tmp_path / "from") as publisher, subscribing(publisher, tmp_path / "to") as subscriber:
        for move, version in ((publisher.announce, 1), (publisher.announce, 2), (publisher.rollback, 1)):
            move(version)
            wait_for(subscriber.poll)
            subscriber.confirm(version)
        assert bundle_to_run(tmp_path / "to") == tmp_path / "to/000001"
        publisher.announce(2)
        wait_for(subscriber.poll)
        assert bundle_to_run(tmp_path / "to") == tmp_path / "to/000002"
    (tmp_path / "to/.announcement").write_text('{"announcement": 1')
    assert bundle_to_run(tmp_path / "to") == tmp_path / "to/000002"


def test_another_runs_bundle_of_the_same_number_is_not_confirmed(tmp_path):
    for name in ("ours", "other"):
        bundle(tmp_path / name, 4, expert=len(name))
    with publishing(tmp_path / "ours") as publisher:
        ends = publisher.announce_endpoint, publisher.fetch_endpoint
        with subscribing(publisher, tmp_path / "to") as subscriber:
            publisher.announce(4)
            wait_for(subscriber.poll)
            subscriber.confirm(4)
            assert publisher.wait_confirmed(4, timeout_s=10)
            publisher.close()
            with publishing(tmp_path / "other", *ends) as other:
                other.announce(4)
                with pytest.raises(Refused, match="version 4 is announced, but what runs is another run's"):
                    wait_for(subscriber.poll)
                with pytest.raises(BridgeTimeout, match="confirmed by 0 of 1"):
                    other.wait_confirmed(4, timeout_s=0.3)


def test_an_old_announcement_is_not_acted_upon(tmp_path):
    for version in (1, 2):
        bundle(tmp_path / "from", version)
    with publishing(tmp_path / "from") as publisher, subscribing(publisher, tmp_path / "to") as subscriber:
        publisher.announce(1)
        wait_for(subscriber.poll)
        publisher.announce(2)
        wait_for(subscriber.poll)
        old = read_manifest(tmp_path / "from/000001")[0]
        replayed = pack_announcement(CheckpointInfo(**vars(old) | {"rollback": True}), 5, None)
        subscriber._consider(replayed)
        assert subscriber.stats()["refused"] == 1
        nothing_comes(subscriber)


def test_a_publisher_that_restarts_goes_on(tmp_path):
    bundle(tmp_path / "from", 1)
    with publishing(tmp_path / "from") as publisher:
        publisher.announce(1)
        endpoints = publisher.announce_endpoint, publisher.fetch_endpoint
        with subscribing(publisher, tmp_path / "to") as subscriber:
            wait_for(subscriber.poll)
            subscriber.confirm(1)
            publisher.close()
            bundle(tmp_path / "from", 2)
            with publishing(tmp_path / "from", *endpoints) as restarted:
                assert restarted.wait_confirmed(1, timeout_s=10)  # told by the new hello
                restarted.announce(2)
                assert wait_for(subscriber.poll).name == "000002"


def test_a_bundle_of_another_embodiment_is_refused_before_it_travels(tmp_path):
    other = Embodiment(cameras=EMBODIMENT.cameras, policy_rate_hz=20.0)
    bundle(tmp_path / "from", 1, embodiment=other, size=300_000)
    with publishing(tmp_path / "from", max_bytes_per_s=20e6) as publisher:
        publisher.announce(1)
        with subscribing(publisher, tmp_path / "to") as subscriber:
            with pytest.raises(SchemaMismatch, match="policy_rate_hz: ours 10.0, theirs 20.0"):
                wait_for(subscriber.poll)
            nothing_comes(subscriber)
        assert latest_bundle(tmp_path / "to") is None
        with subscribing(publisher, tmp_path / "other", allow_contract_mismatch=["policy_rate_hz"]) as knowingly:
            assert wait_for(knowingly.poll).name == "000001"


def test_a_tampered_block_never_becomes_a_bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_fetch, "BACK_OFF_S", 0.2)
    bundle(tmp_path / "from", 1)
    with publishing(tmp_path / "from") as publisher, subscribing(publisher, tmp_path / "to") as subscriber:
        honest = publisher._block
        publisher._block = lambda sha: b"x" * len(honest(sha)) if sha not in publisher._manifests else honest(sha)
        publisher.announce(1)
        wait_for(lambda: subscriber.stats()["damaged"] > 0)
        assert latest_bundle(tmp_path / "to") is None
        publisher._block = honest
        assert verify_bundle(wait_for(subscriber.poll)).version == 1


def test_keep_removes_the_oldest(tmp_path):
    for version in range(1, 6):
        bundle(tmp_path / "from", version)
    with publishing(tmp_path / "from") as publisher, subscribing(publisher, tmp_path / "to", keep=2) as subscriber:
        for version in range(1, 6):
            publisher.announce(version)
            subscriber.confirm(verify_bundle(wait_for(subscriber.poll)).version)
        assert sorted(p.name for p in (tmp_path / "to").glob("0*")) == ["000004", "000005"]


def test_rate_paces_blocks():
    rate = Rate(1e6)
    assert rate.wait_s() == 0
    rate.spend(500_000)
    rate.spend(500_000)
    assert 0.9 < rate.wait_s() <= 1.0
    assert Rate(None).wait_s() == 0
    with pytest.raises(ValueError, match="more than 0"):
        Rate(0)


def test_a_bundle_damaged_on_disk_is_fetched_again(tmp_path):
    bundle(tmp_path / "from", 1)
    shutil.copytree(tmp_path / "from/000001", tmp_path / "to/000001")
    model = tmp_path / "to/000001/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with publishing(tmp_path / "from") as publisher:
        publisher.announce(1)
        with subscribing(publisher, tmp_path / "to") as subscriber:
            assert verify_bundle(wait_for(subscriber.poll)).version == 1
