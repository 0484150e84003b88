"""The trainer's workers as Ray actors, placed as `cluster.component_placement` says. Nothing else knows Ray.

    driver: Trainer ── collect ──▶ rollout actors ── reset, step ──▶ env actors
                    ── update ───▶ actor actors (gradients summed among them)
    weights: actor 0 ── changed tensors ──▶ rollout actors

Each rollout actor owns its env actors and replaces those that die; the episodes that died with them begin again. All
other failures end the run, which goes on from its last saved state.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

try:
    import ray
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:  # everything runs in one process without it
    ray = None

from learner.placement_map import Placement, Process
from learner.rollouts import ChunkResult, VectorEnv, Views
from learner.trainer import RolloutWorker, Trainer, UpdateWorker
from learner.update import AlgoConfig
from learner.weight_sync import WeightSender, receive

RESULT_FIELDS = ("reward", "terminated", "truncated", "valid", "success", "episode_len", "seeds", "lost")


@dataclass(frozen=True)
class Job:
    """What every process needs to build its worker; the functions must be importable on every node."""

    make_policy: Callable[[str], Any]  # device -> policy, the same everywhere
    make_env: Callable[[int, int], VectorEnv]  # (environments, seed) -> environments in the calling process
    make_demos: Callable[[Any, int, int], Any]  # (policy, rank, ranks) -> Mixture or None
    algo: AlgoConfig
    envs: int
    stages: int
    seed: int
    threads: int
    device: str


class EnvProcess:
    """Environments in a process of their own."""

    def __init__(self, make_env: Callable[[int, int], VectorEnv], num_envs: int, seed: int):
        self.env = make_env(num_envs, seed)

    def reset(self, seeds: list[int], env_ids: list[int]) -> Any:
        views = self.env.reset(seeds, env_ids)
        return views.images, views.state

    def step_chunk(self, actions: np.ndarray, env_ids: list[int]) -> Any:
        result = self.env.step_chunk(actions, env_ids)
        images = {name: np.array(pictures) for name, pictures in result.observation.images.items()}
        return images, result.observation.state, {name: getattr(result, name) for name in RESULT_FIELDS}


class RemoteEnvs:
    """Environments of several processes as one `VectorEnv`. A process that dies is replaced, its episodes are lost."""

    def __init__(self, starts: Sequence[Callable[[], Any]], envs_each: int):
        self.starts, self.envs_each = starts, envs_each
        self.num_envs = envs_each * len(starts)
        self.handles = [start() for start in starts]
        self.blank: tuple[dict[str, np.ndarray], np.ndarray] | None = None  # what an unseen environment shows
        self.sent: list[tuple[int, list[int], Any]] = []
        self.num_actions = 0

    def reset(self, seeds: Sequence[int], env_ids: Sequence[int] | None = None) -> Views:
        seed_of = dict(zip(self._ids(env_ids), seeds, strict=True))
        answers = []
        for process, local in self._split(self._ids(env_ids)):
            mine = [int(seed_of[process * self.envs_each + env]) for env in local]
            try:
                answers.append(ray.get(self.handles[process].reset.remote(mine, local)))
            except RayActorError:
                self.handles[process] = self.starts[process]()
                answers.append(ray.get(self.handles[process].reset.remote(mine, local)))
        images, state = answers[0]
        self.blank = {name: np.zeros_like(pictures[:1]) for name, pictures in images.items()}, np.zeros_like(state[:1])
        return _views([answer[0] for answer in answers], [answer[1] for answer in answers])

    def step_chunk(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> ChunkResult:
        self.send(actions, env_ids)
        return self.recv()

    def send(self, actions: np.ndarray, env_ids: Sequence[int] | None = None) -> None:
        ids = self._ids(env_ids)
        action_of = dict(zip(ids, actions, strict=True))
        self.num_actions = actions.shape[1]
        for process, local in self._split(ids):
            mine = np.stack([action_of[process * self.envs_each + env] for env in local])
            self.sent.append((process, local, self.handles[process].step_chunk.remote(mine, local)))

    def recv(self) -> ChunkResult:
        images, states, results = [], [], []
        for process, local, answer in self.sent:
            try:
                pictures, state, result = ray.get(answer)
            except RayActorError:
                self.handles[process] = self.starts[process]()
                pictures, state, result = self._lost(len(local))
            images.append(pictures)
            states.append(state)
            results.append(result)
        self.sent = []
        joined = {name: np.concatenate([result[name] for result in results]) for name in RESULT_FIELDS}
        return SimpleNamespace(observation=_views(images, states), **joined)

    def close(self) -> None:
        for handle in self.handles:
            ray.kill(handle)

    def _ids(self, env_ids: Sequence[int] | None) -> list[int]:
        return list(range(self.num_envs)) if env_ids is None else list(env_ids)

    def _split(self, ids: list[int]) -> list[tuple[int, list[int]]]:
        """Process and its own numbers of the environments."""
        of = [(process, [i % self.envs_each for i in ids if i // self.envs_each == process])
              for process in range(len(self.handles))]  # fmt: skip
        return [(process, local) for process, local in of if local]

    def _lost(self, count: int) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        assert self.blank is not None
        images = {name: picture.repeat(count, 0) for name, picture in self.blank[0].items()}
        flags = {name: np.zeros((count, self.num_actions), bool) for name in ("terminated", "truncated", "valid")}
        numbers = {name: np.zeros(count, np.int64) for name in ("episode_len", "seeds")}
        reward = np.zeros((count, self.num_actions), np.float32)
        result = flags | numbers | {"reward": reward, "success": np.zeros(count, bool), "lost": np.ones(count, bool)}
        return images, self.blank[1].repeat(count, 0), result


def _views(images: list[dict[str, np.ndarray]], states: list[np.ndarray]) -> Views:
    joined = {name: np.concatenate([part[name] for part in images]) for name in images[0]}
    return SimpleNamespace(images=joined, state=np.concatenate(states))


class Member:
    """One rollout or actor process: its place among all of them, and its worker."""

    def __init__(self, job: Job, ranks: dict[str, int], component: str, rank: int):
        torch.set_num_threads(job.threads)
        self.job, self.ranks, self.component, self.rank = job, ranks, component, rank

    def address(self) -> str:
        """Where the members may meet; asked of actor 0."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def join(self, address: str, env_options: list[dict[str, Any]]) -> None:
        """Meet the others, and build the worker."""
        job, actors = self.job, self.ranks["actor"]
        position = self.rank if self.component == "actor" else actors + self.rank
        # Gradients of models on GPUs go through NCCL; weights to rollouts through host memory, as two processes of one
        # GPU cannot meet in NCCL.
        backend = "cpu:gloo,cuda:nccl" if job.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=address, rank=position, world_size=sum(self.ranks.values()))
        updating = dist.new_group(list(range(actors)))
        self.sharing = dist.new_group([0, *range(actors, sum(self.ranks.values()))], backend="gloo")
        policy = job.make_policy(job.device)
        if self.component == "rollout":
            self.worker: Any = RolloutWorker(policy, self._envs(env_options), job.algo, job.seed, self.rank)
            return
        demos = job.make_demos(policy, self.rank, actors)
        self.worker = UpdateWorker(policy, job.algo, demos, job.seed, updating if actors > 1 else None, self.rank)
        self.sender = WeightSender(policy, self.sharing) if self.rank == 0 else None

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        result = getattr(self.worker, method)(*arguments)
        return result.to("cpu") if method == "collect" and result is not None else result

    def share(self, version: int) -> int:
        """Rank 0 of the actors sends, rollouts receive; the bytes that were sent."""
        if self.component == "rollout":
            self.worker.version = receive(self.worker.policy, self.sharing)
        elif self.sender:
            return self.sender.send(version)
        return 0

    def env_handles(self) -> list[Any]:
        return [handle for env in self.worker.envs for handle in env.handles]

    def _envs(self, options: list[dict[str, Any]]) -> list[RemoteEnvs]:
        """This process's env processes, in pipeline stages."""
        each = self.job.envs // (len(options) * self.ranks["rollout"])

        def starter(option: dict[str, Any], seed: int) -> Callable[[], Any]:
            return lambda: ray.remote(EnvProcess).options(**option).remote(self.job.make_env, each, seed)

        first = self.rank * len(options)
        starts = [starter(option, self.job.seed + first + k) for k, option in enumerate(options)]
        size = len(starts) // self.job.stages
        return [RemoteEnvs(starts[k * size : (k + 1) * size], each) for k in range(self.job.stages)]


class RayCrew:
    def __init__(self, handles: list[Any]):
        self.handles = handles

    def __len__(self) -> int:
        return len(self.handles)

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return ray.get([h.call.remote(method, args) for h, args in zip(self.handles, arguments, strict=True)])


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or begin one on this machine (which lets only holders of its token in)."""
    if ray is None:
        raise ValueError("cluster.component_placement needs Ray: uv pip install ray, or run in one process without it")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, path))}}
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False, runtime_env=runtime_env)
    else:
        # Our processes ask for no CPUs: what shares them is the placement's business.
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)


@contextlib.contextmanager
def placed_trainer(job: Job, placement: Placement, episodes: int) -> Iterator[Trainer]:
    """A trainer whose workers run as `placement` says, on the Ray cluster of RAY_ADDRESS or on this machine alone.
    Raises ValueError when Ray or a node is missing."""
    owned = ray is None or not ray.is_initialized()
    if owned:
        start_ray()
    members: dict[str, list[Any]] = {}
    try:
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        wanted = 1 + max(process.node for processes in placement.values() for process in processes)
        if len(nodes) < wanted:
            raise ValueError(f"component_placement needs {wanted} nodes; the Ray cluster has {len(nodes)}")
        ranks = {name: len(placement[name]) for name in ("actor", "rollout")}

        def options(process: Process) -> dict[str, Any]:
            # GPUs are given by name, not by Ray, so that components may share them.
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, process.devices)) if job.device == "cuda" else ""}
            variables = visible | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            strategy = NodeAffinitySchedulingStrategy(nodes[process.node], soft=False)
            return {"num_cpus": 0, "scheduling_strategy": strategy, "runtime_env": {"env_vars": variables}}

        for name in ranks:
            members[name] = [
                ray.remote(Member).options(**options(process)).remote(job, ranks, name, process.rank)
                for process in placement[name]
            ]
        meeting = ray.get(members["actor"][0].address.remote())
        env_options = [options(process) for process in placement["env"]]
        each = len(env_options) // ranks["rollout"]
        joins = [member.join.remote(meeting, []) for member in members["actor"]]
        for rank, member in enumerate(members["rollout"]):
            joins.append(member.join.remote(meeting, env_options[rank * each : (rank + 1) * each]))
        ray.get(joins)

        def publish(version: int) -> None:
            ray.get([member.share.remote(version) for name in members for member in members[name]])

        crews = RayCrew(members["rollout"]), RayCrew(members["actor"])
        yield Trainer(*crews, job.algo, episodes, job.seed, publish)
    finally:
        # Env processes go with the rollout process that owns them.
        for member in (member for name in members for member in members[name]):
            ray.kill(member)
        if owned:
            ray.shutdown()
