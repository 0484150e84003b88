"""Environments in processes of their own, and several such processes as one `VectorEnv`."""

import logging
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from learner.remote import Answer, Handle, WorkerDied
from learner.rollouts import ChunkResult, VectorEnv, Views

log = logging.getLogger(__name__)
RESULT_FIELDS = ("reward", "terminated", "truncated", "valid", "success", "episode_len", "seeds", "lost")


class EnvProcess:
    """Environments, and the seconds that each answer took."""

    def __init__(self, make_env: Callable[[int, int], VectorEnv], num_envs: int, seed: int):
        self.env = make_env(num_envs, seed)

    def reset(self, seeds: list[int], env_ids: list[int]) -> Any:
        began_s = time.perf_counter()
        views = self.env.reset(seeds, env_ids)
        return copied(views), time.perf_counter() - began_s

    def step_chunk(self, actions: np.ndarray, env_ids: list[int]) -> Any:
        began_s = time.perf_counter()
        result = self.env.step_chunk(actions, env_ids)
        fields = {name: getattr(result, name) for name in RESULT_FIELDS}
        return copied(result.observation), fields, time.perf_counter() - began_s

    def close(self) -> None:
        self.env.close()


def copied(views: Views) -> SimpleNamespace:
    """A copy: pictures may be a worker's own memory."""
    images = {name: np.array(pictures) for name, pictures in views.images.items()}
    return SimpleNamespace(images=images, state=views.state, instruction=views.instruction)


class RemoteEnvs:
    """A process that dies is replaced, its episodes are lost; if it died while some began, all are reported lost
    at the next chunk. `busy_s`: seconds of work of all processes together; `waited_s`: seconds that the caller spent
    waiting for them."""

    def __init__(self, starts: Sequence[Callable[[], Handle]], envs_each: int):
        self.starts, self.envs_each = starts, envs_each
        self.num_envs = envs_each * len(starts)
        self.handles = [start() for start in starts]
        self.shown: Views | None = None  # by the first process at its last reset
        self.sent: list[tuple[int, list[int], Answer | None]] = []
        self.untold: set[int] = set()  # new processes, whose owner was not told yet that its episodes are lost
        self.num_actions = 0
        self.busy_s = self.waited_s = 0.0

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int] | None = None) -> Views:
        began_s = time.perf_counter()
        seed_of = dict(zip(self._ids(env_ids), seeds, strict=True))
        asked = []
        for process, local in self._split(self._ids(env_ids)):
            mine = [int(seed_of[process * self.envs_each + env]) for env in local]
            asked.append((process, mine, local, self.handles[process].call("reset", mine, local)))
        answers = []
        for process, mine, local, answer in asked:
            try:
                answers.append(answer.get())
            except WorkerDied as death:
                self._replace(process, death)
                if len(local) < self.envs_each:
                    self.untold.add(process)
                answers.append(self.handles[process].call("reset", mine, local).get())
        self.shown = answers[0][0]
        self.busy_s += sum(worked_s for _, worked_s in answers)
        self.waited_s += time.perf_counter() - began_s
        return _joined([views for views, _ in answers])

    def step_chunk(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> ChunkResult:
        self.send(actions, env_ids)
        return self.recv()

    def send(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> None:
        ids = self._ids(env_ids)
        action_of = dict(zip(ids, actions, strict=True))
        self.num_actions = actions.shape[1]
        for process, local in self._split(ids):
            mine = np.stack([action_of[process * self.envs_each + env] for env in local])
            told = process not in self.untold
            self.sent.append((process, local, self.handles[process].call("step_chunk", mine, local) if told else None))

    def recv(self) -> ChunkResult:
        began_s = time.perf_counter()
        parts, results = [], []
        for process, local, answer in self.sent:
            try:
                views, result, worked_s = answer.get() if answer else self._lost(len(local))
            except WorkerDied as death:
                self._replace(process, death)
                views, result, worked_s = self._lost(len(local))
            self.busy_s += worked_s
            parts.append(views)
            results.append(result)
            self.untold.discard(process)
        self.sent = []
        joined = {name: np.concatenate([result[name] for result in results]) for name in RESULT_FIELDS}
        self.waited_s += time.perf_counter() - began_s
        return SimpleNamespace(observation=_joined(parts), **joined)

    def close(self) -> None:
        for handle in self.handles:
            handle.kill()

    def _replace(self, process: int, death: WorkerDied) -> None:
        log.warning("%s; another takes its place, and its episodes begin again", death)
        self.handles[process] = self.starts[process]()

    def _ids(self, env_ids: Sequence[int] | None) -> list[int]:
        return list(range(self.num_envs)) if env_ids is None else list(env_ids)

    def _split(self, ids: list[int]) -> list[tuple[int, list[int]]]:
        """Process and its own numbers of the environments."""
        of = [(process, [i % self.envs_each for i in ids if i // self.envs_each == process])
              for process in range(len(self.handles))]  # fmt: skip
        return [(process, local) for process, local in of if local]

    def _lost(self, count: int) -> tuple[Views, dict[str, np.ndarray], float]:
        """What is answered for a process that is gone."""
        assert self.shown is not None
        images = {name: np.zeros_like(pictures[:1]).repeat(count, 0) for name, pictures in self.shown.images.items()}
        state, words = np.zeros_like(self.shown.state[:1]).repeat(count, 0), self.shown.instruction[:1] * count
        flags = {name: np.zeros((count, self.num_actions), bool) for name in ("terminated", "truncated", "valid")}
        numbers = {name: np.zeros(count, np.int64) for name in ("episode_len", "seeds")}
        reward = np.zeros((count, self.num_actions), np.float32)
        result = flags | numbers | {"reward": reward, "success": np.zeros(count, bool), "lost": np.ones(count, bool)}
        return SimpleNamespace(images=images, state=state, instruction=words), result, 0.0


def _joined(parts: list[Views]) -> Views:
    images = {name: np.concatenate([part.images[name] for part in parts]) for name in parts[0].images}
    words = [text for part in parts for text in part.instruction]
    return SimpleNamespace(images=images, state=np.concatenate([part.state for part in parts]), instruction=words)
