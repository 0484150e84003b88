"""One twin, and the process that serves a few of them."""

import multiprocessing as mp
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from bridge.embodiment import Embodiment
from sim.twin.config import TwinConfig


class Twin:
    """One environment, an episode at a time, in this process. Importing ManiSkill for the first one takes seconds.

    `facts` (`sim.twin.put_cube.Facts`) is the privileged truth after the last step, `seed` the episode's, `steps` how
    many were made, `ended` whether it is over. `stream` seeds the episodes that are begun without a seed.
    """

    def __init__(self, config: TwinConfig, embodiment: Embodiment, stream: Sequence[int] = (0, 0), render: bool = True):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's CPU renderer: parallel by processes, not by threads
        import gymnasium as gym

        import sim.twin.put_cube  # noqa: F401  registers the task

        self.config, self.embodiment, self.render = config, embodiment, render
        shown = (
            {"obs_mode": "rgb", "render_backend": "cpu"} if render else {"obs_mode": "state", "render_backend": "none"}
        )
        made = gym.make(config.task, num_envs=1, sim_backend="physx_cpu", twin=config, embodiment=embodiment, **shown)
        self.env: Any = made.unwrapped
        self._seeds = np.random.default_rng(list(stream))
        self.seed, self.steps, self.ended = -1, 0, True
        self.facts: Any = None

    def reset(self, seed: int | None = None) -> None:
        """Begin the episode of `seed`, or of the next seed of this environment's stream."""
        self.seed = int(self._seeds.integers(2**31)) if seed is None else int(seed)
        self.env.begin(self.seed)
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

    def step_chunk(self, actions: np.ndarray, frames: list[np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Run actions [C, 7] until they or the episode end. Arrays [C], see ChunkResult. `frames` collects a
        third-person picture after each step."""
        num = len(actions)
        out = {"reward": np.zeros(num, np.float32)}
        out |= {key: np.zeros(num, bool) for key in ("terminated", "truncated", "valid")}
        for index, action in enumerate(actions):
            if self.ended:
                break
            out["valid"][index] = True
            out["reward"][index], out["terminated"][index], out["truncated"][index] = self.step(action)
            if frames is not None:
                frames.append(next(iter(self.pictures().values())))
        return out

    def pictures(self) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] for each camera; empty without rendering."""
        return self.env.pictures() if self.render else {}

    @property
    def state(self) -> np.ndarray:
        """The observation's `state`, float32 [7]."""
        return self.env.state(self.facts)


@dataclass(frozen=True)
class Setup:
    """What a worker needs to build its environments and to find its place in the shared pictures."""

    config: TwinConfig
    embodiment: Embodiment
    env_ids: tuple[int, ...]
    num_envs: int
    seed: int
    auto_reset: bool
    render: bool
    memory: dict[str, str]  # camera -> name of the shared memory, see `picture_shape`

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Two pictures of each environment: the current one, and the last of the episode that a chunk belonged to."""
        return (2, self.num_envs, self.config.picture_height, self.config.picture_width, 3)


class Worker:
    """Serves the environments of one process. Every answer is {env_id: {key: value}}."""

    def __init__(self, setup: Setup, incarnation: int = 0):
        self.setup = setup
        self._memory = {name: SharedMemory(name=memory) for name, memory in setup.memory.items()}
        self._pictures = {
            name: np.ndarray(setup.picture_shape, np.uint8, memory.buf) for name, memory in self._memory.items()
        }
        self.twins = {
            env: Twin(setup.config, setup.embodiment, (setup.seed, env, incarnation), setup.render)
            for env in setup.env_ids
        }
        self._watched: int | None = None
        self._frames: list[np.ndarray] = []

    def serve(self, what: str, envs: list[int], arguments: list[Any]) -> dict[int, dict[str, Any]]:
        return {env: getattr(self, "_" + what)(env, argument) for env, argument in zip(envs, arguments, strict=True)}

    def _reset(self, env: int, seed: int | None) -> dict[str, Any]:
        twin = self.twins[env]
        twin.reset(seed)
        self._draw(env, final=False)
        return {"state": twin.state, "final_state": twin.state, "seeds": twin.seed}

    def _step(self, env: int, actions: np.ndarray) -> dict[str, Any]:
        twin = self.twins[env]
        out: dict[str, Any] = dict(twin.step_chunk(actions, self._frames if env == self._watched else None))
        out |= {"success": twin.facts.success, "episode_len": twin.steps, "seeds": twin.seed, "lost": False}
        out["final_state"] = out["state"] = twin.state
        self._draw(env, final=True)
        if twin.ended and self.setup.auto_reset:
            out["state"] = self._reset(env, None)["state"]
        else:
            for pictures in self._pictures.values():
                pictures[0, env] = pictures[1, env]
        return out

    def _poses(self, env: int, _: None) -> dict[str, Any]:
        return vars(self.twins[env].facts)

    def _watch(self, env: int, on: bool) -> dict[str, Any]:
        self._watched, self._frames = (env if on else None), []
        return {}

    def _frames_since(self, env: int, _: None) -> dict[str, Any]:
        taken, self._frames = self._frames, []
        return {"frames": taken if env == self._watched else []}

    def _draw(self, env: int, final: bool) -> None:
        for name, picture in self.twins[env].pictures().items():
            self._pictures[name][int(final), env] = picture


def start(setup: Setup, incarnation: int) -> tuple[Any, Connection]:
    """A new worker process and our end of its pipe."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(setup, theirs, incarnation), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _run(setup: Setup, pipe: Connection, incarnation: int) -> None:
    """A worker process. Ends with its parent: the pipe closes. Errors go to the parent, which raises them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when an interrupted run ends
    worker, failure = None, ""
    try:
        worker = Worker(setup, incarnation)
    except Exception:  # whatever it was, the owner has to see it
        failure = traceback.format_exc()
    while True:
        try:
            what, envs, arguments = pipe.recv()
        except EOFError:
            return
        if what == "close":
            return
        try:
            answer = ("error", failure) if worker is None else ("ok", worker.serve(what, envs, arguments))
        except Exception:
            answer = ("error", traceback.format_exc())
        pipe.send(answer)
