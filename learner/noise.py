"""The learned exploration noise of flow_noise (ReinFlow): a small MLP on the action expert's features."""

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class NoiseConfig:
    """Range and shape of the noise head."""

    std_min: float = 0.08
    std_max: float = 0.16
    hidden: list[int] = field(default_factory=lambda: [128, 64])

    def __post_init__(self):
        if not 0.0 < self.std_min <= self.std_max:
            raise ValueError(f"noise std range [{self.std_min}, {self.std_max}]: needs 0 < std_min <= std_max")


class NoiseHead(nn.Module):
    """features [B, H, width] -> std float32 [B, H, action_dim], in [std_min, std_max].

    log-variance = lo + (hi - lo) (tanh z + 1) / 2, so z = 0 is the geometric mean of the range. Computes in float32.
    """

    def __init__(self, width: int, action_dim: int, config: NoiseConfig):
        super().__init__()
        sizes = [width, *config.hidden, action_dim]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.log_var_min = 2 * math.log(config.std_min)
        self.log_var_max = 2 * math.log(config.std_max)

    def forward(self, features: Tensor) -> Tensor:
        share = (torch.tanh(self.mlp(features.float())) + 1.0) / 2.0
        return torch.exp(0.5 * (self.log_var_min + (self.log_var_max - self.log_var_min) * share))
