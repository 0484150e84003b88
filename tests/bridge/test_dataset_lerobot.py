"""The real LeRobot reader on what we write. Everything that imports it is here: the import takes ten seconds."""

import numpy as np
import pytest

from bridge.dataset import DatasetStore, read_episode
from tests.bridge.small_episodes import FPS, picture, small_embodiment, write_episode
from tests.bridge.test_dataset import die_at_every_step

LENGTHS = (7, 9, 5)
COLUMNS = ("action", "observation.state", "requested_action", "capture_stamp_ns", "next.done", "next.reward")


@pytest.fixture(scope="module", autouse=True)
def cache_elsewhere(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def lerobot(cache_elsewhere):
    return pytest.importorskip("lerobot.datasets").LeRobotDataset


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot")
    store = DatasetStore.create(folder / "data", "lab/cube", small_embodiment(), FPS)
    for number, length in enumerate(LENGTHS):
        task, success = f"task {number % 2}", number != 1
        store.append(write_episode(folder / f"{number}", length, seed=number, instruction=task, success=success))
    return store


def test_every_row_and_picture(lerobot, store):
    dataset = lerobot("lab/cube", root=store.root, video_backend="pyav")
    assert (len(dataset), dataset.num_episodes, dataset.fps) == (sum(LENGTHS), 3, FPS)
    number = 0
    for episode, length in enumerate(LENGTHS):
        rows = read_episode(store.root, episode)
        for k in range(length):
            item = dataset[number]
            number += 1
            for key in (
                "action",
                "observation.state",
                "requested_action",
                "capture_stamp_ns",
                "next.done",
                "next.reward",
            ):
                np.testing.assert_array_equal(item[key].numpy(), rows[key][k])
            assert item["task"] == f"task {episode % 2}"
            assert (int(item["episode_index"]), int(item["frame_index"])) == (episode, k)
            for camera in ("third_person", "wrist"):
                seen = item[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255
                assert np.abs(seen - picture(k, camera)).mean() < 3


def test_action_chunks_stop_at_the_end_of_an_episode(lerobot, store):
    deltas = {"action": [k / FPS for k in range(4)]}
    dataset = lerobot("lab/cube", root=store.root, video_backend="pyav", delta_timestamps=deltas)
    item = dataset[5]
    np.testing.assert_array_equal(item["action_is_pad"].numpy(), [False, False, True, True])
    np.testing.assert_array_equal(item["action"].numpy()[:2], read_episode(store.root, 0)["action"][5:])


def test_metadata(lerobot, store):
    meta = lerobot("lab/cube", root=store.root, video_backend="pyav").meta
    assert meta.video_keys == ["observation.images.third_person", "observation.images.wrist"]
    assert [bool(e["success"]) for e in meta.episodes] == [True, False, True]
    assert {e["domain"] for e in meta.episodes} == {"stand_in"}
    actions = np.concatenate([read_episode(store.root, i)["action"] for i in range(3)])
    np.testing.assert_allclose(meta.stats["action"]["q99"], np.quantile(actions, 0.99, axis=0), atol=1e-6)
    assert meta.stats["observation.images.wrist"]["mean"].shape == (3, 1, 1)


def test_one_episode_can_be_chosen(lerobot, store):
    dataset = lerobot("lab/cube", root=store.root, video_backend="pyav", episodes=[1])
    assert len(dataset) == LENGTHS[1]
    np.testing.assert_array_equal(dataset[3]["action"].numpy(), read_episode(store.root, 1)["action"][3])


def test_their_statistics_code_reads_ours(lerobot, store):
    from lerobot.datasets.compute_stats import aggregate_stats

    stats = lerobot("lab/cube", root=store.root, video_backend="pyav").meta.stats
    merged = aggregate_stats([stats, stats])
    np.testing.assert_allclose(merged["action"]["mean"], stats["action"]["mean"])


@pytest.mark.slow
def test_it_loads_unrepaired_after_a_death_at_every_step(lerobot, store, tmp_path):
    folder = write_episode(tmp_path / "another", 4, instruction="another")
    died = die_at_every_step(store.root, folder, tmp_path)
    for step in (3, died - 2, died - 1):  # rows in place; episode table too; statistics too
        dataset = lerobot("lab/cube", root=tmp_path / str(step), video_backend="pyav")
        assert len(dataset) == sum(LENGTHS)
        assert dataset[len(dataset) - 1]["task"] == "task 0"
