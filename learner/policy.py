"""What every policy implements, from the few-million-parameter one to full-size pi0.5.

Shapes: B batch, H action horizon (model), C executed actions of a chunk (`num_action_chunks`), d environment action
width (7), K denoising steps, D padded model action width.

A policy is used in two halves, so that work that does not depend on the trained weights is done once:
`prepare` turns raw observations into model inputs (resize, normalise, tokenise) and, if the vision-language part is
frozen, may already hold its keys and values; everything after takes the prepared batch.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class ObservationBatch:
    """images: uint8 [B, H, W, 3] RGB for each camera; state: float32 [B, 7], contract units; instruction: B strings."""

    images: dict[str, Tensor]
    state: Tensor
    instruction: list[str]

    def __len__(self) -> int:
        return self.state.shape[0]


@dataclass
class SftBatch:
    """Demonstrations. actions: float32 [B, H, 7], contract units; is_pad: bool [B, H], True past the episode's end.

    goal_m: float32 [B, 3], TCP position (base) where the gripper next opens or closes; NaN where it never will.
    """

    observation: ObservationBatch
    actions: Tensor
    is_pad: Tensor
    goal_m: Tensor | None = None


@dataclass
class Sample:
    """One stochastic chunk and all that PPO needs to score it again.

    actions: float32 [B, H, 7], contract units, not clipped to the action limits. chain: float32 [B, K+1, H, D], the
    denoising path in model units from noise to actions. denoise_index: int64 [B, K] which steps were stochastic (all
    of them in joint mode; one value repeated otherwise). log_prob: float32 [B, C, d] of the first C actions
    value: float32 [B] (zeros without a value head). prepared: what `prepare` returned, to be passed back.
    """

    actions: Tensor
    chain: Tensor
    denoise_index: Tensor
    log_prob: Tensor
    value: Tensor
    prepared: Any


@dataclass
class Scores:
    """log_prob float32 [B, C, d]; entropy float32 [B]; value float32 [B]. All carry gradients."""

    log_prob: Tensor
    entropy: Tensor
    value: Tensor


class Policy(Protocol):
    """A `torch.nn.Module` with these methods. Randomness comes from `generator` alone (None: torch's global one)."""

    embodiment: Any  # bridge.embodiment.Embodiment
    horizon: int
    num_action_chunks: int
    pads_pictures: bool  # demonstrations' pictures are padded to `picture_size`, undistorted; else resized

    @property
    def picture_size(self) -> tuple[int, int]:
        """height, width that demonstrations' pictures are kept at"""

    def prepare(self, observation: ObservationBatch) -> Any:
        """Raw observations to model inputs on the policy's device. The result is indexable with a LongTensor of batch
        positions, and its class has `concatenate(parts)`."""

    def infer(self, observation: ObservationBatch, generator: torch.Generator | None = None) -> Tensor:
        """Deterministic-ODE actions for deployment: float32 [B, H, 7], contract units, on the CPU. No gradient."""

    def sample(self, prepared: Any, generator: torch.Generator | None = None) -> Sample:
        """Stochastic actions for rollouts. No gradient."""

    def value(self, prepared: Any) -> Tensor:
        """Critic alone: float32 [B]. No gradient."""

    def set_noise_level(self, level: float) -> None:
        """Exploration of `sample` and `scores` from now on (learner.flow.annealed_noise_level)."""

    def scores(self, prepared: Any, chain: Tensor, denoise_index: Tensor) -> Scores:
        """Log-probability, entropy and value of stored chains under the current weights, with gradient."""

    def sft_loss(self, batch: SftBatch, generator: torch.Generator | None = None) -> Tensor:
        """Scalar flow-matching loss over real action dims, padding masked."""

    def sft_terms(self, batch: SftBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`loss`, which is `sft_loss`, and by name what it is made of, if of several."""
