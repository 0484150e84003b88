"""The plugin under LeRobot's own classes and commands, on topics that are fed here."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bridge import pose
from tests.bridge.small_episodes import HEIGHT, WIDTH, small_embodiment

rclpy = pytest.importorskip("rclpy")
pytest.importorskip("lerobot")
from tests.robot.topics import Topics  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LEROBOT_RECORD = "import rclpy, lerobot.scripts.lerobot_record as command; command.main()"


@pytest.fixture
def topics(monkeypatch, tmp_path):
    domain_id = random.randint(1, 100)
    for name, value in {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_DOMAIN_ID": str(domain_id)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(ROOT / "plugin"))
    small_embodiment().save(tmp_path / "contract.json")
    running = Topics(domain_id, (HEIGHT, WIDTH))
    yield running
    running.close()


def readings(path: Path, count: int) -> Path:
    """Forward at full stick while the clutch is held."""
    reading = {"motion": [1.0, 0, 0, 0, 0, 0], "clutch": True, "deadman": True, "pressed": []}
    path.write_text("".join(json.dumps(reading) + "\n" for _ in range(count)))
    return path


def test_states_and_actions_pass_and_strange_keys_do_not(topics, tmp_path):
    import lerobot_robot_cotwin as plugin

    folders = {"id": "a", "calibration_dir": tmp_path / "calibration"}
    robot = plugin.Cotwin(plugin.CotwinConfig(embodiment=str(tmp_path / "contract.json"), **folders))
    hand_config = plugin.CotwinHandConfig(device="playback", path=str(readings(tmp_path / "hand.jsonl", 2)), **folders)
    hand = plugin.CotwinHand(hand_config)
    assert not robot.is_connected
    hand.connect()
    robot.connect()
    try:
        seen = robot.get_observation()
        assert set(seen) == set(robot.observation_features)
        expected = [0.4, 0.0, 0.3, np.pi, 0.0, 0.0, 0.03]
        assert [seen[f"{name}.pos"] for name in pose.STATE_NAMES] == pytest.approx(expected, abs=1e-6)
        assert (seen["wrist"].shape, seen["wrist"].mean()) == ((HEIGHT, WIDTH, 3), 160)
        action = hand.get_action()
        assert set(action) == set(robot.action_features) == set(hand.action_features)
        assert not set(robot.action_features) & set(robot.observation_features)
        assert action["dx_m.pos"] == pytest.approx(0.2 * 0.5 / 30)  # the middle of three speeds, one thirtieth second
        assert action["gripper.pos"] == -1.0  # taking over leaves the hand as it is
        assert robot.send_action(action) == action
        hand.get_action()
        assert list(hand.get_action().values()) == [0, 0, 0, 0, 0, 0, -1]  # let go
        for wrong in (
            {key: value for key, value in seen.items() if key.endswith(".pos")},  # what a rollout sends at its end
            action | {"tcp_x_m.pos": 0.4},
            {},
        ):
            with pytest.raises(ValueError, match="states are no actions"):
                robot.send_action(wrong)
        with pytest.raises(ValueError, match="not finite"):
            robot.send_action(action | {"dx_m.pos": float("nan")})
        until_s = time.monotonic() + 10
        while not topics.actions:
            assert time.monotonic() < until_s
            time.sleep(0.02)
        assert tuple(topics.actions[0].name) == pose.ACTION_NAMES
        assert list(topics.actions[0].position) == pytest.approx(list(action.values()))
        assert len(topics.actions) == 1
    finally:
        robot.disconnect()
        hand.disconnect()


def test_silence_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ROS_DOMAIN_ID", str(random.randint(1, 100)))
    monkeypatch.syspath_prepend(str(ROOT / "plugin"))
    import lerobot_robot_cotwin as plugin
    from lerobot.utils.errors import DeviceNotConnectedError

    config = plugin.CotwinConfig(timeout_s=0.2, calibration_dir=tmp_path)
    with pytest.raises(DeviceNotConnectedError, match="nothing yet from third_person, wrist"):
        plugin.Cotwin(config).connect()


def install_plugin(place: Path) -> str:
    """As pip would, into a folder of its own; the search path that makes it found."""
    shutil.copytree(ROOT / "plugin", place / "source", ignore=shutil.ignore_patterns("__pycache__"))
    command = [shutil.which("uv") or "uv", "pip", "install", "--python", sys.executable, "--offline", "--no-deps", "-q"]
    target = place / "site"
    subprocess.run([*command, "--no-build-isolation", "--target", target, place / "source"], check=True, timeout=60)
    return os.pathsep.join([str(target), str(ROOT)])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("uv") is None, reason="the plugin is installed with uv")
def test_lerobot_record_writes_what_the_robot_showed(topics, tmp_path):
    root = tmp_path / "data"
    options = {
        "robot.type": "cotwin",
        "robot.embodiment": tmp_path / "contract.json",
        "teleop.type": "cotwin",
        "teleop.device": "playback",
        "teleop.path": readings(tmp_path / "hand.jsonl", 1000),
        "dataset.repo_id": "lab/cube",
        "dataset.root": root,
        "dataset.single_task": "pick up the cube",
        "dataset.num_episodes": 1,
        "dataset.episode_time_s": 2,
        "dataset.reset_time_s": 0,
        "dataset.push_to_hub": "false",
        "dataset.rgb_encoder.vcodec": "h264",
        "play_sounds": "false",
    }
    command = [sys.executable, "-c", LEROBOT_RECORD, *(f"--{key}={value}" for key, value in options.items())]
    environment = os.environ | {"PYTHONPATH": install_plugin(tmp_path), "HF_LEROBOT_HOME": str(tmp_path / "lerobot")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    info = json.loads((root / "meta/info.json").read_text())
    assert (info["robot_type"], info["total_episodes"]) == ("cotwin", 1)
    assert info["features"]["action"]["names"] == [f"{name}.pos" for name in pose.ACTION_NAMES]
    assert info["total_frames"] > 20
    assert len(topics.actions) > 20
    assert topics.actions[3].position[0] == pytest.approx(0.2 * 0.5 / 30)
