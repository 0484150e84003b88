"""Training pictures as if the camera had stood a little elsewhere and the room had been lit otherwise.

What is drawn and in which ranges is openpi's (`preprocess_observation` with train=True): a crop scaled back, a turn,
brightness, contrast, saturation. Each picture has its own draw, as in openpi's JAX code; its PyTorch code and RLinf
draw once a batch.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class AugmentConfig:
    """How far pictures may change. All at 0 (and `crop` at 1) changes nothing."""

    crop: float = 0.95  # share of either side that is kept
    rotate_deg: float = 5.0  # either way
    brightness: float = 0.3  # factors lie within 1 - this and 1 + this
    contrast: float = 0.4
    saturation: float = 0.5
    # Cameras that only get other colours: where one sits on the hand is what relates its pictures to the gripper.
    steady: list[str] = field(default_factory=lambda: ["wrist"])

    def __post_init__(self):
        if not 0.0 < self.crop <= 1.0:
            raise ValueError(f"augment.crop {self.crop}: allowed are shares above 0, to 1 (no crop)")
        if not 0.0 <= self.rotate_deg <= 180.0:
            raise ValueError(f"augment.rotate_deg {self.rotate_deg}: allowed are 0 to 180")
        for name in ("brightness", "contrast", "saturation"):
            if not 0.0 <= (value := getattr(self, name)) <= 1.0:
                raise ValueError(f"augment.{name} {value}: allowed are 0 to 1")


def augment(images: Tensor, cameras: list[str], config: AugmentConfig, generator: torch.Generator | None) -> Tensor:
    """float32 [B, I, 3, S, S] in [-1, 1], pictures of `cameras` in this order, to the same; what is drawn comes from
    `generator` (of the CPU)."""
    batch, device = len(images), images.device
    # Everything is drawn for every camera, so that `steady` does not change what the others get.
    draws = (2 * torch.rand(6, len(cameras), batch, generator=generator) - 1).to(device)
    out = []
    for pictures, name, (x, y, turn, *colours) in zip(images.unbind(1), cameras, draws.unbind(1), strict=True):
        if name not in config.steady:
            centre = (1 - config.crop) * torch.stack([x, y], dim=1)
            pictures = warped(pictures, config.crop, centre, math.radians(config.rotate_deg) * turn)
        ranges = (config.brightness, config.contrast, config.saturation)
        factors = (1 + r * colour for r, colour in zip(ranges, colours, strict=True))
        out.append(recoloured(pictures, *factors))
    return torch.stack(out, dim=1)


def warped(pictures: Tensor, scale: float, centre: Tensor, angle_rad: Tensor) -> Tensor:
    """Crop to `scale` of each side about `centre` [B, 2] (x, y; the picture spans -1 to 1), scale back, and turn what
    is then seen anticlockwise by `angle_rad` [B]: one bilinear look-up. Black comes in at the edges."""
    cos, sin = scale * torch.cos(angle_rad), scale * torch.sin(angle_rad)
    source = torch.stack([torch.stack([cos, -sin, centre[:, 0]], 1), torch.stack([sin, cos, centre[:, 1]], 1)], 1)
    grid = F.affine_grid(source, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


def recoloured(pictures: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Factors [B] on values in [0, 1], about black, the picture's mean and the pixel's grey; cut to the range."""
    of_each = (-1, 1, 1, 1)
    x = (pictures + 1) / 2 * brightness.view(of_each)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + contrast.view(of_each) * (x - mean)
    grey = x.mean(1, keepdim=True)
    x = grey + saturation.view(of_each) * (x - grey)
    return x.clamp(0, 1) * 2 - 1
