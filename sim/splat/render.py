"""Pictures of one canonical cloud in many environments: `render`.

N environments with M cameras each are I = N M pictures. The cloud is held once; what differs between environments is
[N, S, 4, 4] segment poses, so memory and work grow with I G and never with I^2. Colour that depends on the viewpoint
needs no rotated coefficients: the camera's position is taken into each segment's frame, and with it the view direction.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sim.splat import reference
from sim.splat.cloud import GaussianCloud
from sim.splat.config import BACKENDS

PAIRS_PER_CALL = 2**25  # Gaussians x pictures that the GPU works on at once: some 4 GB


@dataclass(frozen=True)
class Cameras:
    """M pinhole cameras in each of N environments, all with one picture size.

    K [N, M, 3, 3] as OpenCV and RealSense give it: the centre of the first pixel is (0, 0). T_world_cam [N, M, 4, 4],
    rigid, OpenCV axes (x right, y down, z forward).
    """

    K: Tensor
    T_world_cam: Tensor
    width: int
    height: int

    def __post_init__(self):
        leading = tuple(self.K.shape[:-2])
        if len(leading) != 2 or tuple(self.K.shape) != (*leading, 3, 3):
            raise ValueError(f"K has shape {tuple(self.K.shape)}, expected [N, M, 3, 3]")
        if tuple(self.T_world_cam.shape) != (*leading, 4, 4):
            raise ValueError(f"T_world_cam has shape {tuple(self.T_world_cam.shape)}, expected {(*leading, 4, 4)}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"picture size {self.width} x {self.height}: both must be at least 1")

    def select(self, envs: slice | Tensor, cameras: slice | Tensor) -> "Cameras":
        return replace(self, K=self.K[envs][:, cameras], T_world_cam=self.T_world_cam[envs][:, cameras])


@dataclass(frozen=True)
class RenderOutput:
    """Pictures on the renderer's device.

    rgb [N, M, H, W, 3] float32, nominally in [0, 1], over the background that was asked for (black if none: then colour
    is premultiplied by alpha); alpha [N, M, H, W]; depth_m [N, M, H, W]: mean depth along the optical axis of what is
    seen, inf where nothing is; segment int64 [N, M, H, W]: the segment that gives the pixel most of its light, -1 where
    the background gives more; None unless asked for.
    """

    rgb: Tensor
    alpha: Tensor
    depth_m: Tensor
    segment: Tensor | None = None

    def over(self, background: Tensor) -> Tensor:
        """rgb of a render without background, over colours that broadcast to [N, M, H, W, 3]."""
        return self.rgb + (1 - self.alpha[..., None]) * background.to(self.rgb)


@torch.no_grad()
def render(
    cloud: GaussianCloud,
    T_world_segment: Tensor,
    cameras: Cameras,
    *,
    background: Tensor | None = None,
    backend: str = "auto",
    segments: bool = False,
    antialiased: bool = False,
    images_per_call: int | None = None,
) -> RenderOutput:
    """All cameras of all environments.

    `T_world_segment` [N, S, 4, 4], rigid, one for each of the cloud's segments. `background` broadcasts to
    [N, M, H, W, 3]. `backend`: "gsplat" (CUDA), "torch" (any device), or "auto", gsplat on CUDA. `segments` asks for
    the segment mask. `antialiased` keeps small and far things from swelling; right for clouds that were trained so, and
    for pictures much smaller than those that a cloud was trained on. `images_per_call` bounds the memory of the gsplat
    backend. Everything happens on the cloud's device. Raises ValueError for shapes that do not fit and for an unknown
    backend.
    """
    N, M = cameras.K.shape[:2]
    expected = (N, len(cloud.segment_names), 4, 4)
    if tuple(T_world_segment.shape) != expected:
        raise ValueError(f"T_world_segment has shape {tuple(T_world_segment.shape)}, expected {expected}")
    if images_per_call is not None and images_per_call < 1:
        raise ValueError(f"images_per_call {images_per_call}: must be at least 1")
    draw = _draw_with_gsplat if choose_backend(backend, cloud.device) == "gsplat" else _draw_with_torch

    device, size = cloud.device, (cameras.width, cameras.height)
    # Small matrices, so in float64: a camera a kilometre from the world's origin costs no precision.
    T_world_cam = cameras.T_world_cam.to(device, torch.float64)
    T_cam_world = invert_rigid(T_world_cam)
    T_cam_segment = T_cam_world[:, :, None] @ T_world_segment.to(device, torch.float64)[:, None]
    T_cam_segment = T_cam_segment.float().flatten(0, 1)  # [I, S, 4, 4]
    K = cameras.K.to(device, torch.float32).flatten(0, 1).clone()
    K[:, :2, 2] += 0.5  # from pixel centres at integers to pixel centres at half-integers

    step = images_per_call or max(1, PAIRS_PER_CALL // max(1, len(cloud)))
    parts = [
        draw(cloud, T_cam_segment[i : i + step], K[i : i + step], *size, segments, antialiased)
        for i in range(0, len(K), step)
    ]
    channels, alpha = (torch.cat(part).unflatten(0, (N, M)) for part in zip(*parts, strict=True))
    return _output(channels, alpha, background, segments)


def choose_backend(backend: str, device: torch.device) -> str:
    """What "auto" means on `device`. Raises ValueError for an unknown backend, or for gsplat without CUDA."""
    if backend not in BACKENDS:
        raise ValueError(f"splat backend {backend!r}: allowed are {', '.join(BACKENDS)}")
    if backend == "gsplat" and device.type != "cuda":
        raise ValueError(f"splat backend 'gsplat' needs a CUDA device, the cloud is on {device}; use 'torch'")
    return ("gsplat" if device.type == "cuda" else "torch") if backend == "auto" else backend


def invert_rigid(T: Tensor) -> Tensor:
    """[..., 4, 4]; exact for rigid transforms, and much faster on a GPU than a general inverse."""
    inverse = torch.zeros_like(T)
    R_inverse = T[..., :3, :3].mT
    inverse[..., :3, :3] = R_inverse
    inverse[..., :3, 3:] = -R_inverse @ T[..., :3, 3:]
    inverse[..., 3, 3] = 1
    return inverse


def to_uint8(rgb: Tensor) -> Tensor:
    """Colours in [0, 1] (clipped) to uint8 pictures."""
    return (rgb.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _output(channels: Tensor, alpha: Tensor, background: Tensor | None, segments: bool) -> RenderOutput:
    """channels [N, M, H, W, 4 (+ S)]: premultiplied colour, depth times weight, and each segment's weight."""
    depth_m = torch.where(alpha > 0, channels[..., 3] / alpha, torch.inf)
    mask = None
    if segments:
        weights = torch.cat([1 - alpha[..., None], channels[..., 4:]], dim=-1)
        mask = weights.argmax(dim=-1) - 1
    output = RenderOutput(channels[..., :3], alpha, depth_m, mask)
    return output if background is None else replace(output, rgb=output.over(background))


def _segment_features(cloud: GaussianCloud) -> Tensor:
    """[G, S]: 1 at each Gaussian's segment."""
    return torch.nn.functional.one_hot(cloud.segment_ids, len(cloud.segment_names)).float()


def _draw_with_torch(
    cloud: GaussianCloud, T_cam_segment: Tensor, K: Tensor, width: int, height: int, segments: bool, antialiased: bool
) -> tuple[Tensor, Tensor]:
    """channels [I, H, W, 4 (+ S)] and alpha [I, H, W]."""
    channels, alphas = [], []
    for T, k in zip(T_cam_segment, K, strict=True):
        seen = reference.project(cloud, T, k, width, height, antialiased)
        features = [seen.colours, seen.depths_m[:, None]] + ([_segment_features(cloud)] if segments else [])
        channel, alpha = reference.blend(seen, torch.cat(features, dim=-1), width, height)
        channels.append(channel)
        alphas.append(alpha)
    return torch.stack(channels), torch.stack(alphas)


def _draw_with_gsplat(
    cloud: GaussianCloud, T_cam_segment: Tensor, K: Tensor, width: int, height: int, segments: bool, antialiased: bool
) -> tuple[Tensor, Tensor]:
    """The same, all pictures at once."""
    from sim.splat import fused  # needs gsplat and triton, which a laptop may lack

    features = _segment_features(cloud) if segments else None
    return fused.draw(cloud, T_cam_segment, K, width, height, features, antialiased)
