"""Pictures at a policy's size, and the small policy's eyes: where things are, as numbers.

A four-centimetre cube must be found to about a centimetre from some hundred demonstrations. A pooled feature vector has
to learn that from examples; a spatial softmax has the answer built in: each channel becomes a heat map, and its
expected pixel is the feature. Source: Levine et al., End-to-End Training of Deep Visuomotor Policies, 2016.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.pictures import area_resize as area_resize  # also for those who import it from here


def pad_resize(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """float [N, C, H, W] in [0, 1] -> [N, C, *size]: undistorted, bilinear, centred on black, as LeRobot's and
    openpi-PyTorch's pi0."""
    height, width = pictures.shape[2:]
    if (height, width) == size:
        return pictures
    ratio = max(width / size[1], height / size[0])
    rows, columns = max(1, int(height / ratio)), max(1, int(width / ratio))  # also of a line of pixels
    x = F.interpolate(pictures, size=(rows, columns), mode="bilinear", align_corners=False).clamp(0.0, 1.0)
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    return F.pad(x, (left, size[1] - columns - left, top, size[0] - rows - top))


def padded_pictures(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`pad_resize` of uint8 [N, H, W, 3], rounded, as demonstrations are kept for a policy that pads."""
    x = pad_resize(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0, size)
    return (x * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


class KeypointEncoder(nn.Module):
    """One camera: uint8 [B, H, W, 3] -> float32 [B, 3 * keypoints]: x and y in [-1, 1] and spread of each map."""

    def __init__(self, channels: int, keypoints: int, size: tuple[int, int]):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, channels, 7, stride=4, padding=3),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.Conv2d(channels, channels, 3, padding=2, dilation=2),
            ]
        )
        self.heat = nn.Conv2d(channels, keypoints, 1)
        self.log_temperature = nn.Parameter(torch.full((keypoints,), math.log(5.0)))
        height, width = (size[0] + 3) // 4, (size[1] + 3) // 4
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        grid = torch.stack([x, y, x * x + y * y]).reshape(3, -1)
        self.register_buffer("grid", grid, persistent=False)
        self.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]

    @property
    def num_features(self) -> int:
        return 3 * self.heat.out_channels

    def forward(self, pictures: Tensor, jitter: "ColourJitter | None" = None) -> Tensor:
        # Permuted, not copied: NHWC bytes are already in the order that the convolutions want.
        if jitter is None:
            x = pictures.to(torch.float32).mul_(2 / 255).sub_(1).permute(0, 3, 1, 2)
        else:
            x = jitter(pictures).permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        heat = self.heat(x).flatten(2)  # [B, keypoints, cells]
        # Standardised, so that even untrained maps have peaks: a flat map says "the middle" for every picture and its
        # gradient says little more.
        heat = F.layer_norm(heat, heat.shape[-1:])
        weight = torch.softmax(heat * self.log_temperature.exp()[:, None], dim=-1)
        x_mean, y_mean, square = (weight @ self.grid.T).unbind(-1)
        spread = square - x_mean**2 - y_mean**2
        return torch.cat([x_mean, y_mean, spread], dim=-1)


class ColourJitter:
    """Brightness, contrast and white balance drawn for each picture, and a shift of at most `shift_px` pixels.

    The shift is a camera error, so it stays near the size of a real one: a pixel is most of a centimetre here.
    """

    def __init__(self, strength: float, shift_px: int, generator: torch.Generator | None):
        self.strength, self.shift_px, self.generator = strength, shift_px, generator

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 around [-1, 1]."""
        gain = 1 + self.strength * self._uniform(pictures, 1) + 0.4 * self.strength * self._uniform(pictures, 3)
        offset = self.strength * self._uniform(pictures, 1)
        shifted = self._shift(self._shift(pictures, 1), 2)
        return shifted.to(torch.float32).mul_(gain * (2 / 255)).add_(offset - gain)

    def _shift(self, pictures: Tensor, axis: int) -> Tensor:
        if not self.shift_px:
            return pictures
        by = int(torch.randint(2 * self.shift_px + 1, (1,), generator=self.generator)) - self.shift_px
        source = torch.arange(pictures.shape[axis], device=pictures.device) + by
        return pictures.index_select(axis, source.clamp(0, pictures.shape[axis] - 1))

    def _uniform(self, pictures: Tensor, channels: int) -> Tensor:
        draw = torch.rand((len(pictures), 1, 1, channels), generator=self.generator).to(pictures.device)
        return 2 * draw - 1
