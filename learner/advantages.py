"""Generalised advantage estimation over chunks: one policy query is one time step.

T queries, B environments. Source: Schulman et al., High-Dimensional Continuous Control Using GAE, 2015.
"""

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, ended: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, float32 [T, B].

    rewards, values [T, B]; next_values [T, B]: value of what followed each query, which is 0 after a termination and
    V(final observation) after a truncation; ended bool [T, B]: an episode ended during the query, so that nothing of
    the next one flows back past it.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        error = rewards[t] + gamma * next_values[t] - values[t]
        following = error + gamma * lam * (~ended[t]).float() * following
        advantages[t] = following
    return advantages, advantages + values


def normalized(advantages: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) standard deviation over all entries that count; 0 elsewhere."""
    counted = advantages[mask]
    if len(counted) < 2:
        return torch.zeros_like(advantages)
    return torch.where(mask, (advantages - counted.mean()) / (counted.std() + 1e-5), 0.0)
