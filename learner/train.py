"""Stage II: PPO in the twin with an SFT term on demonstrations of the robot (or its stand-in).

    for every iteration: fresh seeded twin episodes -> advantages -> updates of L_rl + beta L_sft -> checkpoint

Starts from a bundle of Stage I. State is saved after every iteration; an interrupted run goes on there, and gives what
an uninterrupted one would have given.
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bridge import durable
from bridge.checkpoint import CONTRACT, bundle_path, latest_bundle, verify_bundle, write_bundle
from bridge.config import command_line, save
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError
from bridge.run_files import RunConfig, write_stage
from learner.curves import LoggerConfig, open_curves
from learner.demo_dataset import DataConfig, Mixture, open_parts
from learner.explain import explain
from learner.film import Film, VideoConfig
from learner.load import load_policy
from learner.placement_map import ClusterConfig, Placement, parse, require_fit
from learner.recipes import load_train, recipe_names
from learner.remote import WorkerDied
from learner.sft import default_data, terminate_as_interrupt
from learner.trainer import Trainer, local_trainer
from learner.update import AlgoConfig
from sim.libero.config import LiberoConfig
from sim.twin.config import TwinConfig
from sim.twin.vector_env import TwinVectorEnv


@dataclass
class TrainConfig(RunConfig):
    """Keys of `cotwin train`."""

    stage: str = "train"
    seed: int = 0
    checkpoint: str = ""  # bundle folder to start from; empty: the run's newest
    iterations: int = 3
    envs: int = 8  # twins
    workers: int = 2  # processes that share them
    episodes: int = 16  # of an iteration
    save_every: int = 1  # iterations between bundles; the last one is always saved
    threads: int = 2
    device: str = "cpu"
    noise_level: float | None = None  # exploration; None: the checkpoint's
    resume: bool = True
    pipeline_stages: int = 1  # groups of environments of a rollout worker; the policy thinks for one at a time
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    policy: dict[str, Any] = field(default_factory=dict)  # keys of the checkpoint's policy config to change
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)  # of the SFT term; empty: the run's own data/stand_in
    twin: TwinConfig = field(default_factory=TwinConfig)
    libero: LiberoConfig = field(default_factory=LiberoConfig)  # with a suite: in place of the twin

    def __post_init__(self):
        if min(self.iterations, self.episodes, self.save_every) < 1:
            raise ValueError("iterations, episodes and save_every must be at least 1")
        if self.pipeline_stages < 1 or self.envs % self.pipeline_stages:
            raise ValueError(f"envs {self.envs}: must be a multiple of pipeline_stages {self.pipeline_stages}")
        if self.episodes % self.algo.group_size:
            raise ValueError(f"episodes {self.episodes}: must be a multiple of algo.group_size {self.algo.group_size}")

    @property
    def simulator(self) -> TwinConfig | LiberoConfig:
        return self.libero if self.libero.suite else self.twin

    @property
    def placement(self) -> Placement | None:
        """None: everything in one process."""
        c = self.cluster
        if not c.component_placement:
            return None
        placement = parse(c.component_placement, c.num_nodes, c.gpus_per_node or max(torch.cuda.device_count(), 1))
        require_fit(placement, self.envs, self.pipeline_stages, self.algo.batch_size)
        return placement


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        command_line(
            "train", TrainConfig, ["--help"], f"{__doc__}\n\nrecipes (config=NAME): {', '.join(recipe_names())}"
        )
    shown = [text for text in argv if text in ("explain=true", "explain=True")]
    try:
        config = load_train(TrainConfig, [text for text in argv if text not in (*shown, "explain=false")])
        if shown:
            print(explain(config))
            return 0
        torch.set_num_threads(config.threads)
        figures = train(config)
    except (BridgeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except WorkerDied as error:
        print(f"error: {error}; the same command goes on from the last saved state", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    print(f"version {figures['parent_version']} -> {figures['version']} after {figures['optimizer_steps']} steps")
    return 0


def train(config: TrainConfig) -> dict[str, Any]:
    """The whole stage; returns its figures."""
    started_s = time.monotonic()
    start = config.bundle(config.checkpoint)
    state_file = config.run / "training" / f"{config.stage}.pt"
    saved = load_state(state_file, config) if config.resume and state_file.exists() else None
    start = Path(saved["start"]) if saved else start
    parent = verify_bundle(start).version
    embodiment = Embodiment.load(start / CONTRACT)
    save(config, config.run / "config" / f"{config.stage}.yaml")
    with open_trainer(config, start, embodiment) as trainer:
        if saved:
            trainer.load_state_dict(saved["trainer"])
        newest, history = (saved["version"], saved["history"]) if saved else (parent, [])
        newest = run_iterations(trainer, config, embodiment, start, newest, history, state_file)
        optimizer_steps = trainer.optimizer_steps
    curve = config.run / "curves" / f"{config.stage}.json"
    durable.make_folder(curve.parent)
    durable.write_text(curve, json.dumps(history) + "\n")
    rollout_s = sum(m["time/rollout_s"] for m in history)
    figures = {
        "parent_version": parent,
        "version": newest,
        "iterations": trainer.iteration,
        "optimizer_steps": optimizer_steps,
        "env_steps": trainer.env_steps,
        "env_steps_per_s": sum(m["time/env_steps_per_s"] * m["time/rollout_s"] for m in history) / max(rollout_s, 1e-9),
        "rollout_s": rollout_s,
        "update_s": sum(m["time/update_s"] for m in history),
        "success_once_first": history[0].get("env/success_once", 0.0) if history else 0.0,
        "success_once_last": history[-1].get("env/success_once", 0.0) if history else 0.0,
    }
    write_stage(config.run, config.stage, time.monotonic() - started_s, figures, {"metrics": curve})
    state_file.unlink(missing_ok=True)
    return figures


@contextlib.contextmanager
def open_trainer(config: TrainConfig, start: Path, embodiment: Embodiment) -> Iterator[Trainer]:
    """In this process, or as `cluster.component_placement` says."""
    placement, stages = config.placement, config.pipeline_stages
    if placement is None:
        policy = open_policy(config, start, config.device)
        demos = open_demos(config, policy)
        with contextlib.ExitStack() as stack:
            envs = []
            for stage in range(stages):
                count, workers, seed = config.envs // stages, config.workers // stages, config.seed + stage
                env = TwinVectorEnv(config.simulator, embodiment, count, workers, seed, auto_reset=False)
                envs.append(stack.enter_context(contextlib.closing(env)))
            yield local_trainer(policy, envs, demos, config.algo, config.episodes, config.seed)
        return
    from learner.member import Job
    from learner.placement import placed_trainer

    job = Job(
        make_policy=functools.partial(open_policy, config, start.resolve()),
        make_env=functools.partial(make_envs, config.simulator, embodiment),
        make_demos=functools.partial(open_demos, config),
        algo=config.algo,
        envs=config.envs,
        stages=stages,
        seed=config.seed,
        threads=config.threads,
        device=config.device,
        cluster=config.cluster,
    )
    with placed_trainer(job, placement, config.episodes) as trainer:
        yield trainer


def make_envs(simulator: TwinConfig | LiberoConfig, embodiment: Embodiment, num_envs: int, seed: int) -> TwinVectorEnv:
    """Environments in the calling process."""
    return TwinVectorEnv(simulator, embodiment, num_envs, 0, seed, auto_reset=False)


def open_policy(config: TrainConfig, start: Path, device: str) -> Any:
    """The checkpoint's policy, ready for Stage II; parts that the checkpoint lacks begin the same everywhere."""
    torch.manual_seed(config.seed)
    policy = load_policy(start, device, config.policy)
    if hasattr(policy, "freeze_eyes"):
        policy.freeze_eyes()
    if config.noise_level is not None:
        policy.config.flow.noise_level = config.noise_level
    if config.algo.algorithm == "ppo" and getattr(policy, "value_head", None) is None:
        raise ValueError(f"{start} has no critic: train it with policy.add_value_head=true or set algo.algorithm=grpo")
    return policy


def open_demos(config: TrainConfig, policy: Any, rank: int = 0, ranks: int = 1) -> Mixture | None:
    """Demonstrations of the SFT term; None when beta is 0. Of several ranks each reads its part of them."""
    if config.algo.beta == 0:
        return None
    data = config.data
    if not data.sim and not data.real:
        data = default_data(data, config.run)
        data.sim = []  # Stage II anchors the policy to the robot; the twin is where it explores
        if not data.real:
            raise ValueError(
                f"algo.beta {config.algo.beta} needs demonstrations: {config.run}/data/stand_in is missing"
            )
    parts = open_parts(data, policy.embodiment, policy.horizon, policy.picture_size, policy.pads_pictures)
    return Mixture(parts, config.algo.sft_batch_size(ranks), config.seed, rank, ranks)


def run_iterations(
    trainer: Trainer,
    config: TrainConfig,
    embodiment: Embodiment,
    start: Path,
    version: int,
    history: list[dict[str, float]],
    state_file: Path,
) -> int:
    """Iterate to the end, logging and saving; metrics are added to `history`. Returns the last version; `version` is
    the one that the weights now are."""
    durable.make_folder(state_file.parent)
    curves = open_curves(config.logger, config.run, config.name, asdict(config))
    bar = tqdm(total=config.iterations, initial=trainer.iteration, desc=config.stage, unit="iteration")
    with curves as logger, bar, terminate_as_interrupt():
        if history and trainer.iteration >= config.iterations:  # asked for fewer than the stopped run has made: it ends
            version = save_bundle(trainer, config, embodiment, version, history[-1])
        while trainer.iteration < config.iterations:
            metrics = trainer.iterate(film(config, trainer.iteration))
            history.append(metrics)
            logger.log(metrics, trainer.iteration)
            bar.update()
            bar.set_postfix(success=f"{metrics.get('env/success_once', 0):.2f}", refresh=False)
            if trainer.iteration % config.save_every == 0 or trainer.iteration == config.iterations:
                version = save_bundle(trainer, config, embodiment, version, metrics)
            save_state(trainer, config, start, version, history, state_file)
    return version


def film(config: TrainConfig, iteration: int) -> Film | None:
    """What to keep of this iteration's rollouts on video."""
    if not config.video.save or iteration % config.video.every:
        return None
    folder = Path(config.video.folder) if config.video.folder else config.run / "videos"
    return Film(folder / f"{config.stage}-{iteration:04d}.mp4", config.video.info)


def save_bundle(
    trainer: Trainer, config: TrainConfig, embodiment: Embodiment, parent: int, metrics: dict[str, float]
) -> int:
    """The next version; returns it."""
    root = config.run / "checkpoints"
    newest = latest_bundle(root)
    version = 1 + max(parent, verify_bundle(newest).version if newest else 0)
    evaluation = {key: metrics[key] for key in ("env/success_once", "env/episode_len") if key in metrics}
    write_bundle(
        bundle_path(root, version),
        trainer.bundle(),
        embodiment,
        version,
        parent,
        trainer.optimizer_steps,
        evaluation,
    )
    return version


def save_state(
    trainer: Trainer, config: TrainConfig, start: Path, version: int, history: list[dict[str, float]], path: Path
) -> None:
    unfinished = path.with_suffix(".partial")
    state = {
        "config": asdict(config),
        "start": str(start),
        "version": version,
        "history": history,
        "trainer": trainer.state_dict(),
    }
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_state(path: Path, config: TrainConfig) -> dict[str, Any]:
    """Raises ValueError when the state belongs to another configuration."""
    saved = torch.load(path, weights_only=True)
    free = {"iterations", "save_every", "threads", "resume"}
    ours = asdict(config)
    changed = [key for key in ours if key not in free and ours[key] != saved["config"].get(key)]
    if changed:
        raise ValueError(f"{path} was saved with other values of {changed}; use them again or set resume=false")
    return saved


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
