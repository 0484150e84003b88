"""pi0 and pi0.5 policies as files: folders that LeRobot opens too, and folders in openpi-PyTorch's layout.

A policy folder holds LeRobot's own files (config.json, model.safetensors, pre- and postprocessor with the
normalisation) and of ours: policy.json, the whole `Pi0Config`; heads.safetensors, the critic and the noise head, and
adapters.safetensors, LoRA's (each present if the policy has such). Weights below adapters are saved as they are, so
that training goes on exactly; as LeRobot would run them without the adapters, config.json then names a type that it
does not know. With `lora.merge_on_save` the adapters are merged in and the folder is a plain policy's.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bridge.embodiment import Embodiment
from learner.load import CONFIG, WEIGHTS, require_fit, without_lone_heads
from learner.pi0.adapters import LoraConfig, adapter_weights
from learner.pi0.config import ModelConfig, VisionConfig
from learner.pi0.inputs import Tokenizer
from learner.pi0.lerobot_files import policy_config, processor_files, read_processors
from learner.pi0.normalise import Normaliser
from learner.pi0.policy import Pi0Config, Pi0Policy
from learner.pi0.weights import load_released, to_released

POLICY, HEADS, ADAPTERS = "policy.json", "heads.safetensors", "adapters.safetensors"
IMAGES = "observation.images."


def bundle_files(policy: Pi0Policy) -> dict[str, bytes]:
    """For `bridge.checkpoint.write_bundle`. The language-model heads that no pi0 uses are not among the weights."""
    lora = policy.config.lora
    merged = lora.merge_on_save or not lora.rank
    released = to_released(policy.model, merged)
    config = replace(policy.config, lora=LoraConfig()) if merged else policy.config
    files = {
        CONFIG: json.dumps(policy_config(policy) | {"type": _kind(config)}, indent=2).encode(),
        WEIGHTS: save(_on_cpu({f"model.{key}": value for key, value in released.items()}), metadata={"format": "pt"}),
        POLICY: json.dumps(asdict(config), indent=2).encode(),
        **processor_files(policy),
    }
    extra = {HEADS: policy.heads().state_dict(), ADAPTERS: {} if merged else adapter_weights(policy.model)}
    return files | {name: save(_on_cpu(tensors)) for name, tensors in extra.items() if tensors}


def from_bundle(
    folder: Path, embodiment: Embodiment, device: str = "cpu", changes: Mapping[str, Any] | None = None
) -> Pi0Policy:
    """A policy that `bundle_files` wrote (its config is read from policy.json), or one that LeRobot saved.

    `changes`: keys of policy.json that shall have other values; heads and adapters that come with them are new."""
    path = folder / POLICY
    if not path.exists() and changes:
        raise ValueError(f"{path} is missing, so that there is nothing to change: train it by cotwin sft first")
    if not path.exists():
        return load_lerobot(folder, embodiment, device=device)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Pi0Config), OmegaConf.create(path.read_text()))
        saved = cast(Pi0Config, OmegaConf.to_object(merged))
        config = cast(Pi0Config, OmegaConf.to_object(OmegaConf.merge(merged, changes or {})))
    except (OSError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {error}") from error
    _require_kind(folder, read_json(folder / CONFIG), _kind(saved))
    state, action, state_in_prompt = read_processors(folder)
    config = replace(config, state_in_prompt=state_in_prompt)
    policy = Pi0Policy(config, embodiment, state, action, device=device)
    load_weights(policy, folder, fresh=bool(changes))
    return policy.eval()


def load_weights(policy: Pi0Policy, folder: Path, fresh: bool = False, allow: Iterable[str] = ()) -> None:
    """A folder's network, critic, noise head and adapters into `policy`. With `fresh`, heads and adapters that the
    folder lacks keep their initial values and heads that `policy` lacks are left out (to go on otherwise than before);
    all else fits or is a ValueError."""
    load_released(policy.model, read_tensors(folder / WEIGHTS), allow, str(folder / WEIGHTS))
    extra = {HEADS: policy.heads().state_dict(), ADAPTERS: adapter_weights(policy.model)}
    for name, wanted in extra.items():
        exists = (folder / name).exists()
        if exists or (wanted and not fresh):
            tensors = read_tensors(folder / name)
            if fresh:
                wanted, tensors = without_lone_heads(wanted, tensors)
            require_fit(wanted, tensors, f"{folder / name} does not fit this policy")
            with torch.no_grad():
                for key, value in wanted.items():
                    value.copy_(tensors[key])


def load_lerobot(
    folder: Path,
    embodiment: Embodiment,
    config: Pi0Config | None = None,
    tokenizer: Tokenizer | None = None,
    allow: Iterable[str] = (),
    device: torch.device | str = "cpu",
) -> Pi0Policy:
    """A policy from a folder that LeRobot's `save_pretrained` (or `bundle_files`) wrote.

    Without `config` the shapes and cameras are LeRobot's config.json's. With one, its `cameras` name ours in the order
    of the checkpoint's. `allow`: weight names that may be missing, unexpected or misshapen.

    Raises ValueError naming the file and everything in it that does not fit; nothing is ever left at random values.
    """
    saved = read_json(folder / CONFIG)
    config = config or config_from_lerobot(saved, folder / CONFIG)
    _require_kind(folder, saved, config.model.variant)
    state, action, state_in_prompt = read_processors(folder)
    config = replace(config, state_in_prompt=state_in_prompt)
    if action.width not in (None, config.action_env_dim):
        raise ValueError(
            f"{folder}: action statistics are {action.width}-D, the policy's action_env_dim is {config.action_env_dim}"
        )
    policy = Pi0Policy(config, embodiment, state, action, tokenizer, device)
    load_released(policy.model, read_tensors(folder / WEIGHTS), allow, str(folder / WEIGHTS))
    return policy.eval()


def openpi_normalisers(folder: Path, config: Pi0Config) -> tuple[Normaliser, Normaliser]:
    """State's and action's, from the one norm_stats.json at or below an openpi-PyTorch folder. Raises ValueError."""
    found = sorted(folder.rglob("norm_stats.json"))
    if len(found) != 1:
        names = [str(p.relative_to(folder)) for p in found] or "none"
        raise ValueError(f"{folder}: needs exactly one norm_stats.json, found {names}; keep the one of your robot")
    statistics = read_json(found[0])
    statistics = statistics.get("norm_stats", statistics)
    mode = "QUANTILES" if config.model.variant == "pi05" else "MEAN_STD"
    names = {"QUANTILES": ("q01", "q99"), "MEAN_STD": ("mean", "std")}[mode]

    def normaliser(key: str, width: int | None) -> Normaliser:
        try:
            values = {name: torch.tensor(statistics[key][name], dtype=torch.float32)[:width] for name in names}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{found[0]}: no {' and '.join(names)} of {key!r}: {error!r}") from error
        return Normaliser(mode, values, "openpi")

    return normaliser("state", None), normaliser("actions", config.action_env_dim)


def config_from_lerobot(saved: dict[str, Any], path: Path) -> Pi0Config:
    """What LeRobot's config.json says about a released-size network."""
    variants = (saved.get("paligemma_variant"), saved.get("action_expert_variant"))
    if saved.get("type") not in ("pi0", "pi05") or variants != ("gemma_2b", "gemma_300m"):
        raise ValueError(
            f"{path}: type {saved.get('type')!r} with {variants}: only pi0 and pi05 of gemma_2b and gemma_300m"
        )
    if saved.get("use_relative_actions"):
        raise ValueError(f"{path}: use_relative_actions is on; actions here are deltas from the commanded target")
    horizon = saved["chunk_size"]
    model = ModelConfig(
        variant=saved["type"],
        vision=VisionConfig(image_size=saved["image_resolution"][0]),
        prompt_tokens=saved["tokenizer_max_length"],
        horizon=horizon,
        action_width=saved["max_action_dim"],
        state_width=saved["max_state_dim"],
    )
    return Pi0Config(
        model=model,
        cameras=[key.removeprefix(IMAGES) for key in saved["input_features"] if key.startswith(IMAGES)],
        num_action_chunks=min(saved["n_action_steps"], horizon),
        action_env_dim=saved["output_features"]["action"]["shape"][0],
        num_inference_steps=saved["num_inference_steps"],
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError when the file is absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError when the file is absent or no JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def _kind(config: Pi0Config) -> str:
    """`type` in config.json: LeRobot's name of the variant, where LeRobot may open the folder."""
    return config.model.variant + ("_lora" if config.lora.rank else "")


def _require_kind(folder: Path, saved: dict[str, Any], kind: str) -> None:
    if saved.get("type") != kind:
        raise ValueError(f"{folder / CONFIG} is a {saved.get('type')!r} checkpoint, the policy is {kind!r}")


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
