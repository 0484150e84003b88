"""Where the parts of Stage II run: three placements, pipelining, weight sync, and an update beside the peer's way.

    python -m tests.bench.bench_placement --out docs/results/placement.json     # two GPUs, full-size pi0.5, minutes
    python -m tests.bench.bench_placement --tiny --out /tmp/placement.json      # small model, CPU and gloo

pi0.5 has random weights and its vision-language part frozen. The environments are no simulator: `PacedEnvs` shows
constant pictures and answers as late as twins would, STEP_S for each control step of each environment of a process
(measured: the twin's physics on one core of a CPU); all episodes are equally long. Figures are medians over iterations
after the first, which compiles.

`update` steps PPO and SFT on samples whose prefix rollouts kept, and on the same samples with the prefix recomputed for
every micro-batch, which is the peer's way; both by this project's kernels, on one GPU, alternating.
"""

import argparse
import functools
import gc
import json
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bridge.embodiment import Embodiment
from learner.flow import FlowConfig
from learner.member import Job
from learner.pi0.config import ModelConfig, tiny
from learner.pi0.normalise import Normaliser
from learner.pi0.policy import Pi0Config, Pi0Policy
from learner.placement import placed_trainer
from learner.placement_map import ClusterConfig, described, parse
from learner.policy import ObservationBatch, SftBatch
from learner.rollouts import Rollouts, collect, observation_batch
from learner.trainer import UpdateWorker
from learner.update import AlgoConfig
from tests.bench.bench_splat import commit, machine
from tests.learner.pi0.words import ByteTokenizer

STEP_S = 1.55e-3  # of the twin's physics, one control step at 10 Hz
CHUNK = 10
QUERIES = 4  # policy queries of an episode
CAMERAS = ("third_person", "wrist")
PLACEMENTS: dict[str, tuple[dict[str, Any], int]] = {  # and pipeline stages
    "hybrid": ({"env": "0:0-3", "rollout": 1, "actor": "0-1"}, 1),
    "hybrid_pipelined": ({"env": "0:0-3", "rollout": 1, "actor": "0-1"}, 2),
    "collocated": ({"env": "0-1:0-3", "rollout,actor": "0-1"}, 1),
    "disaggregated": ({"env": "0:0-3", "rollout": 0, "actor": 1}, 1),
    "disaggregated_asynchronous": ({"env": "0:0-3", "rollout": 0, "actor": 1}, 1),
    "collocated_sharded": ({"env": "0-1:0-3", "rollout,actor": "0-1"}, 1),
    "collocated_offload": ({"env": "0-1:0-3", "rollout,actor": "0-1"}, 1),
}


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    device: str
    model: ModelConfig
    dtype: str
    picture: int
    envs: int
    batch: int
    micro_batch: int
    iterations: int  # measured; one more goes before
    repeats: int  # of the update
    step_s: float


FULL = Size("cuda", ModelConfig(horizon=CHUNK), "bfloat16", 224, 64, 128, 64, 3, 8, STEP_S)
TINY = Size("cpu", replace(tiny(horizon=CHUNK), prompt_tokens=64), "float32", 28, 4, 8, 4, 2, 3, 1e-3)


def make_policy(size: Size, device: str, kept: str = "device") -> Pi0Policy:
    """The same weights in every process: all draw them from one seed on the same kind of device."""
    torch.manual_seed(0)
    units = Normaliser("QUANTILES", {"q01": -torch.ones(7), "q99": torch.ones(7)})
    config = Pi0Config(
        model=size.model, flow=FlowConfig(num_steps=4), num_action_chunks=CHUNK, dtype=size.dtype,
        add_value_head=True, prefix_cache=kept,
    )  # fmt: skip
    return Pi0Policy(config, Embodiment(), units, units, ByteTokenizer(size.model.vocabulary), device).eval()


class PacedEnvs:
    """No simulator: constant pictures, episodes of QUERIES chunks, and the time that twins' physics would take."""

    def __init__(self, size: Size, num_envs: int, seed: int):
        self.num_envs, self.step_s = num_envs, size.step_s
        rng, shape = np.random.default_rng(seed), (num_envs, size.picture, size.picture, 3)
        self.images = {name: rng.integers(256, size=shape, dtype=np.uint8) for name in CAMERAS}
        self.chunks, self.seeds = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)

    def reset(self, seeds: list[int], env_ids: list[int]) -> Any:
        self.chunks[env_ids], self.seeds[env_ids] = 0, seeds
        return self._views(env_ids)

    def step_chunk(self, actions: np.ndarray, env_ids: list[int]) -> Any:
        time.sleep(actions.shape[0] * actions.shape[1] * self.step_s)
        self.chunks[env_ids] += 1
        none = np.zeros(actions.shape[:2], bool)
        truncated = none.copy()
        truncated[:, -1] = self.chunks[env_ids] == QUERIES
        return SimpleNamespace(
            observation=self._views(env_ids),
            reward=none.astype(np.float32),
            terminated=none,
            truncated=truncated,
            valid=~none,
            success=none[:, 0],
            episode_len=self.chunks[env_ids] * CHUNK,
            seeds=self.seeds[env_ids],
            lost=none[:, 0],
        )

    def send(self, actions: np.ndarray, env_ids: list[int]) -> None:
        self.answer = self.step_chunk(actions, env_ids)

    def recv(self) -> Any:
        return self.answer

    def close(self) -> None:
        pass

    def _views(self, env_ids: list[int]) -> Any:
        images = {name: pictures[env_ids] for name, pictures in self.images.items()}
        state = np.full((len(env_ids), 7), 0.1, np.float32)
        return SimpleNamespace(images=images, state=state, instruction=["put the cube on the plate"] * len(env_ids))


class RandomDemos:
    """Demonstrations of nothing, drawn once."""

    def __init__(self, size: Size, count: int):
        shape = (count, size.picture, size.picture, 3)
        images = {name: torch.randint(256, shape, dtype=torch.uint8) for name in CAMERAS}
        observation = ObservationBatch(images, torch.full((count, 7), 0.1), ["put the cube on the plate"] * count)
        actions = torch.rand(count, size.model.horizon, 7) * 2 - 1
        self.batch = SftBatch(observation, actions, torch.zeros(count, size.model.horizon, dtype=torch.bool))

    def __next__(self) -> SftBatch:
        return self.batch


def make_demos(size: Size, count: int, policy: Any, rank: int, ranks: int) -> RandomDemos:
    return RandomDemos(size, count)


def algorithm(size: Size) -> AlgoConfig:
    """One demonstration for 20 samples, as RLinf's recipe."""
    return AlgoConfig(
        batch_size=size.batch, micro_batch_size=size.micro_batch, update_epochs=2, critic_warmup_steps=0, lr=4e-6,
        target_kl=None, value_lr=2e-4, gradient_report_every=0, sft_per_rl=max(0.05, 1 / size.micro_batch),
    )  # fmt: skip


@dataclass
class Bench:
    size: Size
    carrier: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, ours: float, peer: float | None, unit: str, n: int, peer_name: str | None, **more: Any):
        ratio = ours / peer if peer else None
        self.figures[name] = {"ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "peer_name": peer_name, "n": n}
        self.figures[name] |= more
        print(f"{name}: {ours:.4g} {unit}" + (f", {ratio:.3g} times {peer:.4g}" if peer else ""), flush=True)


def placement(bench: Bench, name: str) -> None:
    """Iterations of the whole trainer, its processes placed as `name` says."""
    size, (places, stages) = bench.size, PLACEMENTS[name]
    algo, began_s = algorithm(size), time.perf_counter()
    options = {key: key in name for key in ("asynchronous", "sharded", "offload")}
    cluster = ClusterConfig(component_placement=places, launcher="processes", carrier=bench.carrier, **options)
    job = Job(
        make_policy=functools.partial(make_policy, size),
        make_env=functools.partial(PacedEnvs, size),
        make_demos=functools.partial(make_demos, size, algo.sft_batch_size()),
        algo=algo,
        envs=size.envs,
        stages=stages,
        seed=0,
        threads=2 if size.device == "cuda" else 1,
        device=size.device,
        cluster=cluster,
    )
    placed = parse(places, 1, 2)
    with placed_trainer(job, placed, size.envs) as trainer:
        started_s = time.perf_counter() - began_s
        first = trainer.iterate()
        first_s = time.perf_counter() - began_s - started_s
        history = [trainer.iterate() for _ in range(size.iterations)]
        used_gib = [gpu_used_gib(gpu) for gpu in range(torch.cuda.device_count())]
        sent_bytes, carrier = trainer.publish.__self__.sent_bytes, trainer.publish.__self__.carrier
    middle = {key: statistics.median(metrics[key] for metrics in history) for key in history[0]}
    samples = size.envs * QUERIES
    bench.details[name] = {
        "start_s": started_s,
        "first_iteration_s": first_s,
        "samples_an_iteration": samples,
        "processes": described(placed, cluster, size.device == "cuda"),
        "weights_sent_bytes": sent_bytes,
        "carrier": carrier,
        "gpu_used_gib": used_gib,
        "rollout_samples_per_s": samples / middle["time/rollout_s"],
        "update_samples_per_s": samples * algo.update_epochs / middle["time/update_s"],
        "ratio_of_first_iteration": first["actor/ratio"],
        **{key: middle[key] for key in middle if key.startswith(("time/", "rollout/staleness"))},
    }
    bench.record(f"{name}_samples_per_s", middle["time/samples_per_s"], None, "samples/s", size.iterations, None)
    bench.figures[f"{name}_samples_per_s"]["idle_shares"] = {
        component: middle[f"time/{component}_idle_share"] for component in ("env", "rollout", "actor")
    }
    if name.startswith("disaggregated") and not cluster.asynchronous:
        bench.record("weight_sync_s", middle["time/sync_s"], None, "s", size.iterations, None, bytes=sent_bytes)


def gpu_used_gib(gpu: int) -> float:
    """By all processes."""
    free, everything = torch.cuda.mem_get_info(gpu)
    return (everything - free) / 2**30


def pipelining(bench: Bench) -> None:
    """After both hybrid placements."""
    one, two = (bench.details[name] for name in ("hybrid", "hybrid_pipelined"))
    for name, key in (("rollouts", "rollout_samples_per_s"), ("iterations", "time/samples_per_s")):
        n, peer = bench.size.iterations, "unpipelined, hybrid placement"
        bench.record(f"pipelined_{name}_samples_per_s", two[key], one[key], "samples/s", n, peer)


def update(bench: Bench) -> None:
    """One optimiser step of PPO and SFT: prefixes kept by the rollout, and recomputed."""
    size = bench.size
    algo = replace(algorithm(size), batch_size=size.batch, micro_batch_size=size.batch)
    policy = make_policy(size, size.device)
    seeds = list(range(size.batch // QUERIES))
    env = PacedEnvs(replace(size, step_s=0.0), len(seeds), 0)
    rollouts = collect([env], policy, seeds, algo.gamma, algo.gae_lambda, torch.Generator().manual_seed(0))
    rollouts = replace(rollouts, advantages=torch.randn(size.batch, device=size.device))
    policy.config.prefix_cache = "recompute"
    raw = policy.prepare(observation_batch(env.reset(seeds, seeds)))  # what was seen at every query alike
    raw = raw[torch.arange(size.batch) % len(seeds)]
    worker = UpdateWorker(policy, algo, RandomDemos(size, algo.sft_batch_size()), 0)  # type: ignore[arg-type]
    worker.updater.generator = torch.Generator().manual_seed(0)
    rows = torch.arange(size.batch, device=size.device)
    kept_s, recomputed_s = [], []
    for turn in range(size.repeats + 2):  # two to compile
        for times, batch in ((kept_s, rollouts), (recomputed_s, replace(rollouts, prepared=raw))):
            took_s = _seconds(worker, batch, rows)
            if turn >= 2:
                times.append(took_s)
    kept, recomputed = (size.batch / statistics.median(times) for times in (kept_s, recomputed_s))
    name = "the same step with the prefix recomputed"
    bench.record("update_samples_per_s", kept, recomputed, "samples/s", size.repeats, name, batch=size.batch)
    bench.details["update"] = {"kept_s": kept_s, "recomputed_s": recomputed_s, "demonstrations": algo.sft_batch_size()}


def _seconds(worker: UpdateWorker, batch: Rollouts, rows: torch.Tensor) -> float:
    cuda = rows.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began_s = time.perf_counter() if cuda else time.process_time()  # others' load on a shared CPU does not count
    worker.updater.step(batch, rows)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() if cuda else time.process_time()) - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--out", type=Path, required=True)
    parts = ["update", *PLACEMENTS]
    parser.add_argument("--only", nargs="*", default=parts[:-2], choices=parts)
    parser.add_argument("--commit", default=None, help="recorded commit, where there is no git")
    parser.add_argument("--carrier", default="", choices=["nccl", "gloo"], help="of samples and weights, not as fits")
    args = parser.parse_args()
    bench = Bench(TINY if args.tiny else FULL, args.carrier)
    began_s = time.perf_counter()
    for name in args.only:
        update(bench) if name == "update" else placement(bench, name)
        if name == "hybrid_pipelined":
            pipelining(bench)
        gc.collect()
        if bench.size.device == "cuda":
            torch.cuda.empty_cache()
        print(f"-- {name} done at {time.perf_counter() - began_s:.0f} s", flush=True)
        result = {
            "name": "placement",
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit or commit(),
            "command": "python -m tests.bench.bench_placement" + " --tiny" * args.tiny,
            "machine": machine(torch.device(bench.size.device)) | {"gpus": torch.cuda.device_count()},
            "environments": f"paced, no simulator: {bench.size.step_s} s a control step",
            "figures": bench.figures,
            "details": bench.details,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
