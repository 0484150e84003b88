"""What the arm did in its last 30 seconds, written on a fault; `cotwin robot replay FILE` goes through it again.

The file (.npz, no pickle) holds every state that was read, every action that came with the target before and after it,
what happened in words, the limits and the robot's own description: enough to run each action through the safety layer
once more and see whether it decides the same.
"""

import dataclasses
import json
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from robot import safety
from robot.body import Body
from robot.safety import SafetyLimits, State

SECONDS = 30.0
AFTER_S = 0.5  # of what follows a fault is kept too
MAX_ACTIONS, MAX_EVENTS = 6000, 2000
USAGE = "usage: cotwin robot replay FILE.npz"
STATE = np.dtype(
    [("stamp_ns", "i8"), ("state", "i1"), ("q_rad", "f8", 7), ("T_base_tcp", "f8", (4, 4)), ("wrench_base", "f8", 6)]
    + [("T_base_target", "f8", (4, 4)), ("gripper_opening_m", "f8")]
)
ACTION = np.dtype(
    [("arrived_ns", "i8"), ("stamp_ns", "i8"), ("action", "f8", 7), ("q_rad", "f8", 7)]
    + [("T_before", "f8", (4, 4)), ("T_after", "f8", (4, 4))]
)
STATES = list(State)


class BlackBox:
    """A ring in memory. `add_*` may be called from any thread and never wait for the disk."""

    def __init__(self, rate_hz: float, facts: dict[str, Any]):
        """`facts`: what belongs to every file, as JSON can hold it; may be added to later."""
        self.facts = facts
        self._states: deque[tuple] = deque(maxlen=round(SECONDS * rate_hz))
        self._actions: deque[tuple] = deque(maxlen=MAX_ACTIONS)
        self._events: deque[tuple[int, str]] = deque(maxlen=MAX_EVENTS)
        self._lock = threading.Lock()

    def add_state(self, *row: Any) -> None:
        """The fields of STATE, in order; `state` as a State."""
        with self._lock:
            self._states.append(row)

    def add_action(self, *row: Any) -> None:
        """The fields of ACTION, in order."""
        with self._lock:
            self._actions.append(row)

    def add_event(self, stamp_ns: int, text: str) -> None:
        with self._lock:
            self._events.append((stamp_ns, text))

    def save(self, folder: Path, reason: str) -> Path:
        """Write the ring to a new file of the folder. Raises OSError."""
        with self._lock:
            states, actions, events = list(self._states), list(self._actions), list(self._events)
        first_ns = states[0][0] if states else 0
        rows = [(stamp, STATES.index(state), *rest) for stamp, state, *rest in states]
        facts = self.facts | {"reason": reason, "events": [e for e in events if e[0] >= first_ns]}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"fault_{time.strftime('%Y%m%d_%H%M%S')}_{time.time_ns() % 10**9:09d}.npz"
        with open(path, "xb") as file:
            np.savez(
                file,
                states=np.array(rows, dtype=STATE),
                actions=np.array([a for a in actions if a[0] >= first_ns], dtype=ACTION),
                facts=np.array(json.dumps(facts)),
            )
        return path


@dataclasses.dataclass
class Recording:
    """One file. `facts`: reason, events, limits, period_s, urdf, T_flange_tcp."""

    states: np.ndarray
    actions: np.ndarray
    facts: dict[str, Any]


def load(path: Path) -> Recording:
    """Raises ValueError for a file that is none of ours."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Recording(file["states"], file["actions"], json.loads(str(file["facts"])))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a fault recording: {error}") from error


def replay(recording: Recording) -> tuple[int, list[str]]:
    """Run every action through the safety layer again: how many, and where it decides otherwise than it did."""
    facts, different = recording.facts, []
    limits = SafetyLimits(**facts["limits"])
    body = Body(facts["urdf"], np.array(facts["T_flange_tcp"]), limits) if facts.get("urdf") else None
    for row in recording.actions:
        check = (lambda a, b, q=row["q_rad"]: body.limit(a, b, q, facts["period_s"])) if body is not None else None
        T = safety.safe_step(row["T_before"], row["action"], facts["period_s"], limits, check).T_target
        off = float(np.abs(T - row["T_after"]).max())
        if off > 1e-9:
            different.append(f"action at {row['stamp_ns']}: the target is {off:.2e} elsewhere")
    return len(recording.actions), different


def describe(recording: Recording) -> list[str]:
    """What happened, in lines, with times in seconds before the last state."""
    states, actions, facts = recording.states, recording.actions, recording.facts
    if not len(states):
        return [f"{facts['reason']}: no state was read before it"]
    end_ns, t_s = int(states["stamp_ns"][-1]), states["stamp_ns"] * 1e-9
    force_n = np.linalg.norm(states["wrench_base"][:, :3], axis=1)
    off_mm = 1e3 * np.linalg.norm(states["T_base_target"][:, :3, 3] - states["T_base_tcp"][:, :3, 3], axis=1)
    lines = [
        f"reason: {facts['reason']}",
        f"{len(states)} states over {t_s[-1] - t_s[0]:.2f} s, {len(actions)} actions",
        f"force on the TCP at most {force_n.max():.1f} N; arm behind its target at most {off_mm.max():.1f} mm",
    ]
    changes = np.flatnonzero(np.diff(states["state"], prepend=-1))
    marks = [(int(states["stamp_ns"][i]), f"state {STATES[states['state'][i]]}") for i in changes]
    marks += [(stamp, text) for stamp, text in facts["events"]]
    return lines + [f"{(stamp - end_ns) * 1e-9:+9.3f} s  {text}" for stamp, text in sorted(marks)]


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] != "replay":
        print(f"{USAGE}\n\n{__doc__.strip()}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        recording = load(Path(argv[1]))
        num_actions, different = replay(recording)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(describe(recording)))
    print(f"replayed {num_actions} actions: {len(different) or 'none'} decided otherwise than then")
    print("\n".join(different[:20]))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
