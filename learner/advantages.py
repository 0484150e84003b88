"""Advantages: generalised estimation over chunks (one policy query is one time step), and group-relative ones.

T queries, B environments, N samples, E episodes. Sources: Schulman et al., High-Dimensional Continuous Control Using
GAE, 2015; Shao et al., DeepSeekMath (GRPO), 2024.
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


def group_relative(scores: Tensor, group: Tensor) -> Tensor:
    """GRPO: how much better than its group each episode was, in the group's (unbiased) standard deviations.

    scores float32 [E]; group int64 [E], any labels. A group whose scores are equal says nothing: 0.
    """
    advantages = torch.zeros_like(scores)
    for label in group.unique():
        mine = group == label
        if mine.sum() > 1:
            advantages[mine] = (scores[mine] - scores[mine].mean()) / (scores[mine].std() + 1e-6)
    return advantages


def informative_groups(success: Tensor, group: Tensor, low: float, high: float) -> Tensor:
    """Labels of the groups whose mean success is within [low, high]: the others have (almost) nothing to compare."""
    labels = group.unique()
    rates = torch.stack([success[group == label].float().mean() for label in labels])
    return labels[(rates >= low) & (rates <= high)]
