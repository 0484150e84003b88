"""Does co-training pay? Small policy from scratch, the twin for practice, the stand-in cell for reality.

    python -m tests.bench.bench_rl_co --minutes 8.5 --cores 64 --out docs/results/rl_co.json

Per seed: three Stage I checkpoints (stand-in demonstrations alone, twin demonstrations alone, both), and from the last
two Stage II with and without the SFT term on stand-in demonstrations. Each is evaluated in the twin (deterministic
actions) and in the stand-in cell (`cotwin cell-eval`: the cell's scene, physics and cameras in lock step) on scenes
that no demonstration and no rollout began from. The robot's demonstrations cover a narrow part of the table, the twin's
and all trials a wide one: where demonstrations cover what is tried, the stand-in's alone reach 97 % (58 of 60, measured
with 50 of them) and there is nothing to show. Every job is a command of `cotwin`; what is finished stays below
`--root`, an interrupted one goes on there. When the minutes are over, jobs are stopped, and what there is is written.

Why the defaults are what they are:

    --twin-demos 20     few, so that practice has room: rollouts should begin at 35 to 45 %
    --sft-steps 3000    the same for all arms; a mixture has more to learn, and is short of steps before the others
    --alpha 0.5         the twin's share of a mixed batch: the robot's 2200 rows are seen 22 times, alone 43 times
    --envs 48           as many as episodes: all begin at once, and 10 rounds wait for the slowest worker, not 30
    --max-steps 80      of practice: demonstrations take about 50; trials have 100
    --first-trial 1000  seeds of trials; settings are probed with others: --stages 1 --seeds 7 --first-trial 5000

`--arms` names those of Stage II to run. Where the robot's demonstrations alone leave no room above them, `--narrow` is
what to turn.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bridge.checkpoint import latest_bundle
from bridge.statistics import success_figures

SEEDS = (0, 1, 2)
WIDE_M = ("[0.40,0.24]", "[0.12,0.10]")  # where cubes start in the twin and in trials: middle, half-range
TWIN = [f"twin.cube_center_m={WIDE_M[0]}", f"twin.cube_range_m={WIDE_M[1]}"]
TRIED = [f"cell.layout.cube_pos_m={WIDE_M[0]}", f"cell.layout.cube_spread_m={WIDE_M[1]}"]
TAUGHT = ["cell.layout.cube_pos_m=[0.36,0.20]"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGE_1 = {"stand_in_sft": ("real",), "twin_sft": ("sim",), "mixed_sft": ("sim", "real")}
# 48 episodes are some 400 queries: two steps an epoch. The time limit is the task's own: who is late has failed. What
# is explored are ways: the executed steps of a chunk share a draw, which may then be softer (docs/training.md).
ALGO = [
    *("algo.bootstrap_truncation=false", "algo.update_epochs=6", "algo.target_kl=0.1"),
    *("policy.flow.last_steps=1", "policy.flow.hold=8", "noise_level=0.25"),
]
ADAPTIVE = ["algo.beta=0.2", "algo.sft_gradient_share=0.3"]
STAGE_2 = {  # arm -> (Stage I it starts from, keys)
    "twin_sft+ppo": ("twin_sft", ["algo.beta=0"]),
    "twin_sft+rl_co": ("twin_sft", ["algo.beta=0.2"]),
    "mixed_sft+ppo": ("mixed_sft", ["algo.beta=0"]),
    "mixed_sft+rl_co": ("mixed_sft", ["algo.beta=0.2"]),
    "mixed_sft+rl_co_adaptive": ("mixed_sft", ADAPTIVE),
}


@dataclass
class Job:
    """One command; done when its stage file exists. `command` is asked for when it starts."""

    run: str
    stage: str
    command: Callable[[], list[str]]
    cores: int
    needs: list["Job"] = field(default_factory=list)
    process: subprocess.Popen | None = None
    failed: bool = False


class Study:
    def __init__(self, args: argparse.Namespace):
        self.args, self.root = args, args.root
        self.jobs: list[Job] = []
        data = {
            "sim": self.add("data", "twin_demos", self.demos("twin", args.twin_demos, 0.06, 0.002), 16),
            "real": self.add("data", "cell_demos", self.demos("stand_in", args.cell_demos, 0.0, 0.0), 16),
        }
        self.arms = [*STAGE_1, *(args.arms if args.stages == 2 else ())]
        for seed in args.seeds:
            stage_1 = {}
            for arm, sides in STAGE_1.items():
                sft = self.add(f"{arm}.{seed}", "sft", self.sft(arm, seed, sides), 2, [data[side] for side in sides])
                stage_1[arm] = sft
                self.evaluate(f"{arm}.{seed}", sft)
            for arm in self.arms[len(STAGE_1) :]:
                start, keys = STAGE_2[arm]
                command = self.train(f"{arm}.{seed}", f"{start}.{seed}", seed, keys)
                train = self.add(f"{arm}.{seed}", "train", command, args.workers, [stage_1[start], data["real"]])
                self.evaluate(f"{arm}.{seed}", train)
        # Long ones first: the short ones fill the gaps.
        rank = {"twin_demos": 0, "cell_demos": 0, "sft": 1, "train": 2, "cell_eval": 3, "twin_eval": 3}
        self.jobs.sort(key=lambda job: rank[job.stage])

    def add(
        self, run: str, stage: str, command: Callable[[], list[str]], cores: int, needs: list[Job] | None = None
    ) -> Job:
        self.jobs.append(Job(run, stage, command, min(cores, self.args.cores), needs or []))
        return self.jobs[-1]

    def named(self, run: str) -> list[str]:
        return [f"name={run}", f"runs_dir={self.root}"]

    def data(self, sides: tuple[str, ...]) -> list[str]:
        folders = {"sim": "twin", "real": "stand_in"}
        return [f"data.{side}=[{self.root}/data/data/{folders[side]}]" for side in sides]

    def demos(self, world: str, episodes: int, start_m: float, noise_m: float) -> Callable[[], list[str]]:
        keys = [f"episodes={episodes}", f"world={world}", f"workers={min(16, self.args.cores)}"]
        keys += [f"start_range_m={start_m}", f"action_noise_m={noise_m}"]
        keys.append(f"cell.layout.cube_spread_m={list(self.args.narrow)}".replace(" ", ""))
        return lambda: ["twin-demos", *self.named("data"), *keys, *TWIN, *TAUGHT]

    def sft(self, arm: str, seed: int, sides: tuple[str, ...]) -> Callable[[], list[str]]:
        keys = [f"seed={seed}", f"steps={self.args.sft_steps}", "max_seconds=0", f"device={DEVICE}", "threads=1"]
        keys.append(f"data.alpha={self.args.alpha}")
        return lambda: ["sft", *self.named(f"{arm}.{seed}"), *keys, *self.data(sides)]

    def train(self, run: str, start: str, seed: int, keys: list[str]) -> Callable[[], list[str]]:
        a = self.args
        sizes = [f"iterations={a.iterations}", f"envs={a.envs}", f"workers={a.workers}", f"episodes={a.episodes}"]
        more = [f"seed={seed}", f"device={DEVICE}", "threads=1", "save_every=1000", *self.data(("real",)), *a.algo]
        more.append(f"twin.max_steps={a.max_steps}")
        return lambda: [
            "train", *self.named(run), f"checkpoint={latest_bundle(self.root / start / 'checkpoints')}",
            *sizes, *more, *keys, *TWIN,
        ]  # fmt: skip

    def evaluate(self, run: str, of: Job) -> None:
        a, named = self.args, self.named(run)
        cell = [f"trials={a.trials}", f"seed={a.first_trial}", "workers=8"]
        twin = [
            f"episodes={a.trials}",
            f"seed={a.first_trial}",
            "workers=8",
            "envs=24",
            "video=false",
            f"device={DEVICE}",
            "threads=1",
        ]
        self.add(run, "cell_eval", lambda: ["cell-eval", *named, *cell, *TRIED], 8, [of])
        self.add(run, "twin_eval", lambda: ["twin-eval", *named, *twin, *TWIN], 8, [of])

    # --- running ------------------------------------------------------------------------------------------------------

    def done(self, job: Job) -> bool:
        return (self.root / job.run / "stages" / f"{job.stage}.json").exists()

    def work(self) -> None:
        """Until all is done or the time is over."""
        until_s = time.monotonic() + 60 * self.args.minutes
        free, started = self.args.cores, 0
        while time.monotonic() < until_s:
            running = [job for job in self.jobs if job.process]
            for job in running:
                if job.process.poll() is not None:
                    job.failed = job.process.returncode != 0
                    print(f"{job.run} {job.stage}: code {job.process.returncode}", flush=True)
                    job.process, free = None, free + job.cores
            waiting = [j for j in self.jobs if not j.process and not j.failed and not self.done(j)]
            if not waiting and not any(job.process for job in self.jobs):
                return
            for job in waiting:
                if job.cores <= free and all(self.done(need) for need in job.needs):
                    self.begin(job, started)
                    free, started = free - job.cores, started + 1
            if all(not j.process for j in self.jobs):
                return  # what is left waits for something that failed
            time.sleep(0.2)
        for job in self.jobs:
            if job.process:
                job.process.send_signal(signal.SIGTERM)
        for job in self.jobs:
            if job.process:
                try:
                    job.process.wait(15)
                except subprocess.TimeoutExpired:
                    job.process.kill()

    def begin(self, job: Job, number: int) -> None:
        logs = self.root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": str(self.args.gpus[number % len(self.args.gpus)]),
        }
        with (logs / f"{job.run}.{job.stage}.log").open("a") as log:
            command = [sys.executable, "-m", "cotwin", *job.command()]
            job.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    # --- results ------------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        arms = {}
        for arm in self.arms:
            seeds = [self.seed_result(f"{arm}.{seed}") | {"seed": seed} for seed in self.args.seeds]
            arms[arm] = {"seeds": seeds, "cell": pooled(seeds, "cell_eval"), "twin": pooled(seeds, "twin_eval")}
        return arms

    def seed_result(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for stage in ("sft", "train", "cell_eval", "twin_eval"):
            path = self.root / run / "stages" / f"{stage}.json"
            if path.exists():
                found[stage] = json.loads(path.read_text())["figures"]
        curve = self.root / run / "curves" / "train.json"
        if curve.exists():
            keys = ("env/success_once", "train/sft_loss", "actor/approx_kl", "train/grad_share_sft", "train/beta")
            history = json.loads(curve.read_text())
            found["curve"] = {key: [m[key] for m in history if key in m] for key in keys}
        return found


def pooled(seeds: list[dict[str, Any]], stage: str) -> dict[str, Any] | None:
    found = [seed[stage] for seed in seeds if stage in seed]
    if not found:
        return None
    successes, trials = sum(f["successes"] for f in found), sum(f["trials"] for f in found)
    return success_figures(successes, trials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("runs/rl_co"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="numbers of those to use")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--twin-demos", type=int, default=20)
    parser.add_argument("--cell-demos", type=int, default=50)
    parser.add_argument("--narrow", type=float, nargs=2, default=(0.05, 0.04), help="half-range of cubes (m) there")
    parser.add_argument("--sft-steps", type=int, default=3000)
    parser.add_argument("--alpha", type=float, default=0.5, help="the twin's share of a mixed batch")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--envs", type=int, default=48, help="twins of a Stage II run")
    parser.add_argument("--episodes", type=int, default=48, help="of an iteration")
    parser.add_argument("--workers", type=int, default=8, help="processes of a Stage II run")
    parser.add_argument("--max-steps", type=int, default=80, help="of an episode of Stage II")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--first-trial", type=int, default=1000, help="seed of the first trial")
    parser.add_argument("--arms", nargs="+", choices=STAGE_2, default=list(STAGE_2), help="of Stage II")
    parser.add_argument("--stages", type=int, choices=(1, 2), default=2)
    parser.add_argument("--algo", nargs="*", default=ALGO, help="more keys of `cotwin train`")
    args = parser.parse_args()
    started_s = time.monotonic()
    study = Study(args)
    study.work()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpus = f"{len(args.gpus)} {torch.cuda.get_device_name()}" if DEVICE == "cuda" else "none"
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("out", "minutes")}
    document = {
        "name": "rl_co",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "command": "python -m tests.bench.bench_rl_co",
        "machine": {"gpu": gpus, "cpu_cores": os.cpu_count()},
        "settings": settings,
        "minutes": (time.monotonic() - started_s) / 60,
        "arms": study.results(),
        "unfinished": [f"{job.run} {job.stage}" for job in study.jobs if not study.done(job)],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({arm: (r["cell"], r["twin"]) for arm, r in document["arms"].items()}, indent=1))


if __name__ == "__main__":
    main()
