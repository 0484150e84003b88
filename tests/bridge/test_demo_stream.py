"""Episodes from a spool to a data set over real sockets and files."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from bridge import demo_stream, durable
from bridge.dataset import DatasetStore, read_episode
from bridge.demo_stream import DemoReceiver, DemoSender
from bridge.embodiment import Embodiment
from bridge.episode import from_table, read_record
from bridge.errors import BridgeTimeout, CorruptData, SchemaMismatch, SpoolFull
from tests.bridge.small_episodes import FPS, small_embodiment, spoil_rows, write_episode
from tests.bridge.test_checkpoint import wait_for


@contextmanager
def receiving(root, endpoint="tcp://127.0.0.1:*", embodiment=None):
    store = DatasetStore.open_or_create(root, "lab/cube", embodiment or small_embodiment(), FPS)
    receiver = DemoReceiver(endpoint, store)
    stop = threading.Event()
    thread = threading.Thread(target=receiver.serve_forever, args=(stop,))
    thread.start()
    try:
        yield receiver
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def sending(endpoint, spool, **options):
    sender = DemoSender(endpoint, small_embodiment(), spool, **options)
    try:
        yield sender
    finally:
        sender.close()


def stored(root) -> dict[str, int]:
    return {episode["uuid"]: episode["episode_index"] for episode in DatasetStore.open(root).episodes()}


def test_an_episode_is_in_the_data_set_when_it_leaves_the_spool(tmp_path):
    folder = write_episode(tmp_path / "a", num_rows=7, seed=5)
    uuid, rows = read_record(folder).uuid, pq_rows(folder)
    with receiving(tmp_path / "data") as receiver, sending(receiver.endpoint, tmp_path / "spool") as sender:
        sender.enqueue(folder)
        shutil.rmtree(folder)  # the spool has it
        sender.flush(20)
        assert sender.pending() == 0
        index = stored(tmp_path / "data")[uuid]
        np.testing.assert_array_equal(read_episode(tmp_path / "data", index)["action"], rows["action"])
        assert not list((tmp_path / "data.incoming").iterdir())


def pq_rows(folder):
    import pyarrow.parquet as pq

    return from_table(pq.read_table(folder / "rows.parquet"))


def test_the_same_episode_twice_is_stored_once(tmp_path):
    folder = write_episode(tmp_path / "a")
    with receiving(tmp_path / "data") as receiver, sending(receiver.endpoint, tmp_path / "spool") as sender:
        for _ in range(2):
            sender.enqueue(folder)
            sender.flush(20)
        assert receiver.stats()["duplicates"] == 1
    with receiving(tmp_path / "data") as receiver, sending(receiver.endpoint, tmp_path / "spool2") as another:
        another.enqueue(folder)
        another.flush(20)
    assert len(stored(tmp_path / "data")) == 1


def test_a_spool_outlives_its_sender_and_waits_for_a_receiver(tmp_path):
    with sending("tcp://127.0.0.1:1", tmp_path / "spool") as sender:
        for k in range(3):
            sender.enqueue(write_episode(tmp_path / f"{k}", seed=k))
        assert sender.pending() == 3
        with pytest.raises(BridgeTimeout, match="3 episodes in .* were not acknowledged"):
            sender.flush(0.1)
    with receiving(tmp_path / "data") as receiver, sending(receiver.endpoint, tmp_path / "spool") as sender:
        sender.flush(20)
    assert len(stored(tmp_path / "data")) == 3


def test_a_full_spool_is_a_clear_error_and_takes_nothing(tmp_path):
    folder = write_episode(tmp_path / "a")
    size = sum(path.stat().st_size for path in folder.iterdir())
    with sending("tcp://127.0.0.1:1", tmp_path / "spool", max_spool_bytes=2 * size) as sender:
        sender.enqueue(folder)
        with pytest.raises(SpoolFull, match="Is the learner reachable"):
            sender.enqueue(write_episode(tmp_path / "b", num_rows=60))
        assert sender.pending() == 1
        with pytest.raises(CorruptData, match="no finished episode"):
            sender.enqueue(tmp_path)


def test_an_episode_that_does_not_fit_is_kept_apart_not_lost(tmp_path):
    folder = write_episode(tmp_path / "a", fps=2 * FPS)
    uuid = read_record(folder).uuid
    with receiving(tmp_path / "data") as receiver, sending(receiver.endpoint, tmp_path / "spool") as sender:
        sender.enqueue(folder)
        good = write_episode(tmp_path / "b")
        sender.enqueue(good)
        sender.flush(20)
        assert sender.stats()["refused"] == 1
    refused = tmp_path / "spool/refused" / uuid
    assert "fps" in (refused / "refused.txt").read_text()
    assert (refused / "rows.parquet").exists()
    assert list(stored(tmp_path / "data")) == [read_record(good).uuid]


def test_an_episode_that_cannot_be_stored_costs_no_other_robot_anything(tmp_path):
    spoil_rows(bad := write_episode(tmp_path / "bad"))
    good = write_episode(tmp_path / "good")
    with receiving(tmp_path / "data") as receiver, sending(receiver.endpoint, tmp_path / "one") as one:
        one.enqueue(bad)
        one.flush(20)
        assert one.stats()["refused"] == 1
        with sending(receiver.endpoint, tmp_path / "two") as two:
            two.enqueue(good)
            two.flush(20)
    assert list(stored(tmp_path / "data")) == [read_record(good).uuid]


def test_another_contract_is_told_to_whoever_records(tmp_path):
    other = Embodiment(cameras=small_embodiment().cameras, policy_rate_hz=5.0)
    with (
        receiving(tmp_path / "data", embodiment=other) as receiver,
        sending(receiver.endpoint, tmp_path / "spool") as sender,
    ):
        sender.enqueue(write_episode(tmp_path / "a"))
        with pytest.raises(SchemaMismatch, match="policy_rate_hz: ours"):
            sender.flush(20)
        assert sender.pending() == 1


def test_a_full_disk_at_the_learner_delays_and_loses_nothing(tmp_path, monkeypatch):
    full = threading.Event()
    full.set()
    append = DatasetStore.append

    def append_or_full(self, folder):
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(self, folder)

    monkeypatch.setattr(DatasetStore, "append", append_or_full)
    monkeypatch.setattr(demo_stream, "BUSY_S", 0.2)
    with receiving(tmp_path / "data") as receiver, sending(receiver.endpoint, tmp_path / "spool") as sender:
        sender.enqueue(write_episode(tmp_path / "a"))
        while receiver.stats()["busy"] == 0:
            time.sleep(0.01)
        assert sender.pending() == 1
        full.clear()
        sender.flush(20)
    assert len(stored(tmp_path / "data")) == 1


def test_a_full_disk_at_the_robot_delays_a_refusal_and_nothing_else(tmp_path, monkeypatch):
    full, write_text = threading.Event(), durable.write_text
    full.set()

    def write_or_full(path, text):
        if full.is_set() and path.name == "refused.txt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_text(path, text)

    monkeypatch.setattr(durable, "write_text", write_or_full)
    monkeypatch.setattr(demo_stream, "BUSY_S", 0.2)
    with receiving(tmp_path / "data") as receiver, sending(receiver.endpoint, tmp_path / "spool") as sender:
        sender.enqueue(write_episode(tmp_path / "a", fps=2 * FPS))
        wait_for(lambda: sender.stats()["error"])
        sender.enqueue(write_episode(tmp_path / "b"))
        wait_for(lambda: sender.stats()["stored"])
        assert sender.pending() == 1
        full.clear()
        wait_for(lambda: sender.stats()["refused"])
        assert sender.pending() == 0


RECEIVER = """
import sys, threading
from pathlib import Path
from bridge.dataset import DatasetStore
from bridge.demo_stream import DemoReceiver
from tests.bridge.small_episodes import FPS, small_embodiment
store = DatasetStore.open_or_create(Path(sys.argv[2]), "lab/cube", small_embodiment(), FPS)
DemoReceiver(sys.argv[1], store).serve_forever(threading.Event())
"""
SENDER = """
import sys, time
from pathlib import Path
from bridge.demo_stream import DemoSender
from bridge.episode import finished_episodes, read_record
from tests.bridge.small_episodes import small_embodiment
sender = DemoSender(sys.argv[1], small_embodiment(), Path(sys.argv[2]))
done = Path(sys.argv[4])
for folder in finished_episodes(Path(sys.argv[3])):
    if not (done / folder.name).exists():
        sender.enqueue(folder)
        (done / folder.name).touch()
sender.flush(600)
print("all acknowledged", flush=True)
"""


def kill_both_at_random(tmp_path, num_episodes: int, kills_each: int, seed: int, longest_s: float) -> dict[str, int]:
    """Send `num_episodes` while sender and receiver are killed (SIGKILL) at random; what the data set holds then."""
    (tmp_path / "done").mkdir()
    for k in range(num_episodes):
        write_episode(tmp_path / "episodes" / f"{k:03d}", num_rows=4, seed=k)
    endpoint = f"ipc://{tmp_path}/demos.sock"
    commands = {
        "receiver": [sys.executable, "-c", RECEIVER, endpoint, tmp_path / "data"],
        "sender": [
            sys.executable,
            "-c",
            SENDER,
            endpoint,
            tmp_path / "spool",
            tmp_path / "episodes",
            tmp_path / "done",
        ],
    }
    running = {name: subprocess.Popen(command, stdout=subprocess.PIPE) for name, command in commands.items()}
    rng = np.random.default_rng(seed)
    try:
        for name in rng.permutation(["receiver", "sender"] * kills_each):
            time.sleep(float(rng.uniform(0.3, longest_s)))
            running[name].send_signal(signal.SIGKILL)
            running[name].wait()
            running[name] = subprocess.Popen(commands[name], stdout=subprocess.PIPE)
        assert b"all acknowledged" in running["sender"].communicate(timeout=300)[0]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
            process.stdout.close()
    return stored(tmp_path / "data")


def require_every_episode_once(tmp_path, held: dict[str, int]) -> None:
    sent = sorted((tmp_path / "episodes").iterdir())
    assert len(DatasetStore.open(tmp_path / "data").episodes()) == len(sent)
    for folder in sent:
        rows, index = pq_rows(folder), held[read_record(folder).uuid]
        there = read_episode(tmp_path / "data", index)
        for key in ("action", "observation.state", "capture_stamp_ns"):
            np.testing.assert_array_equal(there[key], rows[key])


def test_kills_lose_and_repeat_nothing(tmp_path):
    held = kill_both_at_random(tmp_path, num_episodes=5, kills_each=2, seed=1, longest_s=1.0)
    require_every_episode_once(tmp_path, held)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_episodes_survive_forty_kills(tmp_path):
    held = kill_both_at_random(tmp_path, num_episodes=200, kills_each=20, seed=2, longest_s=6.0)
    require_every_episode_once(tmp_path, held)
