"""Clouds without a scan: surfaces covered evenly with flat Gaussians. For tests, benches and first scenes.

Colours are RGB in [0, 1]. Everything is deterministic; lengths are m, in the frame of the one segment that is made.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from sim.splat import harmonics
from sim.splat.cloud import GaussianCloud, matrix_from_quat_wxyz, quat_wxyz_from_matrix

OPACITY_LOGIT = 4.0  # 0.982
SPREAD = 0.7  # standard deviation of a Gaussian along the surface, in mean distances between neighbours
THINNESS = 0.1  # standard deviation across the surface, relative to along it
PLASTIC = 1.32471795724475  # its powers spread points in the plane most evenly (R2 sequence)


def triangles(corners_m: np.ndarray, num: int, colour: ArrayLike, segment: str = "world") -> GaussianCloud:
    """`num` Gaussians over triangles `corners_m` [F, 3, 3], as many to each as its area asks for.

    `colour` [3], or [F, 3, 3]: one for each corner. The third axis of each Gaussian is its triangle's normal. Raises
    ValueError for no area.
    """
    corners = np.asarray(corners_m, dtype=np.float64).reshape(-1, 3, 3)
    edge_1, edge_2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normals = np.cross(edge_1, edge_2)
    areas = 0.5 * np.linalg.norm(normals, axis=1)
    if not areas.sum() > 0 or num < 1:
        raise ValueError(f"cannot put {num} Gaussians on {len(corners)} triangles of {areas.sum()} m2")
    index = np.arange(num)
    # Systematic sampling: every triangle gets its share of the area to within one Gaussian.
    face = np.searchsorted(np.cumsum(areas) / areas.sum(), (index + 0.5) / num).clip(max=len(corners) - 1)
    u, v = (0.5 + index / PLASTIC) % 1, (0.5 + index / PLASTIC**2) % 1
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    shares = np.stack([1 - u - v, u, v], axis=1)[:, :, None]
    rgb = np.broadcast_to(np.asarray(colour, dtype=np.float64), corners.shape)

    z = normals[face] / np.linalg.norm(normals[face], axis=1, keepdims=True)
    x = edge_1[face] / np.linalg.norm(edge_1[face], axis=1, keepdims=True)
    frames = np.stack([x, np.cross(z, x), z], axis=-1)
    along = SPREAD * math.sqrt(areas.sum() / num)
    return GaussianCloud(
        means_m=torch.from_numpy((shares * corners[face]).sum(axis=1)).float(),
        quats_wxyz=quat_wxyz_from_matrix(torch.from_numpy(frames)).float(),
        log_scales=torch.tensor([along, along, THINNESS * along]).log().repeat(num, 1),
        opacity_logits=torch.full((num,), OPACITY_LOGIT),
        sh=flat_colour(torch.from_numpy((shares * rgb[face]).sum(axis=1)).float()),
        segment_ids=torch.zeros(num, dtype=torch.int64),
        segment_names=(segment,),
    )


def mesh(vertices_m: np.ndarray, faces: np.ndarray, num: int, colour: ArrayLike, segment: str) -> GaussianCloud:
    """`num` Gaussians on a triangle mesh: vertices [V, 3], faces [F, 3]; colour [3], or one for each vertex [V, 3]."""
    colour = np.asarray(colour)
    return triangles(np.asarray(vertices_m)[faces], num, colour[faces] if colour.ndim == 2 else colour, segment)


def box(size_m: tuple[float, float, float], num: int, colour: ArrayLike, segment: str) -> GaussianCloud:
    """The six faces of a box about the origin."""
    unit = np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]]) / 2
    sides = [unit, unit[::-1] * [1, 1, -1]]  # corners counter-clockwise seen from outside
    faces = [np.roll(side, axis, axis=1) * size_m for axis in range(3) for side in sides]
    return triangles(np.stack([face[[i, i + 1, (i + 2) % 4]] for face in faces for i in (0, 2)]), num, colour, segment)


def cylinder(radius_m: float, length_m: float, num: int, colour: ArrayLike, segment: str) -> GaussianCloud:
    """Wall and both ends of a cylinder about the z axis, centred on the origin (32 sides)."""
    angle = np.linspace(0, 2 * np.pi, 33)
    ring = np.stack([radius_m * np.cos(angle), radius_m * np.sin(angle), 0 * angle], axis=1)
    up = np.array([0, 0, length_m / 2])
    low, high, a, b = ring - up, ring + up, slice(0, -1), slice(1, None)
    centre = np.zeros((32, 3))
    walls = [(low[a], low[b], high[b]), (low[a], high[b], high[a])]
    ends = [(centre - up, low[b], low[a]), (centre + up, high[a], high[b])]
    return triangles(np.concatenate([np.stack(t, axis=1) for t in walls + ends]), num, colour, segment)


def flat_colour(rgb: torch.Tensor) -> torch.Tensor:
    """Degree 0 coefficients [G, 1, 3] of colours [G, 3] that look alike from everywhere."""
    constant = harmonics.basis(0, torch.zeros(1, 3))[0, 0]
    return ((rgb - 0.5) / constant)[:, None]


def shaded(cloud: GaussianCloud, to_light: ArrayLike, ambient: float) -> GaussianCloud:
    """Colours as a matt surface has them under one light from direction `to_light` (segment frame), like a scan's."""
    direction = torch.nn.functional.normalize(torch.as_tensor(to_light, dtype=torch.float32), dim=0)
    normals = matrix_from_quat_wxyz(cloud.quats_wxyz)[:, :, 2]
    light = ambient + (1 - ambient) * (normals @ direction).clamp_min(0)
    rgb = harmonics.colours(cloud.sh[:, :1], normals) * light[:, None]
    return replace(cloud, sh=torch.cat([flat_colour(rgb), cloud.sh[:, 1:]], dim=1))
