"""One twin, and the process that serves a few of them."""

import multiprocessing as mp
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from bridge.embodiment import Embodiment
from sim.splat.scene import carriers
from sim.twin.config import TwinConfig
from sim.twin.splat_pictures import SplatPictures, View


class Twin:
    """One environment, an episode at a time, in this process. Importing ManiSkill for the first one takes seconds.

    `facts` (`sim.twin.scene.Facts`) is the privileged truth after the last step, `seed` the episode's, `steps` how
    many were made, `ended` whether it is over. `stream` seeds the episodes that are begun without a seed; `episode`
    is the number of the last of these.
    """

    def __init__(self, config: TwinConfig, embodiment: Embodiment, stream: Sequence[int] = (0, 0), render: bool = True):
        """Raises ValueError for a splat scene that binds bodies that the task lacks."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's CPU renderer: parallel by processes, not by threads
        import gymnasium as gym
        import torch

        import sim.twin.pick_place
        import sim.twin.put_cube  # noqa: F401  registers the tasks

        self.config, self.embodiment, self.render = config, embodiment, render
        self._splats: SplatPictures | None = None  # made when somebody asks for a picture
        self.sapien_draws = render and config.render != "splat"
        shown = (
            {"obs_mode": "rgb", "render_backend": "gpu" if torch.cuda.is_available() else "cpu"}
            if self.sapien_draws
            else {"obs_mode": "state", "render_backend": "none"}
        )
        made = gym.make(config.task, num_envs=1, sim_backend="physx_cpu", twin=config, embodiment=embodiment, **shown)
        self.env: Any = made.unwrapped
        self._bound: tuple[list[str], list[str]] = ([], [])
        if render and config.render != "sapien":
            self._bind(Path(config.splat.scene))
        self._stream, self.episode = list(stream), -1
        self.seed, self.steps, self.ended = -1, 0, True
        self.facts: Any = None

    def reset(self, seed: int | None = None, episode: int | None = None) -> None:
        """Begin the episode of `seed`; or of this environment's stream number `episode`, or the next."""
        if seed is None:
            self.episode = self.episode + 1 if episode is None else episode
            seed = int(np.random.default_rng([*self._stream, self.episode]).integers(2**31))
        self.seed = int(seed)
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

    def step_chunk(self, actions: np.ndarray, frames: list[Any] | None = None) -> dict[str, np.ndarray]:
        """Run actions [C, 7] until they or the episode end. Arrays [C], see ChunkResult. `frames` collects after each
        step the first camera's picture, or a view where splats are drawn."""
        num = len(actions)
        out = {"reward": np.zeros(num, np.float32)}
        out |= {key: np.zeros(num, bool) for key in ("terminated", "truncated", "valid")}
        for index, action in enumerate(actions):
            if self.ended:
                break
            out["valid"][index] = True
            out["reward"][index], out["terminated"][index], out["truncated"][index] = self.step(action)
            if frames is not None:
                frames.append(next(iter(self.pictures().values())) if self.config.render == "sapien" else self.view())
        return out

    def pictures(self) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] for each camera; empty without rendering."""
        if not self.render or self.config.render == "sapien":
            return self.env.pictures() if self.render else {}
        if self._splats is None:
            self._splats = SplatPictures(self.config, self.embodiment)
        return {name: pictures[0] for name, pictures in self._splats.draw([self.view()]).items()}

    def view(self) -> View:
        """What a picture of now is made from, where splats are drawn."""
        return self.env.view(*self._bound, with_rgb=self.sapien_draws)

    def _bind(self, scene: Path) -> None:
        links, actors, has_fixed = carriers(scene)
        for known, wanted in ((self.env.agent.robot.links_map, links), (self.env.actor_names, actors)):
            if unknown := sorted(set(wanted) - set(known)):
                raise ValueError(f"{scene}: {self.config.task} has no {unknown}; it has {', '.join(sorted(known))}")
        self._bound = links, actors
        if self.sapien_draws:  # what the scene holds is not drawn twice
            self.env.hide(links, actors + ["table"] * has_fixed)

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
    group_size: int
    begun: tuple[int, ...]  # episodes of their streams that the environments have begun already
    auto_reset: bool
    render: bool
    memory: dict[str, str]  # camera -> name of the shared memory of SAPIEN's pictures, see `picture_shape`

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Two pictures of each environment: the current one, and the last of the episode that a chunk belonged to."""
        return (2, self.num_envs, self.config.picture_height, self.config.picture_width, 3)


class Worker:
    """Serves the environments of one process. Every answer is {env_id: {key: value}}."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self._memory = {name: SharedMemory(name=memory) for name, memory in setup.memory.items()}
        self._pictures = {
            name: np.ndarray(setup.picture_shape, np.uint8, memory.buf) for name, memory in self._memory.items()
        }
        self.twins = {
            env: Twin(setup.config, setup.embodiment, (setup.seed, env // setup.group_size), setup.render)
            for env in setup.env_ids
        }
        for twin, begun in zip(self.twins.values(), setup.begun, strict=True):
            twin.episode = begun - 1
        self._watched: int | None = None
        self._frames: list[Any] = []

    def serve(self, what: str, envs: list[int], arguments: list[Any]) -> dict[int, dict[str, Any]]:
        return {env: getattr(self, "_" + what)(env, argument) for env, argument in zip(envs, arguments, strict=True)}

    def _reset(self, env: int, start: tuple[int | None, int | None]) -> dict[str, Any]:
        twin = self.twins[env]
        twin.reset(*start)
        now = {"state": twin.state, "final_state": twin.state, "seeds": twin.seed, "episode": twin.episode}
        view = self._look(env, final=False)
        return now | {"view": view, "final_view": view}

    def _step(self, env: int, actions: np.ndarray) -> dict[str, Any]:
        twin = self.twins[env]
        out: dict[str, Any] = dict(twin.step_chunk(actions, self._frames if env == self._watched else None))
        out |= {"success": twin.facts.success, "episode_len": twin.steps, "seeds": twin.seed, "lost": False}
        out["final_state"] = out["state"] = twin.state
        out["final_view"] = out["view"] = self._look(env, final=True)
        out["episode"] = twin.episode
        if twin.ended and self.setup.auto_reset:
            fresh = self._reset(env, (None, None))
            out |= {key: fresh[key] for key in ("state", "view", "episode")}
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

    def _look(self, env: int, final: bool) -> Any:
        """SAPIEN's pictures go to the shared memory; where splats are drawn, the owner draws them from a view."""
        if self.setup.render and self.setup.config.render != "sapien":
            return self.twins[env].view()
        for name, picture in self.twins[env].pictures().items():
            self._pictures[name][int(final), env] = picture
        return None


def start(setup: Setup) -> tuple[Any, Connection]:
    """A new worker process and our end of its pipe."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(setup, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _run(setup: Setup, pipe: Connection) -> None:
    """A worker process. Ends with its parent: the pipe closes. Errors go to the parent, which raises them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when an interrupted run ends
    worker, failure = None, ""
    try:
        worker = Worker(setup)
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
