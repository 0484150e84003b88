"""Twin episodes under a policy, and what PPO keeps of them.

T policy queries, B environments, C executed actions of a chunk, N = T * B samples.
"""

from collections.abc import Iterator, Sequence
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
    seeds: Iterator[int],
    num_queries: int,
    gamma: float,
    gae_lambda: float,
    generator: torch.Generator,
) -> Rollouts:
    """Fresh episodes, `num_queries` chunks in every environment; where one ends, the next of `seeds` begins."""
    instruction = policy.embodiment.instructions[0]
    views = env.reset([next(seeds) for _ in range(env.num_envs)])
    samples, results, next_values = [], [], []
    episodes: list[Episode] = []
    earned = np.zeros(env.num_envs)
    prepared = policy.prepare(observation_batch(views, instruction))
    for _ in tqdm(range(num_queries), desc="rollouts", leave=False):
        sample = policy.sample(prepared, generator)
        result = env.step_chunk(sample.actions[:, : policy.num_action_chunks].cpu().numpy())
        prepared = policy.prepare(observation_batch(result.observation, instruction))
        samples.append(sample)
        results.append(result)
        # A time limit is no fact of the task, so an episode that it cut is worth what its last picture promises; a
        # terminated one is worth nothing more.
        terminated = torch.from_numpy(result.terminated.any(1)).to(sample.value.device)
        next_values.append(torch.where(terminated, 0.0, policy.value(prepared)))
        earned += (result.reward * result.valid).sum(1)
        ended = np.flatnonzero(is_over(result))
        for i in ended:
            if not result.lost[i]:
                length = int(result.episode_len[i])
                episodes.append(Episode(int(result.seeds[i]), bool(result.success[i]), length, float(earned[i])))
            earned[i] = 0.0
        if len(ended):
            begun = env.reset([next(seeds) for _ in ended], ended.tolist())
            prepared = _replaced(prepared, ended, policy.prepare(observation_batch(begun, instruction)), env.num_envs)
    return _rollouts(samples, results, torch.stack(next_values), episodes, gamma, gae_lambda)


def is_over(result: ChunkResult) -> np.ndarray:
    """bool [n]: the environment needs a reset."""
    return result.terminated.any(1) | result.truncated.any(1) | result.lost


def _replaced(prepared: Any, rows: np.ndarray, new: Any, total: int) -> Any:
    """`prepared` with `new` at `rows`."""
    source = np.arange(total)
    source[rows] = total + np.arange(len(rows))
    return type(prepared).concatenate([prepared, new])[torch.from_numpy(source)]


def _rollouts(
    samples: list[Sample],
    results: list[ChunkResult],
    next_values: Tensor,
    episodes: list[Episode],
    gamma: float,
    gae_lambda: float,
) -> Rollouts:
    values = torch.stack([sample.value for sample in samples])
    device = values.device
    valid = torch.from_numpy(np.stack([r.valid for r in results])).to(device)  # [T, B, C]
    reward = torch.from_numpy(np.stack([(r.reward * r.valid).sum(1) for r in results])).float().to(device)
    ended = torch.from_numpy(np.stack([is_over(r) for r in results])).to(device)
    advantages, returns = gae(reward, values, next_values, ended, gamma, gae_lambda)
    return Rollouts(
        prepared=type(samples[0].prepared).concatenate([sample.prepared for sample in samples]),
        chain=torch.cat([sample.chain for sample in samples]),
        denoise_index=torch.cat([sample.denoise_index for sample in samples]),
        old_log_prob=torch.cat([sample.log_prob for sample in samples]),
        old_value=values.flatten(),
        valid=valid.flatten(0, 1),
        advantages=normalized(advantages, valid.any(-1)).flatten(),
        raw_advantages=advantages.flatten(),
        returns=returns.flatten(),
        num_env_steps=int(valid.sum()),
        episodes=episodes,
    )


def observation_batch(views: Views, instruction: str) -> ObservationBatch:
    images = {name: torch.from_numpy(np.ascontiguousarray(pictures)) for name, pictures in views.images.items()}
    state = torch.from_numpy(np.ascontiguousarray(views.state, dtype=np.float32))
    return ObservationBatch(images, state, [instruction] * len(state))
