"""One process of a placed run: a rollout worker, an update worker, or both on one copy of the weights.

Samples stay with the rollout worker that made them; the trainer sees all but their model inputs, and those that another
process trains on go there directly (learner.exchange).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from learner.exchange import Exchange, Pantry, Parcel, open_store
from learner.pi0.graphs import Graphed
from learner.placement_map import ClusterConfig, Process, Seat
from learner.remote import Handle, Launcher
from learner.remote_envs import EnvProcess, RemoteEnvs
from learner.rollouts import Rollouts, VectorEnv
from learner.sharding import shard
from learner.trainer import RolloutWorker, UpdateWorker
from learner.update import AlgoConfig
from learner.weight_sync import WeightSource, receive

if TYPE_CHECKING:
    from learner.film import Film


@dataclass(frozen=True)
class Job:
    """What every process needs to build its worker; the functions must be importable everywhere."""

    make_policy: Callable[[str], Any]  # device -> policy, the same everywhere
    make_env: Callable[[int, int], VectorEnv]  # (environments, seed) -> environments in the calling process
    make_demos: Callable[[Any, int, int], Any]  # (policy, rank, ranks) -> Mixture or None
    algo: AlgoConfig
    envs: int
    stages: int
    seed: int
    threads: int
    device: str
    cluster: ClusterConfig


class Member:
    """`env_places`: of this process's own env processes, in pipeline stages."""

    def __init__(self, job: Job, seat: Seat, actors: int, env_places: list[Process], envs: int, launcher: Launcher):
        torch.set_num_threads(job.threads)
        self.job, self.seat, self.actors = job, seat, actors
        self.policy = job.make_policy(job.device)
        self.pantry = Pantry(seat.number)
        self.came: dict[int, Rollouts] = {}
        self.player = self.learner = self.exchange = self.line = None
        if seat.rollout is not None:
            size, first = len(env_places) // job.stages, seat.rollout * len(env_places)
            starts = [self._starter(place, envs, first + k, launcher) for k, place in enumerate(env_places)]
            stages = [RemoteEnvs(starts[k * size : (k + 1) * size], envs) for k in range(job.stages)]
            self.player = RolloutWorker(self.policy, stages, job.algo, job.seed, seat.rollout)

    def host(self, address: str) -> str:
        """Where the members of several machines meet; asked of seat 0, whose machine has this address."""
        self.store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return f"tcp:{address}:{self.store.port}"

    def join(self, meeting: str, backend: str) -> None:
        """Actors meet for good, and build their workers."""
        if self.seat.actor is None:
            return
        rank, job, group = self.seat.actor, self.job, None
        if self.actors > 1 or job.cluster.sharded:
            store = dist.PrefixStore("actors", open_store(meeting))
            # What is counted goes over gloo, gradients of GPUs over NCCL where each actor has its own.
            both = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
            dist.init_process_group(both, store=store, rank=rank, world_size=self.actors)
            group = dist.group.WORLD
        if job.cluster.sharded:
            shard(self.policy, job.device, self.actors)
        demos = job.make_demos(self.policy, rank, self.actors)
        self.learner = UpdateWorker(self.policy, job.algo, demos, job.seed, group, rank)
        self.weights = WeightSource(self.policy)

    def enter(self, meeting: str, generation: int, seats: int, line: list[int], backend: str) -> None:
        """All members' exchange of samples, and among `line` (seat 0 and who gets weights from it) that of weights."""
        self.exchange = Exchange(meeting, f"{generation}/samples", self.seat.number, seats, backend)
        if self.seat.number in line:
            mine = line.index(self.seat.number)
            self.line = Exchange(meeting, f"{generation}/weights", mine, len(line), backend)

    # -- what a rollout worker is asked ------------------------------------------------------------------------------

    def collect(
        self, iteration: int, attempt: int, seeds: list[int], film: "Film | None" = None
    ) -> tuple[Rollouts | None, dict[str, float]]:
        """As `RolloutWorker.collect`, but the samples' model inputs stay here until the next iteration's begin; and the
        seconds of work of rollout and environments."""
        if attempt == 0:
            self.pantry.clear()
        self._begin(rolling_out=True)
        began_s, waited_s, busy_s = time.perf_counter(), self._env_seconds("waited_s"), self._env_seconds("busy_s")
        rollouts = self.player.collect(iteration, attempt, seeds, film)
        light = None if rollouts is None else self.pantry.keep(rollouts)
        rollout_s = time.perf_counter() - began_s - (self._env_seconds("waited_s") - waited_s)
        self._rest()
        return light, {"rollout": rollout_s, "env": self._env_seconds("busy_s") - busy_s}

    # -- what an update worker is asked ------------------------------------------------------------------------------

    def update(
        self, iteration: int, part: Rollouts, batches: list[torch.Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """As `UpdateWorker.update`, of samples kept here and of those that `trade` brought; and the seconds of work."""
        self._begin(rolling_out=False)
        began_s = time.perf_counter()
        metrics = self.learner.update(iteration, self._gathered(part), batches)
        self.came = {}
        return metrics, {"actor": time.perf_counter() - began_s}

    def bundle(self) -> dict[str, bytes]:
        if not self.job.cluster.sharded:
            return self.learner.bundle()
        weights = self.learner.state_dict()["policy"]
        if self.seat.number:
            return {}
        plain = self.job.make_policy("cpu")
        plain.load_state_dict(weights)
        return UpdateWorker(plain, self.job.algo, None, self.job.seed).bundle()

    def steps(self) -> int:
        return self.learner.steps()

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)

    # -- what all are asked ------------------------------------------------------------------------------------------

    def trade(self, parcels: list[Parcel]) -> None:
        """Samples to whom they are needed by."""
        self.came = self.pantry.trade(parcels, self.exchange)

    def changed(self, everything: bool) -> list[str]:
        return self.weights.changed(everything)

    def share(self, version: int, names: list[str]) -> int:
        """Seat 0 sends weights, those who only roll out receive; the bytes that each got."""
        sent = 0
        if self.learner:
            sent = self.weights.send(names, self.line if self.seat.number == 0 else None)
        else:
            receive(self.policy, names, self.line)
        if self.player:
            self.player.version = version
        return sent

    def close(self) -> None:
        for env in self.player.envs if self.player else ():
            env.close()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _gathered(self, part: Rollouts) -> Rollouts:
        """`part` with what it was kept without, all on one device."""
        kept, pieces, order = part.prepared, [], []
        host = getattr(self.policy.config, "prefix_cache", "device") == "host"
        device = "cpu" if host else self.job.device
        for seat in kept.seat.unique().tolist():
            mine = (kept.seat == seat).nonzero()[:, 0]
            piece = self.pantry.rows(kept.row[mine]) if seat == self.seat.number else self.came[seat]
            pieces.append(piece.to(device))
            order.append(mine)
        samples = Rollouts.concatenate(pieces)[torch.cat(order).argsort()]
        return replace(samples, advantages=part.advantages.to(device))

    def _begin(self, rolling_out: bool) -> None:
        """With `cluster.offload`: moments of the optimiser are on the GPU for updates alone, weights of a process that
        only rolls out for rollouts alone."""
        if self.job.cluster.offload and self.learner:
            self.learner.move_moments("cpu" if rolling_out else self.job.device)
        elif self.job.cluster.offload:
            self.policy.to(self.job.device)

    def _rest(self) -> None:
        if self.job.cluster.offload and not self.learner:
            for part in vars(self.policy).values():
                if isinstance(part, Graphed):
                    part.clear()  # they hold on to addresses
            self.policy.to("cpu")

    def _env_seconds(self, name: str) -> float:
        return sum(getattr(env, name) for env in self.player.envs) if self.player else 0.0

    def _starter(self, place: Process, envs: int, number: int, launcher: Launcher) -> Callable[[], Handle]:
        job = self.job
        arguments = (job.make_env, envs, job.seed + number)
        return lambda: launcher.start(f"env {number}", EnvProcess, arguments, place, job.device)
