"""Many twins in a few processes, stepped by action chunks.

Physics runs a whole chunk without a picture; each camera is drawn once, at the chunk's end, which is when a policy
looks. Pictures come back through shared memory.

    env = TwinVectorEnv(config, embodiment, num_envs=8, num_workers=2, seed=0)
    observation = env.reset(seeds=range(8))
    result = env.step_chunk(actions)              # float32 [8, C, 7]

Each environment draws the seeds of its next episodes from its own stream, so what an environment sees does not depend
on how many workers share the work.
"""

import contextlib
import logging
import multiprocessing as mp
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from bridge.embodiment import Embodiment
from bridge.pose import ACTION_DIM, STATE_DIM
from sim.twin.config import TwinConfig

log = logging.getLogger(__name__)

START_LIMIT_S = 300.0


@dataclass
class TwinObservation:
    """images: uint8 [n, H, W, 3] for each camera; state: float32 [n, 7]."""

    images: dict[str, np.ndarray]
    state: np.ndarray


@dataclass
class ChunkResult:
    """What n environments did with one chunk of C actions each.

    reward float32 [n, C], terminated, truncated, valid bool [n, C]: an episode that ends inside the chunk leaves the
    rest of its actions unexecuted (`valid` False, no reward). success bool [n], episode_len int [n] and seeds int [n]
    are of the episode that the chunk belonged to, up to its last step. observation: after the chunk, of the next
    episode where one ended. final_observation: the last of the episode that the chunk belonged to (the same as
    `observation` where none ended). lost bool [n]: its worker died, nothing here is to be used.
    """

    observation: TwinObservation
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    success: np.ndarray
    episode_len: np.ndarray
    final_observation: TwinObservation
    seeds: np.ndarray
    lost: np.ndarray


@dataclass(frozen=True)
class _Setup:
    """What a worker needs to build its environments and to find its place in the shared pictures."""

    config: TwinConfig
    embodiment: Embodiment
    env_ids: tuple[int, ...]
    seed: int
    auto_reset: bool
    render: bool
    memory: dict[str, str]  # camera -> name of the shared memory, [2, num_envs, H, W, 3]: current and final
    num_envs: int


class Twin:
    """One environment: an episode at a time, in this process. The vectorised environment is many of these."""

    def __init__(self, config: TwinConfig, embodiment: Embodiment, stream: Sequence[int] = (0, 0), render: bool = True):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        import gymnasium as gym

        import sim.twin.put_cube  # noqa: F401  registers the task

        self.config, self.embodiment, self.render = config, embodiment, render
        arguments: dict[str, Any] = {
            "num_envs": 1,
            "sim_backend": "physx_cpu",
            "twin": config,
            "embodiment": embodiment,
        }
        arguments |= {"obs_mode": "rgb" if render else "state", "render_backend": "cpu" if render else "none"}
        self.env = gym.make(config.task, **arguments).unwrapped
        self._seeds = np.random.default_rng(list(stream))
        self.seed, self.steps, self.ended = -1, 0, True
        self.facts: Any = None

    def reset(self, seed: int | None = None) -> None:
        """Begin the episode of `seed`, or of the next seed of this environment's stream."""
        self.seed = int(self._seeds.integers(2**31)) if seed is None else int(seed)
        self.env._clear_sim_state()
        self.env.reset(seed=self.seed)
        self.facts, self.steps, self.ended = self.env.facts(), 0, False

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Reward, terminated, truncated of one policy step."""
        assert not self.ended, "step after the end of an episode"
        self.facts = self.env.policy_step(np.asarray(action, dtype=np.float64))
        self.steps += 1
        reward = self.env.dense_reward(self.facts) if self.config.reward == "dense" else float(self.facts.success)
        truncated = not self.facts.success and self.steps >= self.config.max_steps
        self.ended = self.facts.success or truncated
        return reward, self.facts.success, truncated

    def step_chunk(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        """Run actions [C, 7] until they or the episode end. Arrays [C], see ChunkResult."""
        num = len(actions)
        out = {"reward": np.zeros(num, np.float32)}
        out |= {key: np.zeros(num, bool) for key in ("terminated", "truncated", "valid")}
        for index, action in enumerate(actions):
            if self.ended:
                break
            out["valid"][index] = True
            out["reward"][index], out["terminated"][index], out["truncated"][index] = self.step(action)
        return out

    def pictures(self) -> dict[str, np.ndarray]:
        return self.env.pictures() if self.render else {}

    @property
    def state(self) -> np.ndarray:
        return self.env.state(self.facts)


class TwinVectorEnv:
    """num_workers=0 runs everything in this process. Raises ValueError for counts that do not fit."""

    def __init__(
        self,
        config: TwinConfig,
        embodiment: Embodiment,
        num_envs: int,
        num_workers: int,
        seed: int = 0,
        *,
        auto_reset: bool = True,
        render: bool = True,
    ):
        if num_envs < 1 or not 0 <= num_workers <= num_envs:
            raise ValueError(f"num_envs {num_envs}, num_workers {num_workers}: need 1 <= num_envs, workers <= envs")
        self.config, self.embodiment, self.num_envs = config, embodiment, num_envs
        self.instruction = embodiment.instructions[0] if embodiment.instructions else ""
        cameras = sorted(embodiment.cameras) if render else []
        shape = (2, num_envs, config.picture_height, config.picture_width, 3)
        self._memory = {name: SharedMemory(create=True, size=int(np.prod(shape))) for name in cameras}
        self._pictures = {name: np.ndarray(shape, np.uint8, memory.buf) for name, memory in self._memory.items()}
        shares = np.array_split(np.arange(num_envs), max(num_workers, 1))
        names = {name: memory.name for name, memory in self._memory.items()}
        self._setups = [
            _Setup(config, embodiment, tuple(map(int, ids)), seed, auto_reset, render, names, num_envs)
            for ids in shares
        ]
        self._worker_of = {env: worker for worker, setup in enumerate(self._setups) for env in setup.env_ids}
        self._sent: list[tuple[int, list[int]]] = []
        self._chunk = 1  # actions of the chunk under way
        self._local = _Worker(self._setups[0]) if num_workers == 0 else None
        self._processes: list[Any] = [None] * len(self._setups)
        self._pipes: list[Connection | None] = [None] * len(self._setups)
        if num_workers:
            for worker in range(num_workers):
                self._start(worker)

    def reset(self, seeds: Sequence[int] | None = None, env_ids: Sequence[int] | None = None) -> TwinObservation:
        """Begin episodes of the given seeds (None: the next of each environment's own stream)."""
        ids = self._ids(env_ids)
        self._call("reset", ids, [None] * len(ids) if seeds is None else [int(seed) for seed in seeds])
        return self._observation(self._receive(), ids)

    def step_chunk(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> ChunkResult:
        """float32 [n, C, 7], actions in the contract's units (clipped to its step limits by the controller)."""
        self.send(actions, env_ids)
        return self.recv()

    def send(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> None:
        """First half of `step_chunk`: the workers begin, this process may do something else."""
        ids = self._ids(env_ids)
        actions = np.asarray(actions, dtype=np.float32)
        if actions.ndim != 3 or actions.shape[0] != len(ids) or actions.shape[2] != ACTION_DIM:
            raise ValueError(f"actions have shape {actions.shape}: expected ({len(ids)}, C, {ACTION_DIM})")
        if not np.isfinite(actions).all():
            raise ValueError("actions hold NaN or infinity")
        self._chunk = actions.shape[1]
        self._call("step", ids, list(actions))

    def recv(self) -> ChunkResult:
        """Second half of `step_chunk`."""
        ids = sorted(env for _, envs in self._sent for env in envs)
        answers = self._receive()
        rows = [answers[env] for env in ids]
        stacked = {key: np.stack([row[key] for row in rows]) for key in ("reward", "terminated", "truncated", "valid")}
        observation = self._observation(answers, ids)
        final = self._observation(answers, ids, final=True)
        plain = {key: np.array([row[key] for row in rows]) for key in ("success", "episode_len", "seeds", "lost")}
        return ChunkResult(observation=observation, final_observation=final, **stacked, **plain)

    def info_poses(self, env_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Privileged truth of each environment: `sim.twin.put_cube.Facts` as a dict."""
        ids = self._ids(env_ids)
        self._call("facts", ids, [None] * len(ids))
        answers = self._receive()
        return [answers[env] for env in ids]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process is not None and process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(("close", [], []))
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
        self._processes, self._pipes = [None] * len(self._setups), [None] * len(self._setups)
        self._pictures = {}
        for memory in self._memory.values():
            memory.close()
            memory.unlink()
        self._memory = {}

    def __enter__(self) -> "TwinVectorEnv":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, env_ids: Sequence[int] | None) -> list[int]:
        ids = list(range(self.num_envs)) if env_ids is None else [int(env) for env in env_ids]
        if sorted(set(ids)) != ids or not all(0 <= env < self.num_envs for env in ids):
            raise ValueError(f"env_ids {ids}: expected ascending numbers below {self.num_envs}, each once")
        return ids

    def _call(self, what: str, ids: list[int], arguments: list[Any]) -> None:
        """One message to each worker concerned. A worker that died is replaced and its environments are marked lost."""
        for worker, setup in enumerate(self._setups):
            mine = [(env, argument) for env, argument in zip(ids, arguments, strict=True) if env in setup.env_ids]
            if not mine:
                continue
            envs, values = [env for env, _ in mine], [value for _, value in mine]
            self._sent.append((worker, envs))
            if self._local is None:
                with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is awaited
                    self._pipes[worker].send((what, envs, values))
            else:
                self._answer = self._local.serve(what, envs, values)

    def _receive(self) -> dict[int, dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        for worker, envs in self._sent:
            if self._local is not None:
                answers |= self._answer
                continue
            try:
                kind, content = self._pipes[worker].recv()
            except (EOFError, OSError):
                answers |= self._replace(worker, envs)
                continue
            if kind == "error":
                raise RuntimeError(f"twin worker {worker} failed:\n{content}")
            answers |= content
        self._sent = []
        return answers

    def _replace(self, worker: int, envs: list[int]) -> dict[int, dict[str, Any]]:
        """Start the worker anew with fresh episodes; what it was doing is lost and marked so."""
        log.error("twin worker %d died; its episodes (environments %s) are dropped", worker, envs)
        self._start(worker, generation=os.urandom(2)[0])
        others = list(self._setups[worker].env_ids)
        self._pipes[worker].send(("reset", others, [None] * len(others)))
        _, fresh = self._pipes[worker].recv()
        nothing = {key: np.zeros(self._chunk, bool) for key in ("terminated", "truncated", "valid")}
        lost = {
            "reward": np.zeros(self._chunk, np.float32),
            **nothing,
            "success": False,
            "episode_len": 0,
            "lost": True,
        }
        return {env: {**lost, **fresh[env], "lost": True} for env in envs}

    def _start(self, worker: int, generation: int = 0) -> None:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(self._setups[worker], theirs, generation), daemon=True)
        process.start()
        theirs.close()
        self._processes[worker], self._pipes[worker] = process, ours

    def _observation(self, answers: dict[int, dict[str, Any]], ids: list[int], final: bool = False) -> TwinObservation:
        key = "final_state" if final else "state"
        state = np.stack([answers[env].get(key, np.zeros(STATE_DIM, np.float32)) for env in ids])
        images = {name: pictures[int(final)][ids] for name, pictures in self._pictures.items()}
        return TwinObservation(images, state)


class _Worker:
    """Serves the environments of one process."""

    def __init__(self, setup: _Setup, generation: int = 0):
        self.setup = setup
        shape = (2, setup.num_envs, setup.config.picture_height, setup.config.picture_width, 3)
        self._memory = {name: SharedMemory(name=memory) for name, memory in setup.memory.items()}
        self._pictures = {name: np.ndarray(shape, np.uint8, memory.buf) for name, memory in self._memory.items()}
        self.twins = {
            env: Twin(setup.config, setup.embodiment, (setup.seed, env, generation), setup.render)
            for env in setup.env_ids
        }

    def serve(self, what: str, envs: list[int], arguments: list[Any]) -> dict[int, dict[str, Any]]:
        return {env: getattr(self, "_" + what)(env, argument) for env, argument in zip(envs, arguments, strict=True)}

    def _reset(self, env: int, seed: int | None) -> dict[str, Any]:
        twin = self.twins[env]
        twin.reset(seed)
        self._draw(env, final=False)
        return {"state": twin.state, "final_state": twin.state, "seeds": twin.seed}

    def _step(self, env: int, actions: np.ndarray) -> dict[str, Any]:
        twin = self.twins[env]
        out: dict[str, Any] = dict(twin.step_chunk(actions))
        out |= {"success": twin.facts.success, "episode_len": twin.steps, "seeds": twin.seed, "lost": False}
        out["final_state"] = out["state"] = twin.state
        self._draw(env, final=True)
        if twin.ended and self.setup.auto_reset:
            out["state"] = self._reset(env, None)["state"]
        else:
            for pictures in self._pictures.values():
                pictures[0, env] = pictures[1, env]
        return out

    def _facts(self, env: int, _: None) -> dict[str, Any]:
        return vars(self.twins[env].facts)

    def _draw(self, env: int, final: bool) -> None:
        for name, picture in self.twins[env].pictures().items():
            self._pictures[name][int(final), env] = picture


def _run(setup: _Setup, pipe: Connection, generation: int) -> None:
    """A worker process. Ends with its parent: the pipe closes."""
    import traceback

    worker = _Worker(setup, generation)
    while True:
        try:
            what, envs, arguments = pipe.recv()
        except EOFError:
            return
        if what == "close":
            return
        try:
            answer = ("ok", worker.serve(what, envs, arguments))
        except Exception:  # whatever it was, the owner has to see it
            answer = ("error", traceback.format_exc())
        pipe.send(answer)
