import json

import numpy as np
import pytest

from bridge import pose
from bridge.dataset import DatasetStore, read_episode, video_path
from bridge.video import decode_frames
from sim.twin import demos
from sim.twin.demos import REPO_IDS, TwinDemosConfig, demonstrate, main


@pytest.fixture
def config(twin, embodiment, tmp_path):
    return TwinDemosConfig(runs_dir=str(tmp_path), embodiment=embodiment, twin=twin.config, action_noise_m=0.0)


def test_a_demonstration_becomes_an_episode_of_the_contract(twin, embodiment, config, tmp_path):
    size = (twin.config.picture_height, twin.config.picture_width)
    store = DatasetStore.create(tmp_path / "data", REPO_IDS["PutCubeOnPlate-v0"], embodiment, 10, size)
    attempt = demonstrate(twin, config, 5, tmp_path / "episode")
    assert attempt.success
    store.append(tmp_path / "episode")
    rows = read_episode(tmp_path / "data", 0)
    assert len(rows["action"]) == attempt.steps
    assert rows["next.success"].ravel().tolist() == [False] * (attempt.steps - 1) + [True]
    assert np.array_equal(rows["action"], rows["requested_action"])
    assert np.abs(rows["action"][:, :3]).max() <= 0.036
    # The TCP trails the commanded target; over the episode the recorded actions add up to where it went.
    travelled = rows["observation.state"][-1, :3] - rows["observation.state"][0, :3]
    assert np.abs(travelled - rows["action"][:-1, :3].sum(0)).max() < 0.03
    for camera in embodiment.cameras:
        frames = list(decode_frames(video_path(tmp_path / "data", camera, 0)))
        assert len(frames) == attempt.steps
        assert frames[0].shape == (*size, 3)
        assert np.abs(frames[0].astype(int) - frames[-1].astype(int)).mean() > 1.0  # something moved


def test_noise_is_executed_but_not_recorded(twin, embodiment, config, tmp_path):
    """The rows hold what the expert wanted: they lead back to the clean path, and do not add up to the noisy one."""
    config.action_noise_m = 0.003
    attempt = demonstrate(twin, config, 5, tmp_path / "noisy")
    assert attempt.success
    import pyarrow.parquet as pq

    action = np.stack(pq.read_table(tmp_path / "noisy" / "rows.parquet")["action"].to_numpy())
    record = json.loads((tmp_path / "noisy" / "episode.json").read_text())
    assert record["extra"] == {"seed": 5, "action_noise_m": 0.003}
    assert record["domain"] == "twin"
    waits = np.abs(action[:, :3]).max(1) < 1e-6
    assert waits.sum() >= 3  # while the fingers close the expert asks for no motion, whatever the noise did
    T = pose.pose([0, 0, 0], np.eye(3))
    for row in action:
        T = pose.integrate(T, row)
    assert np.linalg.norm(T[:3, 3] - (twin.facts.T_base_target[:3, 3])) > 1e-3


def test_a_start_says_nothing_of_its_scene(twin, config, tmp_path, monkeypatch):
    """It is drawn from other numbers than the scene (none), its physics (1), shoving (2) and the expert (3)."""
    drawn = []

    def displaced(_, rng, range_m):
        drawn.append(rng.random())
        raise InterruptedError

    monkeypatch.setattr(demos, "displace", displaced)
    with pytest.raises(InterruptedError):
        demonstrate(twin, config, 5, tmp_path / "episode")
    assert drawn[0] not in [np.random.default_rng(other).random() for other in (5, [5, 1], [5, 2], [5, 3])]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="episodes"):
        TwinDemosConfig(episodes=0)
    with pytest.raises(ValueError, match="action_noise_m"):
        TwinDemosConfig(action_noise_m=-1.0)


@pytest.mark.slow
def test_command_fills_a_data_set_that_lerobot_reads_and_resumes(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    common = [f"runs_dir={tmp_path}", "name=t", "workers=1"]
    main([*common, "episodes=2"])
    main([*common, "episodes=3"])
    stage = json.loads((tmp_path / "t/stages/twin_demos.json").read_text())
    assert stage["figures"]["episodes"] == 3
    attempts = [json.loads(line) for line in (tmp_path / "t/twin_demos/attempts.jsonl").read_text().splitlines()]
    seeds = [attempt["seed"] for attempt in attempts]
    assert seeds == list(range(seeds[0], seeds[0] + len(seeds)))  # goes on where it stopped
    dataset = LeRobotDataset(REPO_IDS["PutCubeOnPlate-v0"], root=tmp_path / "t/data/twin", video_backend="pyav")
    assert dataset.num_episodes == 3
    assert dataset.fps == 10
    sample = dataset[len(dataset) - 1]
    assert sample["observation.images.wrist"].shape == (3, 96, 128)
    assert sample["action"].shape == (7,)
    assert bool(sample["next.success"])
    assert sample["task"] == "pick up the cube and put it on the plate"
