"""`cotwin serve` and `cotwin push` as processes: a robot is answered, a push swaps the weights, SIGTERM ends it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cotwin
import learner.serve
from bridge.announcement import pack_announcement
from bridge.checkpoint import bundle_path, read_manifest, write_bundle
from bridge.config import load
from bridge.embodiment import Embodiment
from bridge.keys import Keys
from bridge.messages import Observation
from bridge.pictures import PictureFormat
from bridge.policy_client import PolicyClient
from bridge.telemetry import TelemetrySubscriber
from learner.load import bundle_files
from learner.normalization import Quantiles
from learner.serve import Loaded, ServeConfig, collate
from learner.small_policy import SmallPolicy, SmallPolicyConfig, Statistics

TINY = SmallPolicyConfig(image_height=24, image_width=32, conv_channels=4, keypoints=4, width=16, heads=2, layers=1)
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def embodiment() -> Embodiment:
    return load("serve", ServeConfig, []).embodiment


def tiny_policy(embodiment: Embodiment, seed: int) -> SmallPolicy:
    torch.manual_seed(seed)
    span = Quantiles(np.full(7, -1.0), np.full(7, 1.0))
    return SmallPolicy(TINY, embodiment, Statistics(span, span)).eval()


def write(root, embodiment: Embodiment, version: int) -> None:
    files: dict[str, Path | bytes] = {**bundle_files(tiny_policy(embodiment, version))}
    write_bundle(bundle_path(root, version), files, embodiment, version, version - 1, 0, {})


def observation(embodiment: Embodiment) -> Observation:
    rng = np.random.default_rng(0)
    images = {n: rng.integers(0, 255, (c.height, c.width, 3), np.uint8) for n, c in embodiment.cameras.items()}
    return Observation(images, np.zeros(7, np.float32), embodiment.instructions[0], 1)


@contextmanager
def running(*arguments: str):
    """A `cotwin` command; its lines as they come."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "cotwin", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def line_with(child: subprocess.Popen, text: str) -> str:
    seen = []
    assert child.stdout is not None
    for line in child.stdout:
        seen.append(line)
        if text in line:
            return line
    raise AssertionError(f"it ended without {text!r}:\n{''.join(seen)}")


@pytest.fixture
def key_folders(tmp_path):
    made = {role: Keys.new(tmp_path / "keys" / role, role, role) for role in ("robot", "server", "learner")}
    for keys in made.values():
        for other in made.values():
            if other is not keys:
                keys.allow(other.me)
    return {role: str(keys.folder) for role, keys in made.items()}


def test_a_served_policy_answers_swaps_by_push_and_ends(tmp_path, embodiment, key_folders):
    port = random.randint(20_000, 32_000)  # the kernel gives those from 32768 on to whoever connects
    ends = [f"announce_endpoint=tcp://127.0.0.1:{port}", f"fetch_endpoint=tcp://127.0.0.1:{port + 1}"]
    write(tmp_path / "deployed", embodiment, 1)
    write(tmp_path / "trained", embodiment, 2)
    settings = [f"root={tmp_path}/deployed", "endpoint=tcp://127.0.0.1:*", f"keys={key_folders['server']}"]
    telemetry = f"tcp://127.0.0.1:{port + 2}"
    with running("serve", *settings, *ends, "shadow_batches=1", f"telemetry_endpoint={telemetry}") as server:
        endpoint = line_with(server, "ready").split()[4].rstrip(",")
        keys = Keys.at(key_folders["robot"])
        client = PolicyClient(endpoint, embodiment, keys=keys, resize_pictures=True)
        client.wait_ready(PATIENCE_S)
        seen = observation(embodiment)
        assert client.infer(seen, PATIENCE_S).policy_version == 1
        viewer = TelemetrySubscriber(telemetry, keys=keys)
        (name, fields, _), *_ = viewer.poll(PATIENCE_S)
        viewer.close()
        assert name == "policy_server"
        assert fields["policy_version"] == 1
        assert fields["robots"] == 1
        push = ["push", f"root={tmp_path}/trained", f"keys={key_folders['learner']}", *ends]
        with running(*push, f"timeout_s={PATIENCE_S}") as pusher:
            until_s, versions = time.monotonic() + PATIENCE_S, [1]
            while versions[-1] == 1 and time.monotonic() < until_s:
                versions.append(client.infer(seen, PATIENCE_S).policy_version)
            assert versions[-1] == 2
            assert "version 2 runs on" in line_with(pusher, "version 2 runs")
            assert pusher.wait(PATIENCE_S) == 0
        assert "candidate_version=2" in line_with(server, "shadow:")
        client.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
    assert (tmp_path / "deployed/000002/done").exists()


def test_a_restart_begins_with_what_was_rolled_back_to(tmp_path, embodiment, monkeypatch, capsys):
    for version in (1, 2):
        write(tmp_path, embodiment, version)
    info = replace(read_manifest(bundle_path(tmp_path, 1))[0], rollback=True)
    accepted = {key: value.hex() for key, value in pack_announcement(info, 1, None).items()}
    (tmp_path / ".announcement").write_text(json.dumps(accepted))

    def listen(*_, policy_version, **__):
        raise ValueError(f"it would serve version {policy_version}")

    monkeypatch.setattr(learner.serve, "PolicyServer", listen)
    assert cotwin.main(["serve", f"root={tmp_path}", "threads=1"]) == 1
    assert "it would serve version 1" in one_error(capsys)


def test_what_a_person_can_get_wrong_is_one_line(tmp_path, capsys):
    assert cotwin.main(["serve", f"root={tmp_path}", "endpoint=tcp://0.0.0.0:*", "threads=1"]) == 1
    assert "no keys were given" in one_error(capsys)
    assert cotwin.main(["push", f"root={tmp_path}"]) == 1
    assert "holds no finished bundle" in one_error(capsys)


def one_error(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:")
    return line


def test_prepared_pictures_give_the_same_actions_bit_for_bit(embodiment):
    loaded = Loaded(tiny_policy(embodiment, 3), 3)
    seen = observation(embodiment)
    prepared = Observation({n: loaded.pictures.apply(i) for n, i in seen.images.items()}, seen.state, "x", 1)
    assert prepared.images["wrist"].shape == (24, 32, 3)
    alike = [loaded.policy.prepare(collate([o], loaded.pictures)) for o in (seen, prepared)]
    for name in seen.images:
        assert torch.equal(alike[0].views[name], alike[1].views[name])
    mixed = collate([seen, prepared], loaded.pictures)  # of two robots, one of which prepares its own
    assert torch.equal(mixed.images["wrist"][0], mixed.images["wrist"][1])


def test_padding_is_the_full_size_policies_own():
    from learner.vision import padded_pictures

    picture = np.random.default_rng(4).integers(0, 255, (48, 64, 3), np.uint8)
    ours = PictureFormat(22, 22, padded=True).apply(picture)
    theirs = padded_pictures(picture[None], (22, 22))[0]
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # a tie may be rounded to the other side
    assert (ours == theirs).mean() > 0.95
    assert not ours[:3].any()  # black above
