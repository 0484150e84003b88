import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bridge import durable
from bridge.dataset import DatasetStore, EpisodeWriter, decode_frames, read_episode, video_path
from bridge.dataset_schema import features
from bridge.episode import finished_episodes, read_record, remove_unfinished
from bridge.errors import CorruptData, SchemaMismatch
from bridge.statistics import column_stats, pixel_stats, wilson_interval
from tests.bridge.small_episodes import FPS, picture, reseal, small_embodiment, small_row, spoil_rows, write_episode


@pytest.fixture
def store(tmp_path):
    return DatasetStore.create(tmp_path / "data", "lab/cube", small_embodiment(), FPS)


def test_rows_and_pictures_come_back(tmp_path, store):
    index = store.append(write_episode(tmp_path / "a", num_rows=9, seed=3))
    rows, rng = read_episode(store.root, index), np.random.default_rng(3)
    expected = [small_row(k, rng) for k in range(9)]
    for key in ("action", "requested_action", "observation.state"):
        np.testing.assert_array_equal(rows[key], np.float32([row[key] for row in expected]))
    np.testing.assert_array_equal(rows["capture_stamp_ns"], [row["capture_stamp_ns"] for row in expected])
    np.testing.assert_array_equal(rows["next.done"], [False] * 8 + [True])
    np.testing.assert_array_equal(rows["next.reward"], [0.0] * 8 + [1.0])
    np.testing.assert_allclose(rows["timestamp"], np.arange(9) / FPS, atol=1e-6)
    for camera in ("third_person", "wrist"):
        frames = list(decode_frames(video_path(store.root, camera, index)))
        assert len(frames) == 9
        for k, frame in enumerate(frames):
            assert np.abs(frame.astype(int) - picture(k, camera)).mean() < 3


def test_indices_continue_over_episodes_and_tasks(tmp_path, store):
    store.append(write_episode(tmp_path / "a", 4, instruction="one"))
    store.append(write_episode(tmp_path / "b", 5, instruction="two", success=False))
    store.append(write_episode(tmp_path / "c", 6, instruction="one"))
    np.testing.assert_array_equal(read_episode(store.root, 2)["index"], np.arange(9, 15))
    assert [int(read_episode(store.root, i)["task_index"][0]) for i in range(3)] == [0, 1, 0]
    summary = DatasetStore.open(store.root).summary()
    assert (summary["episodes"], summary["successes"], summary["frames"]) == (3, 2, 15)
    assert summary["tasks"] == ["one", "two"]
    assert not read_episode(store.root, 1)["next.success"].any()


def test_the_same_episode_is_stored_once(tmp_path, store):
    folder = write_episode(tmp_path / "a")
    assert store.append(folder) == store.append(folder) == 0
    assert DatasetStore.open(store.root).append(folder) == 0
    assert store.num_episodes == 1


def test_two_processes_may_hold_one_data_set(tmp_path, store):
    other = DatasetStore.open(store.root)
    assert store.append(write_episode(tmp_path / "a")) == 0
    assert other.append(write_episode(tmp_path / "b")) == 1
    assert store.append(write_episode(tmp_path / "c")) == 2
    assert other.num_episodes == 2
    assert len(DatasetStore.open(store.root).uuids()) == 3


def test_statistics_are_those_of_all_rows(tmp_path, store):
    """A gripper closed in one episode and open in the other: weighted means of per-episode quantiles give q99 = 0."""
    for seed, gripper in enumerate([-1.0, 1.0]):
        writer, rng = (
            EpisodeWriter(tmp_path / f"{seed}", store.embodiment, FPS, "x", "real"),
            np.random.default_rng(seed),
        )
        for k in range(10):
            row = small_row(k, rng)
            row["action"][6] = gripper
            shade = np.full((48, 64, 3), 200 if seed else 20, np.uint8)
            writer.add({"third_person": shade, "wrist": shade}, row)
        store.append(writer.close(True))
    stats = json.loads((store.root / "meta/stats.json").read_text())
    actions = np.concatenate([read_episode(store.root, i)["action"] for i in range(2)])
    assert stats["action"]["q99"][6] == 1.0
    assert stats["action"]["q01"][6] == -1.0
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["q10"], np.quantile(actions, 0.1, axis=0), atol=1e-6)
    image = stats["observation.images.wrist"]
    np.testing.assert_allclose(np.array(image["mean"]).ravel(), 110 / 255, atol=1e-6)
    np.testing.assert_allclose(np.array(image["std"]).ravel(), 90 / 255, atol=1e-6)
    assert np.array(image["max"]).shape == (3, 1, 1)


def test_rows_of_30_fps_compose_into_actions_of_10_hz(tmp_path, store):
    """Three rows' translations add, their rotations multiply: what one policy step of the same motion would be."""
    from bridge import pose

    rng = np.random.default_rng(0)
    T = pose.pose(np.array([0.4, 0.1, 0.2]), pose.matrix_from_rpy(np.array([np.pi, 0.0, 0.4])))
    targets = [T]
    for _ in range(12):
        targets.append(pose.integrate(targets[-1], np.append(rng.uniform(-0.01, 0.01, 6), 0.0)))
    writer = EpisodeWriter(tmp_path / "a", store.embodiment, FPS, "x", "real")
    for k in range(12):
        row = small_row(k, rng) | {"action": np.append(pose.delta(targets[k], targets[k + 1]), 1.0)}
        writer.add({name: picture(k, name) for name in store.embodiment.cameras}, row)
    actions = read_episode(store.root, store.append(writer.close(True)))["action"].astype(np.float64)
    for step in range(4):
        rows = actions[3 * step : 3 * step + 3]
        dR = np.eye(3)
        for row in rows:
            dR = dR @ pose.matrix_from_rpy(row[3:6])
        composed = np.concatenate([rows[:, :3].sum(0), pose.rpy_from_matrix(dR)])
        np.testing.assert_allclose(composed, pose.delta(targets[3 * step], targets[3 * step + 3]), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "field"), [({"policy_rate_hz": 15.0}, "policy_rate_hz"), ({"gripper_open_m": 0.07}, "gripper_open_m")]
)
def test_another_contract_is_refused_by_field(tmp_path, store, changes, field):
    folder = write_episode(tmp_path / "a", embodiment=small_embodiment(**changes))
    with pytest.raises(SchemaMismatch, match=field):
        store.append(folder)
    with pytest.raises(SchemaMismatch, match=field):
        DatasetStore.open(store.root, small_embodiment(**changes))
    assert store.num_episodes == 0


def test_another_fps_or_picture_size_is_refused(tmp_path, store):
    with pytest.raises(SchemaMismatch, match="fps 10"):
        store.append(write_episode(tmp_path / "a", fps=10))
    writer = EpisodeWriter(tmp_path / "b", store.embodiment, FPS, "x", "twin", image_size=(24, 32))
    small = dict.fromkeys(store.embodiment.cameras, np.zeros((24, 32, 3), np.uint8))
    writer.add(small, small_row(0, np.random.default_rng(0)))
    with pytest.raises(SchemaMismatch, match=r"third_person of shape \[24, 32, 3\]"):
        store.append(writer.close(True))
    with pytest.raises(ValueError, match="whole multiple"):
        DatasetStore.create(tmp_path / "c", "lab/x", small_embodiment(), 25)
    with pytest.raises(SchemaMismatch, match="fps 60"):
        DatasetStore.open_or_create(store.root, "lab/cube", store.embodiment, 60)


def test_a_damaged_episode_is_refused_and_leaves_nothing(tmp_path, store):
    folder = write_episode(tmp_path / "a")
    video = folder / "wrist.mp4"
    video.write_bytes(video.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptData, match=r"wrist\.mp4"):
        store.append(folder)
    (folder / "episode.json").write_text("{}")
    with pytest.raises(CorruptData, match="no finished episode"):
        store.append(folder)
    assert not list((store.root / "data").glob("*/*")) if (store.root / "data").exists() else True


def overwrite(data: bytes):
    def damage(folder):
        (folder / "rows.parquet").write_bytes(data)
        reseal(folder)

    return damage


def tear(folder):
    """Bytes within the first column that Arrow's reader calls an OSError."""
    data = bytearray((folder / "rows.parquet").read_bytes())
    data[4:40] = b"\xff" * 36
    overwrite(bytes(data))(folder)


def drop_a_column(folder):
    pq.write_table(pq.read_table(folder / "rows.parquet").drop_columns(["intervention"]), folder / "rows.parquet")
    reseal(folder)


BLACK = [[8] + [0] * 255] * 3
SPOILT = [
    *(overwrite(b""), overwrite(b"no parquet"), tear, drop_a_column, spoil_rows),
    *(partial(reseal, num_rows=wrong) for wrong in (7, 8.0, None)),
    partial(reseal, pixel_histograms={"wrist": BLACK}),
    partial(reseal, pixel_histograms={"third_person": BLACK, "wrist": BLACK[:2]}),
    partial(reseal, pixel_histograms={"third_person": BLACK, "wrist": [[0] * 256] * 3}),
    *(partial(reseal, **{name: 5}) for name in ("instruction", "domain", "success", "image_size", "contract", "files")),
    *(partial(reseal, instruction="\ud800"), partial(reseal, extra={"x": float("nan")})),
]


@pytest.mark.parametrize("damage", SPOILT)
def test_what_statistics_could_not_take_is_refused_before_it_is_stored(tmp_path, store, damage):
    damage(bad := write_episode(tmp_path / "bad"))
    with pytest.raises(CorruptData):
        store.append(bad)
    store.append(write_episode(tmp_path / "good"))
    assert DatasetStore.open(store.root).num_episodes == 1


def test_writer_refuses_bad_rows(tmp_path):
    embodiment, rng = small_embodiment(), np.random.default_rng(0)
    writer = EpisodeWriter(tmp_path / "a", embodiment, FPS, "x", "real")
    images = {name: picture(0, name) for name in embodiment.cameras}
    good = small_row(0, rng)
    with pytest.raises(ValueError, match=r"lacks \['action'\]"):
        writer.add(images, {key: value for key, value in good.items() if key != "action"})
    with pytest.raises(ValueError, match=r"next\.success"):
        writer.add(images, good | {"next.success": True})
    with pytest.raises(ValueError, match="not finite"):
        writer.add(images, good | {"action": np.full(7, np.nan)})
    with pytest.raises(ValueError, match="shape"):
        writer.add(images, good | {"action": np.zeros(6)})
    with pytest.raises(ValueError, match="wrist"):
        writer.add({"third_person": images["third_person"]}, good)
    writer.add(images, good)
    with pytest.raises(ValueError, match="does not follow"):
        writer.add(images, good)
    with pytest.raises(ValueError, match="domain 'lab'"):
        EpisodeWriter(tmp_path / "b", embodiment, FPS, "x", "lab")
    assert read_record(writer.close(False)).num_rows == 1
    with pytest.raises(ValueError, match="exists"):
        EpisodeWriter(tmp_path / "a", embodiment, FPS, "x", "real")


def test_episode_without_rows_is_no_episode(tmp_path):
    writer = EpisodeWriter(tmp_path / "a", small_embodiment(), FPS, "x", "real")
    with pytest.raises(ValueError, match="without rows"):
        writer.close(True)
    assert not list(tmp_path.iterdir())


def test_backpressure_never_drops_a_frame(tmp_path):
    embodiment, rng = small_embodiment(), np.random.default_rng(0)
    writer = EpisodeWriter(tmp_path / "a", embodiment, FPS, "x", "real", queue_frames=2)
    for k in range(120):
        writer.add({name: picture(k, name) for name in embodiment.cameras}, small_row(k, rng))
        assert writer.backlog <= 2
    folder = writer.close(True)
    assert sum(1 for _ in decode_frames(folder / "wrist.mp4")) == 120


def test_columns_follow_the_schema(tmp_path, store):
    index = store.append(write_episode(tmp_path / "a"))
    rows = read_episode(store.root, index)
    stored = {key for key, feature in features(store.embodiment).items() if feature["dtype"] != "video"}
    assert stored | {"timestamp", "frame_index", "episode_index", "index", "task_index"} == set(rows)


# --- a process that dies ------------------------------------------------------------------------------------------


def die_at_every_step(root: Path, folder: Path, copies: Path) -> int:
    """Append `folder` to copies of the data set, `copies/<n>`, in processes that end, as by kill -9, before they move
    their n-th file in place. Returns how many died; the copy after those is of an append that was left alone."""
    command = [sys.executable, "-c", DIE_AT_EVERY_STEP, str(root), str(folder), str(copies)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout)


DIE_AT_EVERY_STEP = """
import os, shutil, sys
from pathlib import Path
from bridge import durable
from bridge.dataset import DatasetStore
root, folder, copies = map(Path, sys.argv[1:])
move, step = durable.replace, 0
while True:
    shutil.copytree(root, copies / str(step))
    if (pid := os.fork()) == 0:
        moves = iter(range(1000))
        def move_or_die(source, target):
            os._exit(9) if next(moves) == step else move(source, target)
        durable.replace = move_or_die
        DatasetStore.open(copies / str(step)).append(folder)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), code
    if code == 0:
        print(step)
        break
    step += 1
"""


def check_whole(store: DatasetStore) -> None:
    info = json.loads((store.root / "meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"]) == (store.num_episodes, store.num_frames)
    assert len(list(store.root.glob("data/*/*"))) == store.num_episodes
    assert len(list(store.root.glob("videos/*/*/*"))) == 2 * store.num_episodes
    assert not list(store.root.rglob("*" + durable.UNFINISHED))
    if store.num_episodes:
        stats = json.loads((store.root / "meta/stats.json").read_text())
        assert stats["action"]["count"] == [store.num_frames]
    for index, episode in enumerate(store.episodes()):
        assert len(read_episode(store.root, index)["action"]) == episode["length"]
        for camera in store.embodiment.cameras:
            assert sum(1 for _ in decode_frames(video_path(store.root, camera, index))) == episode["length"]


def test_death_at_every_step_of_an_append(tmp_path, store):
    store.append(write_episode(tmp_path / "a", 3))
    folder = write_episode(tmp_path / "b", 4, instruction="another")
    died = die_at_every_step(store.root, folder, tmp_path / "copies")
    assert died == 8  # 2 videos, rows, record, tasks, episode table, stats, info
    outcomes = []
    for step in range(died + 1):
        reopened = DatasetStore.open(tmp_path / "copies" / str(step))
        check_whole(reopened)
        outcomes.append(reopened.num_episodes)
        assert reopened.append(folder) == 1
        check_whole(reopened)
    assert outcomes == [1] * 6 + [2] * 3  # the episode exists from the moment its table file is in place


WRITER = """
import sys
from pathlib import Path
from bridge.dataset import DatasetStore
from tests.bridge.small_episodes import small_embodiment, write_episode
root, spool = Path(sys.argv[1]), Path(sys.argv[2])
store = DatasetStore.open_or_create(root, "lab/cube", small_embodiment(), 30)
for n in range(1000):
    store.append(write_episode(spool / f"{sys.argv[3]}-{n}", 6, seed=n))
    print(store.num_episodes, flush=True)
"""


def test_kill_9_at_random_moments(tmp_path):
    root, rng, acknowledged = tmp_path / "data", np.random.default_rng(1), 0
    for attempt in range(4):
        command = [sys.executable, "-c", WRITER, str(root), str(tmp_path / "spool"), str(attempt)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(int(rng.integers(1, 4))):
            acknowledged = int(process.stdout.readline())
        time.sleep(float(rng.uniform(0, 0.06)))
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.communicate(timeout=10)[0].split())])
        store = DatasetStore.open(root)
        check_whole(store)
        assert store.num_episodes >= acknowledged
    remove_unfinished(tmp_path / "spool")
    for folder in finished_episodes(tmp_path / "spool"):
        store.append(folder)
    check_whole(store)
    assert not list((tmp_path / "spool").glob("*.partial"))


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson_interval(11, 10)


def test_pixel_counts_give_the_same_numbers_as_the_pixels():
    pixels = np.random.default_rng(0).integers(10, 240, (5000, 3))
    histogram = np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(3)])
    ours, direct = pixel_stats(histogram, 5), column_stats(pixels / 255.0)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(ours[name].ravel(), direct[name], atol=1e-9)
    for name in ("q01", "q10", "q50", "q90", "q99"):
        np.testing.assert_allclose(ours[name].ravel(), direct[name], atol=1.01 / 255)
