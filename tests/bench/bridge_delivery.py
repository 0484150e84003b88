"""Checkpoints for `bench_bridge`: rate of a 1 GB bundle beside a raw stream, and what an expert-only update sends.

The raw stream: one PUSH/PULL pair, the same bytes from the same mapped file; nothing is hashed, checked or written.
Its frames are kept until the end, so that after both a gigabyte lies in memory; the table also has a stream that
drops each frame at once. Ours: the whole delivery, from connecting to a verified bundle that is synced to its file
system, once in memory (tmpfs) and once on the disk. Rounds alternate, and the median of each counts.
"""

import contextlib
import json
import mmap
import os
import statistics
import tempfile
import time
from math import prod
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import zmq

from bridge.checkpoint import bundle_path, verify_bundle, write_bundle
from bridge.checkpoint_stream import CheckpointPublisher, CheckpointSubscriber
from bridge.embodiment import Camera, Embodiment
from bridge.transfer import BLOCK_BYTES

EMBODIMENT = Embodiment(cameras={"third_person": Camera(), "wrist": Camera()})
SPAWN = get_context("spawn")
MEMORY = "/dev/shm"
EXPERT = ("gemma_expert", "action_in", "action_out", "time_mlp")
HEADS = {  # of LeRobot's files, which no pi0 evaluates and our bundles leave out
    "paligemma_with_expert.paligemma.lm_head.weight": (257152, 2048),
    "paligemma_with_expert.gemma_expert.lm_head.weight": (257152, 1024),
}


def pi05_tensors(heads: bool) -> dict[str, int]:
    """Name -> bytes of every tensor of a full-size pi0.5 in bfloat16."""
    from learner.pi0.config import ModelConfig
    from learner.pi0.weights import released_names

    shapes = {name: shape for pieces in released_names(ModelConfig()).values() for name, shape in pieces}
    return {name: 2 * prod(shape) for name, shape in (shapes | (HEADS if heads else {})).items()}


def synthetic(path: Path, sizes: dict[str, int], version: int) -> None:
    """A safetensors file of random bytes; the expert's differ from version to version, the rest does not."""
    header, offset = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, size) in enumerate(sizes.items()):
            is_expert = any(part in name for part in EXPERT) and "lm_head" not in name
            rng = np.random.default_rng([index, version if is_expert else 0])
            for start in range(0, size, BLOCK_BYTES):
                file.write(rng.bytes(min(BLOCK_BYTES, size - start)))


def make_bundle(root: Path, sizes: dict[str, int], version: int) -> int:
    """Its bytes."""
    weights = root / "model.safetensors"
    root.mkdir(parents=True, exist_ok=True)
    synthetic(weights, sizes, version)
    write_bundle(bundle_path(root, version), {"model.safetensors": weights}, EMBODIMENT, version, version - 1, 0, {})
    weights.unlink()
    return sum(path.stat().st_size for path in bundle_path(root, version).iterdir())


# --- both streams ----------------------------------------------------------------------------------------------------


def push_file(pipe, path):
    socket = zmq.Context().socket(zmq.PUSH)
    socket.sndhwm = 8
    socket.bind("tcp://127.0.0.1:*")
    pipe.send(socket.last_endpoint.decode())
    with open(path, "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    for start in range(0, len(view), BLOCK_BYTES):
        socket.send(view[start : start + BLOCK_BYTES], copy=False)
    pipe.recv()


def raw_stream_s(path: Path, keep: bool) -> float:
    """From connecting to the last byte."""
    kept = []
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=push_file, args=(theirs, str(path)), daemon=True)
    process.start()
    endpoint, left = ours.recv(), path.stat().st_size
    started_s = time.monotonic()
    context = zmq.Context()
    socket = context.socket(zmq.PULL)
    socket.rcvhwm = 8
    socket.connect(endpoint)
    while left:
        frame = socket.recv(copy=False)
        left -= len(frame)
        if keep:
            kept.append(frame)
    elapsed_s = time.monotonic() - started_s
    ours.send("stop")
    context.destroy(linger=0)
    process.join()
    return elapsed_s


def publish(pipe, root):
    publisher = CheckpointPublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", Path(root))
    pipe.send((publisher.announce_endpoint, publisher.fetch_endpoint))
    while (version := pipe.recv()) is not None:
        publisher.announce(version)
        pipe.send(publisher.stats()["bytes_sent"])
    publisher.close()


@contextlib.contextmanager
def publisher_process(root: Path):
    """Yields its endpoints and a function that announces a version and returns the bytes sent so far."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=publish, args=(theirs, str(root)), daemon=True)
    process.start()

    def announce(version: int) -> int:
        ours.send(version)
        return ours.recv()

    try:
        yield ours.recv(), announce
    finally:
        process.kill()
        process.join()


def delivery_s(endpoints, root: Path) -> float:
    """From connecting to a verified bundle."""
    started_s = time.monotonic()
    subscriber = CheckpointSubscriber(*endpoints, root, EMBODIMENT)
    while (path := subscriber.poll()) is None:
        time.sleep(0.002)
    elapsed_s = time.monotonic() - started_s
    subscriber.close()
    verify_bundle(path)
    return elapsed_s


def sync_mb_per_s(folder: str, num_bytes: int) -> float:
    """What the file system itself takes: one thread writes and syncs as many bytes."""
    block = os.urandom(BLOCK_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started_s = time.monotonic()
        for _ in range(num_bytes // BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_bytes / (time.monotonic() - started_s) / 1e6


def rate(place: str, num_bytes: int, rounds: int) -> dict:
    """MB/s of both, medians over alternating rounds; one more comes first, in which memory is touched anew."""
    sizes = pi05_tensors(heads=False)
    scaled = {name: max(1, round(size * num_bytes / sum(sizes.values()))) for name, size in sizes.items()}
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        folder = Path(temporary)
        total = make_bundle(folder / "from", scaled, 1)
        weights = bundle_path(folder / "from", 1) / "model.safetensors"
        times_s: dict[str, list[float]] = {"ours": [], "raw": [], "raw, dropped": []}
        with publisher_process(folder / "from") as (endpoints, announce):
            announce(1)
            for index in range(rounds + 1):
                times_s["raw"].append(raw_stream_s(weights, keep=True))
                times_s["ours"].append(delivery_s(endpoints, folder / f"to-{index}"))
                times_s["raw, dropped"].append(raw_stream_s(weights, keep=False))
                for path in bundle_path(folder / f"to-{index}", 1).iterdir():
                    path.unlink()
        alone = sync_mb_per_s(place, num_bytes)
    rates = {name: [total / s / 1e6 for s in seconds[1:]] for name, seconds in times_s.items()}
    return {name: statistics.median(values) for name, values in rates.items()} | {
        "bytes": total,
        "rounds": rates,
        "write_and_sync_alone": alone,
    }


def bench_bundle(figure, quick: bool) -> dict:
    num_bytes, rounds = (2**27, 1) if quick else (2**30, 3)
    rows = {"memory": rate(MEMORY, num_bytes, rounds), "disk": rate(tempfile.gettempdir(), num_bytes, rounds)}
    peer = "raw ZeroMQ stream of the same file, kept in memory unchecked"
    figures = {}
    for name, key in (("memory", "bundle_mb_per_s"), ("disk", "bundle_to_disk_mb_per_s")):
        ours, raw = rows[name]["ours"], rows[name]["raw"]
        figures[key] = figure(ours, raw, ours / raw, "MB/s", peer, rounds)
    return {"figures": figures, "tables": {"bundle_mb_per_s": rows}}


# --- what an update sends --------------------------------------------------------------------------------------------


def update_share(sizes: dict[str, int]) -> dict:
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        folder = Path(temporary)
        totals = [make_bundle(folder / "from", sizes, version) for version in (1, 2)]
        with publisher_process(folder / "from") as (endpoints, announce):
            announce(1)
            subscriber = CheckpointSubscriber(*endpoints, folder / "to", EMBODIMENT)
            for version in (1, 2):
                before = announce(version)
                while (path := subscriber.poll()) is None:
                    time.sleep(0.005)
                assert verify_bundle(path).version == version
                subscriber.confirm(version)
            subscriber.close()
            sent = announce(2) - before
    return {"bundle_bytes": totals[1], "sent_bytes": sent, "share": sent / totals[1]}


def bench_update(figure, quick: bool) -> dict:
    """Every tensor of a full-size pi0.5 at a scale of 1:20 (quick: 1:200), the proportions kept."""
    scale = 200 if quick else 20
    rows = {}
    for name, heads in (("as LeRobot saves it", True), ("our bundle, without the unused heads", False)):
        rows[name] = update_share({key: max(1, size // scale) for key, size in pi05_tensors(heads).items()})
    share = rows["as LeRobot saves it"]["share"]
    peer = f"whole checkpoint of the full-size pi0.5 layout, 1:{scale}"
    figures = {"expert_update_bytes_share": figure(share, 1.0, 1.0 / share, "share of the layout", peer, 1)}
    slim = rows["our bundle, without the unused heads"]
    figures["expert_update_bytes_share_of_our_bundle"] = figure(
        slim["share"], 1.0, 1.0 / slim["share"], "share of the bundle", peer, 1
    )
    return {"figures": figures, "tables": {"expert_update": rows}}
