"""Twin episodes under a policy, and what an update keeps of them.

B environments, C executed actions of a chunk, N samples (policy queries).
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from learner.advantages import gae
from learner.policy import ObservationBatch, Policy, Sample


class Views(Protocol):
    """What n environments show: images uint8 [n, H, W, 3] for each camera, state float32 [n, 7], instruction [n]."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: list[str]


class ChunkResult(Protocol):
    """What n environments did with a chunk; nobody has begun a new episode. reward, terminated, truncated, valid
    [n, C] (valid: the step was executed); success, episode_len, seeds, lost [n] (lost: a worker died, do not use)."""

    observation: Views
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    success: np.ndarray
    episode_len: np.ndarray
    seeds: np.ndarray
    lost: np.ndarray


class VectorEnv(Protocol):
    """sim.twin.vector_env.TwinVectorEnv with auto_reset=False, or a toy. Answers hold the rows of `env_ids` (None:
    all), in ascending order. `send` and `recv` are the halves of `step_chunk`: the environments are at work between."""

    num_envs: int

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int] | None = None) -> Views: ...

    def step_chunk(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> ChunkResult: ...

    def send(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> None: ...

    def recv(self) -> ChunkResult: ...

    def close(self) -> None: ...


Watch = Callable[[Views, int, int, float], None]
"""Shown environment 0's first episode: what all show, its row, its policy queries so far, its reward so far."""


@dataclass
class Episode:
    seed: int
    success: bool
    length: int
    reward: float


@dataclass
class Rollouts:
    """N samples with everything an update needs; `episodes` are those that ended, and all samples are theirs."""

    prepared: Any
    chain: Tensor  # [N, K+1, H, D]
    denoise_index: Tensor  # [N, K]
    old_log_prob: Tensor  # [N, C, d]
    old_value: Tensor  # [N]
    valid: Tensor  # bool [N, C]
    advantages: Tensor  # [N], as collected: unnormalised, for `learner.trainer` to normalise over all workers
    returns: Tensor  # [N]
    episode: Tensor  # int64 [N], position in `episodes`
    version: Tensor  # int64 [N], optimiser steps that the weights which chose the actions had seen
    episodes: list[Episode] = field(default_factory=list)

    @property
    def mask(self) -> Tensor:
        """bool [N]: any step of the chunk was executed."""
        return self.valid.any(-1)

    @property
    def num_env_steps(self) -> int:
        return int(self.valid.sum())

    def __len__(self) -> int:
        return len(self.old_value)

    def __getitem__(self, rows: Tensor) -> "Rollouts":
        """Some samples, with the list of all episodes."""
        picked = {name: getattr(self, name)[rows] for name in SAMPLE_FIELDS}
        return Rollouts(**picked, episodes=self.episodes)

    def to(self, device: torch.device | str) -> "Rollouts":
        return moved(self, device)

    @classmethod
    def concatenate(cls, parts: list["Rollouts"]) -> "Rollouts":
        if len(parts) == 1:
            return parts[0]
        counts = np.cumsum([0] + [len(part.episodes) for part in parts])
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in SAMPLE_FIELDS[1:]}
        joined["episode"] = torch.cat([part.episode + int(n) for part, n in zip(parts, counts[:-1], strict=True)])
        prepared = type(parts[0].prepared).concatenate([part.prepared for part in parts])
        return cls(prepared, **joined, episodes=[episode for part in parts for episode in part.episodes])


SAMPLE_FIELDS = tuple(f.name for f in fields(Rollouts) if f.name != "episodes")


def moved(value: Any, device: torch.device | str) -> Any:
    """Tensors of dataclasses and dicts, however deep, on `device`; everything else as it is."""
    return mapped(value, lambda tensor: tensor.to(device))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Dataclasses and dicts, however deep, with `change` of their tensors, in the order of their fields."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: mapped(getattr(value, f.name), change) for f in fields(value)})
    return value


def collect(
    envs: Sequence[VectorEnv],
    policy: Policy,
    seeds: Sequence[int],
    gamma: float,
    gae_lambda: float,
    generator: torch.Generator,
    version: int = 0,
    watch: Watch | None = None,
    bootstrap_truncation: bool = True,
) -> Rollouts:
    """One whole episode for each seed; an environment takes the next seed when its episode ends and rests when none is
    left. Whole episodes, because those that fit a fixed number of queries are the short ones, and short ones are the
    successes.

    `envs` are pipeline stages: while the policy thinks for one, the others are at work. Each has its own share of the
    seeds, so what happens does not depend on who is faster.
    """
    shares = [share.tolist() for share in np.array_split(np.asarray(seeds, np.int64), len(envs))]
    with tqdm(total=len(seeds), desc="rollouts", unit="episode", leave=False) as bar:
        stages = {
            k: _play(env, policy, share, generator, bar, watch if k == 0 else None)
            for k, (env, share) in enumerate(zip(envs, shares, strict=True))
            if share
        }
        played: dict[int, tuple[list[_Query], list[Episode]]] = {}
        while stages:
            for k, stage in list(stages.items()):
                try:
                    next(stage)
                except StopIteration as end:
                    played[k] = end.value
                    del stages[k]
    counting = gamma, gae_lambda, bootstrap_truncation
    parts = [_rollouts(*played[k], envs[k].num_envs, *counting, version) for k in sorted(played)]
    return Rollouts.concatenate(parts)


@dataclass(frozen=True)
class _Query:
    """One policy query of the environments `active`, what it led to, and the critic's word on what followed. `episode`
    [n]: which of the stage's episodes each row is of."""

    active: list[int]
    episode: list[int]
    sample: Sample
    result: ChunkResult
    next_value: Tensor


def is_over(result: ChunkResult) -> np.ndarray:
    """bool [n]: the environment needs a reset."""
    return result.terminated.any(1) | result.truncated.any(1) | result.lost


def _play(
    env: VectorEnv, policy: Policy, seeds: list[int], generator: torch.Generator, bar: tqdm, watch: Watch | None
) -> Generator[None, None, tuple[list[_Query], list[Episode]]]:
    """One stage's episodes; yields while the environments are at work. An episode whose worker died begins again."""
    left = list(enumerate(seeds))[::-1]
    active = list(range(min(env.num_envs, len(left))))
    at = {i: left.pop() for i in active}  # environment -> (episode, seed)
    views = env.reset([at[i][1] for i in active], active)
    prepared = policy.prepare(observation_batch(views))
    steps: list[_Query] = []
    episodes: dict[int, Episode] = {}
    earned = np.zeros(env.num_envs)
    while active:
        if watch and active[0] == 0 and at[0][0] == 0:
            watch(views, 0, len(steps), earned[0])
        sample = policy.sample(prepared, generator)
        env.send(sample.actions[:, : policy.num_action_chunks].cpu().numpy(), active)
        yield
        result = env.recv()
        views = result.observation
        prepared = policy.prepare(observation_batch(views))
        steps.append(_Query(active, [at[i][0] for i in active], sample, result, policy.value(prepared)))
        earned[active] += (result.reward * result.valid).sum(1)
        over = is_over(result)
        for row in np.flatnonzero(over):
            (number, seed), total = at[active[row]], float(earned[active[row]])
            if result.lost[row]:
                # Under a new number: what was seen of the lost episode counts for nothing.
                left.append((len(seeds) + len(steps) * env.num_envs + active[row], seed))
            else:
                episodes[number] = Episode(seed, bool(result.success[row]), int(result.episode_len[row]), total)
                bar.update()
            earned[active[row]] = 0.0
        freed, going_on = [active[row] for row in np.flatnonzero(over)], np.flatnonzero(~over)
        begun, kept = freed[: len(left)], [active[row] for row in going_on]
        parts = [prepared[torch.from_numpy(going_on)]] if len(going_on) else []
        if begun:
            at |= {i: left.pop() for i in begun}
            parts.append(policy.prepare(observation_batch(env.reset([at[i][1] for i in begun], begun))))
        if parts:
            order = np.argsort([*kept, *begun])  # environments answer in ascending order
            prepared = type(prepared).concatenate(parts)[torch.from_numpy(order)]
        active = sorted([*kept, *begun])
    numbers = {number: position for position, number in enumerate(episodes)}
    steps = [replace(step, episode=[numbers.get(number, -1) for number in step.episode]) for step in steps]
    return steps, list(episodes.values())


def _rollouts(
    steps: list[_Query],
    episodes: list[Episode],
    num_envs: int,
    gamma: float,
    gae_lambda: float,
    bootstrap_truncation: bool,
    version: int,
) -> Rollouts:
    """GAE along each environment's queries; those of a resting environment and of lost episodes have no sample."""
    device = steps[0].next_value.device
    shape = (len(steps), num_envs)
    reward, value, next_value = (torch.zeros(shape, device=device) for _ in range(3))
    ended, taken = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    for t, step in enumerate(steps):
        row, result = step.active, step.result
        earned = torch.from_numpy((result.reward * result.valid).sum(1)).float().to(device)
        # A terminated episode is worth nothing more. One that a time limit cut is worth what its last picture promises,
        # unless the limit belongs to the task: then it has failed.
        final = result.terminated.any(1) if bootstrap_truncation else is_over(result)
        terminated = torch.from_numpy(final).to(device)
        reward[t, row], value[t, row], taken[t, row] = earned, step.sample.value, True
        next_value[t, row] = torch.where(terminated, 0.0, step.next_value)
        ended[t, row] = torch.from_numpy(is_over(result)).to(device)
    advantages, returns = gae(reward, value, next_value, ended, gamma, gae_lambda)
    samples = [step.sample for step in steps]
    rollouts = Rollouts(
        prepared=type(samples[0].prepared).concatenate([sample.prepared for sample in samples]),
        chain=torch.cat([sample.chain for sample in samples]),
        denoise_index=torch.cat([sample.denoise_index for sample in samples]),
        old_log_prob=torch.cat([sample.log_prob for sample in samples]),
        old_value=value[taken],
        valid=torch.cat([torch.from_numpy(step.result.valid) for step in steps]).to(device),
        advantages=advantages[taken],
        returns=returns[taken],
        episode=torch.tensor([number for step in steps for number in step.episode], device=device),
        version=torch.full((int(taken.sum()),), version, device=device),
        episodes=episodes,
    )
    whole = rollouts.episode >= 0
    return rollouts if whole.all() else rollouts[whole.nonzero()[:, 0]]


def observation_batch(views: Views) -> ObservationBatch:
    images = {name: torch.from_numpy(np.ascontiguousarray(pictures)) for name, pictures in views.images.items()}
    state = torch.from_numpy(np.ascontiguousarray(views.state, dtype=np.float32))
    return ObservationBatch(images, state, views.instruction)
