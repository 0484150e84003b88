"""Optimiser steps of L = L_rl + beta L_sft: PPO or GRPO on twin samples, anchored by demonstrations of the robot.

    PPO   L_rl = actor + critic - entropy_bonus * entropy        GRPO   L_rl = actor - entropy_bonus * entropy

The two terms share no activations, so their gradients are made one after the other and added: the sum's gradient is the
sum of the gradients, and both are known apart at no further cost. Losses are sums with weights that add up to 1 over
the batch, so micro-batches and ranks add up to the batch exactly. With several ranks (torch.distributed) each takes a
part of every batch, gradients are summed, and all ranks make the same step, each of all weights or of its shard of them
(learner.sharding).
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.flow import LEVELS
from learner.losses import actor_loss, critic_loss, level_log_prob, loss_ratio, per_sample
from learner.policy import Policy, SftBatch
from learner.rollouts import Rollouts
from learner.sharding import is_sharded
from learner.weight_sync import whole

log = logging.getLogger(__name__)
LOSS_RATIO_LIMIT = 1e5
ALGORITHMS = ("ppo", "grpo")


@dataclass
class AlgoConfig:
    """PPO or GRPO with an SFT term. Rates suit the small policy; full-size ones need some 4e-6 (value 2e-4)."""

    algorithm: str = "ppo"  # grpo: advantages against episodes of the same start, no critic
    level: str = "chunk"  # what one probability ratio is of: chunk, action, token
    gamma: float = 0.99
    gae_lambda: float = 0.95
    bootstrap_truncation: bool = True  # ppo: an episode cut by its time limit is worth its last value; false: it failed
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    dual_clip: float | None = None  # c > 1: a bad action's loss is at most c |A|
    value_clip: float = 0.2
    huber_delta: float = 10.0
    entropy_bonus: float = 0.0
    group_size: int = 1  # episodes that share a start (grpo: at least 2)
    filter_low: float = 0.0  # grpo: groups whose success rate is outside [filter_low, filter_high] are left out
    filter_high: float = 1.0
    refill_rounds: int = 2  # grpo: times that left-out groups are replaced by fresh ones
    beta: float = 0.2  # weight of the SFT term (where its gradient's share is asked for: its first value); 0: none
    sft_per_rl: float = 0.25  # demonstrations for each RL sample of an optimiser step
    sft_gradient_share: float | None = None  # beta follows: |beta g_sft| / (|g_rl| + |beta g_sft|) is held at this
    beta_max: float = 100.0  # of a beta that follows
    lr: float = 1e-4
    value_lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 1.0
    update_epochs: int = 4
    batch_size: int = 256  # RL samples (policy queries) of an optimiser step, over all ranks
    micro_batch_size: int = 256  # of one backward pass on one rank
    critic_warmup_steps: int = 8  # ppo: optimiser steps at the start that train the value head alone
    lr_warmup_steps: int = 10  # of the policy, at rates that rise to lr: Adam's first step is as long for any gradient
    target_kl: float | None = 0.05  # an iteration's updates end where approx_kl is above; None: never
    gradient_report_every: int = 10  # optimiser steps between comparisons of the two terms' gradients; 0: never

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm {self.algorithm!r}: allowed are {', '.join(ALGORITHMS)}")
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r}: allowed are {', '.join(LEVELS)}")
        if self.beta < 0:
            raise ValueError(f"beta {self.beta}: must not be negative")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.beta and round(self.sft_per_rl * self.micro_batch_size) < 1:
            raise ValueError(
                f"sft_per_rl {self.sft_per_rl} of micro_batch_size {self.micro_batch_size} is not one demonstration: "
                f"allowed are {1 / self.micro_batch_size:.3g} and more, or beta 0"
            )
        if self.algorithm == "grpo" and self.group_size < 2:
            raise ValueError(f"group_size {self.group_size}: grpo compares at least 2 episodes of the same start")
        if min(self.critic_warmup_steps, self.lr_warmup_steps) < 0:
            raise ValueError(
                f"critic_warmup_steps {self.critic_warmup_steps}, lr_warmup_steps {self.lr_warmup_steps}: at least 0"
            )
        if self.group_size < 1:
            raise ValueError(f"group_size {self.group_size}: at least 1")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip {self.dual_clip}: must be above 1")
        if not 0 <= self.filter_low <= self.filter_high <= 1:
            raise ValueError(
                f"filter_low {self.filter_low}, filter_high {self.filter_high}: need 0 <= low <= high <= 1"
            )
        if self.sft_gradient_share is not None and not (0 < self.sft_gradient_share < 1 and self.beta > 0):
            raise ValueError(
                f"sft_gradient_share {self.sft_gradient_share} with beta {self.beta}: needs a share between 0 and 1 "
                "and a beta above 0 to begin with"
            )

    def sft_batch_size(self, ranks: int = 1) -> int:
        """Demonstrations of one micro-batch on one of so many ranks, whose part of a batch may be less than that."""
        return max(1, round(self.sft_per_rl * min(self.micro_batch_size, self.batch_size // ranks)))


def make_optimizer(policy: torch.nn.Module, config: AlgoConfig) -> torch.optim.AdamW:
    """Two groups: the policy, and its value head at `value_lr`. Frozen parameters stay out."""
    head = [p for name, p in policy.named_parameters() if "value_head" in name and p.requires_grad]
    rest = [p for name, p in policy.named_parameters() if "value_head" not in name and p.requires_grad]
    groups = [{"params": rest, "lr": config.lr}, {"params": head, "lr": config.value_lr}]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)


def plan(num_samples: int, config: AlgoConfig, ranks: int, generator: torch.Generator) -> list[Tensor]:
    """Rows of each optimiser step, all epochs in a row; a rank takes every `ranks`-th row of each. A remainder that
    would leave a rank without a row is left out."""
    orders = [torch.randperm(num_samples, generator=generator) for _ in range(config.update_epochs)]
    return [rows for order in orders for rows in order.split(config.batch_size) if len(rows) >= ranks]


@dataclass
class Updater:
    """Policy, optimiser and the counter of its steps. `demos` gives SFT batches; it is not touched while beta is 0.
    `group`: the ranks that update together; None: this process alone."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    config: AlgoConfig
    demos: Iterator[SftBatch] | None
    generator: torch.Generator
    group: Any = None
    steps: int = 0

    def __post_init__(self):
        self.beta = self.config.beta
        self.ranks = dist.get_world_size(self.group) if self.group else 1
        self.is_sharded = is_sharded(self.policy)

    def update(self, rollouts: Rollouts, batches: list[Tensor]) -> dict[str, float]:
        """One step for each of this rank's `batches` (rows of `rollouts`), until one finds that the policy is too far
        from the one that acted; returns metrics, means over the steps and what that last one saw."""
        history: list[dict[str, float]] = []
        started, stopped = self.steps, False
        for rows in batches:
            steps = self.steps
            history.append(self.step(rollouts, rows.to(rollouts.old_value.device)))
            if stopped := self.steps == steps:
                break
        counts = {"actor/stopped_early": float(stopped), "actor/optimizer_steps": float(self.steps - started)}
        return summary(history) | counts

    def step(self, rollouts: Rollouts, rows: Tensor) -> dict[str, float]:
        """One optimiser step; metrics of the whole batch. Where its KL divergence is above `target_kl`, no step. A
        non-finite loss or gradient leaves the weights as they are and raises ValueError."""
        c, micro_batches = self.config, rows.split(self.config.micro_batch_size)
        weights = self._weights(rollouts, rows)
        with_sft = c.beta > 0 and self.demos is not None and not self.is_warming_up
        self.optimizer.zero_grad(set_to_none=True)
        last = len(micro_batches) - 1
        metrics = self._reduced(
            [self._backward_rl(rollouts, micro, weights, k == last) for k, micro in enumerate(micro_batches)]
        )
        if c.target_kl is not None and metrics["actor/approx_kl"] > c.target_kl:
            return metrics
        if with_sft and self._is_report_due():
            rl_gradient = self._take_gradients()
            metrics["train/sft_loss"] = self._backward_sft(self._sft_rounds(rows), 1.0)
            metrics |= self._join_gradients(rl_gradient)
        else:
            if with_sft:
                metrics["train/sft_loss"] = self._backward_sft(self._sft_rounds(rows), self.beta)
            self._sum_gradients()
        if self.is_warming_up:  # a critic on features that train has given those gradients, too
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None
        norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters(), c.clip_grad))
        if not torch.isfinite(norm):
            raise ValueError(f"optimiser step {self.steps}: gradient norm {norm.item()}, losses {metrics}")
        self.optimizer.param_groups[0]["lr"] = c.lr * self._lr_share()
        self.optimizer.step()
        self.steps += 1
        return metrics | self._totals(metrics) | {"actor/grad_norm": norm.item()}

    @property
    def is_warming_up(self) -> bool:
        """The critic learns first: advantages from an untrained one would push the policy anywhere."""
        return self.config.algorithm == "ppo" and self.steps < self.config.critic_warmup_steps

    def _lr_share(self) -> float:
        trained = self.steps - (self.config.critic_warmup_steps if self.config.algorithm == "ppo" else 0)
        return min(1.0, max(trained + 1, 1) / max(self.config.lr_warmup_steps, 1))

    def rl_loss(
        self, rollouts: Rollouts, rows: Tensor, weights: tuple[float, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """The part of the batch's mean loss that `rows` are, with metrics. weights: of one entry at the level of the
        ratios, and of one sample."""
        c, taken = self.config, rollouts[rows].to(next(iter(self._parameters())).device)
        scores = self.policy.scores(taken.prepared, taken.chain, taken.denoise_index)
        new, counts = level_log_prob(scores.log_prob, taken.valid, c.level)
        old, _ = level_log_prob(taken.old_log_prob, taken.valid, c.level)
        weight, per_query = counts * weights[0], taken.mask * weights[1]
        advantages = per_sample(taken.advantages, new)
        loss, metrics = actor_loss(new, old, advantages, weight, c.clip_ratio_low, c.clip_ratio_high, c.dual_clip)
        entropy = (scores.entropy * per_query).sum()
        metrics |= {"actor/policy_loss": loss.detach(), "actor/entropy": entropy.detach()}
        if not self.is_warming_up:
            loss = loss - c.entropy_bonus * entropy
        if c.algorithm == "ppo":
            critic, more = critic_loss(
                scores.value, taken.old_value, taken.returns, per_query, c.value_clip, c.huber_delta
            )
            loss, metrics = critic if self.is_warming_up else loss + critic, metrics | more
        return loss, {name: value.item() for name, value in metrics.items()} | {"train/ppo_loss": loss.item()}

    def sft_loss(self) -> Tensor:
        """The next demonstrations' loss."""
        assert self.demos is not None
        return self.policy.sft_loss(next(self.demos), self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.beta = state["steps"], state["beta"]

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _backward_rl(
        self, rollouts: Rollouts, rows: Tensor, weights: tuple[float, float], is_last: bool
    ) -> dict[str, float]:
        self._expect_backward(is_last)
        loss, metrics = self.rl_loss(rollouts, rows, weights)
        loss.backward()
        return metrics

    def _sft_rounds(self, rows: Tensor) -> int:
        """Micro-batches of demonstrations in this step: as many on each rank, for all ranks' places in the data are
        saved as one, and a remainder may leave them with different numbers of samples."""
        num_rows = self._reduced([{"rows": float(len(rows))}])["rows"]
        return math.ceil(math.ceil(num_rows / self.ranks) / self.config.micro_batch_size)

    def _backward_sft(self, micro_batches: int, weight: float) -> float:
        """Adds `weight` times the gradient of the SFT loss, a mean over micro-batches and ranks; returns the loss."""
        losses = []
        for k in range(micro_batches):
            self._expect_backward(k == micro_batches - 1)
            loss = self.sft_loss() / (micro_batches * self.ranks)
            (weight * loss).backward()
            losses.append(loss.item())
        return self._reduced([{"loss": sum(losses)}])["loss"]

    def _weights(self, rollouts: Rollouts, rows: Tensor) -> tuple[float, float]:
        """One over the entries that count in the whole batch, at the level of the ratios, and over its samples."""
        valid, shape = rollouts.valid[rows], rollouts.old_log_prob[rows]
        entries = float(level_log_prob(shape, valid, self.config.level)[1].sum())
        counts = self._reduced([{"entries": entries, "samples": float(valid.any(-1).sum())}])
        return 1 / max(counts["entries"], 1.0), 1 / max(counts["samples"], 1.0)

    def _reduced(self, parts: list[dict[str, float]]) -> dict[str, float]:
        """Sums over micro-batches and ranks."""
        sums = {name: sum(part[name] for part in parts) for name in parts[0]}
        if self.group is None:
            return sums
        values = torch.tensor(list(sums.values()), dtype=torch.float64)
        dist.all_reduce(values, group=self.group)
        return dict(zip(sums, values.tolist(), strict=True))

    def _sum_gradients(self) -> None:
        """Over the ranks. A parameter that no rank has a gradient of keeps none. Those of shards are sums already."""
        if self.group is None or self.is_sharded:
            return
        parameters = self._parameters()
        present = torch.tensor([float(p.grad is not None) for p in parameters])
        dist.all_reduce(present, group=self.group)
        present_parameters = [p for p, n in zip(parameters, present.tolist(), strict=True) if n > 0]
        if not present_parameters:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in present_parameters])
        dist.all_reduce(flat, group=self.group)
        for p, part in zip(present_parameters, flat.split([p.numel() for p in present_parameters]), strict=True):
            p.grad = part.view_as(p).clone()

    def _take_gradients(self) -> list[Tensor | None]:
        """The gradients summed over the ranks; none is left behind."""
        self._sum_gradients()
        taken = [p.grad for p in self._parameters()]
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def _join_gradients(self, rl: list[Tensor | None]) -> dict[str, float]:
        """Both terms' gradients are known apart: compare them, let beta follow, and add. The comparison is over the
        policy without its value head, which the SFT term cannot reach."""
        sft = self._take_gradients()
        of_policy = len(self.optimizer.param_groups[0]["params"])
        pairs = [(a, b) for a, b in zip(rl[:of_policy], sft[:of_policy], strict=True)]
        rl_norm = total(a.square().sum() for a, _ in pairs if a is not None) ** 0.5
        sft_norm = total(b.square().sum() for _, b in pairs if b is not None) ** 0.5
        product = total((a * b).sum() for a, b in pairs if a is not None and b is not None)
        share = self.config.sft_gradient_share
        if share is not None and rl_norm > 0 and sft_norm > 0:
            wanted = share / (1 - share) * rl_norm / sft_norm
            # A single batch's norms are noisy: half the way there (in orders of magnitude), every time.
            self.beta = min((self.beta * wanted) ** 0.5, self.config.beta_max)
        for p, a, b in zip(self._parameters(), rl, sft, strict=True):
            p.grad = a if b is None else self.beta * b if a is None else a + self.beta * b
        weighted = self.beta * sft_norm
        return {
            "train/grad_norm_ppo": rl_norm,
            "train/grad_norm_sft": weighted,
            "train/grad_share_sft": weighted / max(weighted + rl_norm, 1e-12),
            "train/grad_cosine": product / max(rl_norm * sft_norm, 1e-12),
        }

    def _expect_backward(self, is_last: bool) -> None:
        """Shards are gathered for the first of a term's micro-batches and summed over the ranks after its last."""
        if self.is_sharded:
            self.policy.set_requires_gradient_sync(is_last)
            self.policy.set_reshard_after_backward(is_last)

    def _is_report_due(self) -> bool:
        """A beta that follows looks at every step."""
        every = self.config.gradient_report_every
        return self.config.sft_gradient_share is not None or (every > 0 and self.steps % every == 0)

    def _totals(self, metrics: dict[str, float]) -> dict[str, float]:
        rl_loss = metrics["train/ppo_loss"]
        if "train/sft_loss" not in metrics:
            return {"actor/total_loss": rl_loss}
        ratio = loss_ratio(self.beta, metrics["train/sft_loss"], rl_loss)
        if ratio > LOSS_RATIO_LIMIT:
            log.warning("beta |SFT| / |PPO| is %.3g: the SFT term drowns PPO; lower algo.beta", ratio)
        # TensorBoard cannot draw infinity, which only says that the PPO loss was exactly 0.
        return {
            "actor/total_loss": rl_loss + self.beta * metrics["train/sft_loss"],
            "train/loss_ratio": min(ratio, 1e9),
            "train/beta": self.beta,
        }

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def total(terms: Iterable[Tensor]) -> float:
    """The sum of numbers, of which each rank may hold its part; 0 of none."""
    terms = list(terms)
    return float(whole(sum(terms[1:], terms[0]))) if terms else 0.0


def summary(history: list[dict[str, float]]) -> dict[str, float]:
    """Means; a name that only some entries have is averaged over those."""
    names = dict.fromkeys(name for metrics in history for name in metrics)
    present = {name: [m[name] for m in history if name in m] for name in names}
    return {name: sum(values) / len(values) for name, values in present.items()}
