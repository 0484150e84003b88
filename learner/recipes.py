"""RLinf's spelling of a training configuration, understood: names of recipes, and keys beside ours.

`cotwin train --config-name libero_spatial_ppo_openpi actor.optim.lr=1e-6 algo.beta=0` composes
`configs/recipe/libero_spatial_ppo_openpi.yaml`, which is written in RLinf's keys, and lays the command line over it;
both spellings may be used in either place. What is translated is listed below, key by key. A key of which nothing would
take notice is refused, and so are two spellings that disagree and values that ask for what is done otherwise here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from bridge.config import CONFIG_DIR, compose_files, did_you_mean, leaf_keys, load
from sim.libero.config import SUITES

RECIPES = CONFIG_DIR / "recipe"
SECTIONS = ("actor", "algorithm", "env", "rollout", "runner", "cluster")
OPENPI, PLACEMENT = "actor.model.openpi", "cluster.component_placement"

# Older or second spellings of RLinf's own.
ALIASES = {
    "actor.model.use_real_data_co_training": "actor.enable_sft_co_train",
    "actor.model.sft_loss_weight": "actor.sft_loss_weight",
    "actor.config_name": f"{OPENPI}.config_name",
    "actor.model.num_steps": f"{OPENPI}.num_steps",
    "actor.model.add_value_head": f"{OPENPI}.add_value_head",
    f"{OPENPI}.action_chunk": "actor.model.num_action_chunks",
    f"{OPENPI}.action_env_dim": "actor.model.action_dim",
    "rollout.model.model_path": "actor.model.model_path",
    "env.train.num_envs": "env.train.total_num_envs",
}

RENAMED = {
    "algorithm.gamma": "algo.gamma",
    "algorithm.gae_lambda": "algo.gae_lambda",
    "algorithm.clip_ratio_low": "algo.clip_ratio_low",
    "algorithm.clip_ratio_high": "algo.clip_ratio_high",
    "algorithm.clip_ratio_c": "algo.dual_clip",
    "algorithm.value_clip": "algo.value_clip",
    "algorithm.huber_delta": "algo.huber_delta",
    "algorithm.entropy_bonus": "algo.entropy_bonus",
    "algorithm.update_epoch": "algo.update_epochs",
    "algorithm.group_size": "algo.group_size",
    "actor.seed": "seed",
    "actor.global_batch_size": "algo.batch_size",
    "actor.micro_batch_size": "algo.micro_batch_size",
    "actor.optim.lr": "algo.lr",
    "actor.optim.value_lr": "algo.value_lr",
    "actor.optim.weight_decay": "algo.weight_decay",
    "actor.optim.clip_grad": "algo.clip_grad",
    "actor.optim.critic_warmup_steps": "algo.critic_warmup_steps",
    "actor.model.model_path": "checkpoint",
    "actor.model.num_action_chunks": "policy.num_action_chunks",
    "actor.model.action_dim": "policy.action_env_dim",
    f"{OPENPI}.add_value_head": "policy.add_value_head",
    f"{OPENPI}.value_after_vlm": "policy.value_after_vlm",
    f"{OPENPI}.value_vlm_mode": "policy.value_vlm_mode",
    f"{OPENPI}.detach_critic_input": "policy.detach_critic_input",
    f"{OPENPI}.chunk_critic_input": "policy.chunk_critic_input",
    f"{OPENPI}.train_expert_only": "policy.train_expert_only",
    f"{OPENPI}.discrete_state_input": "policy.state_in_prompt",
    f"{OPENPI}.action_horizon": "policy.model.horizon",
    f"{OPENPI}.num_steps": "policy.flow.num_steps",
    f"{OPENPI}.noise_method": "policy.flow.method",
    f"{OPENPI}.noise_level": "policy.flow.noise_level",
    f"{OPENPI}.joint_logprob": "policy.flow.joint",
    f"{OPENPI}.ignore_last": "policy.flow.ignore_last",
    "rollout.pipeline_stage_num": "pipeline_stages",
    "env.train.total_num_envs": "envs",
    "env.train.video_cfg.save_video": "video.save",
    "env.train.video_cfg.info_on_video": "video.info",
    "env.train.video_cfg.video_base_dir": "video.folder",
    "runner.max_epochs": "iterations",
    "runner.save_interval": "save_every",
    "runner.logger.log_path": "runs_dir",
    "runner.logger.experiment_name": "name",
    "runner.logger.project_name": "logger.project",
    "runner.logger.logger_backends": "logger.backends",
    "cluster.num_nodes": "cluster.num_nodes",
    "actor.enable_offload": "cluster.offload",
    "rollout.enable_offload": "cluster.offload",
    PLACEMENT: PLACEMENT,
}

# key -> our key, and their value -> ours
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "algorithm.adv_type": ("algo.algorithm", {"gae": "ppo", "grpo": "grpo"}),
    "algorithm.loss_type": ("algo.algorithm", {"actor_critic": "ppo", "actor": "grpo"}),
    "algorithm.logprob_type": ("algo.level", {f"{level}_level": level for level in ("chunk", "action", "token")}),
    "actor.fsdp_config.sharding_strategy": ("cluster.sharded", {"no_shard": False, "full_shard": True}),
    "env.train.task_suite_name": ("libero.suite", {name: name for name in SUITES}),
}

# Done in one way here: the values that say so, and what to do about others.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "algorithm.normalize_advantages": ((True,), "advantages are always normalised, over all ranks"),
    "algorithm.reward_type": (("chunk_level",), "one policy query is one time step"),
    "algorithm.entropy_type": (("chunk_level",), "entropy is averaged over a chunk"),
    "algorithm.bootstrap_type": (("standard",), "truncated episodes bootstrap through the value, ended ones do not"),
    "algorithm.kl_beta": ((0, 0.0), "there is no reference model; the SFT term (algo.beta) holds the policy"),
    "env.train.auto_reset": ((True,), "an environment takes the next start when its episode ends"),
    "env.train.ignore_terminations": ((False,), "an episode ends with success"),
    "actor.model.model_type": (("openpi",), "the other policy is `small`: leave actor.model.* out"),
    "actor.model.precision": ((None,), "policy.dtype says what arithmetic is done in"),
    "actor.training_backend": (("fsdp",), "weights are whole copies or FSDP2's shards"),
    "env.enable_offload": ((False,), "environments stay where they are"),
    "actor.optim.adam_eps": ((1e-8,), "AdamW's eps is 1e-8"),
    "runner.val_check_interval": ((-1, 0), "evaluate checkpoints by `cotwin twin-eval`"),
}

# RLinf's data recipes by name: what they say of the network. Whatever is spelled out beside it wins.
CONFIG_NAMES: dict[str, dict[str, Any]] = {
    "pi05_maniskill_sim_real_co_training": {"variant": "pi05", "horizon": 8, "prompt_tokens": 200, "state": False},
    "pi05_maniskill": {"variant": "pi05", "horizon": 8, "prompt_tokens": 200},
    "pi0_maniskill": {"variant": "pi0", "horizon": 8, "prompt_tokens": 48},
    "pi05_gsenv": {"variant": "pi05", "horizon": 5, "prompt_tokens": 200, "state": False},
    "pi05_libero": {"variant": "pi05", "horizon": 10, "prompt_tokens": 200},
    "pi0_libero": {"variant": "pi0", "horizon": 50, "prompt_tokens": 48},
}

# Tasks by their ids there.
TASKS: dict[str, dict[str, Any]] = {
    "PandaPutOnPlateInScene25DigitalTwin-v1": {"twin.task": "PickPlaceTwin-v1"},
    "PickPlaceTwin-v1": {"twin.task": "PickPlaceTwin-v1"},
    "PutCubeOnPlate-v0": {"twin.task": "PutCubeOnPlate-v0"},
    "GSEnv-PutCubeOnPlate-v0": {"twin.task": "PutCubeOnPlate-v0", "twin.render": "splat"},
}

# Keys that are read together, in `_combined`.
COMBINED = (
    *("algorithm.rollout_epoch", "algorithm.filter_rewards"),
    *("algorithm.rewards_lower_bound", "algorithm.rewards_upper_bound"),
    *("actor.enable_sft_co_train", "actor.sft_loss_weight", "actor.sft_data_path"),
    *("actor.optim.adam_beta1", "actor.optim.adam_beta2", "actor.model.is_lora", "actor.model.lora_rank"),
    *(f"{OPENPI}.{key}" for key in ("config_name", "pi05", "num_images_in_input", "noise_logvar_range")),
    *(f"{OPENPI}.{key}" for key in ("noise_anneal", "noise_params")),
    *("env.train.init_params.id", "env.train.gs_scene", "env.train.max_episode_steps"),
)
KNOWN = {*ALIASES, *RENAMED, *CHOICES, *FIXED, *COMBINED}
Found = dict[str, tuple[Any, set[str]]]
"""Our key -> value, and the keys that asked for it."""


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("_"))


def load_train[Config](schema: type[Config], argv: list[str]) -> Config:
    """The configuration of a command line in both spellings, with `--config-name NAME` or `config=NAME` for a recipe.
    Raises ValueError naming key, value and what was allowed."""
    name, texts = _take_name(argv)
    ours_known = leaf_keys(OmegaConf.structured(schema))
    written = _leaves(_read(name)) if name else {}
    typed, passed = {}, []
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and key.split(".")[0] in SECTIONS and (key not in ours_known or key in KNOWN):
            typed[key] = yaml.safe_load(value)
        else:
            passed.append(text)
    levels = [_canonical(_with_placement(level), ours_known) for level in (written, typed)]
    theirs = {k: v for level in levels for k, v in level.items() if k in KNOWN}
    values = {key: value for key, value in levels[0].items() if key not in KNOWN}  # a recipe may use our keys too
    for key, (value, sources) in translate(theirs).items():
        if key in values and values[key] != value and sources & levels[0].keys():
            raise ValueError(f"{name}: {key} {values[key]!r} and {', '.join(sorted(sources))} {value!r} contradict")
        given = [text for text in passed if text.split("=", 1)[0] == key]
        if given and sources & levels[1].keys() and yaml.safe_load(given[-1].split("=", 1)[1]) != value:
            raise ValueError(f"{given[-1]} and {', '.join(sorted(sources))}={value!r} contradict: give one of them")
        values[key] = value
    return load("train", schema, passed, values)


def translate(theirs: Mapping[str, Any]) -> Found:
    """RLinf's keys (dotted) to ours. Raises ValueError for values that cannot be honoured and for contradictions."""
    found: Found = {}

    def put(key: str, value: Any, source: str) -> None:
        before, sources = found.get(key, (value, set()))
        if before != value:
            raise ValueError(f"{', '.join(sorted(sources))} and {source} contradict: {key} {before!r} or {value!r}?")
        found[key] = value, sources | {source}

    for key, value in theirs.items():
        if key in RENAMED:
            put(RENAMED[key], value, key)
        elif key in CHOICES:
            ours, allowed = CHOICES[key]
            if value not in allowed:
                raise ValueError(f"{key} {value!r}: allowed are {', '.join(allowed)}")
            put(ours, allowed[value], key)
        elif key in FIXED and value not in FIXED[key][0]:
            raise ValueError(f"{key} {value!r} cannot be honoured: {FIXED[key][1]}")
    for key, value, source in _combined(theirs):
        if not (source == f"{OPENPI}.config_name" and key in found):
            put(key, value, source)
    return found


def _combined(theirs: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """(our key, value, source) of what several keys say together."""
    out: list[tuple[str, Any, str]] = []

    def together(key: str, needs: str) -> bool:
        """Whether `key` counts: it is there, and its switch is on. Without a switch it would be dead."""
        if key in theirs and needs not in theirs:
            raise ValueError(f"{key} {theirs[key]!r} does nothing without {needs}: true")
        return key in theirs and bool(theirs[needs])

    if "algorithm.rollout_epoch" in theirs:
        if "env.train.total_num_envs" not in theirs:
            raise ValueError("algorithm.rollout_epoch needs env.train.total_num_envs: their product is our `episodes`")
        episodes = theirs["algorithm.rollout_epoch"] * theirs["env.train.total_num_envs"]
        out.append(("episodes", episodes, "algorithm.rollout_epoch"))
    filtered = "algorithm.filter_rewards"
    for bound, ours, default in (("lower", "algo.filter_low", 0.1), ("upper", "algo.filter_high", 0.9)):
        key = f"algorithm.rewards_{bound}_bound"
        if together(key, filtered) or theirs.get(filtered):
            out.append((ours, theirs.get(key, default), filtered))
    switch, weight = "actor.enable_sft_co_train", "actor.sft_loss_weight"
    together(weight, switch)
    if switch in theirs:
        out.append(("algo.beta", theirs.get(weight, 0.1) if theirs[switch] else 0.0, switch))
    if together("actor.sft_data_path", switch):
        out.append(("data.real", [_dataset(theirs["actor.sft_data_path"])], "actor.sft_data_path"))
    beta1, beta2 = "actor.optim.adam_beta1", "actor.optim.adam_beta2"
    if beta1 in theirs or beta2 in theirs:
        out.append(("algo.betas", [theirs.get(beta1, 0.9), theirs.get(beta2, 0.999)], beta1))
    if together("actor.model.lora_rank", "actor.model.is_lora") or theirs.get("actor.model.is_lora"):
        out.append(("policy.lora.rank", theirs.get("actor.model.lora_rank", 32), "actor.model.is_lora"))
    out += _openpi(theirs, together)
    if "env.train.init_params.id" in theirs:
        task = theirs["env.train.init_params.id"]
        if task not in TASKS:
            raise ValueError(f"env.train.init_params.id {task!r}: allowed are {', '.join(TASKS)}")
        out += [(key, value, "env.train.init_params.id") for key, value in TASKS[task].items()]
    if (steps := "env.train.max_episode_steps") in theirs:
        simulator = "libero" if "env.train.task_suite_name" in theirs else "twin"
        out.append((f"{simulator}.max_steps", theirs[steps], steps))
    if "env.train.gs_scene" in theirs:
        out.append(("twin.splat.scene", theirs["env.train.gs_scene"], "env.train.gs_scene"))
    return out


def _openpi(theirs: Mapping[str, Any], together: Any) -> list[tuple[str, Any, str]]:
    """What actor.model.openpi.* says of network and exploration."""
    out: list[tuple[str, Any, str]] = []
    name, is_pi05 = f"{OPENPI}.config_name", f"{OPENPI}.pi05"
    if name in theirs:
        if theirs[name] not in CONFIG_NAMES:
            raise ValueError(f"{name} {theirs[name]!r}: allowed are {', '.join(CONFIG_NAMES)}")
        known = CONFIG_NAMES[theirs[name]]
        if theirs.get(is_pi05, known["variant"] == "pi05") != (known["variant"] == "pi05"):
            raise ValueError(f"{is_pi05} {theirs[is_pi05]!r} and {name} {theirs[name]!r} contradict")
        out += [(f"policy.model.{key}", known[key], name) for key in ("variant", "horizon", "prompt_tokens")]
        if "state" in known:
            out.append(("policy.state_in_prompt", known["state"], name))
    elif is_pi05 in theirs:
        out.append(("policy.model.variant", "pi05" if theirs[is_pi05] else "pi0", is_pi05))
    images = f"{OPENPI}.num_images_in_input"
    if images in theirs:
        if theirs[images] not in (1, 2):
            raise ValueError(f"{images} {theirs[images]!r}: allowed are 1 (third_person) and 2 (and wrist)")
        cameras = ["third_person", "wrist"]
        out.append(("policy.cameras", cameras[: theirs[images]], images))
        out.append(("policy.ignored_cameras", cameras[theirs[images] :], images))
    spread = f"{OPENPI}.noise_logvar_range"
    if spread in theirs:
        low, high = theirs[spread]
        out += [("policy.noise.std_min", low, spread), ("policy.noise.std_max", high, spread)]
    params = f"{OPENPI}.noise_params"
    if together(params, f"{OPENPI}.noise_anneal"):
        start, end, steps = theirs[params]
        out += [("policy.flow.noise_level", start, params), ("policy.flow.noise_level_end", end, params)]
        out.append(("policy.flow.noise_anneal_steps", steps, params))
    return out


def _dataset(name: str) -> str:
    """A folder, or a data set's name below HF_LEROBOT_HOME."""
    home = os.environ.get("HF_LEROBOT_HOME")
    return name if Path(name).exists() or not home else str(Path(home) / name)


def _take_name(argv: list[str]) -> tuple[str, list[str]]:
    """The recipe's name and the rest of the command line."""
    rest, names, arguments = [], [], list(argv)
    while arguments:
        text = arguments.pop(0)
        if text == "--config-name":
            if not arguments:
                raise ValueError("--config-name needs the name of a recipe")
            names.append(arguments.pop(0))
        elif text.startswith(("--config-name=", "config=")):
            names.append(text.split("=", 1)[1])
        else:
            rest.append(text)
    if len(set(names)) > 1:
        raise ValueError(f"recipes {names}: one at a time")
    return (names[0] if names else ""), rest


def _read(name: str) -> dict[str, Any]:
    if name not in recipe_names():
        near = did_you_mean(name, recipe_names())
        raise ValueError(f"no recipe {name!r}.{near} There are: {', '.join(recipe_names())}")
    composed = OmegaConf.to_container(compose_files(RECIPES, name), resolve=True)
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; component_placement is one value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and dotted != PLACEMENT:
            found |= _leaves(value, dotted)
        else:
            found[dotted] = value
    return found


def _with_placement(level: dict[str, Any]) -> dict[str, Any]:
    """`cluster.component_placement.env=0-1` and its like, gathered: they replace a recipe's placement as a whole."""
    parts = {key: value for key, value in level.items() if key.startswith(PLACEMENT + ".")}
    rest = {key: value for key, value in level.items() if key not in parts}
    return rest | ({PLACEMENT: {k.removeprefix(PLACEMENT + "."): v for k, v in parts.items()}} if parts else {})


def _canonical(level: dict[str, Any], ours: list[str]) -> dict[str, Any]:
    """One spelling for each of RLinf's keys. Raises ValueError for unknown keys and two spellings that disagree."""
    found: dict[str, Any] = {}
    for key, value in level.items():
        if key not in KNOWN and key not in ours and not key.startswith("policy."):
            raise ValueError(f"unknown key {key!r}.{did_you_mean(key, [*KNOWN, *ours])}")
        name = ALIASES.get(key, key)
        if name in found and found[name] != value:
            raise ValueError(f"{name} {found[name]!r} and {key} {value!r} contradict: they mean the same")
        found[name] = value
    return found
