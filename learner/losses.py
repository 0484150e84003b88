"""PPO's terms, summed over the samples that count so that micro-batches add up to the batch. Pure functions.

N samples (policy queries). `mask` float32 [N]: 1 for a sample that counts. All means are over those.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Metrics = dict[str, Tensor]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1.0)


def chunk_log_prob(log_prob: Tensor, valid: Tensor) -> Tensor:
    """[N, C, d] -> [N]: only steps that were executed (valid bool [N, C]) had any part in what followed."""
    return (log_prob * valid[..., None]).sum((-1, -2))


def actor_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate over chunks; all [N]. Both log-probabilities must be float32: their difference is small.

    approx_kl is k3, mean(r - 1 - ln r): unbiased and never negative (Schulman, 2020).
    """
    assert log_prob.dtype == old_log_prob.dtype == torch.float32
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        metrics = {
            "actor/approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
            "actor/pg_clipfrac": masked_mean((clipped > unclipped).float(), mask),
            "actor/ratio": masked_mean(ratio, mask),
        }
    return loss, metrics


def critic_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, mask: Tensor, value_clip: float, huber_delta: float
) -> tuple[Tensor, Metrics]:
    """The worse of the Huber errors of the value and of the value held near its old one; all [N]."""
    held = old_value + (value - old_value).clamp(-value_clip, value_clip)
    errors = [F.huber_loss(v, returns, reduction="none", delta=huber_delta) for v in (value, held)]
    loss = masked_mean(torch.maximum(*errors), mask)
    with torch.no_grad():
        outside = ((value - old_value).abs() > value_clip).float()
        metrics = {"actor/value_loss": loss.detach(), "actor/value_clip_ratio": masked_mean(outside, mask)}
    return loss, metrics


def loss_ratio(beta: float, sft_loss: float, rl_loss: float) -> float:
    """beta |L_SFT| / |L_RL|. Spikes where L_RL passes through zero; the gradients' norms say more."""
    return math.inf if rl_loss == 0 else beta * abs(sft_loss) / abs(rl_loss)
