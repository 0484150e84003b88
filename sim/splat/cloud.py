"""A cloud of Gaussians in the frames of the bodies that carry them.

One canonical cloud serves every environment: a Gaussian never moves in its segment's frame, segments move in the world.
Values are kept as 3D Gaussian Splatting files keep them (log scales, opacity logits, unnormalised quaternions), so that
a file that was read and written again is the same file.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from sim.splat import harmonics


@dataclass(frozen=True)
class GaussianCloud:
    """G Gaussians in S segments; all float32 except the ids, all on one device.

    means_m [G, 3] and quats_wxyz [G, 4] (any non-zero norm) in the frame of the Gaussian's segment; log_scales [G, 3],
    natural logarithm of m; opacity_logits [G]; sh [G, K, 3], K = 1, 4, 9 or 16, order of `harmonics`; segment_ids int64
    [G], each in [0, S); segment_names: S different names. Raises ValueError where these do not fit together.
    """

    means_m: Tensor
    quats_wxyz: Tensor
    log_scales: Tensor
    opacity_logits: Tensor
    sh: Tensor
    segment_ids: Tensor
    segment_names: tuple[str, ...] = ("world",)

    def __post_init__(self):
        num = self.means_m.shape[0]
        tails = {"means_m": (3,), "quats_wxyz": (4,), "log_scales": (3,), "opacity_logits": (), "segment_ids": ()}
        for name, tail in tails.items():
            if tuple(getattr(self, name).shape) != (num, *tail):
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, expected {(num, *tail)}")
            dtype = torch.int64 if name == "segment_ids" else torch.float32
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"{name} is {getattr(self, name).dtype}, expected {dtype}")
        if self.sh.ndim != 3 or self.sh.shape[0] != num or self.sh.shape[2] != 3:
            raise ValueError(f"sh has shape {tuple(self.sh.shape)}, expected ({num}, K, 3)")
        harmonics.degree_of(self.sh.shape[1])
        if len(set(self.segment_names)) != len(self.segment_names):
            raise ValueError(f"segment names repeat: {list(self.segment_names)}")
        if num and not 0 <= int(self.segment_ids.min()) <= int(self.segment_ids.max()) < len(self.segment_names):
            raise ValueError(f"segment ids must lie in [0, {len(self.segment_names)}) for {list(self.segment_names)}")

    def __len__(self) -> int:
        return self.means_m.shape[0]

    @property
    def degree(self) -> int:
        return harmonics.degree_of(self.sh.shape[1])

    @property
    def device(self) -> torch.device:
        return self.means_m.device

    @cached_property
    def opacities(self) -> Tensor:
        """[G] in (0, 1)."""
        return torch.sigmoid(self.opacity_logits)

    @cached_property
    def covariances_m2(self) -> Tensor:
        """[G, 3, 3] in the segment frame: R(q) diag(scale^2) R(q)^T."""
        M = matrix_from_quat_wxyz(self.quats_wxyz) * self.log_scales.exp()[:, None, :]
        return M @ M.mT

    @cached_property
    def planes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means [3, G], covariances [6, G] (xx xy xz yy yz zz) and coefficients [K, 3, G]: G runs fastest, so that
        neighbouring threads of a GPU read neighbouring numbers."""
        covariances = self.covariances_m2[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
        return self.means_m.T.contiguous(), covariances.T.contiguous(), self.sh.permute(1, 2, 0).contiguous()

    def to(self, device: torch.device | str) -> "GaussianCloud":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "segment_names"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def select(self, which: Tensor) -> "GaussianCloud":
        """The Gaussians at `which` (bool [G] or positions); segments keep their ids and names."""
        tensors = {f.name: getattr(self, f.name)[which] for f in fields(self) if f.name != "segment_names"}
        return replace(self, **tensors)

    def select_segments(self, names: Iterable[str]) -> "GaussianCloud":
        """The Gaussians of the named segments; ids and names stay, so the same segment poses still fit."""
        chosen = torch.zeros(len(self.segment_names), dtype=torch.bool, device=self.device)
        for name in names:
            if name not in self.segment_names:
                raise ValueError(f"no segment {name!r}: there are {list(self.segment_names)}")
            chosen[self.segment_names.index(name)] = True
        return self.select(chosen[self.segment_ids])

    def bind(self, name: str) -> "GaussianCloud":
        """All Gaussians in one segment `name`."""
        return replace(self, segment_ids=torch.zeros_like(self.segment_ids), segment_names=(name,))

    def transform(self, T: Tensor, scale: float = 1.0) -> "GaussianCloud":
        """The cloud scaled about its origin, then moved by the rigid `T` [4, 4], inside its segments' frames."""
        if not scale > 0:
            raise ValueError(f"scale {scale}: must be positive")
        T = T.to(self.means_m)
        R = T[:3, :3]
        return replace(
            self,
            means_m=scale * self.means_m @ R.mT + T[:3, 3],
            quats_wxyz=multiply_wxyz(quat_wxyz_from_matrix(R).expand(len(self), 4), self.quats_wxyz),
            log_scales=self.log_scales + math.log(scale),
            sh=harmonics.rotate(self.sh, R),
        )


def merge(clouds: Sequence[GaussianCloud]) -> GaussianCloud:
    """One cloud of all; segments of the same name become one, lower SH degrees are padded with zeros."""
    if not clouds:
        raise ValueError("nothing to merge: the list of clouds is empty")
    names = tuple(dict.fromkeys(name for cloud in clouds for name in cloud.segment_names))
    num_sh = max(cloud.sh.shape[1] for cloud in clouds)
    ids, sh = [], []
    for cloud in clouds:
        ids.append(torch.tensor([names.index(n) for n in cloud.segment_names], device=cloud.device)[cloud.segment_ids])
        sh.append(torch.nn.functional.pad(cloud.sh, (0, 0, 0, num_sh - cloud.sh.shape[1])))
    return GaussianCloud(
        means_m=torch.cat([c.means_m for c in clouds]),
        quats_wxyz=torch.cat([c.quats_wxyz for c in clouds]),
        log_scales=torch.cat([c.log_scales for c in clouds]),
        opacity_logits=torch.cat([c.opacity_logits for c in clouds]),
        sh=torch.cat(sh),
        segment_ids=torch.cat(ids),
        segment_names=names,
    )


def matrix_from_quat_wxyz(quats_wxyz: Tensor) -> Tensor:
    """[..., 4] (any non-zero norm) -> [..., 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quats_wxyz, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def quat_wxyz_from_matrix(R: Tensor) -> Tensor:
    """Rotations [..., 3, 3] -> unit quaternions [..., 4], w >= 0 (Shepperd's method: the best-conditioned of four)."""
    xx, yy, zz = R.diagonal(dim1=-2, dim2=-1).unbind(-1)
    wx, wy, wz = R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]
    xy, xz, yz = R[..., 1, 0] + R[..., 0, 1], R[..., 2, 0] + R[..., 0, 2], R[..., 2, 1] + R[..., 1, 2]
    rows = [
        [1 + xx + yy + zz, wx, wy, wz],
        [wx, 1 + xx - yy - zz, xy, xz],
        [wy, xy, 1 - xx + yy - zz, yz],
        [wz, xz, yz, 1 - xx - yy + zz],
    ]
    candidates = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    quats = torch.take_along_dim(candidates, best[..., None, None], dim=-2)[..., 0, :]
    quats = torch.nn.functional.normalize(quats, dim=-1)
    return torch.where(quats[..., :1] < 0, -quats, quats)


def multiply_wxyz(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product of quaternions [..., 4]: first `b`, then `a`."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        dim=-1,
    )
