"""Stage I: supervised training on demonstrations of the robot (or its stand-in) and of the twin: of the small policy
from scratch, of pi0 and pi0.5 (`policy=pi05`) from a released checkpoint.

L = alpha L_sim + (1 - alpha) L_real, as shares of every batch. Ends after `steps` or `max_seconds`, whichever is first;
the learning rate's schedule follows the same budget. An interrupted run goes on exactly where its last saved state
was. Leaves a checkpoint bundle of the averaged (EMA) weights.
"""

import contextlib
import copy
import importlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from bridge import durable
from bridge.checkpoint import bundle_path, latest_bundle, read_manifest, write_bundle
from bridge.config import command_line, save
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError
from bridge.run_files import RunConfig, write_stage
from learner.demo_dataset import DataConfig, Mixture, Part, open_parts
from learner.load import bundle_files
from learner.normalization import weighted_quantiles
from learner.policy import Policy
from learner.small_policy import SmallPolicy, SmallPolicyConfig, Statistics


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and cosine decay, and the average of the weights that is saved in the end."""

    lr: float = 1.5e-3
    final_lr_share: float = 0.02
    warmup_steps: int = 30
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 1.0
    ema_decay: float = 0.99


@dataclass
class SftConfig(RunConfig):
    """Keys of `cotwin sft`."""

    stage: str = "sft"
    seed: int = 0
    steps: int = 0  # 0: no limit
    max_seconds: float = 150.0  # of training, without start-up; 0: no limit
    batch_size: int = 32
    threads: int = 2
    save_every_s: float = 60.0
    resume: bool = True  # go on from an interrupted run's state
    data: DataConfig = field(default_factory=DataConfig)  # empty: the run's own data/twin and data/stand_in
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    policy: SmallPolicyConfig = field(default_factory=SmallPolicyConfig)
    embodiment: Embodiment = field(default_factory=Embodiment)
    device: str = "cpu"

    def __post_init__(self):
        if self.steps <= 0 and self.max_seconds <= 0:
            raise ValueError("set steps or max_seconds above 0: training without a limit never saves its result")

    def new_policy(self, statistics: Statistics) -> Policy:
        """What training starts from."""
        return SmallPolicy(self.policy, self.embodiment, statistics).to(self.device)


class SftTrainer:
    """One step at a time, and all that it takes to continue: `state_dict` after n steps and n more steps here give
    the same bits as 2n steps."""

    def __init__(self, config: SftConfig, parts: list[Part]):
        self.config = config
        torch.manual_seed(config.seed)
        self.policy: Any = config.new_policy(measure(parts))
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.mixture = Mixture(parts, config.batch_size, config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        decayed = [p for p in self.trained if p.ndim >= 2]
        others = [p for p in self.trained if p.ndim < 2]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, weight_decay=o.weight_decay, betas=o.betas, fused=True)
        # Frozen weights are shared: an average of one value needs no memory of its own.
        self.averaged = copy.deepcopy(self.policy, {id(p): p for p in self.policy.parameters() if not p.requires_grad})
        self.step, self.elapsed_s = 0, 0.0
        self.losses: list[float] = []  # of every step, those before an interruption too

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        shares = [0.0]
        if self.config.steps:
            shares.append(self.step / self.config.steps)
        if self.config.max_seconds:
            shares.append(self.elapsed_s / self.config.max_seconds)
        return min(max(shares), 1.0)

    def train_step(self) -> dict[str, float]:
        """One optimiser step. Raises ValueError when the loss is not finite; the weights are those before the step."""
        started_s = time.monotonic()
        o = self.config.optimizer
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        lr = o.lr * min(1.0, (self.step + 1) / o.warmup_steps) * (o.final_lr_share + (1 - o.final_lr_share) * cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        terms = self.policy.sft_terms(next(self.mixture), self.generator)
        self.optimizer.zero_grad()
        terms["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, o.clip_grad)
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {self.step}: loss {terms['loss'].item()}, gradient norm {norm.item()}; lower optimizer.lr"
            )
        self.optimizer.step()
        self.step += 1
        decay = min(o.ema_decay, self.step / (self.step + 9))
        with torch.no_grad():
            averaged = [p for p in self.averaged.parameters() if p.requires_grad]
            torch._foreach_lerp_(averaged, self.trained, 1 - decay)
        self.elapsed_s += time.monotonic() - started_s
        return {name: value.item() for name, value in terms.items()} | {"grad_norm": norm.item(), "lr": lr}

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mixture": self.mixture.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mixture.load_state_dict(state["mixture"])
        self.generator.set_state(state["generator"])
        self.step, self.elapsed_s, self.losses = state["step"], state["elapsed_s"], list(state["losses"])


def measure(parts: list[Part]) -> Statistics:
    """Quantiles over all rows, weighted as batches will be."""
    state, action, state_weight, action_weight = [], [], [], []
    for part in parts:
        for dataset in part.datasets:
            rows = dataset.rows
            state.append(rows.state)
            state_weight.append(np.full(len(rows.state), part.share / len(part)))
            action.append(rows.step_action[rows.step_known])
            action_weight.append(np.full(len(action[-1]), part.share / len(part)))
    return Statistics(
        weighted_quantiles(np.concatenate(state), np.concatenate(state_weight)),
        weighted_quantiles(np.concatenate(action), np.concatenate(action_weight)),
    )


def default_data(data: DataConfig, run: Path) -> DataConfig:
    """The run's own data sets where none is named."""
    if data.sim or data.real:
        return data
    named = {"sim": run / "data" / "twin", "real": run / "data" / "stand_in"}
    found = {side: [str(path)] for side, path in named.items() if (path / "meta" / "info.json").is_file()}
    return DataConfig(**(asdict(data) | found))


def schema(argv: list[str]) -> type[SftConfig]:
    """The stage's keys; `policy=pi0...` (a file of configs/policy) brings its own."""
    choices = [text.removeprefix("policy=") for text in argv if text.startswith("policy=")]
    if not choices or not choices[-1].startswith("pi0"):
        return SftConfig
    return importlib.import_module("learner.pi0.stage").Pi0SftConfig


def main(argv: list[str]) -> int:
    config = command_line("sft", schema(argv), argv, __doc__)
    torch.set_num_threads(config.threads)
    try:
        figures = train(config)
    except (BridgeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    print(f"version {figures['version']}: loss {figures['first_loss']:.3f} -> {figures['final_loss']:.3f}")
    return 0


def train(config: SftConfig) -> dict[str, Any]:
    """The whole stage; returns its figures. KeyboardInterrupt and SIGTERM save the state first."""
    started_s = time.monotonic()
    data = default_data(config.data, config.run)
    policy = config.policy
    parts = open_parts(data, config.embodiment, policy.horizon, policy.picture_size, policy.pads_pictures)
    trainer = SftTrainer(config, parts)
    state_file = config.run / "training" / f"{config.stage}.pt"
    if config.resume and state_file.exists():
        resume(trainer, state_file)
    save(config, config.run / "config" / f"{config.stage}.yaml")
    losses = run_steps(trainer, config, state_file)
    newest = latest_bundle(config.run / "checkpoints")
    version = 1 + (read_manifest(newest)[0].version if newest else 0)
    folder = bundle_path(config.run / "checkpoints", version)
    samples = trainer.step * config.batch_size
    figures = {
        "version": version,
        "steps": trainer.step,
        "first_loss": losses[0],
        "final_loss": float(np.mean(losses[-20:])),
        "samples": samples,
        "samples_per_s": samples / trainer.elapsed_s,
        "parameters": sum(p.numel() for p in trainer.policy.parameters()),
    } | {f"{part.name}_rows": len(part) for part in parts}
    evaluation = {"sft_loss": figures["final_loss"]}
    write_bundle(folder, bundle_files(trainer.averaged), config.embodiment, version, 0, trainer.step, evaluation)
    curve = config.run / "curves" / f"{config.stage}.json"
    durable.make_folder(curve.parent)
    durable.write_text(curve, json.dumps({"loss": losses}) + "\n")
    files = {"loss_curve": curve, "checkpoint": folder}
    write_stage(config.run, config.stage, time.monotonic() - started_s, figures, files)
    state_file.unlink(missing_ok=True)
    return figures


def run_steps(trainer: SftTrainer, config: SftConfig, state_file: Path) -> list[float]:
    """Train until the budget is used; returns the loss of every step."""
    durable.make_folder(state_file.parent)
    losses = trainer.losses
    saved_s = time.monotonic()
    # No purge_step: it would remove the other stage's curves of the same run as well.
    writer = SummaryWriter(str(config.run / "tensorboard"))
    with writer, tqdm(total=100, desc=config.stage, unit="%") as bar, terminate_as_interrupt():
        try:
            while trainer.progress < 1.0:
                terms = trainer.train_step()
                losses.append(terms["loss"])
                for name, value in terms.items():
                    writer.add_scalar(f"sft/{name}", value, trainer.step)
                bar.update(round(100 * trainer.progress, 1) - bar.n)
                bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", step=trainer.step, refresh=False)
                if time.monotonic() - saved_s > config.save_every_s:
                    save_state(trainer, state_file)
                    saved_s = time.monotonic()
        except KeyboardInterrupt:
            save_state(trainer, state_file)
            raise
    return losses


def save_state(trainer: SftTrainer, path: Path) -> None:
    unfinished = path.with_suffix(".partial")
    torch.save({"config": asdict(trainer.config), "trainer": trainer.state_dict()}, unfinished)
    unfinished.replace(path)


def resume(trainer: SftTrainer, path: Path) -> None:
    """Raises ValueError when the state belongs to another configuration: it would not be the same run."""
    saved = torch.load(path, weights_only=True)
    free = {"steps", "max_seconds", "threads", "save_every_s", "resume"}
    ours = asdict(trainer.config)
    changed = [key for key in ours if key not in free and ours[key] != saved["config"].get(key)]
    if changed:
        raise ValueError(f"{path} was saved with other values of {changed}; use them again or set resume=false")
    trainer.load_state_dict(saved["trainer"])


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside the block, so that a stopped stage keeps its state."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
