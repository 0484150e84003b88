"""Twin episodes under a policy, and what PPO keeps of them.

B environments, C executed actions of a chunk, N samples (policy queries).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from learner.advantages import gae, normalized
from learner.policy import ObservationBatch, Policy, Sample


class Views(Protocol):
    """What n environments show: images uint8 [n, H, W, 3] for each camera, state float32 [n, 7]."""

    images: dict[str, np.ndarray]
    state: np.ndarray


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
    all), in ascending order."""

    num_envs: int

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int] | None = None) -> Views: ...

    def step_chunk(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> ChunkResult: ...

    def close(self) -> None: ...


@dataclass
class Episode:
    seed: int
    success: bool
    length: int
    reward: float


@dataclass
class Rollouts:
    """N samples with everything an update needs, on the policy's device; `episodes` are those that ended."""

    prepared: Any
    chain: Tensor  # [N, K+1, H, D]
    denoise_index: Tensor  # [N, K]
    old_log_prob: Tensor  # [N, C, d]
    old_value: Tensor  # [N]
    valid: Tensor  # bool [N, C]
    advantages: Tensor  # [N], normalised
    raw_advantages: Tensor  # [N]
    returns: Tensor  # [N]
    num_env_steps: int
    episodes: list[Episode] = field(default_factory=list)

    @property
    def mask(self) -> Tensor:
        """float32 [N]: 1 where any step of the chunk was executed."""
        return self.valid.any(-1).float()

    def __len__(self) -> int:
        return len(self.old_value)


def collect(
    env: VectorEnv,
    policy: Policy,
    seeds: Sequence[int],
    gamma: float,
    gae_lambda: float,
    generator: torch.Generator,
) -> Rollouts:
    """One whole episode for each seed, `env.num_envs` at a time; an environment takes the next seed when it ends and
    rests when none is left. Whole episodes, because those that fit a fixed number of queries are the short ones, and
    short ones are the successes."""
    instruction = policy.embodiment.instructions[0]
    left = list(seeds)[::-1]
    active = list(range(min(env.num_envs, len(left))))
    prepared = policy.prepare(observation_batch(env.reset([left.pop() for _ in active], active), instruction))
    steps: list[_Query] = []
    episodes: list[Episode] = []
    earned = np.zeros(env.num_envs)
    with tqdm(total=len(seeds), desc="rollouts", unit="episode", leave=False) as bar:
        while active:
            sample = policy.sample(prepared, generator)
            result = env.step_chunk(sample.actions[:, : policy.num_action_chunks].cpu().numpy(), active)
            prepared = policy.prepare(observation_batch(result.observation, instruction))
            steps.append(_Query(active, sample, result, policy.value(prepared)))
            earned[active] += (result.reward * result.valid).sum(1)
            over = is_over(result)
            for row in np.flatnonzero(over):
                if not result.lost[row]:
                    seed, length = int(result.seeds[row]), int(result.episode_len[row])
                    episodes.append(Episode(seed, bool(result.success[row]), length, float(earned[active[row]])))
                earned[active[row]] = 0.0
                bar.update()
            freed = [active[row] for row in np.flatnonzero(over)]
            going_on = np.flatnonzero(~over)
            begun = freed[: len(left)]
            kept = [active[row] for row in going_on]
            parts = [prepared[torch.from_numpy(going_on)]] if len(going_on) else []
            if begun:
                views = env.reset([left.pop() for _ in begun], begun)
                parts.append(policy.prepare(observation_batch(views, instruction)))
            if parts:
                order = np.argsort([*kept, *begun])  # environments answer in ascending order
                prepared = type(prepared).concatenate(parts)[torch.from_numpy(order)]
            active = sorted([*kept, *begun])
    return _rollouts(steps, env.num_envs, episodes, gamma, gae_lambda)


@dataclass(frozen=True)
class _Query:
    """One policy query of the environments `active`, what it led to, and the critic's word on what followed."""

    active: list[int]
    sample: Sample
    result: ChunkResult
    next_value: Tensor


def is_over(result: ChunkResult) -> np.ndarray:
    """bool [n]: the environment needs a reset."""
    return result.terminated.any(1) | result.truncated.any(1) | result.lost


def _rollouts(steps: list[_Query], num_envs: int, episodes: list[Episode], gamma: float, gae_lambda: float) -> Rollouts:
    """GAE along each environment's queries; those of a resting environment have no sample."""
    device = steps[0].next_value.device
    shape = (len(steps), num_envs)
    reward, value, next_value = (torch.zeros(shape, device=device) for _ in range(3))
    ended, taken = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    for t, step in enumerate(steps):
        row, result = step.active, step.result
        earned = torch.from_numpy((result.reward * result.valid).sum(1)).float().to(device)
        # A time limit is no fact of the task, so an episode that it cut is worth what its last picture promises; a
        # terminated one is worth nothing more.
        terminated = torch.from_numpy(result.terminated.any(1)).to(device)
        reward[t, row], value[t, row], taken[t, row] = earned, step.sample.value, True
        next_value[t, row] = torch.where(terminated, 0.0, step.next_value)
        ended[t, row] = torch.from_numpy(is_over(result)).to(device)
    advantages, returns = gae(reward, value, next_value, ended, gamma, gae_lambda)
    valid = torch.cat([torch.from_numpy(step.result.valid) for step in steps]).to(device)
    samples = [step.sample for step in steps]
    return Rollouts(
        prepared=type(samples[0].prepared).concatenate([sample.prepared for sample in samples]),
        chain=torch.cat([sample.chain for sample in samples]),
        denoise_index=torch.cat([sample.denoise_index for sample in samples]),
        old_log_prob=torch.cat([sample.log_prob for sample in samples]),
        old_value=value[taken],
        valid=valid,
        advantages=normalized(advantages[taken], valid.any(-1)),
        raw_advantages=advantages[taken],
        returns=returns[taken],
        num_env_steps=int(valid.sum()),
        episodes=episodes,
    )


def observation_batch(views: Views, instruction: str) -> ObservationBatch:
    images = {name: torch.from_numpy(np.ascontiguousarray(pictures)) for name, pictures in views.images.items()}
    state = torch.from_numpy(np.ascontiguousarray(views.state, dtype=np.float32))
    return ObservationBatch(images, state, [instruction] * len(state))
