"""Recorded episodes beside the twin's: how near its pictures are, whether it succeeds too, a film and a plot of both.

A recording says nothing about where object and goal were, but the arm does: where the fingers first held something, and
where they let it go. The twin's bodies start there, so its success is no independent judgement of the place, only of
whether grasp and release work out; an episode in which nothing was held is left out of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.utils.structs import Pose
from matplotlib.figure import Figure

from bridge.dataset import DatasetStore, decode_frames, video_path
from bridge.pictures import area_resize
from bridge.video import write_video
from sim.scan.scores import scores
from sim.twin.config import Randomization, TwinConfig
from sim.twin.replay import Recording, Strayed
from sim.twin.worker import Twin

HELD_M = 0.008  # fingers that are further open than this while they close hold something
STILL_M = 1e-3  # of the opening between two policy steps
SETTLE_STEPS = 5  # after the last recorded action, before success is judged
ZOOM = 2  # of the film


@dataclass
class Beside:
    """Of one episode: mean scores by camera; whether the twin succeeded (None where it had nothing to hold); and its
    pictures by camera, uint8 [H, W, 3], after every `every`-th step."""

    scores: dict[str, dict[str, float]]
    succeeded: bool | None
    frames: list[dict[str, np.ndarray]]


def places(recording: Recording) -> tuple[np.ndarray, np.ndarray] | None:
    """Where object and goal were on the table, each [2] in m; None where the fingers never held anything."""
    opening_m, closing = recording.states[:, 6], recording.actions[:, 6] < 0
    still = np.abs(np.diff(opening_m)) < STILL_M
    held = np.flatnonzero(closing & still & (opening_m[1:] > HELD_M) & (opening_m[1:] < 0.9 * opening_m.max()))
    return (recording.states[held[0] + 1, :2], recording.states[held[-1] + 1, :2]) if len(held) else None


def put(
    twin: Twin, T_base_tcp: np.ndarray, opening_m: float, things_xy_m: tuple[np.ndarray, np.ndarray] | None
) -> None:
    """Begin an episode with arm, object and goal there, or with the arm alone. ValueError where it cannot reach."""
    env = twin.env
    env.bare = things_xy_m is None
    twin.reset(0)
    env.start_arm_at(T_base_tcp, opening_m)
    for body, xy_m in zip((env.object, env.goal), things_xy_m or (), strict=False):
        lying = body._objs[0].pose
        body.set_pose(Pose.create(sapien.Pose([*map(float, xy_m), float(lying.p[2])])))
    twin.facts = env.facts()


def beside(twin: Twin, recording: Recording, recorded: Sequence[dict[str, np.ndarray]], every: int) -> Beside:
    """Replay with object and goal. `recorded`: pictures by camera, at the twin's size, after each step."""
    things = places(recording)
    put(twin, recording.T_base_tcp[0], float(recording.states[0, 6]), things)
    found: dict[str, list[dict[str, float]]] = {}
    frames, succeeded = [], False
    for step, action in enumerate(recording.actions):
        twin.facts = twin.env.policy_step(action)
        succeeded |= twin.facts.success
        if step % every == 0:
            frames.append(twin.pictures())
            for name, picture in frames[-1].items():
                pair = torch.from_numpy(picture), torch.from_numpy(recorded[step][name])
                found.setdefault(name, []).append(scores(*pair))
    for _ in range(SETTLE_STEPS):
        succeeded |= twin.env.policy_step(np.append(np.zeros(6), recording.actions[-1, 6])).success
    means = {name: {key: float(np.mean([one[key] for one in each])) for key in each[0]} for name, each in found.items()}
    return Beside(means, None if things is None else succeeded, frames)


def recorded_frames(store: DatasetStore, index: int, size: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    """The episode's pictures after each policy step, averaged down to `size` (height, width)."""
    rows_a_step = round(store.fps / store.embodiment.policy_rate_hz)
    cameras = {}
    for name in store.embodiment.cameras:
        rows = enumerate(decode_frames(video_path(store.root, name, index)))
        cameras[name] = [area_resize(frame[None], size)[0] for row, frame in rows if row and row % rows_a_step == 0]
    return [dict(zip(cameras, views, strict=True)) for views in zip(*cameras.values(), strict=True)]


def drawing_twins(config: TwinConfig, store: DatasetStore) -> dict[str, Twin]:
    """By renderer: SAPIEN's pictures, and a splat scene's where one is configured. Nothing is drawn at random."""
    still = replace(config, randomization=Randomization(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), home_noise_rad=0.0)
    renders = ("sapien", "splat") if config.splat.scene else ("sapien",)
    return {render: Twin(replace(still, render=render), store.embodiment) for render in renders}


def pictures(
    twins: dict[str, Twin], store: DatasetStore, index: int, recording: Recording, every: int, film: Path
) -> dict[str, Any]:
    """Scores as `<render>_<camera>_<score>`, and `success_agrees` (None: nothing was held). Writes the film."""
    some = next(iter(twins.values())).config
    recorded = recorded_frames(store, index, (some.picture_height, some.picture_width))
    sides = {render: beside(twin, recording, recorded, every) for render, twin in twins.items()}
    found: dict[str, Any] = {
        f"{render}_{camera}_{score}": round(value, 4)
        for render, side in sides.items()
        for camera, means in side.scores.items()
        for score, value in means.items()
    }
    shown = recorded[: len(recording.actions) : every], *(side.frames for side in sides.values())
    rows = (
        np.concatenate([np.concatenate([views[name] for views in moment], axis=1) for name in moment[0]])
        for moment in zip(*shown, strict=True)
    )
    write_video(film, (row.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1) for row in rows), fps=5)
    succeeded = next(iter(sides.values())).succeeded
    agrees = None if succeeded is None else succeeded == store.episodes()[index]["success"]
    return found | {"success_agrees": agrees}


def means(found: list[dict[str, Any]]) -> dict[str, float]:
    """Of each number over the episodes that have it; `success_agrees` becomes a share."""
    keys = [key for key in found[0] if key != "episode"]
    values = {key: [one[key] for one in found if one[key] is not None] for key in keys}
    return {"episodes": len(found)} | {key: round(float(np.mean(each)), 4) for key, each in values.items() if each}


def plot(strayed: Sequence[Strayed], period_s: float, path: Path) -> Path:
    """Distance, angle and difference of the openings over time, a line for each episode."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    for panel, key, unit in zip(panels, ("position_m", "rotation_rad", "opening_m"), ("mm", "mrad", "mm"), strict=True):
        for one in strayed:
            values = getattr(one, key)
            panel.plot(period_s * np.arange(1, len(values) + 1), 1e3 * values)
        panel.set_ylabel(f"{key.split('_')[0]}, {unit}")
    panels[-1].set_xlabel("s")
    figure.savefig(path)
    return path
