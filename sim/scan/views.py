"""Where to look from: camera poses around what is scanned."""

from collections.abc import Sequence

import numpy as np

from bridge import pose
from sim.splat.sample import PLASTIC


def look_at(eye_m: np.ndarray, target_m: np.ndarray) -> np.ndarray:
    """`T_base_cam` [4, 4] with OpenCV axes, z of the base up in the picture."""
    z = (target_m - eye_m) / np.linalg.norm(target_m - eye_m)
    x = np.cross(z, [0.0, 0.0, 1.0])
    x /= np.linalg.norm(x)
    return pose.pose(eye_m, np.stack([x, np.cross(z, x), z], axis=1))


def around(
    targets_m: Sequence[Sequence[float]],
    num: int,
    distance_m: Sequence[float],
    elevation_rad: Sequence[float],
    azimuth_rad: Sequence[float],
) -> list[np.ndarray]:
    """`num` poses `T_base_cam`, each looking at the next of the targets; the three ranges are filled evenly.

    Azimuth 0 looks from +x of the base, towards it.
    """
    views = []
    for index in range(num):
        shares = (0.5 + index / PLASTIC) % 1, (0.5 + index / PLASTIC**2) % 1, (0.5 + index * 0.618034) % 1
        azimuth, elevation, distance = (
            low + share * (high - low)
            for share, (low, high) in zip(shares, (azimuth_rad, elevation_rad, distance_m), strict=True)
        )
        out = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
        target = np.array(targets_m[index % len(targets_m)], dtype=np.float64)
        views.append(look_at(target + distance * out, target))
    return views
