"""Scripted demonstrations in the twin, written as a LeRobot data set with the same schema and contract as the robot's.

One row a policy step, both cameras. Only successes are kept. An interrupted run goes on with the next seed.

With `action_noise_m` the twin executes the expert's action plus noise, while the row keeps what the expert wanted: the
data then shows how to come back from small errors (DART), which a few clean demonstrations do not.

`world=stand_in` does the same in the stand-in cell in lock step, for studies that need many demonstrations of it and no
robot side; `cotwin record` is the one that drives the robot. `world=libero` does it in LIBERO, whose Spatial suite the
expert knows: `libero.suite=libero_spatial embodiment=libero`.
"""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bridge.config import command_line, save
from bridge.dataset import DatasetStore, EpisodeWriter, video_path
from bridge.embodiment import Embodiment
from bridge.run_files import append_line, read_lines, write_stage
from bridge.statistics import wilson_interval
from sim.libero.config import LiberoConfig
from sim.pool import in_order
from sim.stand_in.config import CellConfig
from sim.twin.config import TwinConfig
from sim.twin.scripted import behaviour

REPO_IDS = {"PutCubeOnPlate-v0": "cotwin/twin_put_cube_on_plate", "PickPlaceTwin-v1": "cotwin/twin_pick_place"}
WORLDS = ("twin", "stand_in", "libero")
STAGES = {"twin": "twin_demos", "stand_in": "cell_demos", "libero": "libero_demos"}
SEED_BASE = 100_000  # training scenes; evaluations count from other bases


@dataclass
class TwinDemosConfig:
    """Keys of `cotwin twin-demos`."""

    name: str = "demo"  # the run: a folder below `runs_dir`
    runs_dir: str = "runs"
    episodes: int = 120  # kept ones, earlier sessions of this run included
    seed: int = 0
    workers: int = 2  # processes
    world: str = "twin"  # or stand_in, libero
    start_range_m: float = 0.06  # the first target is moved by up to this much on each axis, so that starts differ
    action_noise_m: float = 0.002  # standard deviation, each axis and step, of what is executed but not recorded
    embodiment: Embodiment = field(default_factory=Embodiment)
    twin: TwinConfig = field(default_factory=TwinConfig)
    cell: CellConfig = field(default_factory=CellConfig)  # world=stand_in only
    libero: LiberoConfig = field(default_factory=LiberoConfig)  # world=libero only

    def __post_init__(self):
        if self.world not in WORLDS:
            raise ValueError(f"world {self.world!r}: allowed are {', '.join(WORLDS)}")
        for key, least in (("episodes", 1), ("workers", 1), ("start_range_m", 0.0), ("action_noise_m", 0.0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} {getattr(self, key)}: allowed are {least} and more")

    @property
    def run(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def stage(self) -> str:
        return STAGES[self.world]

    @property
    def domain(self) -> str:
        return "stand_in" if self.world == "stand_in" else "twin"

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height, width."""
        shown = self.libero if self.world == "libero" else self.twin
        return shown.picture_height, shown.picture_width

    @property
    def repo_id(self) -> str:
        if self.world == "libero":
            return f"cotwin/{self.libero.suite}"
        return REPO_IDS[self.twin.task] if self.world == "twin" else "cotwin/stand_in_put_cube_on_plate"

    def make(self) -> Any:
        """What answers to `sim.twin.worker.Episodes`."""
        if self.world != "stand_in":
            return (self.twin if self.world == "twin" else self.libero).make(self.embodiment)
        from sim.stand_in.lockstep import LockStepCell  # brings a MuJoCo that LIBERO's processes must not see

        return LockStepCell(self.cell, self.embodiment, self.twin.max_steps, self.picture_size)


@dataclass(frozen=True)
class Attempt:
    """What one seed came to; `folder` holds the finished episode of a success."""

    seed: int
    success: bool
    steps: int
    folder: str


def main(argv: list[str]) -> None:
    config = command_line("twin-demos", TwinDemosConfig, argv, __doc__)
    save(config, config.run / "config" / "twin-demos.yaml")
    started_s = time.monotonic()
    root = config.run / "data" / config.domain
    rate_hz = int(config.embodiment.policy_rate_hz)
    store = DatasetStore.open_or_create(root, config.repo_id, config.embodiment, rate_hz, config.picture_size)
    attempts_file = config.run / config.stage / "attempts.jsonl"
    episodes_before = store.num_episodes
    fresh_steps = record(config, store, attempts_file)
    wall_s = time.monotonic() - started_s
    attempts = read_lines(attempts_file)
    successes = sum(attempt["success"] for attempt in attempts)
    low, high = wilson_interval(successes, len(attempts))
    figures = {
        "episodes": store.num_episodes,
        "attempts": len(attempts),
        "expert_success_rate": round(successes / len(attempts), 4),
        "expert_wilson_low": round(low, 4),
        "expert_wilson_high": round(high, 4),
        "rows": sum(attempt["steps"] for attempt in attempts if attempt["success"]),
        "steps_per_s": round(fresh_steps / wall_s, 1),
        "episodes_per_s": round((store.num_episodes - episodes_before) / wall_s, 3),
    }
    video = config.run / "videos" / f"{config.domain}_demonstration.mp4"
    video.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(video_path(root, "third_person", 0), video)
    write_stage(config.run, config.stage, wall_s, figures, {"demonstration": video})
    print(json.dumps(figures, indent=2))


def record(config: TwinDemosConfig, store: DatasetStore, attempts_file: Path) -> int:
    """Fill the store up to `config.episodes`; returns the policy steps done now."""
    attempts, steps = read_lines(attempts_file), 0
    if store.num_episodes >= config.episodes:
        return steps
    spool = config.run / config.stage / "spool"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir(parents=True)
    first = SEED_BASE + 1000 * config.seed + len(attempts)
    with tqdm(
        total=config.episodes, initial=store.num_episodes, unit="episode", desc=f"{config.world} demonstrations"
    ) as bar:
        for attempt in _attempts(config, spool, first):
            if attempt.success:
                store.append(Path(attempt.folder))
                shutil.rmtree(attempt.folder)
                bar.update()
            append_line(attempts_file, {"seed": attempt.seed, "success": attempt.success, "steps": attempt.steps})
            steps += attempt.steps
            if store.num_episodes >= config.episodes:
                return steps
    raise AssertionError("seeds do not end")


def _attempts(config: TwinDemosConfig, spool: Path, first_seed: int) -> Iterator[Attempt]:
    """Attempts in the order of their seeds, whatever process made them."""
    return in_order(_attempt, itertools.count(first_seed), config.workers, _begin, (config, str(spool)))


_twin: Any = None  # of this worker process
_config: TwinDemosConfig | None = None
_spool = Path()


def _begin(config: TwinDemosConfig, spool: str) -> None:
    global _twin, _config, _spool
    _config, _spool = config, Path(spool)
    _twin = config.make()


def _attempt(seed: int) -> Attempt:
    assert _twin is not None
    assert _config is not None
    return demonstrate(_twin, _config, seed, _spool / f"{seed:08d}")


def demonstrate(twin: Any, config: TwinDemosConfig, seed: int, folder: Path) -> Attempt:
    """One episode of the expert from a displaced start, written to `folder` when it succeeds."""
    embodiment, period_ns = config.embodiment, round(1e9 / config.embodiment.policy_rate_hz)
    twin.reset(seed)
    rng = np.random.default_rng([seed, 4])  # 1 is the scene's physics, 3 the expert's
    displace(twin, rng, config.start_range_m)
    act = behaviour("expert", twin, seed)
    rate_hz, size = int(embodiment.policy_rate_hz), config.picture_size
    writer = EpisodeWriter(folder, embodiment, rate_hz, twin.instruction, config.domain, size)
    steps = 0
    while not twin.ended:
        action = act()
        row = {
            "observation.state": twin.state,
            "action": action,
            "requested_action": action,
            "capture_stamp_ns": (steps + 1) * period_ns,
        }
        writer.add(twin.pictures(), row)
        twin.step(action + np.append(rng.normal(0.0, config.action_noise_m, 3), [0.0] * 4))
        steps += 1
    if not twin.facts.success:
        writer.discard()
        return Attempt(seed, False, steps, "")
    extra = {"seed": seed, "action_noise_m": config.action_noise_m}
    return Attempt(seed, True, steps, str(writer.close(success=True, extra=extra)))


def displace(twin: Any, rng: np.random.Generator, range_m: float) -> None:
    """Move the arm to a random start near home, before anything is recorded."""
    offset_m = rng.uniform(-range_m, range_m, 3)
    num_steps = 5
    action = np.append(offset_m / num_steps, [0, 0, 0, 1.0])
    for _ in range(num_steps):
        twin.env.policy_step(action)
    twin.facts = twin.env.policy_step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
