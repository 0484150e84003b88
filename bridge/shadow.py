"""Shadow mode: a new policy version infers beside the running one; its disagreement is noted, the arm never sees it.

`Shadow` wraps the running version's `infer` for a `PolicyServer`. The candidate runs in a thread of its own on the
newest observations and is dropped, not queued, while it is busy: it can neither delay nor change an answer.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.messages import Observation

log = logging.getLogger(__name__)

Infer = Callable[[list[Observation]], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Disagreement:
    """Between two versions over one batch: mean and largest distance of the commanded motion of each step (m, rad), and
    the share of steps whose gripper commands differ in sign."""

    version: int
    candidate_version: int
    translation_mean_m: float
    translation_max_m: float
    rotation_mean_rad: float
    rotation_max_rad: float
    gripper_share: float


def disagreement(actions: np.ndarray, candidate: np.ndarray, version: int, candidate_version: int) -> Disagreement:
    """actions, candidate: float32 [n, H, 7] in contract units."""
    translation = np.linalg.norm(actions[..., :3] - candidate[..., :3], axis=-1)
    rotation = np.linalg.norm(actions[..., 3:6] - candidate[..., 3:6], axis=-1)
    gripper = np.sign(actions[..., 6]) != np.sign(candidate[..., 6])
    numbers = (translation.mean(), translation.max(), rotation.mean(), rotation.max(), gripper.mean())
    return Disagreement(version, candidate_version, *map(float, numbers))


def _kept(observation: Observation) -> Observation:
    """With pictures of its own: the server's may be overwritten once it has answered."""
    return dataclasses.replace(observation, images={name: i.copy() for name, i in observation.images.items()})


class Shadow:
    """Call it as the server's `infer`. `note` gets each Disagreement, in the shadow's thread (a telemetry `send`)."""

    def __init__(self, infer: Infer, note: Callable[[Disagreement], Any]):
        self._infer, self._note = infer, note
        self._candidate: Infer | None = None
        self._job: tuple[list[Observation], np.ndarray, int] | None = None
        self._wake = threading.Condition()
        self._stopped = False
        self.compared = self.dropped = self.failed = 0
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def __call__(self, observations: list[Observation]) -> tuple[np.ndarray, int]:
        actions, version = self._infer(observations)
        if self._candidate is not None:
            with self._wake:
                self.dropped += self._job is not None
                self._job = ([_kept(observation) for observation in observations], np.array(actions), version)
                self._wake.notify()
        return actions, version

    def watch(self, candidate: Infer | None) -> None:
        """Run `candidate` in the shadow from now on; None ends it."""
        with self._wake:
            self._candidate, self._job = candidate, None

    def close(self) -> None:
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._job is not None or self._stopped)
                if self._stopped:
                    return
                assert self._job is not None
                (observations, actions, version), self._job = self._job, None
                candidate = self._candidate
            if candidate is None:
                continue
            try:
                proposed, candidate_version = candidate(observations)
                found = disagreement(actions, np.asarray(proposed), version, candidate_version)
            except (ValueError, RuntimeError, ArithmeticError):
                self.failed += 1
                log.exception("the candidate failed on a batch of %d", len(observations))
                continue
            self.compared += 1
            self._note(found)
