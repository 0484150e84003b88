"""Plans of an evaluation: which scenes, which policies, in which order; and a switch that hides which policy is on.

    seed: 7                     # of the order
    scenes: {first: 1000, count: 20}     # or a list of numbers
    policies: {old: "tcp://127.0.0.1:5601", new: "tcp://127.0.0.1:5611"}

Every policy meets every scene. Scenes come in a shuffled order, and within each the policies too, so that what drifts
(light, wear, the person) meets all policies alike.
"""

import contextlib
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import yaml

PIECE = 65536


@dataclass(frozen=True)
class Plan:
    """`trials`: (scene's seed, name of the policy), in the order in which they are run."""

    trials: list[tuple[int, str]]
    policies: dict[str, str]


def load_plan(path: Path) -> Plan:
    """Raises ValueError naming the key."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"plan {path}: {error}") from error
    keys = {"seed", "scenes", "policies"}
    if not isinstance(content, dict) or set(content) != keys:
        raise ValueError(f"plan {path}: its keys are {sorted(keys)}, got {sorted(content or {})}")
    scenes = _scenes(content["scenes"], path)
    policies: dict[str, str] = content["policies"]
    if not isinstance(policies, dict) or not policies:
        raise ValueError(f"plan {path}: policies names at least one endpoint")
    for name, endpoint in policies.items():
        if urlsplit(str(endpoint)).scheme != "tcp" or not urlsplit(str(endpoint)).port:
            raise ValueError(f"plan {path}: policy {name}: {endpoint!r} is not like tcp://127.0.0.1:5601")
    rng = np.random.default_rng(content["seed"])
    names = sorted(policies)
    trials = [(int(scene), names[k]) for scene in rng.permutation(scenes) for k in rng.permutation(len(names))]
    return Plan(trials, dict(policies))


def _scenes(given: Any, path: Path) -> list[int]:
    if isinstance(given, dict) and set(given) == {"first", "count"}:
        given = list(range(given["first"], given["first"] + given["count"]))
    if not isinstance(given, list) or not given or not all(isinstance(scene, int) for scene in given):
        raise ValueError(f"plan {path}: scenes is a list of numbers, or {{first: N, count: N}}")
    if len(set(given)) != len(given):
        raise ValueError(f"plan {path}: a scene is named twice; repeated trials of one scene are not independent")
    return given


class Switch:
    """A TCP port on loopback that leads to one policy server at a time. Whoever connects cannot tell which.

    `choose` cuts what is connected; the policy client connects and shakes hands anew, as after a server's restart.
    """

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._goal: tuple[str, int] | None = None
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="policy-switch", daemon=True).start()

    def choose(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        with self._lock:
            self._goal = (parts.hostname or "", parts.port or 0)
            self._cut()

    def close(self) -> None:
        self._listener.close()
        with self._lock:
            self._goal = None
            self._cut()

    def _cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open = []

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                goal = self._goal
            try:
                theirs = socket.create_connection(goal, timeout=2.0) if goal else None
            except OSError:
                theirs = None
            with self._lock:
                if theirs is None or goal != self._goal:
                    for end in (ours, theirs):
                        if end is not None:
                            end.close()
                    continue
                theirs.settimeout(None)
                self._open += [ours, theirs]
            for source, sink in ((ours, theirs), (theirs, ours)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(PIECE):
            sink.sendall(piece)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
