"""`cotwin data` on small data sets made by the writers in use."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from bridge import data_command, pose
from bridge.dataset import DatasetStore, decode_frames, read_episode, video_path
from bridge.episode import PARTIAL, EpisodeWriter, remove_episode, remove_unfinished, set_aside_unfinished
from bridge.errors import SchemaMismatch
from tests.bridge.small_episodes import FPS, HEIGHT, WIDTH, picture, small_embodiment, small_row, write_episode
from tests.bridge.test_dataset import check_whole

TWIN_SIZE = (24, 32)


def make_real(folder: Path, lengths=(8, 9), embodiment=None) -> DatasetStore:
    store = DatasetStore.create(folder / "real", "lab/real", embodiment or small_embodiment(), FPS)
    for number, length in enumerate(lengths):
        episode = write_episode(folder / f"r{number}", length, seed=number, embodiment=embodiment, domain="stand_in")
        store.append(episode)
    return store


def make_twin(folder: Path, rows: int = 5) -> DatasetStore:
    """As the twin writes them: at the policy's rate, with small pictures."""
    embodiment, rng = small_embodiment(), np.random.default_rng(9)
    store = DatasetStore.create(folder / "twin", "lab/twin", embodiment, 10, TWIN_SIZE)
    writer = EpisodeWriter(folder / "t0", embodiment, 10, "pick up the cube", "twin", image_size=TWIN_SIZE)
    for k in range(rows):
        shade = np.full((*TWIN_SIZE, 3), 40 * k, np.uint8)
        row = small_row(k, rng) | {"capture_stamp_ns": k * 100_000_000}
        writer.add({"third_person": shade, "wrist": shade}, row)
    store.append(writer.close(False))
    return store


def run(*argv: str) -> int:
    return data_command.main(list(argv))


def test_merge_joins_rates_and_pictures_and_keeps_domains(tmp_path):
    real, twin = make_real(tmp_path), make_twin(tmp_path)
    assert run("merge", f"sources=[{real.root},{twin.root}]", f"out={tmp_path / 'both'}") == 0
    both = DatasetStore.open(tmp_path / "both")
    check_whole(both)
    assert (both.fps, both.image_size) == (10, TWIN_SIZE)
    told = [(e["domain"], e["success"], e["length"]) for e in both.episodes()]
    assert told == [("stand_in", True, 2), ("stand_in", True, 3), ("twin", False, 5)]  # 8 rows are 2 slow ones, 2 left
    for index, length in ((0, 2), (1, 3)):
        before, after = read_episode(real.root, index), read_episode(both.root, index)
        np.testing.assert_array_equal(after["observation.state"], before["observation.state"][: 3 * length : 3])
        np.testing.assert_array_equal(after["capture_stamp_ns"], before["capture_stamp_ns"][: 3 * length : 3])
        for key in ("action", "requested_action"):
            T = np.eye(4)
            for k in range(length):
                start = T.copy()
                for row in before[key][3 * k : 3 * k + 3]:
                    T = pose.integrate(T, row)
                np.testing.assert_allclose(pose.integrate(start, after[key][k]), T, atol=1e-6)
                assert after[key][k, 6] == before[key][3 * k + 2, 6]
        frames = list(decode_frames(video_path(both.root, "wrist", index)))
        for k, frame in enumerate(frames):
            assert frame.shape == (*TWIN_SIZE, 3)
            assert abs(frame.mean() - picture(3 * k, "wrist").mean()) < 2
    np.testing.assert_array_equal(read_episode(both.root, 2)["action"], read_episode(twin.root, 0)["action"])
    assert video_path(both.root, "wrist", 2).read_bytes() == video_path(twin.root, "wrist", 0).read_bytes()


def test_merged_statistics_are_those_of_all_rows(tmp_path):
    real, twin = make_real(tmp_path), make_twin(tmp_path)
    both = data_command.merge([real.root, twin.root], tmp_path / "both", "lab/both")
    stats = json.loads((both.root / "meta/stats.json").read_text())
    actions = np.concatenate([read_episode(both.root, i)["action"] for i in range(3)]).astype(np.float64)
    for name, share in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        np.testing.assert_allclose(stats["action"][name], np.quantile(actions, share, axis=0), atol=1e-12)
    per_episode = [np.quantile(read_episode(both.root, i)["action"], 0.99, axis=0) for i in range(3)]
    assert not np.allclose(stats["action"]["q99"], np.average(per_episode, axis=0, weights=[2, 3, 5]), atol=1e-4)
    assert stats["observation.images.wrist"]["count"] == [10]


def test_merge_at_one_rate_copies_videos_and_adds_only_what_is_new(tmp_path):
    real = make_real(tmp_path)
    data_command.merge([real.root], tmp_path / "all", "lab/all")
    real.append(write_episode(tmp_path / "later", 4, seed=5))
    merged = data_command.merge([real.root], tmp_path / "all", "lab/all")
    assert merged.uuids() == real.uuids()
    for index in range(3):
        assert (
            video_path(merged.root, "wrist", index).read_bytes() == video_path(real.root, "wrist", index).read_bytes()
        )
        before, after = read_episode(real.root, index), read_episode(merged.root, index)
        assert all(np.array_equal(after[key], before[key]) for key in before)
    check_whole(DatasetStore.open(merged.root))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


def test_merge_refuses_what_does_not_fit(tmp_path, capsys):
    real = make_real(tmp_path, (3,))
    other = make_real(tmp_path / "other", (3,), small_embodiment(gripper_open_m=0.07))
    with pytest.raises(SchemaMismatch, match=r"gripper_open_m: ours 0\.08, theirs 0\.07"):
        data_command.merge([real.root, other.root], tmp_path / "x", "lab/x")
    twin = make_twin(tmp_path)
    assert run("merge", f"sources=[{real.root},{twin.root}]", f"out={tmp_path / 'x'}", "fps=20") == 1
    assert "joined by a whole number into 20 fps" in capsys.readouterr().err
    assert run("merge", f"sources=[{real.root}]", f"out={tmp_path / 'x'}", "fps=15") == 1
    assert "whole multiple of the contract's policy_rate_hz" in capsys.readouterr().err
    assert run("merge", f"out={tmp_path / 'x'}") == 1
    assert not (tmp_path / "x").exists()


def test_inspect_tells_what_is_there_and_what_is_wrong(tmp_path, capsys):
    store = make_real(tmp_path)
    assert run("inspect", f"root={store.root}") == 0
    told = capsys.readouterr().out
    assert "2 episodes (2 stand_in), 2 successes, 17 rows" in told
    assert "33" in told.splitlines()[1]  # ms between pictures
    spoil(video_path(store.root, "wrist", 1), lambda data: data[: len(data) // 2])
    spoil(video_path(store.root, "third_person", 0), lambda data: data + b"x")
    before = {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    assert run("inspect", f"root={store.root}") == 1
    told = capsys.readouterr().out
    assert "wrist has 0 readable pictures for 9 rows" in told
    assert "third_person is not the video that was recorded" in told
    assert before == {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    assert run("push", f"root={store.root}") == 1
    assert "[0, 1] are damaged" in capsys.readouterr().err
    assert run("merge", f"sources=[{store.root}]", f"out={tmp_path / 'x'}") == 1


def spoil(path: Path, change) -> None:
    """A video is linked from the episode's folder: only this name of it changes."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(change(data))


def test_repair_leaves_out_what_is_lost_and_cuts_where_pictures_end(tmp_path, capsys):
    store = make_real(tmp_path, (40, 9, 7))
    spoil(video_path(store.root, "wrist", 1), lambda data: data[:100])
    short = write_episode(tmp_path / "short", 30, seed=0)
    shutil.copy(short / "wrist.mp4", tmp_path / "30.mp4")
    spoil(video_path(store.root, "wrist", 0), lambda _: (tmp_path / "30.mp4").read_bytes())
    assert run("repair", f"root={store.root}", f"out={tmp_path / 'whole'}") == 0
    told = capsys.readouterr().out
    assert "episode 0: 30 of 40 rows kept: wrist has 30 readable pictures for 40 rows" in told
    assert "episode 1 is lost" in told
    whole = DatasetStore.open(tmp_path / "whole")
    check_whole(whole)
    assert [e["length"] for e in whole.episodes()] == [30, 7]
    np.testing.assert_array_equal(read_episode(whole.root, 0)["action"], read_episode(store.root, 0)["action"][:30])
    assert run("inspect", f"root={whole.root}") == 0


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from bridge.episode import EpisodeWriter
from tests.bridge.small_episodes import picture, small_embodiment, small_row
embodiment, rng = small_embodiment(), np.random.default_rng(4)
writer = EpisodeWriter(Path(sys.argv[1]), embodiment, 30, "pick up the cube", "stand_in")
for k in range(100):
    writer.add({name: picture(k, name) for name in embodiment.cameras}, small_row(k, rng))
while writer.backlog:
    pass
os.kill(os.getpid(), 9)
"""


def test_an_interrupted_episode_is_recovered_up_to_its_last_second(tmp_path, capsys):
    store, spool = make_real(tmp_path, (3,)), tmp_path / "spool"
    (spool / "recordings").mkdir(parents=True)
    died = subprocess.run([sys.executable, "-c", KILLED, str(spool / "recordings/one")], check=False, timeout=60)
    assert died.returncode == -9
    (partial,) = set_aside_unfinished(spool / "recordings", spool / "interrupted")
    torn = partial / "rows.journal"
    torn.write_bytes(torn.read_bytes()[:-5])  # killed within a row
    assert partial.suffix == PARTIAL
    write_episode(spool / "recordings" / "two", 4, seed=7)  # finished, not delivered
    assert run("repair", f"root={store.root}", f"spool={spool}", "success=true") == 0
    lengths = [e["length"] for e in DatasetStore.open(store.root).episodes()]
    assert lengths[:2] == [3, 4]
    assert 70 <= lengths[2] <= 99
    rows, rng = read_episode(store.root, 2), np.random.default_rng(4)
    expected = [small_row(k, rng) for k in range(lengths[2])]
    np.testing.assert_array_equal(rows["action"], np.float32([row["action"] for row in expected]))
    for k, frame in enumerate(decode_frames(video_path(store.root, "wrist", 2))):
        assert np.abs(frame.astype(int) - picture(k, "wrist")).mean() < 4
    assert rows["next.success"][-1]
    assert "interrupted" in capsys.readouterr().out
    check_whole(DatasetStore.open(store.root))
    assert not list(spool.rglob("*" + PARTIAL))
    assert run("repair", f"root={store.root}", f"spool={spool}") == 0
    assert DatasetStore.open(store.root).num_episodes == 3


class Killed(BaseException):
    pass


def killed(*_, **__):
    raise Killed


@pytest.mark.parametrize(("last_act", "of", "aside"), [("rename", os, 1), ("unlink", Path, 0)])
def test_a_kill_while_an_episode_is_closed_loses_nothing(tmp_path, last_act, of, aside):
    store, spool = make_real(tmp_path, (3,)), tmp_path / "spool"
    with mock.patch.object(of, last_act, killed), pytest.raises(Killed):
        write_episode(spool / "recordings" / "one", 4, seed=7)
    assert len(set_aside_unfinished(spool / "recordings", spool / "interrupted")) == aside
    assert remove_unfinished(spool / "recordings") == 0
    assert run("repair", f"root={store.root}", f"spool={spool}") == 0
    assert [(e["length"], e["success"]) for e in DatasetStore.open(store.root).episodes()][1:] == [(4, True)]
    assert not list(spool.rglob("episode.json"))


def test_a_kill_while_an_episode_is_removed_leaves_nothing_to_recover(tmp_path):
    folder = write_episode(tmp_path / "recordings" / "one")
    (folder / "begun.json").touch()  # a kill just before left it
    with mock.patch.object(shutil, "rmtree", killed), pytest.raises(Killed):
        remove_episode(folder)
    assert set_aside_unfinished(tmp_path / "recordings", tmp_path / "interrupted") == []
    assert remove_unfinished(tmp_path / "recordings") == 1


def test_what_was_killed_before_its_first_picture_stays_and_is_named(tmp_path, capsys):
    store, spool = make_real(tmp_path, (3,)), tmp_path / "spool"
    EpisodeWriter(spool / "recordings" / "empty", small_embodiment(), FPS, "x", "real")
    assert run("repair", f"root={store.root}", f"spool={spool}") == 0
    assert "0 rows with pictures" in capsys.readouterr().err
    assert (spool / "recordings" / f"empty{PARTIAL}").is_dir()


# --- the hub -----------------------------------------------------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """Stands for the Hugging Face Hub, which cannot be reached here: it takes files as the hub's client sends them."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub: FakeHubServer = self.server  # type: ignore[assignment]
        hub.asked.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            return self.answer({"url": f"{hub.url}/datasets/lab/cube"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = lambda path: "lfs" if path.endswith(".mp4") else "regular"  # noqa: E731
            return self.answer({"files": [{**f, "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]})
        if self.path.endswith("/info/lfs/objects/batch"):
            wanted = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": wanted})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                match line["key"]:
                    case "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    case "lfsFile":
                        hub.files[line["value"]["path"]] = hub.blobs[line["value"]["oid"]]
            return self.answer({"success": True, "commitOid": 40 * "0", "commitUrl": hub.commit})
        if "/tag/" in self.path:
            hub.tags.append(json.loads(body)["tag"])
        return self.answer({})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.blobs[oid] = data
        self.answer({})

    def do_DELETE(self):
        self.answer({"error": "no such tag"}, 404, {"X-Error-Code": "RevisionNotFound"})

    def do_GET(self):
        self.answer({"siblings": [], "sha": "0" * 40, "id": "lab/cube"})

    def answer(self, content, status: int = 200, headers=None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class FakeHubServer(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHub)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commit = f"{self.url}/datasets/lab/cube/commit/{40 * '0'}"
        self.files, self.blobs, self.tags, self.asked, self.created = {}, {}, [], [], {}


def test_push_brings_every_file_to_the_hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    store, hub = make_real(tmp_path), FakeHubServer()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, "-m", "cotwin", "data", "push", f"root={store.root}", "repo_id=lab/cube"]
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/datasets/lab/cube" in done.stdout
    expected = {str(p.relative_to(store.root)): p.read_bytes() for p in store.root.rglob("*") if p.is_file()}
    assert expected.pop(".lock") == b""
    assert hub.files == expected
    assert hub.tags == ["v3.0"]  # by which LeRobot finds it
    assert (hub.created["type"], hub.created["visibility"]) == ("dataset", "private")
    assert {token for _, token in hub.asked} == {"Bearer hf_secret"}


def test_lerobot_reads_a_merged_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lerobot = pytest.importorskip("lerobot.datasets")
    real, twin = make_real(tmp_path), make_twin(tmp_path)
    both = data_command.merge([real.root, twin.root], tmp_path / "both", "lab/both")
    dataset = lerobot.LeRobotDataset("lab/both", root=both.root, video_backend="pyav")
    assert (len(dataset), dataset.num_episodes, dataset.fps) == (10, 3, 10)
    assert [e["domain"] for e in dataset.meta.episodes] == ["stand_in", "stand_in", "twin"]
    rows = read_episode(both.root, 1)
    for k in range(3):
        item = dataset[2 + k]
        np.testing.assert_array_equal(item["action"].numpy(), rows["action"][k])
        seen = item["observation.images.third_person"].numpy()
        assert seen.shape == (3, *TWIN_SIZE)
        assert abs(seen.mean() * 255 - picture(3 * k, "third_person").mean()) < 3
    assert (HEIGHT, WIDTH) != TWIN_SIZE
