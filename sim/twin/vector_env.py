"""Many twins, or LIBERO tasks, in a few processes, stepped by action chunks.

Physics runs a whole chunk without a picture; each camera is drawn once, at the chunk's end, which is when a policy
looks. Pictures come back through shared memory.

    env = TwinVectorEnv(config, embodiment, num_envs=8, num_workers=2, seed=0)
    observation = env.reset(seeds=range(8))
    result = env.step_chunk(actions)              # float32 [8, C, 7]

Each environment draws the seeds of its next episodes from its own stream, so what an environment sees does not depend
on how many workers share the work. With `group_size` G each G consecutive environments have one stream and so the same
start states: `reset()` begins the same episode in all of a group, as GRPO compares them.

With `render: splat` or `composite` the workers send poses (and SAPIEN's part) and this process draws all environments
in one call on the renderer's device, while the workers may be at another group's chunk.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from bridge.embodiment import Embodiment
from bridge.pose import ACTION_DIM
from sim.libero.config import LiberoConfig
from sim.twin.config import TwinConfig
from sim.twin.splat_pictures import SplatPictures
from sim.twin.worker import Setup, Twin, Worker, start

__all__ = ["ChunkResult", "Twin", "TwinObservation", "TwinVectorEnv"]

log = logging.getLogger(__name__)

ANSWER_LIMIT_S = 300.0  # a worker that is silent for so long is as good as dead; the first answer waits for imports
Answers = dict[int, dict[str, Any]]


@dataclass
class TwinObservation:
    """images: uint8 [n, H, W, 3] for each camera; state: float32 [n, 7]; instruction: of each episode."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: list[str]


@dataclass
class ChunkResult:
    """What n environments did with one chunk of C actions each.

    reward float32 [n, C], terminated, truncated, valid bool [n, C]: an episode that ends inside the chunk leaves the
    rest of its actions unexecuted (`valid` False, no reward). success bool [n], episode_len int [n] and seeds int [n]
    are of the episode that the chunk belonged to, up to its last step. observation: after the chunk, of the next
    episode where one ended. final_observation: the last of the episode that the chunk belonged to (the same as
    `observation` where none ended). lost bool [n]: its worker died, nothing here is to be used but `observation`, which
    is the first of a new episode.
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


@dataclass
class _Request:
    """Something asked of the workers and not yet answered. parts: (worker, its incarnation, environments)."""

    what: str
    arguments: dict[int, Any]  # of each environment
    parts: list[tuple[int, int, list[int]]] = field(default_factory=list)
    answers: Answers = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        return list(self.arguments)


class TwinVectorEnv:
    """num_workers=0 runs everything in this process. Raises ValueError for counts that do not fit, and what the splat
    scene's folder is wrong about."""

    def __init__(
        self,
        config: TwinConfig | LiberoConfig,
        embodiment: Embodiment,
        num_envs: int,
        num_workers: int,
        seed: int = 0,
        *,
        auto_reset: bool = True,
        render: bool = True,
        group_size: int = 1,
    ):
        if group_size < 1 or num_envs % group_size:
            raise ValueError(f"group_size {group_size}: num_envs {num_envs} must be a multiple of it")
        if num_envs < 1 or not 0 <= num_workers <= num_envs:
            raise ValueError(f"num_envs {num_envs}, num_workers {num_workers}: need 1 <= num_envs, workers <= envs")
        local: type[Worker] = Worker
        if isinstance(config, TwinConfig) and config.physics == "physx_cuda":
            from sim.twin.batched_worker import BatchedWorker  # imports ManiSkill

            local, num_workers = BatchedWorker.checked(), 0  # one simulation steps them all, in this process
        self.config, self.embodiment, self.num_envs = config, embodiment, num_envs
        self._group_size = group_size
        self._splats = SplatPictures(config, embodiment) if render and config.draws_splats else None
        cameras = sorted(embodiment.cameras) if render and self._splats is None else []
        shares = np.array_split(np.arange(num_envs), max(num_workers, 1))
        shape = (2, num_envs, config.picture_height, config.picture_width, 3)
        self._memory = {name: SharedMemory(create=True, size=int(np.prod(shape))) for name in cameras}
        self._pictures = {name: np.ndarray(shape, np.uint8, memory.buf) for name, memory in self._memory.items()}
        names = {name: memory.name for name, memory in self._memory.items()}
        self._setups = [
            Setup(
                config,
                embodiment,
                env_ids=tuple(map(int, share)),
                num_envs=num_envs,
                seed=seed,
                group_size=group_size,
                begun=(0,) * len(share),
                auto_reset=auto_reset,
                render=render,
                memory=names,
            )
            for share in shares
        ]
        self._episodes = np.full(num_envs, -1)  # of its stream, that an environment is in
        self._requests: deque[_Request] = deque()
        self._local = local(self._setups[0]) if num_workers == 0 else None
        self._incarnations = [0] * num_workers
        self._workers = [start(setup) for setup in self._setups] if num_workers else []
        self._untold: Answers = {}  # new episodes of environments whose last was lost, and nobody knows it yet

    def reset(self, seeds: Sequence[int] | None = None, env_ids: Sequence[int] | None = None) -> TwinObservation:
        """Begin episodes of the given seeds, one for each environment (None: the next of their streams)."""
        ids = self._ids(env_ids)
        if seeds is not None and len(seeds) != len(ids):
            raise ValueError(f"{len(seeds)} seeds for {len(ids)} environments: one for each is needed")
        if seeds is None:
            groups = np.array(ids) // self._group_size
            newest = {group: max(self._episodes[np.array(ids)[groups == group]]) for group in groups}
            starts = [(None, int(newest[group]) + 1) for group in groups]
        else:
            starts = [(int(seed), None) for seed in seeds]
        request = self._ask("reset", ids, starts)
        self._complete(request)
        for env in ids:
            self._untold.pop(env, None)  # given up before anybody saw it
        return self._observations(request)[0]

    def step_chunk(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> ChunkResult:
        """float32 [n, C, 7], actions in the contract's units (clipped to its step limits by the controller)."""
        if self._requests:
            raise ValueError("chunks are under way: recv() them before the next step_chunk(), or use send() alone")
        self.send(actions, env_ids)
        return self.recv()

    def send(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> None:
        """First half of `step_chunk`: the workers begin, this process may do something else. Several groups of
        environments may be under way; `recv` answers in the order of the sends."""
        ids = self._ids(env_ids)
        actions = np.asarray(actions, dtype=np.float32)
        if actions.ndim != 3 or actions.shape[0] != len(ids) or actions.shape[2] != ACTION_DIM:
            raise ValueError(f"actions have shape {actions.shape}: expected ({len(ids)}, C, {ACTION_DIM})")
        if not np.isfinite(actions).all():
            raise ValueError("actions hold NaN or infinity")
        if busy := sorted(set(ids) & {env for request in self._requests for env in request.ids}):
            raise ValueError(f"environments {busy} have a chunk under way: recv() it first")
        self._requests.append(self._ask("step", ids, list(actions)))

    def recv(self) -> ChunkResult:
        """Second half of `step_chunk`, for the oldest `send`."""
        if not self._requests:
            raise ValueError("recv() without a send()")
        request = self._requests.popleft()
        self._complete(request)
        rows = [request.answers[env] for env in request.ids]
        keys = ("reward", "terminated", "truncated", "valid", "success", "episode_len", "seeds", "lost")
        now, last = self._observations(request)
        return ChunkResult(
            observation=now,
            final_observation=last,
            **{key: np.stack([np.asarray(row[key]) for row in rows]) for key in keys},
        )

    def info_poses(self, env_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Privileged truth of each environment: `sim.twin.scene.Facts` as a dict."""
        request = self._ask("poses", self._ids(env_ids), None)
        self._complete(request)
        return [request.answers[env] for env in request.ids]

    @property
    def splat_device(self) -> str:
        """Where splats are drawn, empty where none are."""
        return "" if self._splats is None else str(self._splats.device)

    def watch(self, env_id: int, on: bool = True) -> None:
        """From now on the environment also draws a picture after every policy step, for a video. One a worker."""
        self._complete(self._ask("watch", [env_id], [on]))

    def frames(self, env_id: int) -> list[np.ndarray]:
        """The watched environment's pictures since the last call, uint8 [H, W, 3] of the first camera by name."""
        request = self._ask("frames_since", [env_id], None)
        self._complete(request)
        frames = request.answers[env_id].get("frames", [])
        return frames if self._splats is None or not frames else list(next(iter(self._splats.draw(frames).values())))

    def close(self) -> None:
        for _, pipe in self._workers:
            with contextlib.suppress(OSError):
                pipe.send(("close", [], []))
        for process, pipe in self._workers:
            with contextlib.suppress(EOFError, OSError):
                while pipe.poll(10):  # an answer that nobody waits for; unread, it would keep the worker from ending
                    pipe.recv_bytes()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers, self._pictures, self._local = [], {}, None
        for memory in self._memory.values():
            with contextlib.suppress(BufferError):  # a view of it is still held somewhere; the kernel frees it later
                memory.close()
            memory.unlink()
        self._memory = {}

    def __enter__(self) -> "TwinVectorEnv":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, env_ids: Sequence[int] | None) -> list[int]:
        ids = list(range(self.num_envs)) if env_ids is None else [int(env) for env in env_ids]
        if not ids or sorted(set(ids)) != ids or not 0 <= ids[0] <= ids[-1] < self.num_envs:
            raise ValueError(f"env_ids {ids}: expected ascending numbers below {self.num_envs}, each once")
        return ids

    def _ask(self, what: str, ids: list[int], arguments: list[Any] | None) -> _Request:
        """One message to each worker concerned."""
        if what != "step" and self._requests:
            raise ValueError(f"chunks are under way: recv() them before {what}()")
        request = _Request(what, dict(zip(ids, [None] * len(ids) if arguments is None else arguments, strict=True)))
        if what == "step":
            request.answers = self._lost(request, [env for env in ids if env in self._untold])
        for worker, setup in enumerate(self._setups):
            envs = [env for env in ids if env in setup.env_ids and env not in request.answers]
            if not envs:
                continue
            if self._local is not None:
                request.answers |= self._local.serve(what, envs, [request.arguments[env] for env in envs])
                continue
            request.parts.append((worker, self._incarnations[worker], envs))
            self._tell(worker, request, envs)
        return request

    def _tell(self, worker: int, request: _Request, envs: list[int]) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is awaited
            self._workers[worker][1].send((request.what, envs, [request.arguments[env] for env in envs]))

    def _complete(self, request: _Request) -> None:
        """Wait for all answers. Raises RuntimeError with the worker's traceback when it failed."""
        for worker, incarnation, envs in request.parts:
            answer = None
            if incarnation == self._incarnations[worker]:
                answer = self._answer(worker)
                if answer is None:
                    self._replace(worker)
                    if request.what != "step":  # is as well asked of the new worker
                        self._tell(worker, request, envs)
                        answer = self._first_answer(worker)
            request.answers |= self._lost(request, envs) if answer is None else answer
        for env, answer in request.answers.items():
            self._episodes[env] = answer.get("episode", self._episodes[env])

    def _answer(self, worker: int) -> Answers | None:
        """None when the worker is dead or silent."""
        process, pipe = self._workers[worker]
        try:
            if not pipe.poll(ANSWER_LIMIT_S):
                return None
            kind, content = pipe.recv()
        except (EOFError, OSError):
            return None
        if kind == "refused":
            raise ValueError(content)
        if kind == "error":
            raise RuntimeError(f"twin worker {worker} (process {process.pid}) failed:\n{content}")
        return content

    def _replace(self, worker: int) -> None:
        """A new process with fresh episodes in all environments of the dead one."""
        envs = list(self._setups[worker].env_ids)
        log.error("twin worker %d died; the episodes of environments %s are dropped", worker, envs)
        process, pipe = self._workers[worker]
        process.kill()
        process.join()
        pipe.close()
        self._incarnations[worker] += 1
        setup = replace(self._setups[worker], begun=tuple(int(n) + 1 for n in self._episodes[envs]))
        self._workers[worker] = start(setup)
        self._tell(worker, _Request("reset", dict.fromkeys(envs, (None, None))), envs)
        self._untold |= self._first_answer(worker)

    def _first_answer(self, worker: int) -> Answers:
        answer = self._answer(worker)
        if answer is None:
            raise RuntimeError(f"twin worker {worker} died twice in a row; its own error output says why")
        return answer

    def _lost(self, request: _Request, envs: list[int]) -> Answers:
        """A step's answers where a worker died: nothing was done, a new episode begins."""
        return {env: _nothing(len(request.arguments[env])) | self._untold.pop(env) for env in envs}

    def _observations(self, request: _Request) -> tuple[TwinObservation, TwinObservation]:
        """What is seen now, and the last of the episodes that the request belonged to."""
        answers = [request.answers[env] for env in request.ids]
        if self._splats is None:
            now, last = ({n: p[which][request.ids] for n, p in self._pictures.items()} for which in (0, 1))
        else:
            over = [row for row, answer in enumerate(answers) if answer["final_view"] is not answer["view"]]
            views = [answer["view"] for answer in answers] + [answers[row]["final_view"] for row in over]
            drawn = self._splats.draw(views)
            now = {name: pictures[: len(answers)] for name, pictures in drawn.items()}
            last = {name: pictures.copy() for name, pictures in now.items()} if over else now
            for name, pictures in last.items() if over else ():
                pictures[over] = drawn[name][len(answers) :]
        state, final_state = (np.stack([answer[key] for answer in answers]) for key in ("state", "final_state"))
        said, final_said = ([answer[key] for answer in answers] for key in ("instruction", "final_instruction"))
        return TwinObservation(now, state, said), TwinObservation(last, final_state, final_said)


def _nothing(num_actions: int) -> dict[str, Any]:
    nothing = {key: np.zeros(num_actions, bool) for key in ("terminated", "truncated", "valid")}
    return nothing | {"reward": np.zeros(num_actions, np.float32), "success": False, "episode_len": 0, "lost": True}
