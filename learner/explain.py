"""What a training configuration will do, before it does it: samples, steps, shares, memory, places. Starts nothing."""

import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bridge.checkpoint import latest_bundle
from learner.load import WEIGHTS
from learner.pi0.config import ModelConfig
from learner.pi0.model import Pi0Model
from learner.pi0.policy import Pi0Config
from learner.placement_map import described

GB = 1e9


def explain(config: Any) -> str:
    """For `learner.train.TrainConfig`. Raises ValueError for a policy or placement that makes no sense."""
    algo, lines = config.algo, []
    policy = openpi_config(config.policy)
    chunk = config.policy.get("num_action_chunks", policy.num_action_chunks if policy else 8)
    samples = config.episodes * math.ceil(config.simulator.max_steps / chunk)
    steps = math.ceil(samples / algo.batch_size) * algo.update_epochs
    groups = f" in groups of {algo.group_size}" if algo.group_size > 1 else ""
    lines += [
        f"algorithm          {algo.algorithm}, {algo.level}-level ratios, {config.libero.suite or config.twin.task}",
        f"iterations         {config.iterations}",
        f"episodes           {config.episodes} an iteration{groups}, in {config.envs} environments",
        f"samples            at most {samples} an iteration ({config.simulator.max_steps} steps, chunks of {chunk})",
        f"optimiser steps    at most {steps} an iteration ({algo.batch_size} samples, {algo.update_epochs} epochs)",
    ]
    if algo.beta:
        sft = algo.sft_batch_size() * (algo.batch_size // algo.micro_batch_size)
        weight = f"beta {algo.beta}"
        if algo.sft_gradient_share is not None:
            weight += f", then as holds its share of the gradient at {algo.sft_gradient_share:.0%}"
        lines.append(
            f"SFT : RL           {sft} : {algo.batch_size} samples (1 : {algo.batch_size / sft:.3g}), {weight}"
        )
    else:
        lines.append("SFT : RL           no SFT term (beta 0)")
    lines += _memory(config, policy, samples)
    placement = config.placement
    if placement is None:
        return "\n".join([*lines, f"placement          one process on {config.device}"])
    cluster, actors = config.cluster, len(placement["actor"])
    copies = f"weights that train in {actors} shards" if cluster.sharded else "whole copies of the weights"
    how = [copies, "on Ray" if cluster.on_ray else "processes of this machine"]
    how += [name for name in ("asynchronous", "offload") if getattr(cluster, name)]
    lines.append(f"placement          {', '.join(how)}")
    return "\n".join([*lines, *(f"  {line}" for line in described(placement, cluster, config.device == "cuda"))])


def openpi_config(changes: dict[str, Any]) -> Pi0Config | None:
    """The pi0 policy that `changes` make of the defaults; None where they are not about one."""
    if "variant" not in changes.get("model", {}):
        return None
    policy = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Pi0Config), changes))
    assert isinstance(policy, Pi0Config)
    return policy


def _memory(config: Any, policy: Pi0Config | None, samples: int) -> list[str]:
    """Weights, gradients and Adam's moments; what is kept of samples. Activations come on top."""
    if policy is None:
        folder = Path(config.checkpoint) if config.checkpoint else latest_bundle(config.run / "checkpoints")
        if folder is None or not (folder / WEIGHTS).is_file():
            return ["memory             that of the checkpoint's policy, which is not there yet"]
        weights = (folder / WEIGHTS).stat().st_size
        return [f"memory             {4 * weights / GB:.2f} GB at most for weights, gradients and optimiser"]
    frozen, trained = parameters(policy.model)
    if not policy.train_expert_only:
        frozen, trained = 0, frozen + trained
    fixed = 2 * frozen + 16 * trained + (2 * trained if policy.dtype == "bfloat16" else 0)
    lines = [
        f"memory, an actor   {fixed / GB:.1f} GB: {frozen / GB:.2f} G frozen parameters in bfloat16, "
        f"{trained / GB:.2f} G trained with gradient and two moments in float32; activations come on top"
    ]
    if policy.prefix_is_frozen and policy.prefix_cache != "recompute":
        tokens = len(policy.cameras) * policy.model.vision.tokens + policy.model.prompt_tokens
        each = policy.model.language.depth * 2 * tokens * policy.model.language.head_width * 2
        where = "GPU" if policy.prefix_cache == "device" else "host"
        lines.append(
            f"memory, samples    {samples * each / GB:.1f} GB at most on the {where}: {each / 1e6:.1f} MB of "
            "frozen prefix each (policy.prefix_cache: device, host, recompute)"
        )
    return lines


def parameters(model: ModelConfig) -> tuple[int, int]:
    """Of vision, words and language, and of expert and action projections."""
    with torch.device("meta"):
        network = Pi0Model(model, torch.bfloat16)
    frozen = sum(p.numel() for part in (network.vision, network.embed, network.language) for p in part.parameters())
    return frozen, sum(p.numel() for p in network.parameters()) - frozen
