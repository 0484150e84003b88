"""Real spherical harmonics up to degree 3, in the order and with the signs that 3D Gaussian Splatting files use.

Basis function k = l(l+1) + m. With Condon-Shortley phase: sqrt(2) Re Y_l^m for m > 0, sqrt(2) Im Y_l^|m| for m < 0.
"""

import math
from functools import cache

import torch
from torch import Tensor

MAX_DEGREE = 3


def num_coefficients(degree: int) -> int:
    return (degree + 1) ** 2


def degree_of(num: int) -> int:
    """The degree whose basis has `num` functions. Raises ValueError unless `num` is 1, 4, 9 or 16."""
    degree = math.isqrt(num) - 1
    if num_coefficients(degree) != num or not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"{num} spherical harmonics coefficients a channel: allowed are 1, 4, 9 and 16")
    return degree


def basis(degree: int, directions: Tensor) -> Tensor:
    """Values of all functions up to `degree` at unit `directions` [..., 3]: [..., (degree + 1)^2]."""
    x, y, z = directions.unbind(-1)
    values = [torch.full_like(x, 0.5 * math.sqrt(1 / math.pi))]
    if degree >= 1:
        c1 = math.sqrt(3 / (4 * math.pi))
        values += [-c1 * y, c1 * z, -c1 * x]
    if degree >= 2:
        c2 = math.sqrt(15 / (4 * math.pi))
        values += [
            c2 * x * y,
            -c2 * y * z,
            0.25 * math.sqrt(5 / math.pi) * (3 * z * z - 1),
            -c2 * x * z,
            0.5 * c2 * (x * x - y * y),
        ]
    if degree >= 3:
        c30, c31 = 0.25 * math.sqrt(7 / math.pi), 0.25 * math.sqrt(21 / (2 * math.pi))
        c32, c33 = 0.5 * math.sqrt(105 / math.pi), 0.25 * math.sqrt(35 / (2 * math.pi))
        values += [
            -c33 * y * (3 * x * x - y * y),
            c32 * x * y * z,
            -c31 * y * (5 * z * z - 1),
            c30 * z * (5 * z * z - 3),
            -c31 * x * (5 * z * z - 1),
            0.5 * c32 * z * (x * x - y * y),
            -c33 * x * (x * x - 3 * y * y),
        ]
    return torch.stack(values, dim=-1)


def colours(sh: Tensor, directions: Tensor) -> Tensor:
    """Coefficients `sh` [G, K, 3] seen along unit `directions` [G, 3]: linear RGB [G, 3], 0.5 added, not below 0."""
    values = basis(degree_of(sh.shape[1]), directions)
    return (torch.einsum("gk,gkc->gc", values, sh) + 0.5).clamp_min(0.0)


def rotate(sh: Tensor, R: Tensor) -> Tensor:
    """Coefficients [G, K, 3] of the same light after it was turned by the rotation `R` [3, 3].

    For editing clouds, not for rendering, which turns the view direction instead. In each degree a turned function is
    a mix of the degree's functions, Y(R^T d) = Y(d) D; D comes from solving that at fixed directions, in float64.
    """
    degree = degree_of(sh.shape[1])
    directions = _probe_directions().to(sh.device)
    fixed, turned = basis(degree, directions), basis(degree, directions @ R.double().to(sh.device))
    result = sh.clone()
    for l in range(1, degree + 1):
        band = slice(l * l, (l + 1) ** 2)
        mix = torch.linalg.lstsq(fixed[:, band], turned[:, band]).solution
        result[:, band] = torch.einsum("jk,gkc->gjc", mix, sh[:, band].double()).to(sh.dtype)
    return result


@cache
def _probe_directions() -> Tensor:
    """64 well-spread unit vectors, float64 (golden spiral)."""
    i = torch.arange(64, dtype=torch.float64) + 0.5
    z, angle = 1 - 2 * i / 64, i * math.pi * (1 + math.sqrt(5))
    r = (1 - z * z).sqrt()
    return torch.stack([r * angle.cos(), r * angle.sin(), z], dim=-1)
