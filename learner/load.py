"""Bundles to policies and back: which class a checkpoint needs, and weights that fit exactly or not at all."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bridge.checkpoint import CONTRACT
from bridge.embodiment import Embodiment
from learner.policy import Policy

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEAD_NAMES = {"value_head", "noise_head"}  # what a policy may gain or give up between two trainings

# `type` in a bundle's config.json -> module with `from_bundle(folder, embodiment, device, changes) -> Policy`.
# `_lora`: with adapters beside the weights, which LeRobot must not open without them.
TYPES = {"small": "learner.small_bundle"} | dict.fromkeys(
    ("pi0", "pi05", "pi0_lora", "pi05_lora"), "learner.pi0.bundle"
)

# Where a policy class is defined -> module with `bundle_files(policy) -> dict[str, bytes]`.
WRITERS = {"learner.small_policy": "learner.small_bundle", "learner.pi0.policy": "learner.pi0.bundle"}


def bundle_files(policy: Policy) -> dict[str, bytes]:
    """A policy's files for `bridge.checkpoint.write_bundle`."""
    return importlib.import_module(WRITERS[type(policy).__module__]).bundle_files(policy)


def load_policy(folder: Path, device: str = "cpu", changes: Mapping[str, Any] | None = None) -> Policy:
    """The policy of a bundle, in evaluation mode. `changes`: keys of its config that shall have other values.

    Raises ValueError naming the file and what is wrong with it."""
    path = Path(folder) / CONFIG
    try:
        kind = json.loads(path.read_text())["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name a policy type: {error!r}") from error
    if kind not in TYPES:
        raise ValueError(f"{path}: policy type {kind!r}, known are {sorted(TYPES)}")
    embodiment = Embodiment.load(Path(folder) / CONTRACT)
    return importlib.import_module(TYPES[kind]).from_bundle(Path(folder), embodiment, device, changes or {})


def load_weights(module: nn.Module, path: Path, fresh: bool = False) -> None:
    """Every tensor of the file into `module`, strictly; with `fresh` the `HEAD_NAMES` only where both have them. Raises
    ValueError naming all keys that do not fit."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    wanted: Mapping[str, Tensor] = module.state_dict()
    if fresh:
        wanted, tensors = without_lone_heads(wanted, tensors)
    require_fit(wanted, tensors, f"{path} does not fit {type(module).__name__}")
    module.load_state_dict(tensors, strict=not fresh)


def without_lone_heads(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both without each of the `HEAD_NAMES` that only one of them has any part of: it is new, or wanted no more."""
    names, others = ({key.split(".")[0] for key in keys} for keys in (wanted, tensors))
    lone = (names ^ others) & HEAD_NAMES
    ours, theirs = ({k: v for k, v in each.items() if k.split(".")[0] not in lone} for each in (wanted, tensors))
    return ours, theirs


def require_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], problem: str) -> None:
    """Raises one ValueError with every missing, unexpected and misshapen key."""
    problems = [f"missing {key}" for key in sorted(wanted.keys() - tensors.keys())]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - wanted.keys())]
    problems += [
        f"{key} is {list(tensors[key].shape)}, expected {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & tensors.keys())
        if tensors[key].shape != wanted[key].shape
    ]
    if problems:
        raise ValueError(f"{problem}: {'; '.join(problems)}")
