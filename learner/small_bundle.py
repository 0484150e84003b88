"""The small policy's files in a checkpoint bundle: config.json, model.safetensors, normalization.json."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save

from bridge.embodiment import Embodiment
from learner.load import CONFIG, WEIGHTS, load_weights
from learner.small_policy import SmallPolicy, SmallPolicyConfig, Statistics

NORMALIZATION = "normalization.json"


def bundle_files(policy: SmallPolicy) -> dict[str, bytes]:
    """For `bridge.checkpoint.write_bundle`."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in policy.state_dict().items()}
    return {
        CONFIG: json.dumps({"type": "small", "policy": asdict(policy.config)}, indent=2).encode(),
        WEIGHTS: save(tensors),
        NORMALIZATION: json.dumps(policy.statistics.to_dict(), indent=2).encode(),
    }


def from_bundle(
    folder: Path, embodiment: Embodiment, device: str = "cpu", changes: Mapping[str, Any] | None = None
) -> SmallPolicy:
    """`changes`: keys of the saved config that shall have other values; a noise head may come or go with them.
    Raises ValueError naming the file and every key that does not fit."""
    try:
        saved = OmegaConf.create(json.loads((folder / CONFIG).read_text())["policy"])
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SmallPolicyConfig), saved, changes or {}))
    except (OSError, KeyError, OmegaConfBaseException) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        statistics = Statistics.from_dict(json.loads((folder / NORMALIZATION).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / NORMALIZATION} is not a small policy's normalisation: {error!r}") from error
    policy = SmallPolicy(config, embodiment, statistics)
    load_weights(policy, folder / WEIGHTS, fresh=bool(changes))
    return policy.to(device).eval()
