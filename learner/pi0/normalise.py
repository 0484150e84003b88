"""State and actions to the units that the network sees, exactly as LeRobot and openpi do it."""

from dataclasses import dataclass

import torch
from torch import Tensor

MODES = {"QUANTILES": ("q01", "q99"), "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "IDENTITY": ()}
CONVENTIONS = ("lerobot", "openpi")


@dataclass
class Normaliser:
    """Statistics of one vector, float32 [D] each. The two conventions differ in how they avoid dividing by zero."""

    mode: str
    statistics: dict[str, Tensor]
    convention: str = "lerobot"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"normalisation mode {self.mode!r}: allowed are {', '.join(MODES)}")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"normalisation convention {self.convention!r}: allowed are {', '.join(CONVENTIONS)}")
        if missing := [name for name in MODES[self.mode] if name not in self.statistics]:
            raise ValueError(f"{self.mode} normalisation needs the statistics {', '.join(missing)}")
        self.statistics = {name: torch.as_tensor(value).float() for name, value in self.statistics.items()}

    @property
    def width(self) -> int | None:
        """D; None where nothing is normalised."""
        names = MODES[self.mode]
        return len(self.statistics[names[0]]) if names else None

    def __call__(self, x: Tensor) -> Tensor:
        """Contract units -> network units, [..., D]."""
        if self.mode == "IDENTITY":
            return x
        low, high = self._pair(x)
        if self.mode == "MEAN_STD":
            return (x - low) / (high + self._epsilon)
        return 2.0 * (x - low) / self._range(low, high) - 1.0

    def inverse(self, x: Tensor) -> Tensor:
        """Network units -> contract units, [..., D]."""
        if self.mode == "IDENTITY":
            return x
        low, high = self._pair(x)
        if self.mode == "MEAN_STD":
            return x * (high + (self._epsilon if self.convention == "openpi" else 0.0)) + low
        return (x + 1.0) / 2.0 * self._range(low, high) + low

    def as_lerobot(self) -> "Normaliser":
        """The same map in LeRobot's convention, for saving: openpi's epsilon goes into the statistics (float32 rounding
        apart)."""
        if self.convention == "lerobot" or self.mode == "IDENTITY":
            return Normaliser(self.mode, self.statistics)
        upper = {"QUANTILES": "q99", "MEAN_STD": "std", "MIN_MAX": "max"}[self.mode]
        return Normaliser(self.mode, {**self.statistics, upper: self.statistics[upper] + self._epsilon})

    @property
    def _epsilon(self) -> float:
        return 1e-6 if self.convention == "openpi" else 1e-8

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (self.statistics[name].to(x.device) for name in MODES[self.mode])
        return low, high

    def _range(self, low: Tensor, high: Tensor) -> Tensor:
        span = high - low
        if self.convention == "openpi":
            return span + self._epsilon
        return torch.where(span == 0, torch.full_like(span, self._epsilon), span)
