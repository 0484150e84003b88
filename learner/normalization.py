"""Contract units to the policy's units and back, from quantiles of the data the policy was trained on."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# Half ranges below these are noise, not signal: a rotation that no demonstration used must not be blown up to [-1, 1].
MIN_HALF_RANGE_ACTION = np.array([0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 1.0])  # m, rad, gripper command
MIN_HALF_RANGE_STATE = np.array([0.05, 0.05, 0.05, 0.1, 0.1, 0.1, 0.02])  # m, rad, m


@dataclass
class Quantiles:
    """1 % and 99 % quantiles, float64 [D], over all (weighted) rows."""

    q01: np.ndarray
    q99: np.ndarray

    def to_dict(self) -> dict[str, list[float]]:
        return {"q01": self.q01.tolist(), "q99": self.q99.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, list[float]]) -> "Quantiles":
        return cls(np.array(data["q01"], np.float64), np.array(data["q99"], np.float64))


def weighted_quantiles(rows: np.ndarray, weights: np.ndarray) -> Quantiles:
    """`rows` [N, D], `weights` [N] (not normalised). The inverse of the weighted empirical distribution."""
    low, high = np.quantile(rows.astype(np.float64), [0.01, 0.99], axis=0, weights=weights, method="inverted_cdf")
    return Quantiles(low, high)


class Normalizer(nn.Module):
    """(x - centre) / half_range: the quantiles go to -1 and +1. Nothing is clipped."""

    def __init__(self, quantiles: Quantiles, min_half_range: np.ndarray):
        super().__init__()
        half_range = np.maximum((quantiles.q99 - quantiles.q01) / 2, min_half_range)
        centre = (quantiles.q99 + quantiles.q01) / 2
        # Not in the weights: the bundle's normalization.json is their one home.
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float32), persistent=False)
        self.register_buffer("half_range", torch.tensor(half_range, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.centre) / self.half_range

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.half_range + self.centre
