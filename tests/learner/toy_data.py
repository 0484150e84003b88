"""Toy demonstrations as real data sets on the disk."""

from pathlib import Path

import numpy as np

from bridge import pose
from bridge.dataset import DatasetStore, EpisodeWriter
from bridge.embodiment import Embodiment
from tests.learner.toy_cell import demonstration

SIZE = (48, 64)  # height, width of the toy pictures: small enough for tests


def write_dataset(root: Path, embodiment: Embodiment, seeds: range, fps: int = 10, domain: str = "twin") -> Path:
    """Expert episodes; at `fps` above the policy rate each step's motion is divided over the rows of its period."""
    store = DatasetStore.create(root, f"toy/{domain}", embodiment, fps, SIZE)
    for seed in seeds:
        demo = demonstration(embodiment, seed, size=SIZE)
        folder = root.parent / f"{root.name}-spool-{seed}"
        writer = EpisodeWriter(folder, embodiment, fps, embodiment.instructions[0], domain, image_size=SIZE)
        share = round(fps / embodiment.policy_rate_hz)
        for step, action in enumerate(demo["action"]):
            for _ in range(share):
                row = {
                    "observation.state": demo["state"][step],
                    "action": divided(action, share),
                    "requested_action": divided(action, share),
                    "capture_stamp_ns": writer.num_rows * 10**9 // fps,
                }
                writer.add({name: frames[step] for name, frames in demo["images"].items()}, row)
        store.append(writer.close(success=demo["success"]))
    return root


def divided(action: np.ndarray, parts: int) -> np.ndarray:
    """One of `parts` equal motions that compose to `action` (for rotations about one axis)."""
    return np.concatenate([action[:6] / parts, action[6:]]).astype(np.float32)


def target_after(actions: np.ndarray) -> np.ndarray:
    """The commanded target [4, 4] that a row of actions [n, 7] leads to from the identity."""
    T = np.eye(4)
    for action in actions:
        T = pose.integrate(T, action)
    return T
