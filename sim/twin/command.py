"""Look at the twin, fit it, and scan a cell for it.

cotwin twin selfcheck                      step and draw every task once, by every renderer that runs here
cotwin twin replay root=DATA               recorded episodes in the twin: how far its TCP strays, how near its pictures
                                           are, whether it succeeds too; numbers, a plot and films of both
cotwin twin fit-dynamics root=DATA         how the arm follows and how late: what strays least, tried on other episodes
cotwin twin capture|fit|bind|check         photograph a cell, fit splats to it, cut them, check them (each: --help)
"""

import dataclasses
import importlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bridge.config import command_line, load
from bridge.dataset import DatasetStore
from bridge.errors import BridgeError
from bridge.run_files import write_stage
from sim.splat.config import SplatConfig
from sim.splat.procedural import panda_urdf, tabletop, write
from sim.twin.config import RENDER, TASKS, TwinConfig
from sim.twin.demos import TwinDemosConfig
from sim.twin.replay import Recording, error_m, fit, recordings, replay
from sim.twin.vector_env import TwinVectorEnv
from sim.twin.worker import Twin

ACTIONS = ("selfcheck", "replay", "fit-dynamics")
SCAN = ("capture", "fit", "bind", "check")  # each a module with settings of its own
GROUPS = {"PutCubeOnPlate-v0": ("put_cube", "fr3_tabletop"), "PickPlaceTwin-v1": ("pick_place", "rl_co")}
BACKGROUND = [0.55, 0.6, 0.65]


@dataclass
class TwinCommandConfig:
    """Keys of `cotwin twin`."""

    name: str = "demo"  # the run
    runs_dir: str = "runs"
    root: str = ""  # of the recorded data set; empty: the run's data/stand_in
    episodes: int = 4  # to fit on; replay: all that are replayed
    held_out: int = 4  # further ones, that the fit is judged by
    out: str = ""  # fit-dynamics: the YAML to write; empty: <run>/twin_fit/dynamics.yaml
    pictures_every: int = 5  # replay: policy steps between two that are compared; 0: no pictures, no success
    num_gaussians: int = 3000  # selfcheck: of the procedural splat scenes
    twin: TwinConfig = field(default_factory=TwinConfig)

    def __post_init__(self):
        for key in ("episodes", "held_out"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} {getattr(self, key)}: at least 1")
        if self.pictures_every < 0:
            raise ValueError(f"pictures_every {self.pictures_every}: at least 0")

    @property
    def run(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def data(self) -> Path:
        return Path(self.root) if self.root else self.run / "data" / "stand_in"


def main(argv: list[str]) -> int:
    if argv and argv[0] in SCAN:
        return importlib.import_module(f"sim.scan.{argv[0]}").main(argv[1:])
    action, settings = (argv[0], argv[1:]) if argv and argv[0] in ACTIONS else (None, argv)
    config = command_line("twin", TwinCommandConfig, settings, __doc__)
    if action is None:
        print(f"error: say what to do: cotwin twin {'|'.join(ACTIONS + SCAN)} (cotwin twin --help)", file=sys.stderr)
        return 1
    try:
        return {"selfcheck": selfcheck, "replay": report_replay, "fit-dynamics": fit_dynamics}[action](config)
    except (ValueError, BridgeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def selfcheck(config: TwinCommandConfig) -> int:
    """A table of every task and renderer; 1 where one failed."""
    failed = 0
    print(f"{'task':<20} {'render':<10} {'device':<7} {'chunk ms':>9} {'picture ms':>11}  result")
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            scene = Path(folder) / task
            write(scene, *tabletop(panda_urdf(), config.num_gaussians, TwinConfig(task=task)), BACKGROUND)
            for render in RENDER:
                found = check(task, render, scene)
                failed += found["result"] != "ok"
                print(
                    f"{task:<20} {render:<10} {found['device']:<7} {found['chunk_ms']:>9.0f} "
                    f"{found['picture_ms']:>11.1f}  {found['result']}"
                )
    return int(failed > 0)


def check(task: str, render: str, scene: Path) -> dict[str, Any]:
    """Two environments, one chunk of five steps with its pictures, and what came of it."""
    twin, embodiment = GROUPS[task]
    made = load("twin-demos", TwinDemosConfig, [f"twin={twin}", f"embodiment={embodiment}"])
    options = dataclasses.replace(made.twin, render=render, splat=SplatConfig(scene=str(scene)))
    actions = np.tile(np.float32([0.01, 0.0, -0.01, 0, 0, 0, 1]), (2, 5, 1))
    with TwinVectorEnv(options, made.embodiment, num_envs=2, num_workers=0) as env:
        before = env.reset([1, 2])
        started_s = time.monotonic()
        result = env.step_chunk(actions)
        chunk_s = time.monotonic() - started_s
        started_s = time.monotonic()
        env.step_chunk(np.zeros((2, 0, 7)))
        pictures_s = time.monotonic() - started_s
        device = env.splat_device
    problems = [] if np.isfinite(result.observation.state).all() else ["state is not finite"]
    for name, pictures in result.observation.images.items():
        if pictures.std() < 5:
            problems.append(f"{name} shows nothing")
        if np.array_equal(pictures, before.images[name]):
            problems.append(f"{name} did not change")
    num_pictures = 2 * len(result.observation.images)
    return {
        "device": device or "-",
        "chunk_ms": 1e3 * chunk_s,
        "picture_ms": 1e3 * pictures_s / num_pictures,
        "result": "; ".join(problems) or "ok",
    }


def report_replay(config: TwinCommandConfig) -> int:
    """A table of the episodes; `<run>/twin_replay/` gets all numbers, a plot, and a film of each episode."""
    from sim.twin import replay_report  # draws: slow to import

    started_s, out = time.monotonic(), config.run / "twin_replay"
    store = DatasetStore.open(config.data)
    out.mkdir(parents=True, exist_ok=True)
    twin, chosen = _twin(config, store), range(min(config.episodes, store.num_episodes))
    twins = replay_report.drawing_twins(config.twin, store) if config.pictures_every else {}
    found, strayed = [], []
    print(f"{'episode':>7} {'steps':>6} {'mean mm':>8} {'max mm':>7} {'mean mrad':>10} {'opening mm':>11}")
    for index, recording in zip(chosen, recordings(store, chosen), strict=True):
        s = replay(twin, recording)
        strayed.append(s)
        found.append({"episode": index, "steps": len(s.position_m), **s.figures()})
        print("{episode:>7} {steps:>6} {mean_mm:>8} {max_mm:>7} {mean_mrad:>10} {opening_mm:>11}".format(**found[-1]))
        if twins:
            film = out / f"episode_{index:04d}.mp4"
            found[-1] |= replay_report.pictures(twins, store, index, recording, config.pictures_every, film)
    files = {"replay_error": replay_report.plot(strayed, store.embodiment.period_s, out / "strayed.png")}
    files |= {"replay": film} if twins else {}
    (out / "replay.json").write_text(json.dumps(found, indent=2) + "\n")
    figures = replay_report.means(found)
    write_stage(config.run, "twin_replay", time.monotonic() - started_s, figures, files)
    print(json.dumps(figures, indent=2))
    return 0


def fit_dynamics(config: TwinCommandConfig) -> int:
    started_s = time.monotonic()
    store = DatasetStore.open(config.data)
    needed = config.episodes + config.held_out
    if store.num_episodes < needed:
        raise ValueError(f"{config.data} has {store.num_episodes} episodes: episodes + held_out is {needed}")
    found = recordings(store, range(needed))
    figures = fitted(_twin(config, store), found[: config.episodes], found[config.episodes :])
    out = Path(config.out) if config.out else config.run / "twin_fit" / "dynamics.yaml"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump({key: value for key, value in figures.items() if hasattr(config.twin, key)}))
    write_stage(config.run, "twin_fit", time.monotonic() - started_s, figures, {"dynamics": out})
    print(json.dumps(figures, indent=2))
    return 0


def fitted(twin: Twin, fit_on: list[Recording], held_out: list[Recording]) -> dict[str, float]:
    """What the fit found, and the error before and after it on both sets; the twin keeps the fitted dynamics."""
    before_m = error_m(twin, fit_on), error_m(twin, held_out)
    best = fit(twin, fit_on)
    twin.env.set_arm_dynamics(**best.values)
    after_m = error_m(twin, held_out)
    figures = best.values | {
        "fit_error_mm_before": 1e3 * before_m[0],
        "fit_error_mm_after": 1e3 * best.error_m,
        "held_out_error_mm_before": 1e3 * before_m[1],
        "held_out_error_mm_after": 1e3 * after_m,
        "replay_error_reduction": 1.0 - after_m / before_m[1],
    }
    return {key: round(value, 5) for key, value in figures.items()}


def _twin(config: TwinCommandConfig, store: DatasetStore) -> Twin:
    return Twin(config.twin, store.embodiment, render=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
