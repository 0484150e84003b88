"""Lay a scene over photographs: cotwin twin check scene=FOLDER photos=[FOLDER]

For each photograph: how many pixels lie between a corner in it and the same corner in the scene's picture (median, and
the 90th percentile; corners are followed by optical flow there and back), the picture's scores, and an overlay: left
half photograph, right half scene, red arrows from corner to corner, ten times as long. Above `limit_px` it fails.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from sim.scan import action
from sim.scan import photos as photo_set
from sim.scan.fit import picture
from sim.scan.scores import scores
from sim.splat.scene import load

MAX_CORNERS, MIN_CORNERS = 300, 8
ROUND_TRIP_PX = 0.5  # a corner that does not come back to where it started was not followed
WINDOW_PX = (21, 21)
ARROW_SCALE = 10


@dataclass
class CheckConfig:
    """Keys of `cotwin twin check`."""

    scene: str = "runs/scan/scene"
    photos: list[str] = field(default_factory=list)  # folders with transforms.json
    every: int = 8  # of the photographs one is looked at, as `cotwin twin fit` holds them out
    out: str = ""  # folder for overlays and check.json; empty: the scene's `check`
    limit_px: float = 2.0
    device: str = "auto"

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every {self.every}: at least 1")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def corner_shifts(
    photo: np.ndarray, render: np.ndarray, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Corners of a picture uint8 [H, W, 3], float32 [n, 2] px, and where the other picture has them. `mask` [H, W] says
    where to look: nothing else is in the window of a corner."""
    a, b = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (photo, render))
    where = None if mask is None else cv2.erode(mask.astype(np.uint8), np.ones(WINDOW_PX[::-1], np.uint8))
    corners = cv2.goodFeaturesToTrack(a, MAX_CORNERS, 0.02, 7, mask=where)
    if corners is None:
        return np.empty((0, 2), np.float32), np.empty((0, 2), np.float32)
    there, found, _ = cv2.calcOpticalFlowPyrLK(a, b, corners, corners.copy(), winSize=WINDOW_PX)
    back, returned, _ = cv2.calcOpticalFlowPyrLK(b, a, there, there.copy(), winSize=WINDOW_PX)
    corners, there, back = (points.reshape(-1, 2) for points in (corners, there, back))
    kept = (found[:, 0] == 1) & (returned[:, 0] == 1) & (np.linalg.norm(back - corners, axis=1) < ROUND_TRIP_PX)
    return corners[kept], there[kept]


def overlay(photo: np.ndarray, render: np.ndarray, corners: np.ndarray, there: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]."""
    half = photo.shape[1] // 2
    both = np.ascontiguousarray(np.concatenate([photo[:, :half], render[:, half:]], axis=1))
    for start, end in zip(corners, corners + ARROW_SCALE * (there - corners), strict=True):
        cv2.arrowedLine(both, tuple(map(int, start)), tuple(map(int, end)), (255, 0, 0), 1, cv2.LINE_AA)
    return both


def check(config: CheckConfig) -> dict[str, Any]:
    """Figures of each photograph and of all corners together; overlays and `check.json` in the folder `out`.

    ValueError where there is nothing to compare, or the median is above the limit.
    """
    scene = load(Path(config.scene))
    out = Path(config.out) if config.out else Path(config.scene) / "check"
    out.mkdir(parents=True, exist_ok=True)
    found = [photo for folder in config.photos for photo in photo_set.load(Path(folder))][:: config.every]
    shifts_px, each = [], {}
    for photo in found:
        pixels, mask, render = photo.pixels(), photo.mask(), picture(scene, photo, config.device).cpu()
        corners, there = corner_shifts(pixels, render.numpy(), mask)
        off_px = np.linalg.norm(there - corners, axis=1)
        shifts_px.append(off_px)
        seen = None if mask is None else torch.from_numpy(mask)
        one: dict[str, float] = {"corners": len(off_px), **scores(torch.from_numpy(pixels), render, seen)}
        if len(off_px) >= MIN_CORNERS:
            one |= {"error_px": float(np.median(off_px)), "error_p90_px": float(np.percentile(off_px, 90))}
        each[photo.path.name] = one
        Image.fromarray(overlay(pixels, render.numpy(), corners, there)).save(out / f"{photo.path.stem}.png")
    together = np.concatenate(shifts_px) if shifts_px else np.empty(0)
    if len(together) < MIN_CORNERS:
        raise ValueError(f"{len(together)} corners were found again in {len(found)} photographs: nothing to judge by")
    figures = {
        "photographs": len(found),
        "corners": len(together),
        "error_px": float(np.median(together)),
        "error_p90_px": float(np.percentile(together, 90)),
    }
    figures |= {
        key: float(np.mean([one[key] for one in each.values()])) for key in ("psnr_db", "ssim", "edge_distance")
    }
    (out / "check.json").write_text(json.dumps(figures | {"each": each}, indent=2) + "\n")
    if figures["error_px"] > config.limit_px:
        raise ValueError(f"corners are {figures['error_px']:.2f} px off, limit_px is {config.limit_px}: see {out}")
    return figures


def main(argv: list[str]) -> int:
    return action.run("check", CheckConfig, argv, __doc__, check)
