"""Small scenes and picture arithmetic that several tests share."""

import math
from dataclasses import replace

import numpy as np
import torch

from bridge.pose import matrix_from_rpy
from sim.splat import harmonics, sample
from sim.splat.cloud import GaussianCloud, merge
from sim.splat.render import Cameras, RenderOutput

SEGMENTS = ("table", "arm", "cube")


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of pictures in [0, 1]; inf when equal."""
    error = float(((a.double() - b.double()) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def mask(output: RenderOutput) -> torch.Tensor:
    assert output.segment is not None
    return output.segment


def rigid(xyz_m, rpy_rad) -> torch.Tensor:
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3] = torch.from_numpy(matrix_from_rpy(np.asarray(rpy_rad, dtype=np.float64)))
    T[:3, 3] = torch.as_tensor(xyz_m, dtype=torch.float64)
    return T


def look_at(eye_m, target_m) -> torch.Tensor:
    """T_world_cam, OpenCV axes, world z up in the picture."""
    eye, target = torch.as_tensor(eye_m, dtype=torch.float64), torch.as_tensor(target_m, dtype=torch.float64)
    z = torch.nn.functional.normalize(target - eye, dim=0)
    x = torch.nn.functional.normalize(torch.linalg.cross(z, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)), dim=0)
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3], T[:3, 3] = torch.stack([x, torch.linalg.cross(z, x), z], dim=1), eye
    return T


def with_sheen(cloud: GaussianCloud, degree: int, strength: float, seed: int) -> GaussianCloud:
    """The same cloud with random higher coefficients of standard deviation `strength`."""
    num = harmonics.num_coefficients(degree)
    noise = torch.randn(len(cloud), num - 1, 3, generator=torch.Generator().manual_seed(seed))
    return replace(cloud, sh=torch.cat([cloud.sh[:, :1], strength * noise.to(cloud.device)], dim=1))


def tabletop(num: int = 900, degree: int = 3) -> GaussianCloud:
    """A table, a leaning cylinder and a cube; `num` Gaussians in three segments."""
    parts = [
        sample.box((0.8, 0.8, 0.02), num // 2, (0.6, 0.5, 0.4), "table"),
        sample.cylinder(0.04, 0.3, num // 3, (0.9, 0.9, 0.95), "arm"),
        sample.box((0.08, 0.08, 0.08), num - num // 2 - num // 3, (0.8, 0.2, 0.1), "cube"),
    ]
    cloud = merge(parts)
    return with_sheen(cloud, degree, 0.15, seed=1) if degree else cloud


def poses(num_envs: int, seed: int = 0) -> torch.Tensor:
    """T_world_segment [N, 3, 4, 4]: the table stays, arm and cube differ everywhere."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_envs):
        arm = rigid([*rng.uniform(-0.2, 0.2, 2), 0.2], rng.uniform(-1, 1, 3))
        cube = rigid([*rng.uniform(-0.25, 0.25, 2), 0.05], [0, 0, rng.uniform(-3, 3)])
        rows.append(torch.stack([rigid([0, 0, -0.01], [0, 0, 0]), arm, cube]))
    return torch.stack(rows)


def cameras(num_envs: int, width: int = 56, height: int = 48) -> Cameras:
    """Two cameras in each environment, the second one different in each."""
    K = torch.tensor([[50.0, 0, 27.5], [0, 52.0, 23.5], [0, 0, 1]]).expand(num_envs, 2, 3, 3)
    T = [
        torch.stack([look_at([0.7, 0.3, 0.6], [0, 0, 0.05]), look_at([-0.5, 0.1 * i - 0.4, 0.5], [0, 0, 0])])
        for i in range(num_envs)
    ]
    return Cameras(K, torch.stack(T), width, height)
