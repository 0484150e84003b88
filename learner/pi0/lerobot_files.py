"""LeRobot 0.6.1's own small files for a pi0 or pi0.5 policy: config.json and the two processor pipelines.

Written without LeRobot, whose import takes ten seconds; tests let LeRobot read them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from learner.pi0.inputs import PALIGEMMA
from learner.pi0.normalise import Normaliser

if TYPE_CHECKING:
    from learner.pi0.policy import Pi0Policy

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
STATE, ACTION = "observation.state", "action"


def features(policy: "Pi0Policy") -> dict[str, dict[str, Any]]:
    """Inputs and output in LeRobot's form: images by camera, state, action."""
    size = policy.config.model.vision.image_size
    found: dict[str, dict[str, Any]] = {
        f"observation.images.{name}": {"type": "VISUAL", "shape": [3, size, size]} for name in policy.config.cameras
    }
    found[STATE] = {"type": "STATE", "shape": [policy.state_normaliser.width or policy.config.model.state_width]}
    found[ACTION] = {"type": "ACTION", "shape": [policy.config.action_env_dim]}
    return found


def policy_config(policy: "Pi0Policy") -> dict[str, Any]:
    """config.json. Optimiser settings are left to LeRobot's defaults."""
    config, model, known = policy.config, policy.config.model, features(policy)
    return {
        "type": model.variant,
        "n_obs_steps": 1,
        "input_features": {key: value for key, value in known.items() if key != ACTION},
        "output_features": {ACTION: known[ACTION]},
        "device": "cpu",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": config.dtype,
        "chunk_size": model.horizon,
        "n_action_steps": config.num_action_chunks,
        "max_state_dim": model.state_width,
        "max_action_dim": model.action_width,
        "num_inference_steps": config.num_inference_steps,
        "image_resolution": [model.vision.image_size, model.vision.image_size],
        "tokenizer_max_length": model.prompt_tokens,
        "normalization_mapping": _modes(policy),
        "train_expert_only": config.train_expert_only,
    }


def processor_files(policy: "Pi0Policy") -> dict[str, bytes]:
    """Both pipelines and the statistics they point to."""
    known = features(policy)
    relative = _step("relative_actions_processor", enabled=False, exclude_joints=["gripper"], action_names=None)
    normalise = _step("normalizer_processor", eps=1e-8, features=known, norm_map=_modes(policy))
    tokenize = _step(
        "tokenizer_processor",
        max_length=policy.config.model.prompt_tokens,
        task_key="task",
        padding_side="right",
        padding="max_length",
        truncation=True,
        tokenizer_name=PALIGEMMA,
    )
    device = _step("device_processor", device="cpu", float_dtype=None)
    before = [_step("rename_observations_processor", rename_map={}), _step("to_batch_processor")]
    if policy.config.model.variant == "pi0":
        steps = [*before, _step("pi0_new_line_processor"), tokenize, device, relative, normalise]
    else:
        words = [_step("pi05_prepare_state_tokenizer_processor_step")] * policy.config.state_in_prompt
        steps = [*before, relative, normalise, *words, tokenize, device]
    back = _step("unnormalizer_processor", eps=1e-8, features={ACTION: known[ACTION]}, norm_map=_modes(policy))
    after = [back, _step("absolute_actions_processor", enabled=False), device]
    statistics = {f"{STATE}.{name}": value for name, value in policy.state_normaliser.statistics.items()}
    statistics |= {f"{ACTION}.{name}": value for name, value in policy.action_normaliser.statistics.items()}
    tensors = save({key: value.cpu().clone() for key, value in statistics.items()})
    files = {}
    for name, pipeline in ((PREPROCESSOR, steps), (POSTPROCESSOR, after)):
        for index, step in enumerate(pipeline):
            if step["registry_name"] in ("normalizer_processor", "unnormalizer_processor"):
                step["state_file"] = f"{name}_step_{index}_{step['registry_name']}.safetensors"
                files[step["state_file"]] = tensors
        files[f"{name}.json"] = json.dumps({"name": name, "steps": pipeline}, indent=2).encode()
    return files


def read_processors(folder: Path) -> tuple[Normaliser, Normaliser, bool]:
    """Normalisers of state and action, and whether pi0.5's prompt holds the state. ValueError names a bad file."""
    state = _normaliser(folder, PREPROCESSOR, "normalizer_processor", STATE, "STATE")
    action = _normaliser(folder, POSTPROCESSOR, "unnormalizer_processor", ACTION, "ACTION")
    steps = _steps(folder, PREPROCESSOR)
    return state, action, "pi05_prepare_state_tokenizer_processor_step" in steps


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _modes(policy: "Pi0Policy") -> dict[str, str]:
    for normaliser in (policy.state_normaliser, policy.action_normaliser):
        if normaliser.convention != "lerobot":
            raise ValueError(
                "this policy normalises as openpi does, which LeRobot's files cannot say exactly; "
                "make its normalisers with Normaliser.as_lerobot() first"
            )
    return {"VISUAL": "IDENTITY", "STATE": policy.state_normaliser.mode, "ACTION": policy.action_normaliser.mode}


def _steps(folder: Path, pipeline: str) -> dict[str, dict[str, Any]]:
    path = folder / f"{pipeline}.json"
    try:
        return {step.get("registry_name", ""): step for step in json.loads(path.read_text())["steps"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a processor pipeline of LeRobot's: {error!r}") from error


def _normaliser(folder: Path, pipeline: str, name: str, key: str, kind: str) -> Normaliser:
    step = _steps(folder, pipeline).get(name)
    if step is None:
        raise ValueError(f"{folder / pipeline}.json has no {name}")
    mode = step["config"]["norm_map"].get(kind, "IDENTITY")
    if "state_file" not in step:
        return Normaliser(mode, {})
    path = folder / step["state_file"]
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    prefix = f"{key}."
    return Normaliser(mode, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
