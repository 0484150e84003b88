"""Deliver a checkpoint: announce a bundle and serve its blocks until enough policy servers run it.

`version=-1` is the newest bundle in `root`. An older version than the announced one needs `rollback=true`: versions
move forward unless somebody says otherwise.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bridge.checkpoint import latest_bundle, verify_bundle
from bridge.checkpoint_stream import CheckpointPublisher
from bridge.config import command_line, errors_in_one_line
from bridge.errors import BridgeTimeout
from bridge.keys import Keys
from bridge.run_files import write_stage


@dataclass
class PushConfig:
    """Keys of `cotwin push`."""

    root: str = "runs/demo/checkpoints"
    version: int = -1
    rollback: bool = False
    confirmations: int = 1  # policy servers that have to run it before the command ends
    timeout_s: float = 60.0
    announce_endpoint: str = "tcp://127.0.0.1:5603"
    fetch_endpoint: str = "tcp://127.0.0.1:5604"
    max_mb_per_s: float = 0.0  # 0: no limit
    keys: str = ""  # key folder; needed unless both endpoints are loopback or ipc
    run: str = ""  # a run's folder, to leave a stage file in
    stage: str = "push"

    def __post_init__(self):
        if self.max_mb_per_s < 0 or self.timeout_s <= 0 or self.confirmations < 0:
            raise ValueError("max_mb_per_s and confirmations must not be negative, timeout_s must be above 0")


@errors_in_one_line()
def main(argv: list[str]) -> int:
    config = command_line("push", PushConfig, argv, __doc__)
    figures = push(config)
    if config.run:
        write_stage(Path(config.run), config.stage, figures["delivery_s"], figures)
    print(f"version {figures['version']} runs on {figures['confirmed_by']} after {figures['delivery_s']:.2f} s")
    return 0


def push(config: PushConfig) -> dict:
    """Announce, deliver, wait. Returns figures: version, confirmed_by, delivery_s, bytes_sent, bundle_bytes."""
    root = Path(config.root)
    folder = latest_bundle(root) if config.version < 0 else root / f"{config.version:06d}"
    if folder is None:
        raise ValueError(f"{root} holds no finished bundle")
    info = verify_bundle(folder)
    limit = config.max_mb_per_s * 1e6 or None
    endpoints = (config.announce_endpoint, config.fetch_endpoint)
    keys = Keys.at(config.keys)
    publisher = CheckpointPublisher(*endpoints, root, keys=keys, max_bytes_per_s=limit)
    bundle_bytes = sum(path.stat().st_size for path in folder.iterdir())
    started_s = time.monotonic()
    try:
        (publisher.rollback if config.rollback else publisher.announce)(info.version)
        names = _wait(publisher, info.version, config, bundle_bytes)
        sent = publisher.stats()["bytes_sent"]
    finally:
        publisher.close()
    return {
        "version": info.version,
        "confirmed_by": ", ".join(names),
        "delivery_s": round(time.monotonic() - started_s, 3),
        "bytes_sent": sent,
        "bundle_bytes": bundle_bytes,
    }


def _wait(publisher: CheckpointPublisher, version: int, config: PushConfig, bundle_bytes: int) -> list[str]:
    """`wait_confirmed` with a progress bar of the bytes that left."""
    until_s = time.monotonic() + config.timeout_s
    with tqdm(total=bundle_bytes, unit="B", unit_scale=True, desc=f"version {version}", leave=False) as bar:
        while True:
            left_s = until_s - time.monotonic()
            try:
                return publisher.wait_confirmed(version, config.confirmations, min(0.2, max(left_s, 0.0)))
            except BridgeTimeout:
                if left_s <= 0:
                    raise
            bar.update(min(publisher.stats()["bytes_sent"], bundle_bytes) - bar.n)
