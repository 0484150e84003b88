"""The twin's speed beside stock ManiSkill, and what fitting its arm to recordings gains.

    python -m tests.bench.bench_twin --workers 16 --out docs/results/twin.json
    python -m tests.bench.bench_twin --only replay --data runs/demo/data/stand_in --out docs/results/twin.json
    python -m tests.bench.bench_twin --only legacy --out docs/results/twin.json
    python -m tests.bench.bench_twin --only splat --workers 16 --scene runs/splat/tabletop --size 224   # one GPU

`state`, `rgb`: as many worker processes on both sides, one environment each, a picture (ours: of two cameras) after
every policy step of 10 physics steps. Peer: ManiSkill's own CPU recipe, `gym.vector.AsyncVectorEnv` of PickCube-v1 in
`CPUGymWrapper`, with the same rates, controller and picture size. `splat`: one picture a chunk of 5 from splats, beside
SAPIEN's by as many workers, environments in two groups as `pipeline_stages=2` has them; and one after every step,
beside the peer. Four environments a worker there, of the peer one, as its recipe has it. Figures are merged into the
file; what it held under other names stays.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge.config import load
from bridge.dataset import DatasetStore
from sim.splat.config import SplatConfig
from sim.twin.command import fitted
from sim.twin.config import TwinConfig
from sim.twin.demos import TwinDemosConfig
from sim.twin.replay import recordings
from sim.twin.scripted import BEHAVIOURS, judge
from sim.twin.vector_env import TwinVectorEnv
from sim.twin.worker import Twin

PARTS = ("state", "rgb", "splat", "replay", "legacy")
RATE_HZ, SIM_HZ, WARM_UP = 10, 100, 5
PEER_GAINS = {"arm_follows": "drives", "arm_stiffness": 1000.0, "arm_damping": 100.0, "latency_s": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["state", "rgb"])
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="policy steps of each environment")
    parser.add_argument("--size", type=int, default=128, help="pictures are so many pixels wide and high")
    parser.add_argument("--episodes", type=int, default=4, help="replay: fitted on; as many more are held out")
    parser.add_argument("--trials", type=int, default=50, help="legacy: episodes of each behaviour and task")
    parser.add_argument("--data", type=Path, help="replay: recorded data set")
    parser.add_argument("--scene", type=Path, help="splat: scene folder")
    args = parser.parse_args()
    measure = {"state": speed, "rgb": speed, "splat": splat_speed, "replay": replay_error, "legacy": legacy_errors}
    figures: dict[str, Any] = {}
    for part in args.only:
        figures |= measure[part](part, args)
        print(json.dumps(figures, indent=2), flush=True)
    merge(args.out, figures)


def merge(path: Path, figures: dict[str, Any], name: str = "twin") -> None:
    """Each of our figures names its own machine; the file's head stays that of whoever wrote it first."""
    machine = {"cpu_cores": os.cpu_count(), "cpu": platform.processor() or platform.machine()}
    parts = [f"{os.cpu_count()} CPU cores"]
    if torch.cuda.is_available():
        machine["gpu"] = f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}"
        parts.append(machine["gpu"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    head = {"name": name, "date": time.strftime("%Y-%m-%d"), "commit": commit}
    head |= {"command": f"python -m tests.bench.bench_{name}", "machine": machine, "figures": {}}
    found = json.loads(path.read_text()) if path.exists() else head
    where = {"machine": machine, "commit": commit, "date": head["date"], "command": head["command"]}
    for name, one in figures.items():  # tables show one machine a file, so a figure of another says so itself
        here = "" if found["machine"] == machine else f"; on {' and '.join(parts)}"
        found["figures"][name] = one | where | {"peer_name": one["peer_name"] + here}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def figure(ours: float, peer: float | None, unit: str, peer_name: str, higher_is_better: bool, **more: Any) -> dict:
    ratio = None if not peer or not ours else (ours / peer if higher_is_better else peer / ours)
    return {"ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "peer_name": peer_name} | more


def speed(part: str, args: argparse.Namespace) -> dict[str, Any]:
    config, embodiment = settings(args.size)
    with_pictures = part == "rgb"
    with TwinVectorEnv(config, embodiment, args.workers, args.workers, render=with_pictures) as env:
        ours, ours_5 = (steps_per_s(env, args.steps, chunk) for chunk in (1, 5))
    peer = stock_steps_per_s(args, with_pictures)
    more = {"n": args.steps * args.workers, "workers": args.workers, "ours_chunks_of_5": ours_5}
    return {
        f"cpu_{part}_steps_per_s": figure(
            ours, peer, "steps/s", "stock ManiSkill AsyncVectorEnv PickCube-v1", True, **more
        )
    }


def settings(size: int) -> tuple[TwinConfig, Any]:
    made = load("twin-demos", TwinDemosConfig)
    return dataclasses.replace(made.twin, picture_width=size, picture_height=size), made.embodiment


def steps_per_s(env: TwinVectorEnv, steps: int, chunk: int, groups: int = 1) -> float:
    """Policy steps of all environments a second; episodes that end begin anew inside the time. Of several groups, one's
    pictures are made while the others' physics run (`pipeline_stages` of a training run)."""
    rng = np.random.default_rng(0)
    members = [range(group, env.num_envs, groups) for group in range(groups)]
    parts = rng.uniform(-0.02, 0.02, (steps // chunk, env.num_envs // groups, chunk, 7)).astype(np.float32)
    env.reset(range(env.num_envs))
    for _ in range(WARM_UP):
        for ids in members:
            env.step_chunk(parts[0], ids)
    started_s, done = time.monotonic(), 0
    for ids in members:
        env.send(parts[0], ids)
    for part in parts[1:]:
        for ids in members:
            done += int(env.recv().valid.sum())
            env.send(part, ids)
    done += sum(int(env.recv().valid.sum()) for _ in members)
    return done / (time.monotonic() - started_s)


def stock_steps_per_s(args: argparse.Namespace, with_pictures: bool) -> float:
    import gymnasium as gym

    env = gym.vector.AsyncVectorEnv([StockEnv(args.size, with_pictures)] * args.workers, context="spawn")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (args.steps, *env.action_space.shape)).astype(np.float32)
    for action in actions[:WARM_UP]:
        env.step(action)
    started_s = time.monotonic()
    for action in actions:
        env.step(action)
    rate = len(actions) * args.workers / (time.monotonic() - started_s)
    env.close()
    return rate


@dataclasses.dataclass(frozen=True)
class StockEnv:
    """Makes one stock environment in its worker process."""

    size: int
    with_pictures: bool

    def __call__(self) -> Any:
        os.environ |= {"LP_NUM_THREADS": "0", "OMP_NUM_THREADS": "1"}  # as ours: a process a core
        import gymnasium as gym
        import mani_skill.envs  # noqa: F401  registers the tasks
        import torch
        from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

        torch.set_num_threads(1)
        env = gym.make(
            "PickCube-v1",
            num_envs=1,
            obs_mode="rgb" if self.with_pictures else "state",
            control_mode="pd_ee_target_delta_pose",
            sim_backend="physx_cpu",
            render_backend="cpu" if self.with_pictures else "none",
            sim_config={"sim_freq": SIM_HZ, "control_freq": RATE_HZ},
            sensor_configs={"width": self.size, "height": self.size},
        )
        return CPUGymWrapper(env, ignore_terminations=True)


def splat_speed(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Beside SAPIEN's pictures: those that the same twin's workers draw, and stock ManiSkill's."""
    config, embodiment = settings(args.size)
    rates, each_step = {}, {}
    for render in ("splat", "sapien"):
        scene = SplatConfig(scene=str(args.scene))
        with TwinVectorEnv(
            dataclasses.replace(config, render=render, splat=scene), embodiment, 4 * args.workers, args.workers
        ) as env:
            rates[render] = steps_per_s(env, args.steps, 5, groups=2)
            each_step[render] = steps_per_s(env, max(args.steps // 5, 2), 1, groups=2)
            device = env.splat_device or "CPU"
            print(render, device, rates[render], each_step[render], flush=True)
    stock = stock_steps_per_s(args, True)
    more = {"workers": args.workers, "size_px": args.size, "cameras": len(embodiment.cameras)}
    own = "the twin's own SAPIEN pictures, drawn by the workers"
    return {
        "env_steps_per_s_16_workers": figure(
            rates["splat"], rates["sapien"], "steps/s", own, True, n=4 * args.steps * args.workers, **more
        ),
        "env_steps_per_s_16_workers_picture_each_step": figure(
            each_step["splat"], stock, "steps/s",
            "stock ManiSkill AsyncVectorEnv PickCube-v1, one environment a worker (ours: 4), one camera (ours: 2)",
            True, own_sapien=each_step["sapien"], **more,
        ),
    }  # fmt: skip


def replay_error(part: str, args: argparse.Namespace) -> dict[str, Any]:
    store = DatasetStore.open(args.data)
    found = recordings(store, range(2 * args.episodes))
    fit_on, held_out = found[: args.episodes], found[args.episodes :]
    config = load("twin-demos", TwinDemosConfig).twin
    peer = Twin(dataclasses.replace(config, **PEER_GAINS), store.embodiment, render=False)
    got = fitted(Twin(config, store.embodiment, render=False), fit_on, held_out)
    drives = fitted(peer, fit_on, held_out)  # the same gains, fitted: what there is to gain without plans
    peer_mm, after_mm = drives["held_out_error_mm_before"], got["held_out_error_mm_after"]
    more = {"n": args.episodes, "found": got, "found_from_peer": drives, "domain": store.episodes()[0]["domain"]}
    name = "GSEnv's gains, on the same held-out episodes"
    return {"replay_error_reduction": figure(after_mm, peer_mm, "mm", name, False, **more)}


def legacy_errors(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Of episodes whose object was never put down and let go, the share that the peer's predicate calls a success."""
    figures = {}
    for task, groups in {"put_cube": [], "pick_place": ["twin=pick_place", "embodiment=rl_co"]}.items():
        made = load("twin-demos", TwinDemosConfig, groups)
        twin = Twin(made.twin, made.embodiment, render=False)
        judged = {name: judge(twin, name, range(args.trials)) for name in BEHAVIOURS}
        failures = [one for episodes in judged.values() for one in episodes if not one.stable]
        counts = {
            name: {"legacy": sum(one.legacy for one in episodes), "stable": sum(one.stable for one in episodes)}
            for name, episodes in judged.items()
        }
        rate = sum(one.legacy for one in failures) / len(failures)
        more = {"n": len(failures), "successes_of_each": counts, "trials_of_each": args.trials}
        figures[f"legacy_false_positive_rate_{task}"] = figure(
            0.0, rate, "share", "the peer's predicate; ours defines success", False, **more
        )
    return figures


if __name__ == "__main__":
    main()
