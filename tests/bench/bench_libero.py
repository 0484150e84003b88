"""LIBERO's speed beside its own environment's, and ten iterations of PPO and of GRPO on Spatial with the small policy.

    python -m tests.bench.bench_libero --workers 16 --out docs/results/libero.json
    python -m tests.bench.bench_libero --only train --workers 16 --device cuda --out docs/results/libero.json

`state`, `rgb`: steps a second of as many processes on both sides, two pictures of 256 x 256 after every chunk of 8
actions; the peer is LIBERO's `OffScreenRenderEnv`, which draws after every step, as it is used. `train`: scripted
demonstrations, Stage I, then Stage II by each algorithm from the same checkpoint, each evaluated; stages that a
stopped bench has finished are not made again.
"""

import argparse
import json
import multiprocessing as mp
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import cotwin
from bridge.config import CONFIG_DIR
from bridge.embodiment import Embodiment
from sim.libero.config import LiberoConfig
from sim.libero.scene import open_packages
from sim.twin.vector_env import TwinVectorEnv
from tests.bench.bench_twin import figure, merge, steps_per_s

SUITE, CHUNK = "libero_spatial", 8
# What is explored are ways, as in bench_rl_co: the executed steps of a chunk share a softer draw (docs/training.md).
EXPLORE = ["policy.flow.hold=8", "noise_level=0.25", "algo.update_epochs=4", "algo.target_kl=0.1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=("state", "rgb", "train"), default=["state", "rgb"])
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=160, help="state, rgb: policy steps of each environment")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", default="runs/bench_libero", help="train: the run's folder")
    parser.add_argument("--demos", type=int, default=150)
    parser.add_argument("--sft-seconds", type=float, default=90.0)
    parser.add_argument("--algorithms", nargs="*", choices=("ppo", "grpo"), default=["ppo", "grpo"], help="train")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=64, help="of an iteration")
    parser.add_argument("--envs", type=int, default=32)
    parser.add_argument("--trials", type=int, default=100, help="of each evaluation")
    parser.add_argument("--keys", nargs="*", default=[], help="train: more keys for all that plays LIBERO")
    args = parser.parse_args()
    measure = {"state": speed, "rgb": speed, "train": train}
    figures: dict[str, Any] = {}
    for part in args.only:
        figures |= measure[part](part, args)
        print(json.dumps(figures, indent=2), flush=True)
        merge(args.out, figures, "libero")


def speed(part: str, args: argparse.Namespace) -> dict[str, Any]:
    config, shown = LiberoConfig(suite=SUITE, max_steps=100_000), part == "rgb"
    embodiment = Embodiment.from_dict(yaml.safe_load((CONFIG_DIR / "embodiment/libero.yaml").read_text()))
    with TwinVectorEnv(config, embodiment, args.workers, args.workers, render=shown) as env:
        ours = steps_per_s(env, args.steps, CHUNK)
    with mp.get_context("spawn").Pool(args.workers) as pool:
        peer = sum(pool.starmap(own_steps_per_s, [(config.packages, args.steps, shown)] * args.workers, chunksize=1))
    more = {"n": args.steps * args.workers, "workers": args.workers, "ours_per_worker": ours / args.workers}
    name = "LIBERO's OffScreenRenderEnv" if shown else "LIBERO's ControlEnv without pictures"
    return {f"libero_{part}_steps_per_s": figure(ours, peer, "steps/s", name, True, **more)}


def own_steps_per_s(packages: str, steps: int, shown: bool) -> float:
    """In a process of its own."""
    open_packages(packages)
    from libero.libero import benchmark
    from libero.libero.envs.env_wrapper import ControlEnv

    suite = benchmark.get_benchmark(SUITE)()
    size = {"camera_heights": 256, "camera_widths": 256}
    env = ControlEnv(suite.get_task_bddl_file_path(0), use_camera_obs=shown, has_offscreen_renderer=shown, **size)
    env.reset()
    env.set_init_state(suite.get_task_init_states(0)[0])
    actions = np.random.default_rng(0).uniform(-0.4, 0.4, (steps, 7))
    for action in actions[:CHUNK]:
        env.step(action)
    started_s = time.monotonic()
    for action in actions:
        env.step(action)
    return steps / (time.monotonic() - started_s)


def train(part: str, args: argparse.Namespace) -> dict[str, Any]:
    run = Path(args.run)
    small = ["libero.picture_width=128", "libero.picture_height=128", "libero.scenes=6", *args.keys]
    libero = [f"libero.suite={SUITE}", *small, f"workers={args.workers}"]

    def stage(name: str, command: str, *keys: str) -> dict[str, Any]:
        """Its figures and wall time; not made again where they are there."""
        path = run / "stages" / f"{name}.json"
        if not path.exists():
            folder = [f"name={run.name}", f"runs_dir={run.parent}"]
            if cotwin.main([command, *folder, *keys]):
                raise SystemExit(f"{name} failed")
        found = json.loads(path.read_text())
        return found["figures"] | {"wall_s": found["wall_s"]}

    def evaluated(name: str, version: int) -> dict[str, Any]:
        counts = [f"episodes={args.trials}", f"envs={args.envs}", f"device={args.device}"]
        bundle = run / "checkpoints" / f"{version:06d}"
        return stage(name, "twin-eval", f"stage={name}", f"checkpoint={bundle}", *counts, *libero)

    stage("libero_demos", "twin-demos", "world=libero", "embodiment=libero", f"episodes={args.demos}", *libero)
    device = f"device={args.device}"
    learnt = ["embodiment=libero", "policy.max_words=24", f"max_seconds={args.sft_seconds}", "batch_size=64"]
    first = stage("sft", "sft", *learnt, device)
    before = evaluated("eval_sft", first["version"])
    figures = {}
    for algorithm in args.algorithms:
        name, bundle = f"train_{algorithm}", run / "checkpoints" / f"{first['version']:06d}"
        keys = [f"algo={algorithm}", "algo.beta=0", f"iterations={args.iterations}", f"episodes={args.episodes}"]
        keys += [f"envs={args.envs}", "save_every=1000", "algo.batch_size=256", "algo.micro_batch_size=256", device]
        trained = stage(name, "train", f"stage={name}", f"checkpoint={bundle}", *keys, *EXPLORE, *libero)
        after = evaluated(f"eval_{algorithm}", trained["version"])
        history = json.loads((run / "curves" / f"{name}.json").read_text())
        more = {key: after[key] for key in ("trials", "wilson_low", "wilson_high")}
        more |= {"success_of_iterations": [one.get("env/success_once") for one in history]}
        more |= {key: trained[key] for key in ("env_steps", "env_steps_per_s", "rollout_s", "update_s", "wall_s")}
        more |= {"n": after["trials"], "peer_wilson": [before["wilson_low"], before["wilson_high"]]}
        rates = after["success_rate"], before["success_rate"]
        figures[f"{SUITE}_{algorithm}_success"] = figure(*rates, "share of starts", "Stage I alone", True, **more)
    return figures


if __name__ == "__main__":
    main()
