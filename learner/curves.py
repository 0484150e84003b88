"""Curves of a run to TensorBoard, Weights & Biases and SwanLab, behind one `log`."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

BACKENDS = ("tensorboard", "wandb", "swanlab")


@dataclass
class LoggerConfig:
    """wandb and swanlab stay on this machine unless WANDB_MODE or SWANLAB_MODE says otherwise."""

    backends: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str = "cotwin"  # of wandb and swanlab

    def __post_init__(self):
        if unknown := sorted(set(self.backends) - set(BACKENDS)):
            raise ValueError(f"logger backends {unknown}: allowed are {', '.join(BACKENDS)}")


class Curves(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...


@contextlib.contextmanager
def open_curves(config: LoggerConfig, run: Path, name: str, settings: dict[str, Any]) -> Iterator[Curves]:
    """All chosen backends at once. Raises ValueError when one is not installed."""
    with contextlib.ExitStack() as stack:
        openers = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}
        yield _All([stack.enter_context(openers[b](config, run, name, settings)) for b in config.backends])


class _All:
    def __init__(self, backends: list[Curves]):
        self.backends = backends

    def log(self, metrics: dict[str, float], step: int) -> None:
        for backend in self.backends:
            backend.log(metrics, step)


class _TensorBoard:
    def __init__(self, writer: SummaryWriter):
        self.writer = writer

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)


@contextlib.contextmanager
def _tensorboard(config: LoggerConfig, run: Path, name: str, settings: dict[str, Any]) -> Iterator[Curves]:
    # No purge_step: it would remove the other stage's curves of the same run as well.
    with SummaryWriter(str(run / "tensorboard")) as writer:
        yield _TensorBoard(writer)


@contextlib.contextmanager
def _wandb(config: LoggerConfig, run: Path, name: str, settings: dict[str, Any]) -> Iterator[Curves]:
    mode = os.environ.get("WANDB_MODE", "offline")
    module = _module("wandb")
    with module.init(project=config.project, name=name, dir=str(run), config=settings, mode=mode) as session:
        yield session


@contextlib.contextmanager
def _swanlab(config: LoggerConfig, run: Path, name: str, settings: dict[str, Any]) -> Iterator[Curves]:
    module, mode = _module("swanlab"), os.environ.get("SWANLAB_MODE", "offline")
    folder = str(run / "swanlab")
    session = module.init(project=config.project, experiment_name=name, logdir=folder, config=settings, mode=mode)
    try:
        yield session
    finally:
        module.finish()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"logger backend {name!r} is not installed: uv pip install {name}, or leave it out") from error
