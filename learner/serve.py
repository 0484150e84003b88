"""Policy server: answers observations with action chunks and swaps checkpoints between requests.

Starts from the newest bundle in `root` (or waits for the first announcement), then follows the learner's
announcements: a new bundle is fetched and verified beside the running policy, loaded and warmed up in another thread,
and takes over between two requests. Every chunk carries the version that made it.
"""

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bridge.checkpoint import latest_bundle, verify_bundle
from bridge.checkpoint_stream import CheckpointSubscriber
from bridge.config import command_line
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError
from bridge.keys import Keys
from bridge.messages import Observation
from bridge.policy_server import PolicyServer
from learner.load import load_policy
from learner.policy import ObservationBatch, Policy

log = logging.getLogger(__name__)


@dataclass
class ServeConfig:
    """Keys of `cotwin serve`."""

    root: str = "deployed"  # where fetched bundles live
    endpoint: str = "tcp://127.0.0.1:5601"
    announce_endpoint: str = "tcp://127.0.0.1:5603"
    fetch_endpoint: str = "tcp://127.0.0.1:5604"
    max_batch: int = 8
    threads: int = 1  # of torch; the cell and the nodes share a laptop's cores
    device: str = "cpu"
    keys: str = ""  # key folder; needed unless every endpoint is loopback or ipc
    embodiment: Embodiment = field(default_factory=Embodiment)


@dataclass(frozen=True)
class Loaded:
    """A policy that is ready to answer."""

    policy: Policy
    version: int


class SwappingPolicy:
    """The callable that a `PolicyServer` serves: `offer` replaces the policy, requests under way keep the old one."""

    def __init__(self, embodiment: Embodiment, device: str = "cpu"):
        self.embodiment, self.device = embodiment, device
        self._loaded: Loaded | None = None

    @property
    def version(self) -> int:
        """-1 while there is no policy."""
        return self._loaded.version if self._loaded else -1

    def load(self, folder: Path) -> Loaded:
        """Load and warm up a bundle; slow, so not on the serving thread. Raises ValueError or BridgeError when the
        bundle is damaged, does not fit its own configuration, or was made for another embodiment."""
        info = verify_bundle(folder)
        policy = load_policy(folder, self.device)
        self.embodiment.require_same(policy.embodiment, f"checkpoint {info.version}")
        policy.infer(blank_observation(self.embodiment))
        return Loaded(policy, info.version)

    def offer(self, loaded: Loaded) -> None:
        """Answer with this policy from the next request on (one reference is replaced: atomic)."""
        self._loaded = loaded

    def __call__(self, observations: list[Observation]) -> tuple[np.ndarray, int]:
        """float32 [n, H, 7] and the version. RuntimeError while no policy has arrived (the robot is told so)."""
        loaded = self._loaded
        if loaded is None:
            raise RuntimeError("no policy yet: the server waits for the first checkpoint")
        return loaded.policy.infer(collate(observations)).numpy(), loaded.version


def collate(observations: list[Observation]) -> ObservationBatch:
    """Pictures that differ in size between robots cannot be batched: the contract forbids it."""
    cameras = observations[0].images
    images = {name: torch.from_numpy(np.stack([o.images[name] for o in observations])) for name in cameras}
    state = torch.from_numpy(np.stack([o.state for o in observations]).astype(np.float32))
    return ObservationBatch(images, state, [o.instruction for o in observations])


def blank_observation(embodiment: Embodiment) -> ObservationBatch:
    images = {n: torch.zeros(1, c.height, c.width, 3, dtype=torch.uint8) for n, c in embodiment.cameras.items()}
    return ObservationBatch(images, torch.zeros(1, 7), [embodiment.instructions[0] if embodiment.instructions else ""])


def follow(
    policy: SwappingPolicy,
    subscriber: CheckpointSubscriber,
    adopted: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Consumes verified bundles, produces swaps; waits on the subscriber, ends on `stop`. A bundle that will not load
    is reported and skipped: the running policy stays."""
    while not stop.is_set():
        folder = subscriber.poll()
        if folder is None:
            stop.wait(0.1)
            continue
        try:
            loaded = policy.load(folder)
        except (BridgeError, ValueError) as error:
            log.error("checkpoint %s is not used: %s", folder.name, error)
            continue
        policy.offer(loaded)
        adopted(loaded.version)
        subscriber.confirm(loaded.version)
        log.info("now serving version %d", loaded.version)


def main(argv: list[str]) -> None:
    config = command_line("serve", ServeConfig, argv, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(config.threads)
    root = Path(config.root)
    root.mkdir(parents=True, exist_ok=True)
    policy = SwappingPolicy(config.embodiment, config.device)
    if newest := latest_bundle(root):
        policy.offer(policy.load(newest))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    keys, version = Keys(Path(config.keys)) if config.keys else None, policy.version
    server = PolicyServer(
        config.endpoint, config.embodiment, policy, max_batch=config.max_batch, keys=keys, policy_version=version
    )
    endpoints = (config.announce_endpoint, config.fetch_endpoint)
    subscriber = CheckpointSubscriber(*endpoints, root, config.embodiment, keys=keys, current_version=version)

    def adopted(version: int) -> None:
        server.policy_version = version

    follower = threading.Thread(target=follow, args=(policy, subscriber, adopted, stop), name="checkpoints")
    follower.start()
    print(f"policy server ready at {server.endpoint}, version {policy.version}", flush=True)
    try:
        server.serve_forever(stop)
    finally:
        stop.set()
        follower.join()
        subscriber.close()
