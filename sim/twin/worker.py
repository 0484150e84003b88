"""One environment, an episode at a time, and the process that serves a few of them."""

import multiprocessing as mp
import os
import signal
import traceback
from abc import ABC, abstractmethod
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


def stream_seed(stream: Sequence[int], episode: int) -> int:
    return int(np.random.default_rng([*stream, episode]).integers(2**31))


class Episodes(ABC):
    """One environment, an episode at a time, in this process.

    `facts` is the privileged truth after the last step, with `success`; `seed` the episode's, `steps` how many were
    made, `ended` whether it is over. `stream` seeds the episodes that are begun without a seed; `episode` is the number
    of the last of these.
    """

    max_steps: int  # of an episode
    instruction: str  # of the episode
    facts: Any

    def __init__(self, stream: Sequence[int]):
        self._stream, self.episode = list(stream), -1
        self.seed, self.steps, self.ended = -1, 0, True

    @abstractmethod
    def begin(self, seed: int) -> None:
        """Put everything where the episode of `seed` starts, `facts` included."""

    @abstractmethod
    def move(self, action: np.ndarray) -> None:
        """A policy step that counts for nothing: float64 [7]. Afterwards `facts` are new."""

    @abstractmethod
    def pictures(self) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] for each camera; empty without rendering."""

    @property
    @abstractmethod
    def state(self) -> np.ndarray:
        """The observation's `state`, float32 [7] in the contract's units."""

    def reward(self) -> float:
        """Of the last step; an episode ends with success, so this is paid once."""
        return float(self.facts.success)

    def view(self) -> Any:
        """What somebody else draws pictures of now from; None where `pictures` are drawn here."""
        return None

    def reset(self, seed: int | None = None, episode: int | None = None) -> None:
        """Begin the episode of `seed`; or of this environment's stream number `episode`, or the next."""
        if seed is None:
            self.episode = self.episode + 1 if episode is None else episode
            seed = stream_seed(self._stream, self.episode)
        self.seed = int(seed)
        self.begin(self.seed)
        self.steps, self.ended = 0, False

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Reward, terminated, truncated of one policy step."""
        assert not self.ended, "step after the end of an episode"
        self.move(np.asarray(action, dtype=np.float64))
        self.steps += 1
        truncated = not self.facts.success and self.steps >= self.max_steps
        self.ended = self.facts.success or truncated
        return self.reward(), self.facts.success, truncated

    def step_chunk(self, actions: np.ndarray, frames: list[Any] | None = None) -> dict[str, np.ndarray]:
        """Run actions [C, 7] until they or the episode end. Arrays [C], see ChunkResult. `frames` collects after each
        step the first camera's picture, or a view where somebody else draws."""
        num = len(actions)
        out = {"reward": np.zeros(num, np.float32)}
        out |= {key: np.zeros(num, bool) for key in ("terminated", "truncated", "valid")}
        for index, action in enumerate(actions):
            if self.ended:
                break
            out["valid"][index] = True
            out["reward"][index], out["terminated"][index], out["truncated"][index] = self.step(action)
            if frames is not None:
                view = self.view()
                frames.append(next(iter(self.pictures().values())) if view is None else view)
        return out


class Twin(Episodes):
    """The twin: `facts` are `sim.twin.scene.Facts`. Importing ManiSkill for the first one takes seconds."""

    def __init__(self, config: TwinConfig, embodiment: Embodiment, stream: Sequence[int] = (0, 0), render: bool = True):
        """Raises ValueError for a splat scene that binds bodies that the task lacks."""
        super().__init__(stream)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's CPU renderer: parallel by processes, not by threads
        import gymnasium as gym

        import sim.twin.pick_place
        import sim.twin.put_cube  # noqa: F401  registers the tasks

        self.config, self.embodiment, self.render = config, embodiment, render
        self.max_steps = config.max_steps
        self.instruction = next(iter(embodiment.instructions), "")
        self._splats: SplatPictures | None = None  # made when somebody asks for a picture
        self.sapien_draws = render and config.render != "splat"
        backends = {"sim_backend": "physx_cpu", "render_backend": render_backend() if self.sapien_draws else "none"}
        # Pictures and states are asked for directly; ManiSkill's own observations would start CUDA in each worker.
        made = gym.make(config.task, num_envs=1, obs_mode="none", twin=config, embodiment=embodiment, **backends)
        self.env: Any = made.unwrapped
        self._bound: tuple[list[str], list[str]] = ([], [])
        if render and config.draws_splats:
            self._bound = bind(self.env, config)

    def begin(self, seed: int) -> None:
        self.env.begin(seed)
        self.facts = self.env.facts()

    def move(self, action: np.ndarray) -> None:
        self.facts = self.env.policy_step(action)

    def reward(self) -> float:
        return self.env.dense_reward(self.facts) if self.config.reward == "dense" else super().reward()

    def pictures(self) -> dict[str, np.ndarray]:
        if not self.render or not self.config.draws_splats:
            return self.env.pictures() if self.render else {}
        if self._splats is None:
            self._splats = SplatPictures(self.config, self.embodiment)
        return {name: pictures[0] for name, pictures in self._splats.draw([self.view()]).items()}

    def view(self) -> View | None:
        if not self.render or not self.config.draws_splats:
            return None
        return self.env.view(*self._bound, with_rgb=self.sapien_draws)

    @property
    def state(self) -> np.ndarray:
        return self.env.state(self.facts)


def bind(env: Any, config: TwinConfig) -> tuple[list[str], list[str]]:
    """The links and actors that the splat scene binds; where SAPIEN draws too, it draws them no more. Raises ValueError
    for those that the task lacks."""
    scene = Path(config.splat.scene)
    links, actors, has_fixed = carriers(scene)
    for known, wanted in ((env.agent.robot.links_map, links), (env.actor_names, actors)):
        if unknown := sorted(set(wanted) - set(known)):
            raise ValueError(f"{scene}: {config.task} has no {unknown}; it has {', '.join(sorted(known))}")
    if config.render != "splat":
        env.hide(links, [*actors, "room", *["table"] * has_fixed])
    return links, actors


def render_backend() -> str:
    """Where SAPIEN draws: on the first GPU that CUDA_VISIBLE_DEVICES leaves, if it can draw; otherwise "cpu", which is
    whatever Vulkan offers, Mesa's renderer where there is nothing else."""
    import sapien

    try:
        return "cuda:0" if sapien.Device("cuda:0").can_render() else "cpu"
    except RuntimeError:  # SAPIEN finds no such device
        return "cpu"


@dataclass(frozen=True)
class Setup:
    """What a worker needs to build its environments and to find its place in the shared pictures."""

    config: Any  # with `make`: TwinConfig, sim.libero.config.LiberoConfig
    embodiment: Embodiment
    env_ids: tuple[int, ...]
    num_envs: int
    seed: int
    group_size: int
    begun: tuple[int, ...]  # episodes of their streams that the environments have begun already
    auto_reset: bool
    render: bool
    memory: dict[str, str]  # camera -> name of the shared memory of pictures that are drawn here, see `picture_shape`

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
        self._watched: int | None = None
        self._frames: list[Any] = []
        self._build(setup)

    def _build(self, setup: Setup) -> None:
        self.twins = {
            env: setup.config.make(setup.embodiment, (setup.seed, env // setup.group_size), setup.render)
            for env in setup.env_ids
        }
        for twin, begun in zip(self.twins.values(), setup.begun, strict=True):
            twin.episode = begun - 1

    def serve(self, what: str, envs: list[int], arguments: list[Any]) -> dict[int, dict[str, Any]]:
        answers = {env: getattr(self, "_" + what)(env, argument) for env, argument in zip(envs, arguments, strict=True)}
        if what == "reset":
            return self._shown(answers, final=False)
        if what == "step":
            answers = self._shown(answers, final=True)
            over = [env for env in envs if self.setup.auto_reset and self.twins[env].ended]
            fresh = self._shown({env: self._reset(env, (None, None)) for env in over}, final=False)
            for env in over:
                answers[env] |= {key: fresh[env][key] for key in ("state", "instruction", "view", "episode")}
        return answers

    def _reset(self, env: int, start: tuple[int | None, int | None]) -> dict[str, Any]:
        twin = self.twins[env]
        twin.reset(*start)
        return {"seeds": twin.seed, "episode": twin.episode}

    def _step(self, env: int, actions: np.ndarray) -> dict[str, Any]:
        twin = self.twins[env]
        out: dict[str, Any] = dict(twin.step_chunk(actions, self._frames if env == self._watched else None))
        out |= {"success": twin.facts.success, "episode_len": twin.steps, "lost": False}
        return out | {"seeds": twin.seed, "episode": twin.episode}

    def _shown(self, answers: dict[int, dict[str, Any]], final: bool) -> dict[int, dict[str, Any]]:
        """With what these environments show now."""
        for env, answer in answers.items():
            twin = self.twins[env]
            now = {"state": twin.state, "instruction": twin.instruction, "view": twin.view()}
            answer |= now | {f"final_{key}": value for key, value in now.items()}
            if now["view"] is not None:  # the owner draws from it
                continue
            for name, picture in twin.pictures().items():
                self._pictures[name][int(final), env] = picture
                if final:
                    self._pictures[name][0, env] = picture
        return answers

    def _poses(self, env: int, _: None) -> dict[str, Any]:
        return vars(self.twins[env].facts)

    def _watch(self, env: int, on: bool) -> dict[str, Any]:
        self._watched, self._frames = (env if on else None), []
        return {}

    def _frames_since(self, env: int, _: None) -> dict[str, Any]:
        taken, self._frames = self._frames, []
        return {"frames": taken if env == self._watched else []}


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
    worker, failure = None, ("", "")
    try:
        worker = Worker(setup)
    except ValueError as error:  # what a user can get wrong needs no traceback
        failure = ("refused", str(error))
    except Exception:  # whatever it was, the owner has to see it
        failure = ("error", traceback.format_exc())
    while True:
        try:
            what, envs, arguments = pipe.recv()
        except EOFError:
            return
        if what == "close":
            return
        try:
            answer = failure if worker is None else ("ok", worker.serve(what, envs, arguments))
        except Exception:
            answer = ("error", traceback.format_exc())
        pipe.send(answer)
