"""The terms of PPO and GRPO as weighted sums, so that micro-batches and ranks add up to the batch. Pure functions.

N samples (policy queries), C executed steps, d action width. `weight` is 0 for what does not count and sums to 1 over
the whole batch: all losses and metrics here are means over the batch, of which a micro-batch holds a part.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from learner.flow import aggregate

Metrics = dict[str, Tensor]


def level_log_prob(log_prob: Tensor, valid: Tensor, level: str) -> tuple[Tensor, Tensor]:
    """[N, C, d] to the level that ratios are taken at, and which entries count (bool): [N] for `chunk`, [N, C] for
    `action`, [N, C, d] for `token`. Only steps that were executed (valid bool [N, C]) had any part in what followed."""
    executed = valid[..., None].expand_as(log_prob)
    counts = {"token": executed, "action": valid, "chunk": valid.any(-1)}
    return aggregate(log_prob * executed, level), counts[level]


def per_sample(x: Tensor, like: Tensor) -> Tensor:
    """[N] shaped to broadcast over the entries of `like` [N, ...]."""
    return x.view(-1, *[1] * (like.ndim - 1))


def actor_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    weight: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate; all of one shape (advantages may broadcast). Both log-probabilities must be float32: their
    difference is small. `dual_clip` c > 1 also bounds the loss of a bad action by c |A| (Ye et al., 2020).

    approx_kl is k3, mean(r - 1 - ln r): unbiased and never negative (Schulman, 2020).
    """
    assert log_prob.dtype == old_log_prob.dtype == torch.float32
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(surrogate, -dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    with torch.no_grad():
        metrics = {
            "actor/approx_kl": ((ratio - 1 - log_ratio) * weight).sum(),
            "actor/pg_clipfrac": ((clipped > unclipped).float() * weight).sum(),
            "actor/ratio": (ratio * weight).sum(),
        }
        if dual_clip is not None:
            dual = (advantages < 0) & (torch.maximum(unclipped, clipped) > -dual_clip * advantages)
            metrics["actor/dual_clipfrac"] = (dual.float() * weight).sum()
    return (surrogate * weight).sum(), metrics


def critic_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, weight: Tensor, value_clip: float, huber_delta: float
) -> tuple[Tensor, Metrics]:
    """The worse of the Huber errors of the value and of the value held near its old one; all [N]."""
    held = old_value + (value - old_value).clamp(-value_clip, value_clip)
    errors = [F.huber_loss(v, returns, reduction="none", delta=huber_delta) for v in (value, held)]
    loss = (torch.maximum(*errors) * weight).sum()
    with torch.no_grad():
        outside = ((value - old_value).abs() > value_clip).float()
        metrics = {"actor/value_loss": loss.detach(), "actor/value_clip_ratio": (outside * weight).sum()}
    return loss, metrics


def loss_ratio(beta: float, sft_loss: float, rl_loss: float) -> float:
    """beta |L_SFT| / |L_RL|. Spikes where L_RL passes through zero; the gradients' norms say more."""
    return math.inf if rl_loss == 0 else beta * abs(sft_loss) / abs(rl_loss)
