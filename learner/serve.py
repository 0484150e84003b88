"""Policy server: answers observations with action chunks and swaps checkpoints between requests.

Starts from the newest bundle in `root` (or waits for the first announcement), then follows the learner's
announcements: a new bundle is fetched and verified beside the running policy, loaded and warmed up in another thread,
and takes over between two requests. Every chunk carries the version that made it.
"""

import logging
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bridge.checkpoint import verify_bundle
from bridge.checkpoint_fetch import bundle_to_run
from bridge.checkpoint_stream import CheckpointSubscriber
from bridge.config import command_line, errors_in_one_line
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError
from bridge.keys import Keys
from bridge.messages import Observation
from bridge.pictures import PictureFormat
from bridge.policy_server import PolicyServer
from bridge.shadow import Shadow
from bridge.telemetry import TelemetryPublisher
from learner.load import load_policy
from learner.policy import ObservationBatch, Policy

log = logging.getLogger(__name__)

LOADING_NICE = 10  # of the thread that loads, beside loops that must not miss a tick


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
    telemetry_endpoint: str = ""  # where `cotwin bridge top` may listen, such as tcp://127.0.0.1:5606; empty: nowhere
    shadow_batches: int = 0  # a new version first infers beside the running one for so many batches; 0: takes over
    embodiment: Embodiment = field(default_factory=Embodiment)


@dataclass(frozen=True)
class Loaded:
    """A policy that is ready to answer."""

    policy: Policy
    version: int

    @property
    def pictures(self) -> PictureFormat:
        return PictureFormat(*self.policy.picture_size, self.policy.pads_pictures)

    def infer(self, observations: list[Observation]) -> tuple[np.ndarray, int]:
        """float32 [n, H, 7] and the version."""
        return self.policy.infer(collate(observations, self.pictures)).numpy(), self.version


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
        return loaded.infer(observations)


def collate(observations: list[Observation], pictures: PictureFormat) -> ObservationBatch:
    """Pictures of one size stay as they came, for the policy to prepare. Where some robots have prepared theirs and
    others have not, those others' are prepared here."""
    images = {}
    for name in observations[0].images:
        views = [o.images[name] for o in observations]
        if len({view.shape for view in views}) > 1:
            views = [pictures.apply(view) for view in views]
        images[name] = torch.from_numpy(np.stack(views))
    state = torch.from_numpy(np.stack([o.state for o in observations]).astype(np.float32))
    return ObservationBatch(images, state, [o.instruction for o in observations])


def blank_observation(embodiment: Embodiment) -> ObservationBatch:
    images = {n: torch.zeros(1, c.height, c.width, 3, dtype=torch.uint8) for n, c in embodiment.cameras.items()}
    return ObservationBatch(images, torch.zeros(1, 7), [embodiment.instructions[0] if embodiment.instructions else ""])


class Follower(threading.Thread):
    """Turns verified bundles into swaps: loads each at low priority, shows it to the shadow if that is asked for, and
    lets it take over. A bundle that will not load is reported and skipped: the running policy stays."""

    def __init__(self, policy: SwappingPolicy, subscriber: CheckpointSubscriber, server: PolicyServer, shadow: Shadow):
        super().__init__(name="checkpoints")
        self._policy, self._subscriber, self._server, self._shadow = policy, subscriber, server, shadow
        self.shadow_batches = 0
        self.stop = threading.Event()

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICE)  # of this thread alone
        try:
            while not self.stop.wait(0.1):
                self._look()
        finally:
            self.stop.set()  # a server that can swap no more ends, and says why

    def _look(self) -> None:
        try:
            if (folder := self._subscriber.poll()) is not None:
                self._adopt(self._policy.load(folder))
        except (BridgeError, ValueError) as error:
            log.error("a checkpoint is not used: %s", error)

    def _adopt(self, loaded: Loaded) -> None:
        if self.shadow_batches and self._policy.version >= 0:
            self._compare(loaded)
        self._policy.offer(loaded)
        self._server.policy_version, self._server.pictures = loaded.version, loaded.pictures
        self._subscriber.confirm(loaded.version)
        log.info("now serving version %d", loaded.version)

    def _compare(self, loaded: Loaded) -> None:
        """Until the new version was asked often enough beside the running one; each disagreement is logged."""
        compared = self._shadow.compared
        self._shadow.watch(loaded.infer)
        while self._shadow.compared - compared < self.shadow_batches and not self.stop.wait(0.05):
            continue
        self._shadow.watch(None)


@errors_in_one_line()
def main(argv: list[str]) -> int:
    config = command_line("serve", ServeConfig, argv, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(config.threads)
    serve(config)
    return 0


def tell(publisher: TelemetryPublisher, server: PolicyServer, stop: threading.Event) -> None:
    """Batches, queues and versions, once a second, for `cotwin bridge top`."""
    while not stop.wait(1.0):
        publisher.send("policy_server", server.stats())
    publisher.close()


def serve(config: ServeConfig) -> None:
    """Until SIGINT or SIGTERM. Raises ValueError or BridgeError for what a person has to put right."""
    root = Path(config.root)
    root.mkdir(parents=True, exist_ok=True)
    policy = SwappingPolicy(config.embodiment, config.device)
    pictures = None
    if newest := bundle_to_run(root):
        policy.offer(loaded := policy.load(newest))
        pictures = loaded.pictures
    keys, version = Keys.at(config.keys), policy.version
    shadow = Shadow(policy, lambda found: log.info("shadow: %s", found))
    server = PolicyServer(
        config.endpoint,
        config.embodiment,
        shadow,
        max_batch=config.max_batch,
        keys=keys,
        policy_version=version,
        pictures=pictures,
    )
    endpoints = (config.announce_endpoint, config.fetch_endpoint)
    subscriber = CheckpointSubscriber(*endpoints, root, config.embodiment, keys=keys, current_version=version)
    follower = Follower(policy, subscriber, server, shadow)
    follower.shadow_batches = config.shadow_batches
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: follower.stop.set())
    if config.telemetry_endpoint:
        publisher = TelemetryPublisher(config.telemetry_endpoint, keys=keys)
        threading.Thread(target=tell, args=(publisher, server, follower.stop), name="telemetry", daemon=True).start()
    follower.start()
    print(f"policy server ready at {server.endpoint}, version {policy.version}", flush=True)
    try:
        server.serve_forever(follower.stop)
    finally:
        follower.stop.set()
        follower.join()
        subscriber.close()
        shadow.close()
