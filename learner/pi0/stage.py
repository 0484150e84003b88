"""Stage I of pi0 and pi0.5: the keys of `cotwin sft policy=pi05`, and the policy that it starts from."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from learner.demo_dataset import DataConfig
from learner.normalization import MIN_HALF_RANGE_ACTION, MIN_HALF_RANGE_STATE, Quantiles
from learner.pi0.bundle import load_weights, openpi_normalisers
from learner.pi0.lerobot_files import PREPROCESSOR, read_processors
from learner.pi0.normalise import Normaliser
from learner.pi0.policy import Pi0Config, Pi0Policy
from learner.sft import OptimizerConfig, SftConfig
from learner.small_policy import Statistics

FROM_SCRATCH = "random"
STATISTICS = ("data", "checkpoint")


def fine_tuning() -> OptimizerConfig:
    """openpi's rates."""
    return OptimizerConfig(2.5e-5, final_lr_share=0.1, warmup_steps=1000, weight_decay=1e-10, ema_decay=0.999)


@dataclass
class Pi0SftConfig(SftConfig):
    """Keys of `cotwin sft policy=pi05` (or pi0, or a file of configs/policy whose name begins so)."""

    checkpoint: str = ""  # folder in LeRobot's or openpi-PyTorch's layout, or a bundle; `random`: from scratch
    allow: list[str] = field(default_factory=list)  # released names that may be missing, unexpected or misshapen
    statistics: str = "data"  # normalise by what the demonstrations show, or by the checkpoint's own statistics
    steps: int = 5000
    max_seconds: float = 0.0
    data: DataConfig = field(default_factory=lambda: DataConfig(hold_steps=0))  # nothing past an episode's end
    optimizer: OptimizerConfig = field(default_factory=fine_tuning)
    policy: Pi0Config = field(default_factory=Pi0Config)  # ty: ignore[incompatible-attribute-override]  the other kind

    def __post_init__(self):
        super().__post_init__()
        if self.statistics not in STATISTICS:
            raise ValueError(f"statistics {self.statistics!r}: allowed are {', '.join(STATISTICS)}")
        if self.statistics == "checkpoint" and self.checkpoint == FROM_SCRATCH:
            raise ValueError("statistics=checkpoint needs a checkpoint folder, not checkpoint=random")

    def new_policy(self, statistics: Statistics) -> Pi0Policy:
        """Raises ValueError for a checkpoint that does not fit, naming every key; random weights must be asked for."""
        if not self.checkpoint:
            raise ValueError(
                f"{self.policy.model.variant} starts from released weights: set checkpoint to their folder, or to "
                f"{FROM_SCRATCH!r} for a network that knows nothing"
            )
        folder = Path(self.checkpoint)
        if self.statistics == "data":
            state = from_quantiles(statistics.state, MIN_HALF_RANGE_STATE)
            action = from_quantiles(statistics.action, MIN_HALF_RANGE_ACTION)
        elif (folder / f"{PREPROCESSOR}.json").exists():
            state, action, _ = read_processors(folder)
        else:
            state, action = (n.as_lerobot() for n in openpi_normalisers(folder, self.policy))
        policy = Pi0Policy(self.policy, self.embodiment, state, action, device=self.device)
        if self.checkpoint != FROM_SCRATCH:
            load_weights(policy, folder, fresh=True, allow=self.allow)
        return policy


def from_quantiles(measured: Quantiles, min_half_range: np.ndarray) -> Normaliser:
    """Quantile normalisation in which an axis that no demonstration used is not blown up to [-1, 1]."""
    centre = (measured.q99 + measured.q01) / 2
    half = np.maximum((measured.q99 - measured.q01) / 2, min_half_range)
    return Normaliser("QUANTILES", {"q01": centre - half, "q99": centre + half})
