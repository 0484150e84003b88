"""Receive demonstrations from robots into a data set, each exactly once; runs until it is stopped.

cotwin demos root=runs/lab/data/stand_in endpoint=tcp://127.0.0.1:5602
"""

import logging
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

from bridge.config import command_line
from bridge.dataset import DatasetStore
from bridge.demo_stream import DemoReceiver
from bridge.embodiment import Embodiment
from bridge.keys import Keys


@dataclass
class DemosConfig:
    root: str = "runs/demos/data/stand_in"  # the data set; made if it does not exist
    repo_id: str = "cotwin/demonstrations"
    fps: int = 30
    endpoint: str = "tcp://127.0.0.1:5602"
    keys: str | None = None  # key folder; needed unless the endpoint is loopback or ipc
    embodiment: Embodiment = field(default_factory=Embodiment)


def main(argv: list[str]) -> int:
    config = command_line("demos", DemosConfig, argv, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        store = DatasetStore.open_or_create(Path(config.root), config.repo_id, config.embodiment, config.fps)
        receiver = DemoReceiver(config.endpoint, store, keys=Keys.at(config.keys))
    except ValueError as error:
        print(f"error: {error}")
        return 1
    print(
        f"receiving demonstrations at {receiver.endpoint} into {config.root} ({store.num_episodes} episodes)",
        flush=True,
    )
    receiver.serve_forever(stop)
    print(f"{store.num_episodes} episodes in {config.root}")
    return 0
