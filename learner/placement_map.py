"""Who runs where: `cluster.component_placement`, parsed and checked. Pure; `learner.placement` acts on it.

    {"env,rollout,actor": "all"}                        all on every GPU (collocated)
    {"env": "0-3", "rollout": "4-7", "actor": "0-7"}    hybrid
    {"env": "0-1", "rollout": "2-5", "actor": "6-7"}    disaggregated
    {"env": "0-1:0-7", ...}                             process ranks: four env processes on each of GPUs 0 and 1

A key is one component or several; a value is hardware ranks, `all` or numbers and ranges, each optionally followed by
`:` and the process ranks on them. Hardware ranks count GPUs through all nodes (without GPUs: CPU slots).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

COMPONENTS = ("env", "rollout", "actor")
LAUNCHERS = ("", "processes", "ray")
CARRIERS = ("", "nccl", "gloo")


@dataclass
class ClusterConfig:
    """What there is to run on, and who runs where. Without a placement everything runs in one process."""

    num_nodes: int = 1
    gpus_per_node: int = 0  # 0: those found here; a machine without GPUs counts as one slot
    component_placement: dict[str, Any] = field(default_factory=dict)
    launcher: str = ""  # processes of this machine, or ray; empty: ray for several nodes or where RAY_ADDRESS is set
    carrier: str = ""  # of samples, weights and gradients: nccl, gloo; empty: nccl where each process has its own GPU
    sharded: bool = False  # actors share weights that train, gradients and moments (FSDP2); else whole copies
    offload: bool = False  # what waits for its turn leaves the GPU: whole moments, weights that only roll out
    asynchronous: bool = False  # the next iteration is played while this one's update runs: samples one update old

    def __post_init__(self):
        if self.num_nodes < 1 or self.gpus_per_node < 0:
            raise ValueError(f"num_nodes {self.num_nodes}, gpus_per_node {self.gpus_per_node}: at least 1 and 0")
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"launcher {self.launcher!r}: allowed are {', '.join(filter(None, LAUNCHERS))} or nothing")
        if self.carrier not in CARRIERS:
            raise ValueError(f"carrier {self.carrier!r}: allowed are {', '.join(filter(None, CARRIERS))} or nothing")
        if self.num_nodes > 1 and self.launcher == "processes":
            raise ValueError(f"launcher processes reaches one machine, not num_nodes {self.num_nodes}: use ray")
        asked = [name for name in ("sharded", "offload", "asynchronous") if getattr(self, name)]
        if asked and not self.component_placement:
            raise ValueError(f"cluster.{', cluster.'.join(asked)} need a cluster.component_placement")
        if self.offload and self.asynchronous:
            raise ValueError("cluster.offload and cluster.asynchronous: components that work at once wait for no turn")

    @property
    def shares_weights(self) -> bool:
        """A rollout worker on an actor's GPU uses its weights: not while they are in shards or being written."""
        return not (self.sharded or self.asynchronous)

    @property
    def on_ray(self) -> bool:
        return self.launcher == "ray" or (not self.launcher and (self.num_nodes > 1 or "RAY_ADDRESS" in os.environ))


@dataclass(frozen=True)
class Process:
    """One process of a component: its rank there, its node, and its GPUs on that node."""

    rank: int
    node: int
    devices: tuple[int, ...]


Placement = dict[str, list[Process]]


@dataclass(frozen=True)
class Seat:
    """One process's part. `number` counts all processes, actors first; None: it is no actor, or no rollout worker."""

    number: int
    place: Process
    actor: int | None
    rollout: int | None

    @property
    def name(self) -> str:
        parts = {"actor": self.actor, "rollout": self.rollout}
        return " and ".join(f"{part} {rank}" for part, rank in parts.items() if rank is not None)


def parse(placement: Mapping[str, Any], num_nodes: int, per_node: int) -> Placement:
    """Processes of each component, by rank. Raises ValueError naming the entry, what is wrong and what is allowed."""
    found: Placement = {}
    for key, value in placement.items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"component_placement {key!r}: node groups describe hardware that is not a GPU; robots are not placed "
                "here, they connect over the bridge (cotwin serve, cotwin push)"
            )
        for name in (part.strip() for part in str(key).split(",")):
            if name not in COMPONENTS:
                raise ValueError(f"component_placement {key!r}: {name!r} is none of {', '.join(COMPONENTS)}")
            if name in found:
                raise ValueError(f"component_placement: {name!r} is placed twice")
            found[name] = _processes(f"component_placement {key!r}: {value!r}", str(value), num_nodes, per_node)
    if missing := [name for name in COMPONENTS if name not in found]:
        raise ValueError(f"component_placement lacks {', '.join(missing)}: all of {', '.join(COMPONENTS)} need a place")
    return {name: found[name] for name in COMPONENTS}


def _processes(where: str, text: str, num_nodes: int, per_node: int) -> list[Process]:
    total, processes = num_nodes * per_node, []
    for segment in text.replace(" ", "").split(","):
        hardware_text, _, ranks_text = segment.partition(":")
        hardware = list(range(total)) if hardware_text == "all" else _range(where, hardware_text)
        if hardware[-1] >= total:
            raise ValueError(f"{where}: hardware rank {hardware[-1]}, there are 0 to {total - 1}")
        ranks = _range(where, ranks_text) if ranks_text else [len(processes) + i for i in range(len(hardware))]
        if ranks[0] != len(processes):
            raise ValueError(f"{where}: process ranks must go on from {len(processes)}, not from {ranks[0]}")
        if len(ranks) % len(hardware) and len(hardware) % len(ranks):
            raise ValueError(
                f"{where}: {len(ranks)} processes on {len(hardware)} GPUs: one number must divide the other"
            )
        for position, rank in enumerate(ranks):
            first = position * len(hardware) // len(ranks)
            mine = hardware[first : first + max(len(hardware) // len(ranks), 1)]
            if len({rank // per_node for rank in mine}) > 1:
                raise ValueError(f"{where}: process {rank} would span two nodes ({per_node} GPUs each)")
            processes.append(Process(rank, mine[0] // per_node, tuple(rank % per_node for rank in mine)))
    return processes


def _range(where: str, text: str) -> list[int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match or (match[2] and int(match[2]) < int(match[1])):
        raise ValueError(f"{where}: {text!r} is neither `all`, a number nor a range such as 0-3")
    return list(range(int(match[1]), int(match[2] or match[1]) + 1))


def require_fit(placement: Placement, envs: int, stages: int, batch_size: int) -> None:
    """Raises ValueError when the work does not divide over the processes."""
    counts = {name: len(processes) for name, processes in placement.items()}
    groups = counts["rollout"] * stages
    if counts["env"] % groups:
        raise ValueError(
            f"{counts['env']} env processes for {counts['rollout']} rollout processes in {stages} pipeline stages: "
            f"must be a multiple of {groups}"
        )
    if envs % counts["env"]:
        raise ValueError(f"envs {envs}: must be a multiple of the {counts['env']} env processes")
    if batch_size % counts["actor"]:
        raise ValueError(f"algo.batch_size {batch_size}: must be a multiple of the {counts['actor']} actor processes")
    for name in ("rollout", "actor"):
        if wide := [process.rank for process in placement[name] if len(process.devices) > 1]:
            raise ValueError(
                f"{name} processes {wide} have several GPUs each: a policy runs on one; use one process a GPU"
            )


def seated(placement: Placement, shares_weights: bool) -> list[Seat]:
    """The processes of rollout workers and actors, actors first. With `shares_weights` a rollout worker whose GPU has
    an actor is in the actor's process."""
    seats = [Seat(process.rank, process, process.rank, None) for process in placement["actor"]]
    for process in placement["rollout"]:
        where = (process.node, process.devices)
        hosts = [s for s in seats if s.rollout is None and (s.place.node, s.place.devices) == where]
        if shares_weights and hosts:
            seats[hosts[0].number] = replace(hosts[0], rollout=process.rank)
        else:
            seats.append(Seat(len(seats), process, None, process.rank))
    return seats


def described(placement: Placement, cluster: ClusterConfig, gpus: bool) -> list[str]:
    """A line for each process."""
    kind = "GPU" if gpus else "CPU slot"
    named = [(f"env {p.rank}", p) for p in placement["env"]]
    named += [(seat.name, seat.place) for seat in seated(placement, cluster.shares_weights)]
    return [f"{name}: node {p.node}, {kind} {', '.join(map(str, p.devices))}" for name, p in named]
