"""A video of one episode of a rollout: a picture at every policy query, cameras side by side, with its numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bridge.video import write_video
from learner.rollouts import Views


@dataclass
class VideoConfig:
    """Of environment 0's first episode."""

    save: bool = False
    info: bool = True  # seed-free numbers in the picture: policy query, reward so far
    folder: str = ""  # empty: the run's videos/
    every: int = 1  # iterations

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"video.every {self.every}: at least 1")


class Film:
    """A `learner.rollouts.Watch` that keeps what it is shown; `save` writes it."""

    def __init__(self, path: Path, info: bool):
        self.path, self.info = Path(path), info
        self.frames: list[np.ndarray] = []

    def __call__(self, views: Views, row: int, query: int, reward: float) -> None:
        frame = np.concatenate([pictures[row] for _, pictures in sorted(views.images.items())], axis=1)
        frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
        if self.info:
            image = Image.fromarray(frame)
            ImageDraw.Draw(image).text((2, 2), f"query {query}  reward {reward:.2f}", fill=(255, 255, 0))
            frame = np.asarray(image)
        self.frames.append(frame)

    def save(self) -> None:
        if self.frames:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_video(self.path, iter(self.frames), fps=5)
