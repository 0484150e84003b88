"""The trainer's workers in processes, placed as `cluster.component_placement` says: on this machine, or on Ray.

    driver: Trainer ── collect ──▶ rollout workers ── reset, step ──▶ env processes
                    ── update ───▶ actors (gradients summed, or sharded, among them)
    samples: rollout worker ──▶ the actor that trains on them       weights: actor 0 ── what changed ──▶ rollout workers

A rollout worker on an actor's GPU is the same process on the same weights: nothing is copied between the two. Each owns
its env processes and replaces those that die. A rollout worker of its own process is replaced when it dies, and what it
had played of the iteration is dropped; the death of an actor ends the run, which goes on from its last saved state.
"""

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# A cluster of our own stays on loopback. Ray asks this variable when it is imported, whatever the platform.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
try:
    import ray
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:  # one machine needs it not
    ray = None

from learner.exchange import Kept, Parcel
from learner.member import Job, Member
from learner.placement_map import Placement, Process, Seat, seated
from learner.remote import Handle, Launcher, Spawn, WorkerDied, local_environment
from learner.rollouts import Rollouts
from learner.trainer import Trainer

log = logging.getLogger(__name__)
MAX_DEATHS = 3  # of all rollout workers in one iteration


class Troupe:
    """All processes of a run but the env processes: starts them, brings them together, replaces rollout workers."""

    def __init__(self, job: Job, placement: Placement, launcher: Launcher):
        self.job, self.placement, self.launcher = job, placement, launcher
        self.seats = seated(placement, job.cluster.shares_weights)
        self.actors = len(placement["actor"])
        self.generation = 0
        self.newcomers = False
        self.sent_bytes = 0  # of weights, to each who only rolls out, the last time
        self.busy_s = dict.fromkeys(placement, 0.0)
        self.lock = threading.RLock()  # an asynchronous run asks from two threads
        self.members: list[Handle] = []
        self.folder = tempfile.TemporaryDirectory(prefix="cotwin-")

    def begin(self) -> None:
        for seat in self.seats:  # one by one, so that none is left behind when a start fails
            self.members.append(self._start(seat))
        self.meeting = f"file:{self.folder.name}/meeting"
        if any(seat.place.node for seat in self.seats):
            self.meeting = self.members[0].call("host", self.launcher.address(self.seats[0].place)).get()
        self._ask(self.members[: self.actors], "join", self.meeting, self._backend(self.seats[: self.actors]))
        self._meet()

    def of_rollouts(self) -> list[Seat]:
        return sorted((seat for seat in self.seats if seat.rollout is not None), key=lambda seat: seat.rollout or 0)

    def publish(self, version: int) -> None:
        """Weights that changed to those who roll out, and their version to all."""
        with self.lock:
            self.revive()
            names = self._ask(self.members[: self.actors], "changed", self.newcomers)[0]
            sent = self._ask(self.members, "share", version, names if len(self.line) > 1 else [])
            self.newcomers, self.sent_bytes = False, sent[0]

    def deliver(self, parts: list[Rollouts]) -> None:
        """Samples to the actors (by rank) that need them and do not keep them."""
        with self.lock:
            parcels = []
            for rank, part in enumerate(parts):
                kept = part.prepared
                assert isinstance(kept, Kept)
                for source in kept.seat.unique().tolist():
                    if source != rank:
                        rows = kept.row[kept.seat == source]
                        parcels.append(Parcel(source, rank, rows, kept.forms[source]))
            self.revive()
            if parcels:
                self._ask(self.members, "trade", parcels)

    def revive(self) -> None:
        """Others for the rollout workers that died; they get their weights with the next `publish`."""
        dead = [seat for seat in self.seats if seat.actor is None and not self.members[seat.number].is_alive()]
        for seat in dead:
            log.warning("%s is started again", seat.name)
            self.members[seat.number] = self._start(seat)
        if dead:
            self.newcomers = True
            self._meet()

    def take_busy(self) -> dict[str, float]:
        """Mean seconds that a process of each component was at work since the last time."""
        spent = {name: seconds / len(self.placement[name]) for name, seconds in self.busy_s.items()}
        self.busy_s = dict.fromkeys(self.busy_s, 0.0)
        return spent

    def note(self, busy_s: dict[str, float]) -> None:
        for name, seconds in busy_s.items():
            self.busy_s[name] += seconds

    def close(self) -> None:
        """Env processes go with the rollout worker that owns them."""
        for member in self.members:
            member.kill()
        self.folder.cleanup()

    def _start(self, seat: Seat) -> Handle:
        envs = self.placement["env"]
        each = len(envs) // len(self.placement["rollout"])
        mine = [] if seat.rollout is None else envs[seat.rollout * each : (seat.rollout + 1) * each]
        arguments = (self.job, seat, self.actors, mine, self.job.envs // len(envs), self.launcher)
        return self.launcher.start(seat.name, Member, arguments, seat.place, self.job.device)

    def _meet(self) -> None:
        self.generation += 1
        self.line = [0, *(seat.number for seat in self.seats if seat.actor is None)]
        self.carrier = self._backend(self.seats) if len(self.seats) > 1 else ""
        if self.carrier:
            self._ask(self.members, "enter", self.meeting, self.generation, len(self.seats), self.line, self.carrier)

    def _backend(self, seats: list[Seat]) -> str:
        """NCCL where each process has a GPU of its own; two of one GPU cannot meet there."""
        if self.job.cluster.carrier:
            return self.job.cluster.carrier
        places = {(seat.place.node, seat.place.devices) for seat in seats}
        return "nccl" if self.job.device == "cuda" and len(places) == len(seats) else "gloo"

    def _ask(self, members: Sequence[Handle], method: str, *arguments: Any) -> list[Any]:
        answers = [member.call(method, *arguments) for member in members]
        return [answer.get() for answer in answers]


class Actors:
    """A `Crew` of update workers."""

    def __init__(self, troupe: Troupe):
        self.troupe = troupe

    def __len__(self) -> int:
        return self.troupe.actors

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self.troupe.lock:
            members = self.troupe.members[: len(self)]
            answers = [member.call(method, *given) for member, given in zip(members, arguments, strict=True)]
            results = [answer.get() for answer in answers]
        if method != "update":
            return results
        for _, busy_s in results:
            self.troupe.note(busy_s)
        return [metrics for metrics, _ in results]


class Players:
    """A `Crew` of rollout workers: those that die in a `collect` give nothing."""

    def __init__(self, troupe: Troupe):
        self.troupe = troupe

    def __len__(self) -> int:
        return len(self.troupe.placement["rollout"])

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert method == "collect"
        for _ in range(MAX_DEATHS):
            found, died = self._collected(arguments)
            if len(died) < len(self):
                return found
            with self.troupe.lock:  # nobody is left to play on: wait for their successors
                self.troupe.revive()
                self.troupe.publish(self.troupe.members[0].call("steps").get())
        raise WorkerDied(f"all rollout workers died {MAX_DEATHS} times: {', '.join(map(str, died))}")

    def _collected(self, arguments: Sequence[tuple[Any, ...]]) -> tuple[list[Any], list[WorkerDied]]:
        seats = self.troupe.of_rollouts()
        members = [self.troupe.members[seat.number] for seat in seats]
        answers = [member.call("collect", *given) for member, given in zip(members, arguments, strict=True)]
        found, died = [], []
        for seat, answer, given in zip(seats, answers, arguments, strict=True):
            try:
                light, busy_s = answer.get()
            except WorkerDied as death:
                if seat.actor is not None:
                    raise
                log.warning("%s: its %d episodes of iteration %d are dropped", death, len(given[2]), given[0])
                light, busy_s = None, {}
                died.append(death)
            found.append(light)
            self.troupe.note(busy_s)
        return found, died


@contextlib.contextmanager
def placed_trainer(job: Job, placement: Placement, episodes: int) -> Iterator[Trainer]:
    """A trainer whose workers run as `placement` says. Raises ValueError when Ray or a node is missing."""
    with opened_launcher(job.cluster.on_ray, placement) as launcher:
        troupe = Troupe(job, placement, launcher)
        try:
            troupe.begin()
            yield Trainer(
                *(Players(troupe), Actors(troupe), job.algo, episodes, job.seed),
                publish=troupe.publish,
                deliver=troupe.deliver,
                take_busy=troupe.take_busy,
                asynchronous=job.cluster.asynchronous,
            )
        finally:
            troupe.close()


@contextlib.contextmanager
def opened_launcher(on_ray: bool, placement: Placement) -> Iterator[Launcher]:
    if not on_ray:
        yield Spawn()
        return
    owned = ray is None or not ray.is_initialized()
    if owned:
        start_ray()
    try:
        nodes = ordered_nodes(ray.nodes(), ray.get_runtime_context().get_node_id())
        wanted = 1 + max(process.node for processes in placement.values() for process in processes)
        if len(nodes) < wanted:
            raise ValueError(f"component_placement needs {wanted} nodes; the Ray cluster has {len(nodes)}")
        yield RayLauncher(nodes)
    finally:
        if owned:
            ray.shutdown()


def ordered_nodes(nodes: list[dict[str, Any]], own_id: str) -> list[tuple[str, str]]:
    """Id and address of each that lives: node 0 is this machine, the others follow by address."""
    alive = [(node["NodeID"], node["NodeManagerAddress"]) for node in nodes if node["Alive"]]
    return sorted(alive, key=lambda node: (node[0] != own_id, node[1], node[0]))


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or begin one on this machine's loopback, for holders of its token."""
    if ray is None:
        raise ValueError("several nodes need Ray: uv pip install ray, or use one machine without it")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, path))}}}
    if address := os.environ.get("RAY_ADDRESS"):
        options["address"] = address
    else:
        # Our processes ask for no CPUs: what shares them is the placement's business.
        options |= {"num_cpus": 1, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(log_to_driver=False, **options)


class RayLauncher:
    """Actors of a Ray cluster. GPUs are given by name, not by Ray, so that components may share them."""

    def __init__(self, nodes: list[tuple[str, str]]):
        """Each with its id and its address."""
        self.nodes = nodes

    def address(self, place: Process) -> str:
        return self.nodes[place.node][1]

    def start(self, name: str, build: Callable[..., Any], arguments: tuple, place: Process, device: str) -> "RayWorker":
        variables = local_environment(place, device) | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        if len(self.nodes) > 1:
            variables = {name: value for name, value in variables.items() if not name.endswith("_SOCKET_IFNAME")}
        strategy = NodeAffinitySchedulingStrategy(self.nodes[place.node][0], soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": strategy, "runtime_env": {"env_vars": variables}}
        return RayWorker(name, ray.remote(_Served).options(**options).remote(build, arguments))


class _Served:
    def __init__(self, build: Callable[..., Any], arguments: tuple):
        self.worker = build(*arguments)

    def answer(self, method: str, arguments: tuple) -> Any:
        return getattr(self.worker, method)(*arguments)


class RayWorker:
    def __init__(self, name: str, actor: Any):
        self.name, self.actor = name, actor

    def call(self, method: str, *arguments: Any) -> "_RayAnswer":
        return _RayAnswer(self.name, self.actor.answer.remote(method, arguments))

    def is_alive(self) -> bool:
        try:
            self.call("__sizeof__").get()
        except WorkerDied:
            return False
        return True

    def kill(self) -> None:
        ray.kill(self.actor)


class _RayAnswer:
    def __init__(self, name: str, reference: Any):
        self.name, self.reference = name, reference

    def get(self) -> Any:
        try:
            return ray.get(self.reference)
        except RayActorError as error:
            raise WorkerDied(f"{self.name} died: {error}") from error
