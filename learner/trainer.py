"""One iteration of Stage II: fresh seeded episodes -> advantages -> updates -> the new weights to whoever rolls out.

    RolloutWorker   a copy of the policy and the environments it acts in: seeds in, samples out
    UpdateWorker    the policy, its optimiser and the demonstrations: samples in, better weights out
    Trainer         draws seeds, computes advantages over all samples, divides the work

Workers are plain classes. A `Crew` holds those of one kind, here in one process; `learner.placement` has one whose
workers are processes on several GPUs or machines, and the trainer cannot tell.

An asynchronous trainer lets the next iteration's episodes be played while an update runs:

    play i+1 (weights of update i-1)  ║  update i (samples of weights of update i-2)  ── both done: publish, go on

so that no sample is older than one update; synchronously none is older than none.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from learner.advantages import group_relative, informative_groups, normalized
from learner.exchange import Kept
from learner.flow import annealed_noise_level
from learner.load import bundle_files
from learner.rollouts import Rollouts, VectorEnv, collect
from learner.sharding import load_shards, whole_state
from learner.update import AlgoConfig, Updater, make_optimizer, plan

if TYPE_CHECKING:  # what decodes videos and reads tables is not loaded into every worker
    from learner.demo_dataset import Mixture
    from learner.film import Film

SEEDS, ROLLOUT, ORDER, UPDATE = range(4)  # purposes of random streams


def stream(*key: int) -> torch.Generator:
    """Randomness for one purpose at one time: nothing of it has to be kept to resume."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


class RolloutWorker:
    """Plays episodes. `envs` are its pipeline stages (learner.rollouts.collect)."""

    def __init__(self, policy: Any, envs: Sequence[VectorEnv], algo: AlgoConfig, seed: int, rank: int = 0):
        self.policy, self.envs, self.algo, self.seed, self.rank = policy, envs, algo, seed, rank
        self.version = 0

    def collect(self, iteration: int, attempt: int, seeds: list[int], film: "Film | None" = None) -> Rollouts | None:
        """An episode for each seed; None where there are no seeds."""
        if not seeds:
            return None
        self.policy.set_noise_level(annealed_noise_level(self.policy.config.flow, iteration))
        generator = stream(self.seed, ROLLOUT, iteration, attempt, self.rank)
        gamma, gae_lambda = self.algo.gamma, self.algo.gae_lambda
        bootstrap = self.algo.bootstrap_truncation
        rollouts = collect(self.envs, self.policy, seeds, gamma, gae_lambda, generator, self.version, film, bootstrap)
        if film:
            film.save()
        return rollouts


class UpdateWorker:
    """Trains. `group`: the ranks that make every step together; None: this worker alone."""

    def __init__(
        self, policy: Any, algo: AlgoConfig, demos: "Mixture | None", seed: int, group: Any = None, rank: int = 0
    ):
        self.policy, self.demos, self.seed, self.rank = policy, demos, seed, rank
        self.updater = Updater(policy, make_optimizer(policy, algo), algo, demos, torch.Generator(), group)

    def update(self, iteration: int, rollouts: Rollouts, batches: list[Tensor]) -> dict[str, float]:
        self.policy.set_noise_level(annealed_noise_level(self.policy.config.flow, iteration))
        self.updater.generator = stream(self.seed, UPDATE, iteration, self.rank)
        return self.updater.update(rollouts, batches)

    def bundle(self) -> dict[str, bytes]:
        """The policy's files for `bridge.checkpoint.write_bundle`."""
        return bundle_files(self.policy)

    def steps(self) -> int:
        return self.updater.steps

    def move_moments(self, device: torch.device | str) -> None:
        """The optimiser's two moments of every weight, to host memory and back; those of shards stay."""
        for moments in () if self.updater.is_sharded else self.updater.optimizer.state.values():
            moments |= {name: value.to(device) for name, value in moments.items() if name != "step"}

    def state_dict(self) -> dict[str, Any]:
        """The same whether the policy is sharded or not; then all ranks must ask together."""
        demos = self.demos.state_dict() if self.demos else None
        state = {"policy": self.policy.state_dict(), "updater": self.updater.state_dict(), "demos": demos}
        return whole_state(state) if self.updater.is_sharded else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.updater.is_sharded:
            moments = state["updater"]["optimizer"]
            load_shards(self.policy, self.updater.optimizer, state["policy"], moments)
            state = state | {"updater": state["updater"] | {"optimizer": self.updater.optimizer.state_dict()}}
        else:
            self.policy.load_state_dict(state["policy"])
        self.updater.load_state_dict(state["updater"])
        if self.demos:
            self.demos.load_state_dict(state["demos"])


class Crew(Protocol):
    """Workers of one kind. `call` runs a method on all of them at once, each with its own arguments."""

    def __len__(self) -> int: ...

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]: ...


class LocalCrew:
    """Workers in this process, one after the other."""

    def __init__(self, *workers: Any):
        self.workers = workers

    def __len__(self) -> int:
        return len(self.workers)

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(w, method)(*args) for w, args in zip(self.workers, arguments, strict=True)]


@dataclass
class Trainer:
    """One iteration at a time. Environments begin anew in each, and every random stream is named by iteration and
    purpose: weights, optimiser and counters are the whole state. (Of an asynchronous trainer the episodes in play are
    not saved: it resumes with fresh ones.)

    `publish(version)` brings the update workers' weights to the rollout workers, `deliver(parts)` each update worker
    the samples that it is about to get a part of, and `take_busy()` tells for how long a worker of each kind was at
    work, on average.
    """

    rollout_crew: Crew
    update_crew: Crew
    algo: AlgoConfig
    episodes: int
    seed: int
    publish: Callable[[int], None]
    deliver: Callable[[list[Rollouts]], None] = lambda parts: None
    take_busy: Callable[[], dict[str, float]] = dict
    asynchronous: bool = False
    iteration: int = 0
    env_steps: int = 0
    ahead: Future[tuple[Rollouts, dict[str, float]]] | None = None

    def iterate(self, film: "Film | None" = None) -> dict[str, float]:
        """Rollouts and updates; returns metrics by the names that TensorBoard shows."""
        started_s = time.monotonic()
        rollouts, metrics = self.ahead.result() if self.ahead else self.collect(self.iteration, film)
        collected_s = time.monotonic()
        env_steps, steps = rollouts.num_env_steps, self.optimizer_steps
        self.env_steps += env_steps
        if len(rollouts):
            metrics["rollout/staleness"] = float(steps - rollouts.version.min())
        work = self.divided(rollouts)
        delivered_s = time.monotonic()
        sync_s = 0.0
        if self.asynchronous:
            sync_s = self._published_s(steps)
            self.ahead = ThreadPoolExecutor(1).submit(self.collect, self.iteration + 1, film)
        began_s = time.monotonic()
        if len(rollouts):
            metrics |= self.update_crew.call("update", work)[0]
        updated_s = time.monotonic()
        if not self.asynchronous:
            sync_s = self._published_s(self.optimizer_steps)
        self.iteration += 1
        wall_s = time.monotonic() - started_s
        busy_s = {f"time/{name}_idle_share": 1 - busy / wall_s for name, busy in self.take_busy().items()}
        return (
            metrics
            | busy_s
            | {
                "time/rollout_s": collected_s - started_s,
                "time/deliver_s": delivered_s - collected_s,
                "time/update_s": updated_s - began_s,
                "time/sync_s": sync_s,
                "time/env_steps_per_s": env_steps / (wall_s if self.asynchronous else collected_s - started_s),
                "time/samples_per_s": len(rollouts) / wall_s,
            }
        )

    def collect(self, iteration: int, film: "Film | None" = None) -> tuple[Rollouts, dict[str, float]]:
        """All workers' samples with their advantages, and metrics of all episodes that were played."""
        c, rng = self.algo, np.random.default_rng([self.seed, SEEDS, iteration])
        wanted = self.episodes // c.group_size
        parts = [self._play(iteration, rng, wanted, 0, film)]
        metrics = rollout_metrics(parts[0])
        if c.algorithm == "ppo":
            rollouts = parts[0]
            advantages = normalized(rollouts.advantages, rollouts.mask)
            return replace(rollouts, advantages=advantages), metrics
        parts = [informative(parts[0], c)]
        for attempt in range(1, c.refill_rounds + 1):
            if not (missing := wanted - sum(num_groups(part) for part in parts)):
                break
            parts.append(informative(self._play(iteration, rng, missing, attempt, None), c))
        rollouts = Rollouts.concatenate(parts)
        metrics["rollout/groups_kept"] = num_groups(rollouts) / wanted
        if not len(rollouts):
            return rollouts, metrics
        scores = torch.tensor([episode.reward for episode in rollouts.episodes])
        group = torch.tensor([episode.seed for episode in rollouts.episodes])
        of_episode = group_relative(scores, group).to(rollouts.episode.device)
        return replace(rollouts, advantages=of_episode[rollouts.episode]), metrics

    def divided(self, rollouts: Rollouts) -> list[tuple[int, Rollouts, list[Tensor]]]:
        """What each update worker is asked to do: all make the same steps, each with its part of every batch. The
        samples that its part needs are there when this returns."""
        ranks, work = len(self.update_crew), []
        batches = plan(len(rollouts), self.algo, ranks, stream(self.seed, ORDER, self.iteration))
        home = torch.full((len(rollouts),), -1)
        if isinstance(rollouts.prepared, Kept):
            home = rollouts.prepared.seat
        shares = [divided(rows, home, ranks) for rows in batches]
        for rank in range(ranks if batches else 0):
            mine = [share[rank] for share in shares]
            needed = torch.cat(mine).unique()
            part = rollouts if ranks == 1 else rollouts[needed.to(rollouts.old_value.device)]
            local = mine if ranks == 1 else [torch.searchsorted(needed, rows) for rows in mine]
            work.append((self.iteration, part, local))
        self.deliver([part for _, part, _ in work])
        return work

    @property
    def optimizer_steps(self) -> int:
        return self.update_crew.call("steps", [()] * len(self.update_crew))[0]

    def bundle(self) -> dict[str, bytes]:
        """The trained policy's files for `bridge.checkpoint.write_bundle`."""
        return self.update_crew.call("bundle", [()] * len(self.update_crew))[0]

    def _published_s(self, version: int) -> float:
        began_s = time.monotonic()
        self.publish(version)
        return time.monotonic() - began_s

    def _play(
        self, iteration: int, rng: np.random.Generator, groups: int, attempt: int, film: "Film | None"
    ) -> Rollouts:
        """Episodes of new seeds, far from those that evaluation uses; whole groups to each rollout worker."""
        workers = len(self.rollout_crew)
        seeds = rng.choice(2**31 - 1_000_001, groups, replace=False) + 1_000_000
        shares = [np.repeat(share, self.algo.group_size).tolist() for share in np.array_split(seeds, workers)]
        films = [film] + [None] * (workers - 1)
        asked = [(iteration, attempt, share, f) for share, f in zip(shares, films, strict=True)]
        return Rollouts.concatenate([part for part in self.rollout_crew.call("collect", asked) if part is not None])

    def state_dict(self) -> dict[str, Any]:
        worker = self.update_crew.call("state_dict", [()] * len(self.update_crew))[0]
        return {"worker": worker, "iteration": self.iteration, "env_steps": self.env_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update_crew.call("load_state_dict", [(state["worker"],)] * len(self.update_crew))
        self.iteration, self.env_steps = state["iteration"], state["env_steps"]
        self.publish(self.optimizer_steps)


def local_trainer(
    policy: Any, envs: Sequence[VectorEnv], demos: "Mixture | None", algo: AlgoConfig, episodes: int, seed: int
) -> Trainer:
    """Everything in this process: rollouts and updates share the policy."""
    player = RolloutWorker(policy, envs, algo, seed)

    def publish(version: int) -> None:
        player.version = version

    return Trainer(LocalCrew(player), LocalCrew(UpdateWorker(policy, algo, demos, seed)), algo, episodes, seed, publish)


def divided(rows: Tensor, home: Tensor, ranks: int) -> list[Tensor]:
    """A batch's rows in equal parts (to one row), each rank's as far as possible of those that are `home` there."""
    if ranks == 1:
        return [rows]
    sizes = [len(rows[rank::ranks]) for rank in range(ranks)]
    parts = [rows[home[rows] == rank][:size] for rank, size in enumerate(sizes)]
    left = rows[~torch.isin(rows, torch.cat(parts))]
    cuts = left.split([size - len(part) for part, size in zip(parts, sizes, strict=True)])
    return [torch.cat(pair) for pair in zip(parts, cuts, strict=True)]


def informative(rollouts: Rollouts, config: AlgoConfig) -> Rollouts:
    """The samples and episodes of groups that GRPO can learn from."""
    group = torch.tensor([episode.seed for episode in rollouts.episodes])
    success = torch.tensor([episode.success for episode in rollouts.episodes])
    kept = torch.isin(group, informative_groups(success, group, config.filter_low, config.filter_high))
    kept = kept.to(rollouts.episode.device)
    picked = rollouts[kept[rollouts.episode].nonzero()[:, 0]]
    episodes = [episode for episode, keep in zip(rollouts.episodes, kept.tolist(), strict=True) if keep]
    return replace(picked, episode=(kept.cumsum(0) - 1)[picked.episode], episodes=episodes)


def num_groups(rollouts: Rollouts) -> int:
    return len({episode.seed for episode in rollouts.episodes})


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Means over samples that count and over episodes that ended."""
    mask = rollouts.mask
    returns, advantages = rollouts.returns[mask], rollouts.advantages[mask]
    error = (rollouts.returns - rollouts.old_value)[mask]
    metrics = {
        "rollout/returns_mean": returns.mean().item(),
        "rollout/advantages_mean": advantages.mean().item(),
        "rollout/explained_variance": 1 - (error.var() / returns.var().clamp(min=1e-8)).item(),
        "rollout/weights_version": rollouts.version.float().mean().item(),
        "env/num_trajectories": float(len(rollouts.episodes)),
    }
    if rollouts.episodes:
        metrics["env/success_once"] = float(np.mean([e.success for e in rollouts.episodes]))
        metrics["env/episode_len"] = float(np.mean([e.length for e in rollouts.episodes]))
        metrics["env/return"] = float(np.mean([e.reward for e in rollouts.episodes]))
    return metrics
