"""Success of a checkpoint in the twin or in LIBERO: seeded episodes, deterministic actions, an interval that says how
sure it is, for each task where there are several. An interrupted evaluation goes on where it was.

`libero.suite=libero_spatial episodes=500` walks all starts of a suite.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bridge import durable
from bridge.checkpoint import verify_bundle
from bridge.config import command_line, errors_in_one_line
from bridge.run_files import RunConfig, append_line, read_lines, write_stage
from bridge.statistics import success_figures, wilson_interval
from bridge.video import write_video
from learner.load import load_policy
from learner.policy import ObservationBatch, Policy
from learner.rollouts import VectorEnv, Views, is_over
from sim.libero.config import LiberoConfig
from sim.twin.config import TwinConfig
from sim.twin.vector_env import TwinVectorEnv


@dataclass
class TwinEvalConfig(RunConfig):
    """Keys of `cotwin twin-eval`."""

    stage: str = "twin_eval"
    checkpoint: str = ""  # bundle folder; empty: the run's newest
    episodes: int = 20
    seed: int = 0  # episode k starts from seed + k
    envs: int = 4
    workers: int = 2  # processes that share them
    video: bool = True  # of the first episode, one picture a policy query
    resume: bool = True  # an interrupted evaluation of the same checkpoint and settings
    threads: int = 2
    device: str = "cpu"
    twin: TwinConfig = field(default_factory=TwinConfig)
    libero: LiberoConfig = field(default_factory=LiberoConfig)  # with a suite: in place of the twin

    def __post_init__(self):
        if self.episodes < 1:
            raise ValueError(f"episodes {self.episodes}: at least 1")

    @property
    def simulator(self) -> TwinConfig | LiberoConfig:
        return self.libero if self.libero.suite else self.twin


@errors_in_one_line()
def main(argv: list[str]) -> int:
    config = command_line("twin-eval", TwinEvalConfig, argv, __doc__)
    torch.set_num_threads(config.threads)
    figures = evaluate(config)
    for name, line in figures.items():
        if name.startswith("task: "):
            print(f"{line:<26} {name.removeprefix('task: ')}")
    low, high = figures["wilson_low"], figures["wilson_high"]
    print(f"version {figures['version']}: {figures['successes']} of {figures['trials']} ({low:.0%} to {high:.0%})")
    return 0


def evaluate(config: TwinEvalConfig) -> dict[str, Any]:
    """The whole stage; returns its figures. An interrupted one goes on with the episodes that are missing."""
    started_s = time.monotonic()
    folder = config.bundle(config.checkpoint)
    version = verify_bundle(folder).version
    trials = config.run / "eval" / f"{config.stage}.jsonl"
    partial = trials.with_suffix(".partial")
    settings = json.loads(json.dumps({"checkpoint": str(folder), "version": version} | asdict(config.simulator)))
    done = unfinished(partial, settings) if config.resume else []
    if not done:
        partial.unlink(missing_ok=True)
        append_line(partial, settings)
    wanted = range(config.seed, config.seed + config.episodes)
    seeds = sorted(set(wanted) - {trial["seed"] for trial in done})
    frames = []
    if seeds:
        policy = load_policy(folder, config.device)
        count, workers = min(config.envs, len(seeds)), min(config.workers, len(seeds))
        env = TwinVectorEnv(config.simulator, policy.embodiment, count, workers, config.seed, auto_reset=False)
        with contextlib.closing(env):
            for trial in run_episodes(env, policy, seeds, frames if config.video else None):
                append_line(partial, trial)
                done.append(trial)
    done = sorted((trial for trial in done if trial["seed"] in wanted), key=lambda trial: trial["seed"])
    durable.write_text(trials, "".join(json.dumps(trial) + "\n" for trial in done))
    partial.unlink()
    files = {"trials": trials}
    if frames:
        files["video"] = trials.with_suffix(".mp4")
        write_video(files["video"], iter(frames), fps=5)
    figures = {"version": version, "episode_len": float(np.mean([trial["steps"] for trial in done]))}
    figures |= success_figures(sum(trial["success"] for trial in done), len(done)) | by_task(done)
    write_stage(config.run, config.stage, time.monotonic() - started_s, figures, files)
    return figures


def unfinished(partial: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Trials of an interrupted evaluation. Raises ValueError when it was another one."""
    lines = read_lines(partial)
    if lines and lines[0] != settings:
        keys = sorted(settings.keys() | lines[0].keys())
        changed = [key for key in keys if settings.get(key) != lines[0].get(key)]
        raise ValueError(f"{partial} was begun with other values of {changed}; use them again or set resume=false")
    return lines[1:]


def counted(trials: Sequence[dict[str, Any]]) -> tuple[int, float, float]:
    """Successes and their rate's 95 % interval."""
    successes = sum(trial["success"] for trial in trials)
    return successes, *wilson_interval(successes, len(trials))


def by_task(trials: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A line for each instruction, where there are several."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        tasks.setdefault(trial["instruction"], []).append(trial)
    lines = {}
    for task, own in tasks.items() if len(tasks) > 1 else ():
        successes, low, high = counted(own)
        lines[f"task: {task}"] = f"{successes} of {len(own)} ({low:.0%} to {high:.0%})"
    return lines


def run_episodes(
    env: VectorEnv, policy: Policy, seeds: Sequence[int], frames: list[np.ndarray] | None
) -> Iterator[dict[str, Any]]:
    """One episode a seed; where one ends, the next seed begins. `frames` gets the first one's pictures, cameras side by
    side."""
    generator = torch.Generator().manual_seed(seeds[0])
    left = list(seeds)[::-1]
    seen: dict[int, Look] = {}  # of the environments that are at work
    filming = frames is not None

    def begin(envs: list[int]) -> None:
        chosen = envs[: len(left)]
        if chosen:
            seen.update(looks(env.reset([left.pop() for _ in chosen], chosen), chosen))

    begin(list(range(env.num_envs)))
    with tqdm(total=len(seeds), desc="episodes", unit="episode") as bar:
        while seen:
            active = sorted(seen)
            actions = policy.infer(stacked([seen[i] for i in active]), generator)
            if filming:
                frames.append(np.concatenate([picture for _, picture in sorted(seen[0].images.items())], axis=1))
            result = env.step_chunk(actions[:, : policy.num_action_chunks].numpy(), active)
            said = {env: look.instruction for env, look in seen.items()}
            seen.update(looks(result.observation, active))
            if result.lost.any():
                raise ValueError("an environment's process died, and its episodes with it; the same command goes on")
            for row in np.flatnonzero(is_over(result)):
                seed, length = int(result.seeds[row]), int(result.episode_len[row])
                filming &= active[row] != 0
                yield {"seed": seed, "success": bool(result.success[row]), "steps": length} | {
                    "instruction": said[active[row]]
                }
                del seen[active[row]]
                begin([active[row]])
                bar.update()


@dataclass(frozen=True)
class Look:
    """What one environment shows."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str


def looks(views: Views, envs: list[int]) -> dict[int, Look]:
    return {
        env: Look(
            {name: pictures[row] for name, pictures in views.images.items()}, views.state[row], views.instruction[row]
        )
        for row, env in enumerate(envs)
    }


def stacked(views: list[Look]) -> ObservationBatch:
    images = {name: torch.from_numpy(np.stack([v.images[name] for v in views])) for name in views[0].images}
    state = torch.from_numpy(np.stack([v.state for v in views]))
    return ObservationBatch(images, state, [v.instruction for v in views])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
