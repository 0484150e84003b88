"""Success of a checkpoint in the twin: seeded episodes, deterministic actions, an interval that says how sure it is."""

import contextlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bridge.checkpoint import latest_bundle, verify_bundle
from bridge.config import command_line
from bridge.errors import BridgeError
from bridge.run_files import append_line, write_stage
from bridge.statistics import wilson_interval
from bridge.video import write_video
from learner.load import load_policy
from learner.policy import ObservationBatch, Policy
from learner.rollouts import Episode, VectorEnv, Views, is_over
from sim.twin.config import TwinConfig
from sim.twin.vector_env import TwinVectorEnv


@dataclass
class TwinEvalConfig:
    """Keys of `cotwin twin-eval`."""

    name: str = "demo"
    runs_dir: str = "runs"
    stage: str = "twin_eval"
    checkpoint: str = ""  # bundle folder; empty: the run's newest
    episodes: int = 20
    seed: int = 0  # episode k starts from seed + k
    envs: int = 4  # twins
    workers: int = 2  # processes that share them
    video: bool = True  # of the first episode, one picture a policy query
    threads: int = 2
    device: str = "cpu"
    twin: TwinConfig = field(default_factory=TwinConfig)

    def __post_init__(self):
        if self.episodes < 1:
            raise ValueError(f"episodes {self.episodes}: at least 1")

    @property
    def run(self) -> Path:
        return Path(self.runs_dir) / self.name


def main(argv: list[str]) -> int:
    config = command_line("twin-eval", TwinEvalConfig, argv, __doc__)
    torch.set_num_threads(config.threads)
    try:
        figures = evaluate(config)
    except (BridgeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    low, high = figures["wilson_low"], figures["wilson_high"]
    print(f"version {figures['version']}: {figures['successes']} of {figures['trials']} ({low:.0%} to {high:.0%})")
    return 0


def evaluate(config: TwinEvalConfig) -> dict[str, Any]:
    """The whole stage; returns its figures."""
    started_s = time.monotonic()
    folder = Path(config.checkpoint) if config.checkpoint else latest_bundle(config.run / "checkpoints")
    if folder is None:
        raise ValueError(f"{config.run / 'checkpoints'} holds no bundle to evaluate")
    version = verify_bundle(folder).version
    policy = load_policy(folder, config.device)
    env = TwinVectorEnv(config.twin, policy.embodiment, config.envs, config.workers, config.seed, auto_reset=False)
    with contextlib.closing(env):
        episodes, frames = run_episodes(env, policy, range(config.seed, config.seed + config.episodes), config.video)
    successes = sum(episode.success for episode in episodes)
    low, high = wilson_interval(successes, len(episodes))
    trials = config.run / "eval" / f"{config.stage}.jsonl"
    trials.unlink(missing_ok=True)
    for episode in episodes:
        append_line(trials, {"seed": episode.seed, "success": episode.success, "steps": episode.length})
    files = {"trials": trials}
    if frames:
        files["video"] = trials.with_suffix(".mp4")
        write_video(files["video"], iter(frames), fps=5)
    figures = {
        "version": version,
        "successes": successes,
        "trials": len(episodes),
        "success_rate": successes / len(episodes),
        "wilson_low": low,
        "wilson_high": high,
        "episode_len": float(np.mean([episode.length for episode in episodes])),
    }
    write_stage(config.run, config.stage, time.monotonic() - started_s, figures, files)
    return figures


def run_episodes(env: VectorEnv, policy: Policy, seeds: range, record: bool) -> tuple[list[Episode], list[np.ndarray]]:
    """One episode a seed; where one ends, the next seed begins. Also the first one's pictures, cameras side by side."""
    generator = torch.Generator().manual_seed(seeds.start)
    left = list(seeds)[::-1]
    seen: dict[int, Look] = {}  # of the environments that are at work
    episodes: list[Episode] = []
    frames: list[np.ndarray] = []

    def begin(envs: list[int]) -> None:
        chosen = envs[: len(left)]
        if chosen:
            seen.update(looks(env.reset([left.pop() for _ in chosen], chosen), chosen))

    begin(list(range(env.num_envs)))
    with tqdm(total=len(seeds), desc="twin episodes", unit="episode") as bar:
        while seen:
            active = sorted(seen)
            actions = policy.infer(stacked([seen[i] for i in active], policy.embodiment.instructions[0]), generator)
            if record and 0 in seen and not any(episode.seed == seeds.start for episode in episodes):
                frames.append(np.concatenate([picture for _, picture in sorted(seen[0].images.items())], axis=1))
            result = env.step_chunk(actions[:, : policy.num_action_chunks].numpy(), active)
            seen.update(looks(result.observation, active))
            for row in np.flatnonzero(is_over(result)):
                seed, length = int(result.seeds[row]), int(result.episode_len[row])
                if result.lost[row]:
                    raise ValueError(f"a twin process died during the episode of seed {seed}; evaluate again")
                episodes.append(Episode(seed, bool(result.success[row]), length, float(result.reward[row].sum())))
                del seen[active[row]]
                begin([active[row]])
                bar.update()
    return sorted(episodes, key=lambda episode: episode.seed), frames


@dataclass(frozen=True)
class Look:
    """What one environment shows."""

    images: dict[str, np.ndarray]
    state: np.ndarray


def looks(views: Views, envs: list[int]) -> dict[int, Look]:
    return {
        env: Look({name: pictures[row] for name, pictures in views.images.items()}, views.state[row])
        for row, env in enumerate(envs)
    }


def stacked(views: list[Look], instruction: str) -> ObservationBatch:
    images = {name: torch.from_numpy(np.stack([v.images[name] for v in views])) for name in views[0].images}
    return ObservationBatch(images, torch.from_numpy(np.stack([v.state for v in views])), [instruction] * len(views))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
