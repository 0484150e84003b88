"""Twin episodes."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Views:
    """What n cells show: images uint8 [n, H, W, 3] for each camera, state float32 [n, 7]."""

    images: dict[str, np.ndarray]
    state: np.ndarray


@dataclass
class ChunkResult:
    observation: Views
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    success: np.ndarray
    episode_len: np.ndarray
    final_observation: Views
    seeds: np.ndarray
