"""Recorded episodes in the twin: how far it strays from what the arm did, and the controller that strays least.

The twin starts where the recorded arm did, makes the recorded actions without object or goal on the table, and its TCP
is compared with the recorded one after every policy step. A data set at a multiple of the policy rate is composed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from bridge import pose
from bridge.dataset import DatasetStore, read_episode
from sim.twin.worker import Twin

MAX_LATENCY_S = 0.2
TRIES = 40  # replays of all episodes for each latency


@dataclass(frozen=True)
class Recording:
    """One episode at the policy rate: `actions` [T, 7], and `states` [T + 1, 7] before each and after the last."""

    actions: np.ndarray
    states: np.ndarray

    @property
    def T_base_tcp(self) -> np.ndarray:
        """[T + 1, 4, 4]."""
        return pose.pose(self.states[:, :3], pose.matrix_from_rpy(self.states[:, 3:6]))


@dataclass(frozen=True)
class Strayed:
    """After each of T steps: distance of both TCPs, angle between them, difference of the openings."""

    position_m: np.ndarray
    rotation_rad: np.ndarray
    opening_m: np.ndarray

    def figures(self) -> dict[str, float]:
        means = {"mean_mm": self.position_m.mean(), "max_mm": self.position_m.max()}
        means |= {"mean_mrad": self.rotation_rad.mean(), "opening_mm": np.abs(self.opening_m).mean()}
        return {key: round(1e3 * float(value), 2) for key, value in means.items()}


@dataclass(frozen=True)
class Dynamics:
    """`values` of the twin's configuration that say how the arm follows. `error_m`: mean distance over the episodes
    fitted on."""

    values: dict[str, float]
    error_m: float


def recordings(store: DatasetStore, episodes: Sequence[int]) -> list[Recording]:
    rows_a_step = round(store.fps / store.embodiment.policy_rate_hz)
    return [composed(read_episode(store.root, index), rows_a_step) for index in episodes]


def composed(rows: dict[str, np.ndarray], rows_a_step: int) -> Recording:
    """Rows compose: a row's action is the motion of the commanded target until the next row."""
    action, state = rows["action"].astype(np.float64), rows["observation.state"].astype(np.float64)
    num = (len(action) - 1) // rows_a_step
    steps = action[: num * rows_a_step].reshape(num, rows_a_step, pose.ACTION_DIM)
    return Recording(pose.compose(steps), state[: num * rows_a_step + 1 : rows_a_step])


def replay(twin: Twin, recording: Recording) -> Strayed:
    """Raises ValueError where the recorded start is out of the twin's reach."""
    env, T_recorded = twin.env, recording.T_base_tcp
    env.bare = True
    twin.reset(0)
    env.start_arm_at(T_recorded[0], float(recording.states[0, 6]))
    seen = [env.policy_step(action) for action in recording.actions]
    env.bare = False
    T_twin = np.stack([facts.T_base_tcp for facts in seen])
    return Strayed(
        position_m=np.linalg.norm(T_twin[:, :3, 3] - T_recorded[1:, :3, 3], axis=1),
        rotation_rad=pose.rotation_angle(np.swapaxes(T_twin[:, :3, :3], 1, 2) @ T_recorded[1:, :3, :3]),
        opening_m=np.array([facts.gripper_opening_m for facts in seen]) - recording.states[1:, 6],
    )


def error_m(twin: Twin, episodes: Sequence[Recording]) -> float:
    """Mean distance of the TCPs over all steps of all episodes."""
    return float(np.concatenate([replay(twin, recording).position_m for recording in episodes]).mean())


FITTED = {"plans": ("arm_acceleration_rad_s2",), "drives": ("arm_stiffness", "arm_damping")}


def fit(twin: Twin, episodes: Sequence[Recording]) -> Dynamics:
    """How the arm follows, and how late, with the smallest `error_m`. The twin keeps its own.

    Latency comes in physics steps, so it is walked up while it helps; the rest (`FITTED`) is searched for each
    (Nelder-Mead on logarithms, from the best so far).
    """
    own, step_s = twin.env.twin, 1.0 / twin.config.sim_freq
    names = FITTED[own.arm_follows]
    start = np.log([getattr(own, name) for name in names])
    best: Dynamics | None = None
    worse = 0

    def values(logs: np.ndarray, latency_s: float) -> dict[str, float]:
        return dict(zip(names, map(float, np.exp(logs)), strict=True)) | {"latency_s": latency_s}

    def strays(logs: np.ndarray, latency_s: float) -> float:
        twin.env.set_arm_dynamics(**values(logs, latency_s))
        return error_m(twin, episodes)

    for delay in range(round(MAX_LATENCY_S / step_s) + 1):
        simplex = start + np.vstack([np.zeros(len(names)), 0.7 * np.diag([1.0, -1.0][: len(names)])])
        options = {"initial_simplex": simplex, "maxfev": TRIES, "xatol": 0.02, "fatol": 1e-5}
        found = minimize(strays, start, args=(delay * step_s,), method="Nelder-Mead", options=options)
        if best is None or found.fun < best.error_m:
            best, start, worse = Dynamics(values(found.x, delay * step_s), float(found.fun)), found.x, 0
        else:
            worse += 1
        if worse == 2:
            break
    twin.env.set_arm_dynamics(latency_s=own.latency_s, **{name: getattr(own, name) for name in names})
    assert best is not None
    return best
