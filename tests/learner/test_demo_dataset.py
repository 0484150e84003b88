import dataclasses
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.dataset import DatasetStore, decode_frames, video_path
from bridge.errors import SchemaMismatch
from learner.demo_dataset import (
    DataConfig,
    DemoDataset,
    Mixture,
    Part,
    cached_frames,
    compose,
    next_gripper_event_m,
    open_parts,
)
from learner.sft import measure
from tests.learner.toy_cell import tabletop
from tests.learner.toy_data import SIZE, target_after, write_dataset

HORIZON = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "twin", tabletop(), range(3))
    write_dataset(folder / "stand_in", tabletop(), range(2), fps=30, domain="stand_in")
    return folder


def dataset(folder, name, size=SIZE):
    return DemoDataset(folder / name, tabletop(), HORIZON, size, folder / "cache")


def test_items_are_those_of_lerobots_reader(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    ours = dataset(folder, "twin")
    steps = {"action": [k / 10 for k in range(HORIZON)]}
    theirs = LeRobotDataset("toy/twin", root=folder / "twin", delta_timestamps=steps, video_backend="pyav")
    assert len(ours) == len(theirs)
    rows = np.array([0, 7, len(ours) // 2, len(ours) - 2])
    batch = ours.batch(rows)
    for position, row in enumerate(rows):
        item = theirs[int(row)]
        np.testing.assert_array_equal(batch.observation.state[position], item["observation.state"])
        np.testing.assert_array_equal(batch.is_pad[position], item["action_is_pad"])
        inside = ~batch.is_pad[position]
        np.testing.assert_array_equal(batch.actions[position][inside], item["action"][inside])
        assert batch.observation.instruction[position] == item["task"]
        for name, pictures in batch.observation.images.items():
            picture = (item[f"observation.images.{name}"].permute(1, 2, 0) * 255).round().to(torch.uint8)
            torch.testing.assert_close(pictures[position], picture, atol=0, rtol=0)


def test_three_rows_make_one_step_from_any_phase(folder):
    slow, fast = dataset(folder, "twin"), dataset(folder, "stand_in")
    assert fast.rows_per_step == 3
    np.testing.assert_allclose(fast.batch(np.array([0])).actions, slow.batch(np.array([0])).actions, atol=1e-6)
    rows = DatasetStore.open(folder / "stand_in")
    length = rows.episodes()[0]["length"]
    for phase in (0, 1, 2):
        batch = fast.batch(np.array([phase]))
        n = HORIZON * 3
        from bridge.dataset import read_episode

        raw = read_episode(folder / "stand_in", 0)["action"][phase : phase + n]
        np.testing.assert_allclose(target_after(batch.actions[0].numpy()), target_after(raw), atol=1e-6)
    # The last whole period starts three rows before the end; a later one is padding.
    assert fast.batch(np.array([length - 3])).is_pad[0].tolist() == [False] + [True] * (HORIZON - 1)
    assert fast.batch(np.array([length - 2])).is_pad.all()


def test_rotations_compose_as_rotations():
    rng = np.random.default_rng(0)
    action = rng.uniform(-0.1, 0.1, (7, 7)).astype(np.float32)
    composed = compose(action, 3)
    assert composed.shape == (5, 7)
    for first in range(5):
        np.testing.assert_allclose(
            target_after(composed[first : first + 1]), target_after(action[first : first + 3]), atol=1e-6
        )
    np.testing.assert_array_equal(composed[:, 6], action[2:, 6])


def test_the_sub_goal_is_where_the_gripper_next_moves():
    state = np.arange(21, dtype=np.float32).reshape(7, 3)
    state = np.concatenate([state, np.zeros((7, 4), np.float32)], axis=1)
    goal_m = next_gripper_event_m(state, np.float32([1, 1, -1, -1, -1, 1, 1]))
    expected = [state[2, :3]] * 2 + [state[5, :3]] * 3 + [[np.nan] * 3] * 2
    np.testing.assert_array_equal(goal_m, expected)


def test_pictures_are_area_resized_once_and_then_mapped(folder, monkeypatch):
    small = dataset(folder, "twin", size=(24, 32))
    frame = next(iter(decode_frames(video_path(folder / "twin", "wrist", 0)))).astype(float)
    expected = frame.reshape(24, 2, 32, 2, 3).mean((1, 3))
    picture = small.batch(np.array([0])).observation.images["wrist"][0].numpy()
    assert np.abs(picture - expected).max() <= 0.5 + 1e-6
    monkeypatch.setattr("learner.demo_dataset.decode_frames", lambda path: pytest.fail(f"decoded {path} again"))
    again = dataset(folder, "twin", size=(24, 32))
    np.testing.assert_array_equal(again.batch(np.array([0])).observation.images["wrist"][0], picture)


def prepare_together(video, cache, number, shapes):
    """Prepare the pictures of `video`; both of two processes have written theirs before either moves it in place."""
    save = np.save

    def together(path, frames):
        save(path, frames)
        Path(f"{path}.saved{number}").touch()
        while len(list(cache.glob("*.saved*"))) < 2:
            time.sleep(0.01)

    np.save = together
    shapes.put(cached_frames(video, (8, 8), cache).shape)


def test_runs_that_begin_together_may_prepare_the_same_pictures(folder, tmp_path):
    video, cache = next(folder.rglob("*.mp4")), tmp_path / "cache"
    context = multiprocessing.get_context("fork")  # the imports would take longer than the rest
    shapes = context.SimpleQueue()
    runs = [context.Process(target=prepare_together, args=(video, cache, k, shapes), daemon=True) for k in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(100)
    assert [run.exitcode for run in runs] == [0, 0]
    assert shapes.get() == shapes.get()
    assert len(list(cache.glob("*.npy"))) == 1


def test_another_contract_is_refused(folder):
    other = dataclasses.replace(tabletop(), gripper_open_m=0.07)
    with pytest.raises(SchemaMismatch, match=r"gripper_open_m.*0\.07.*0\.08"):
        DemoDataset(folder / "twin", other, HORIZON, SIZE, folder / "cache")
    DemoDataset(folder / "twin", other, HORIZON, SIZE, folder / "cache", allow_contract_mismatch=["gripper_open_m"])


def test_the_end_is_held_for_a_few_steps_and_then_masked(folder):
    data = DemoDataset(folder / "stand_in", tabletop(), HORIZON, SIZE, folder / "cache", hold_steps=2)
    end = int(data.rows.episode_end[0])
    batch = data.batch(np.array([end - 5]))  # one whole step (three rows) is left
    assert batch.is_pad[0].tolist() == [False, False, False, True, True, True]
    gripper = data.rows.gripper[end - 1]
    np.testing.assert_array_equal(batch.actions[0, 1:], [[0, 0, 0, 0, 0, 0, gripper]] * (HORIZON - 1))
    np.testing.assert_array_equal(batch.actions[0, 0], data.rows.step_action[end - 5])


def test_what_is_no_data_set_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"info\.json is missing"):
        DemoDataset(tmp_path, tabletop(), HORIZON, SIZE, tmp_path)
    with pytest.raises(ValueError, match=r"data\.sim or data\.real"):
        open_parts(DataConfig(), tabletop(), HORIZON, SIZE)
    shutil.copytree(folder / "twin", tmp_path / "gap")
    (tmp_path / "gap/data/chunk-000/file-001.parquet").unlink()
    with pytest.raises(ValueError, match="missing or double"):
        DemoDataset(tmp_path / "gap", tabletop(), HORIZON, SIZE, tmp_path)


def mixture(folder, seed=0, batch_size=5, alpha=0.7):
    parts = [Part("sim", [dataset(folder, "twin")], alpha), Part("real", [dataset(folder, "stand_in")], 1 - alpha)]
    return Mixture(parts, batch_size, seed)


def test_shares_hold_and_every_epoch_is_a_new_order(folder):
    mixed = mixture(folder)
    for _ in range(40):
        assert len(next(mixed).observation) == 5
    assert mixed.drawn == [140, 60]
    alone = Mixture([Part("sim", [dataset(folder, "twin")], 1.0)], len(dataset(folder, "twin")), 0)
    first, second = next(alone).observation.state, next(alone).observation.state
    assert not torch.equal(first, second)
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))


def test_a_mixture_goes_on_where_it_stopped(folder):
    whole, stopped, resumed = mixture(folder), mixture(folder), mixture(folder)
    for _ in range(50):
        next(whole), next(stopped)
    resumed.load_state_dict(stopped.state_dict())
    for _ in range(3):
        ours, theirs = next(whole), next(resumed)
        assert torch.equal(ours.observation.state, theirs.observation.state)
        assert torch.equal(ours.actions, theirs.actions)
        assert torch.equal(ours.observation.images["wrist"], theirs.observation.images["wrist"])
    with pytest.raises(ValueError, match="rows when training stopped"):
        Mixture([Part("sim", [dataset(folder, "twin")], 1.0)], 5, 0).load_state_dict(stopped.state_dict())


def test_statistics_are_of_policy_rate_actions_and_weighted(folder):
    slow, fast = dataset(folder, "twin"), dataset(folder, "stand_in")
    at_30_fps = measure([Part("real", [fast], 1.0)]).action
    np.testing.assert_allclose(
        at_30_fps.q99[:3], np.quantile(fast.rows.step_action[fast.rows.step_known][:, :3], 0.99, axis=0), atol=2e-3
    )
    only_twin = measure([Part("sim", [slow], 1.0), Part("real", [fast], 1e-12)]).action
    np.testing.assert_allclose(only_twin.q99, measure([Part("sim", [slow], 1.0)]).action.q99)
