"""One iteration of learning: PPO on twin samples plus beta times the SFT loss on demonstrations of the robot.

Every micro-batch makes one combined loss and one backward pass:

    L = (L_rl + beta * L_sft) / n_acc,     L_rl = actor + critic - entropy_bonus * entropy

Micro-batches add up to their batch exactly: L_rl is divided by the samples that count in the whole batch.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.losses import actor_loss, chunk_log_prob, critic_loss, loss_ratio, masked_mean
from learner.policy import Policy, SftBatch
from learner.rollouts import Rollouts

log = logging.getLogger(__name__)
LOSS_RATIO_LIMIT = 1e5


@dataclass
class AlgoConfig:
    """PPO with an SFT term. Rates suit the small policy; full-size ones need some 4e-6 (and 2e-4 for the critic)."""

    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    value_clip: float = 0.2
    huber_delta: float = 10.0
    entropy_bonus: float = 0.0
    beta: float = 0.2  # weight of the SFT term; 0: PPO alone
    lr: float = 2e-5
    value_lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 1.0
    update_epochs: int = 2
    batch_size: int = 64  # RL samples (policy queries) of an optimiser step
    micro_batch_size: int = 64
    sft_batch_size: int = 16  # demonstrations of a micro-batch
    critic_warmup_steps: int = 4  # optimiser steps at the start that train the value head alone
    target_kl: float | None = 0.05  # end an iteration's updates when approx_kl exceeds it; None: never
    gradient_report_every: int = 10  # optimiser steps between comparisons of the two terms' gradients; 0: never

    def __post_init__(self):
        if self.beta < 0:
            raise ValueError(f"beta {self.beta}: must not be negative")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )


def make_optimizer(policy: torch.nn.Module, config: AlgoConfig) -> torch.optim.AdamW:
    """Two groups: the policy, and its value head at `value_lr`. Frozen parameters stay out."""
    head = [p for name, p in policy.named_parameters() if "value_head" in name and p.requires_grad]
    rest = [p for name, p in policy.named_parameters() if "value_head" not in name and p.requires_grad]
    groups = [{"params": rest, "lr": config.lr}, {"params": head, "lr": config.value_lr}]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)


@dataclass
class Updater:
    """Policy, optimiser and the counter of its steps. `demos` gives SFT batches; it is not touched while beta is 0."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    config: AlgoConfig
    demos: Iterator[SftBatch] | None
    generator: torch.Generator
    steps: int = 0

    def update(self, rollouts: Rollouts) -> dict[str, float]:
        """All epochs over one iteration's samples; returns metrics (means over micro-batches)."""
        c = self.config
        history: list[dict[str, float]] = []
        for _ in range(c.update_epochs):
            order = torch.randperm(len(rollouts), generator=self.generator).to(rollouts.old_value.device)
            for rows in order.split(c.batch_size):
                metrics = self.step(rollouts, rows)
                history += metrics
                kl = sum(m["actor/approx_kl"] for m in metrics) / len(metrics)
                if c.target_kl is not None and kl > c.target_kl:
                    return self._summary(history) | {"actor/stopped_early": 1.0}
        return self._summary(history) | {"actor/stopped_early": 0.0}

    def step(self, rollouts: Rollouts, rows: Tensor) -> list[dict[str, float]]:
        """One optimiser step on the samples `rows`; metrics of each micro-batch. A non-finite loss or gradient leaves
        the weights as they are and raises ValueError."""
        c = self.config
        micro_batches = rows.split(c.micro_batch_size)
        counted = rollouts.mask[rows].sum().clamp(min=1.0)
        metrics = []
        self.optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches:
            share = rollouts.mask[micro].sum() / counted * len(micro_batches)
            rl_loss, terms = self.rl_loss(rollouts, micro)
            rl_loss = rl_loss * share
            sft_loss = self.sft_loss()
            if sft_loss is not None and self._is_report_due():
                terms |= self._compare_gradients(rl_loss, sft_loss)
            total = rl_loss if sft_loss is None else rl_loss + c.beta * sft_loss
            (total / len(micro_batches)).backward()
            terms |= {"train/ppo_loss": rl_loss.item(), "actor/total_loss": total.item()}
            if sft_loss is not None:
                terms |= self._sft_metrics(sft_loss.item(), rl_loss.item())
            metrics.append(terms)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), c.clip_grad)
        if not torch.isfinite(norm):
            raise ValueError(f"optimiser step {self.steps}: gradient norm {norm.item()}, losses {metrics}")
        self.optimizer.step()
        self.steps += 1
        return [m | {"actor/grad_norm": norm.item()} for m in metrics]

    @property
    def is_warming_up(self) -> bool:
        """The critic learns first: advantages from an untrained one would push the policy anywhere."""
        return self.steps < self.config.critic_warmup_steps

    def rl_loss(self, rollouts: Rollouts, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean over the samples of `rows` that count, with metrics."""
        c, mask = self.config, rollouts.mask[rows]
        scores = self.policy.scores(rollouts.prepared[rows], rollouts.chain[rows], rollouts.denoise_index[rows])
        valid = rollouts.valid[rows]
        new, old = (chunk_log_prob(p, valid) for p in (scores.log_prob, rollouts.old_log_prob[rows]))
        actor, metrics = actor_loss(new, old, rollouts.advantages[rows], mask, c.clip_ratio_low, c.clip_ratio_high)
        critic, more = critic_loss(
            scores.value, rollouts.old_value[rows], rollouts.returns[rows], mask, c.value_clip, c.huber_delta
        )
        entropy = masked_mean(scores.entropy, mask)
        metrics |= more | {"actor/policy_loss": actor.detach(), "actor/entropy": entropy.detach()}
        loss = critic if self.is_warming_up else actor + critic - c.entropy_bonus * entropy
        return loss, {name: value.item() for name, value in metrics.items()}

    def sft_loss(self) -> Tensor | None:
        """The next demonstrations' loss; None where it has no part."""
        if self.config.beta == 0 or self.demos is None or self.is_warming_up:
            return None
        return self.policy.sft_loss(next(self.demos), self.generator)

    def _sft_metrics(self, sft_loss: float, rl_loss: float) -> dict[str, float]:
        ratio = loss_ratio(self.config.beta, sft_loss, rl_loss)
        if ratio > LOSS_RATIO_LIMIT:
            log.warning("beta |SFT| / |PPO| is %.3g: the SFT term drowns PPO; lower algo.beta", ratio)
        # TensorBoard cannot draw infinity, which only says that the PPO loss was exactly 0.
        return {"train/sft_loss": sft_loss, "train/loss_ratio": min(ratio, 1e9)}

    def _is_report_due(self) -> bool:
        every = self.config.gradient_report_every
        return every > 0 and self.steps % every == 0

    def _compare_gradients(self, rl_loss: Tensor, sft_loss: Tensor) -> dict[str, float]:
        """Norms of both terms' gradients (beta included) and the cosine between them."""
        parameters = self._parameters()
        flat = []
        for loss in (rl_loss, self.config.beta * sft_loss):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            present = (torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True))
            flat.append(torch.cat([g.flatten() for g in present]))
        norms = [g.norm().item() for g in flat]
        cosine = (flat[0] @ flat[1]).item() / max(math.prod(norms), 1e-12)
        return {"train/grad_norm_ppo": norms[0], "train/grad_norm_sft": norms[1], "train/grad_cosine": cosine}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @staticmethod
    def _summary(history: list[dict[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for metrics in history for name in metrics)
        present = {name: [m[name] for m in history if name in m] for name in names}
        return {name: sum(values) / len(values) for name, values in present.items()}
