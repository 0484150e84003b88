"""pi0.5 beside LeRobot 0.6.1's eager code: chunks, a PPO update, an SFT update, and that both compute the same.

    python -m tests.bench.bench_policy --out docs/results/policy.json      # full size, one GPU with 100 GB
    python -m tests.bench.bench_policy --tiny --out /tmp/policy.json       # small model on the CPU

Both sides get the same random weights, the same inputs and the same noise. The peer runs as its users run it (dtype
bfloat16, where it keeps the vision tower in float32). Times are medians after warm-up, with the device synchronised.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bridge.embodiment import Embodiment
from learner.flow import FlowConfig
from learner.pi0.config import ModelConfig, tiny
from learner.pi0.normalise import Normaliser
from learner.pi0.policy import Pi0Config, Pi0Policy
from learner.pi0.prepared import Prepared
from learner.pi0.weights import load_released
from tests.learner.pi0.peer import build_peer

PEER = "lerobot 0.6.1 eager"


@dataclass
class Bench:
    """Where to run, how large, and what was found."""

    device: torch.device
    model: ModelConfig
    chunk_batch: int
    ppo_batch: int
    sft_batch: int
    repeats: int
    dtype: str
    figures: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def inputs(self, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Two cameras, a prompt of full length, noise and actions; the same for both sides."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        model, size = self.model, self.model.vision.image_size
        words = (batch, model.prompt_tokens)
        return {
            "images": normal(batch, 2, 3, size, size).clamp(-1, 1),
            "image_mask": torch.ones(batch, 2, dtype=torch.bool, device=self.device),
            "tokens": torch.randint(model.vocabulary, words, generator=generator, device=self.device),
            "token_mask": torch.ones(words, dtype=torch.bool, device=self.device),
            "state": normal(batch, model.state_width),
            "noise": normal(batch, model.horizon, model.action_width),
            "actions": normal(batch, model.horizon, model.action_width),
            "t": torch.rand(batch, generator=generator, device=self.device) * 0.999 + 0.001,
        }

    def seconds(self, step: Callable[[], Any], repeats: int | None = None, warm_up: int = 2) -> list[float]:
        for _ in range(warm_up):
            step()
        # On a shared CPU the processor's time, which other programs' load does not change.
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        times = []
        for _ in range(repeats or self.repeats):
            self.synchronise()
            start = clock()
            step()
            self.synchronise()
            times.append(clock() - start)
        return times

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0

    def record(self, name: str, ours: float, peer: float, unit: str, n: int, rate: bool = False, **more) -> None:
        ratio = (ours / peer if rate else peer / ours) if ours and peer else None
        self.figures[name] = {
            "ours": ours,
            "peer": peer,
            "ratio": ratio,
            "unit": unit,
            "peer_name": PEER,
            "n": n,
            **more,
        }
        print(f"{name}: ours {ours:.4g} {unit}, peer {peer:.4g}, ratio {ratio}", flush=True)


def peer_arguments(inputs: dict[str, torch.Tensor]) -> tuple:
    images, mask = inputs["images"].unbind(1), inputs["image_mask"].unbind(1)
    return list(images), list(mask), inputs["tokens"], inputs["token_mask"]


def our_policy(bench: Bench, peer: Any, **options) -> Pi0Policy:
    names = {"q01": -torch.ones(7), "q99": torch.ones(7)}
    config = Pi0Config(model=bench.model, dtype=bench.dtype, **options)
    units = Normaliser("QUANTILES", names)
    policy = Pi0Policy(config, Embodiment(), units, units, device=bench.device)
    load_released(policy.model, peer.state_dict(), (), "the peer")
    policy.refresh()
    return policy


def our_inputs(inputs: dict[str, torch.Tensor]) -> Any:
    return tuple(inputs[name] for name in ("images", "image_mask", "tokens", "token_mask", "state", "noise"))


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def peer_velocity(peer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The peer's velocity at its random times, with gradient through the expert where its parameters ask for it."""
    images, masks, tokens, token_mask = peer_arguments(inputs)
    core = peer.model
    with torch.no_grad():
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        embeddings, pad, attention = core.embed_prefix(images, masks, tokens, token_mask)
        mask = prepare_attention_masks_4d(make_att_2d_masks(pad, attention))
        core.paligemma_with_expert.paligemma.model.language_model.config._attn_implementation = "eager"
        _, cache = core.paligemma_with_expert.forward(
            attention_mask=mask,
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
    x = inputs["t"][:, None, None] * inputs["noise"] + (1 - inputs["t"][:, None, None]) * inputs["actions"]
    return core.denoise_step(pad, cache, x, inputs["t"])


def parity(bench: Bench, peer: Any) -> None:
    """Velocity and a whole chunk's motion against the peer in float32. Leaves the peer in the bench's dtype."""
    inputs = bench.inputs(2, seed=7)
    with torch.no_grad():
        velocity = peer_velocity(peer, inputs)
        motion = peer.model.sample_actions(*peer_arguments(inputs), noise=inputs["noise"]) - inputs["noise"]
    peer.model.paligemma_with_expert.to_bfloat16_for_selected_params(bench.dtype)
    with torch.no_grad():
        peer_error = relative_error(peer_velocity(peer, inputs), velocity)
        peer_chunk = peer.model.sample_actions(*peer_arguments(inputs), noise=inputs["noise"]) - inputs["noise"]
    policy = our_policy(bench, peer)
    x = inputs["t"][:, None, None] * inputs["noise"] + (1 - inputs["t"][:, None, None]) * inputs["actions"]
    with torch.no_grad():
        prefix = policy.model.prefix(*our_inputs(inputs)[:4])
        ours = policy.model.velocity(prefix, inputs["state"], x, inputs["t"])[0]
        chunk = policy._infer_graph(*our_inputs(inputs))[0] - inputs["noise"]
    bench.record(
        "parity_full_size_rel_error",
        relative_error(ours, velocity),
        peer_error,
        "relative to the peer in float32",
        1,
        chunk_motion_ours=relative_error(chunk, motion),
        chunk_motion_peer=relative_error(peer_chunk, motion),
        ours_to_peer_bfloat16=relative_error(chunk, peer_chunk),
    )


def chunks(bench: Bench, peer: Any) -> None:
    policy = our_policy(bench, peer)
    for batch, name in ((1, "chunk_b1_ms"), (bench.chunk_batch, "chunk_b64_ms")):
        inputs = bench.inputs(batch)
        start = time.perf_counter()
        policy._infer_graph(*our_inputs(inputs))
        bench.synchronise()
        bench.details[f"{name}_first_call_s"] = time.perf_counter() - start
        repeats = bench.repeats * (3 if batch == 1 else 1)
        ours = bench.seconds(lambda inputs=inputs: policy._infer_graph(*our_inputs(inputs)), repeats)
        peer.eval()
        theirs = bench.seconds(
            lambda inputs=inputs: peer.model.sample_actions(*peer_arguments(inputs), noise=inputs["noise"]), repeats
        )
        ours_ms, theirs_ms = 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs)
        bench.record(name, ours_ms, theirs_ms, "ms", len(ours), ours_p95=1e3 * sorted(ours)[int(0.95 * len(ours))])
        prefix = bench.seconds(lambda inputs=inputs: policy._prefix_graph(*our_inputs(inputs)[:4]))
        bench.details[f"{name}_prefix_alone_ms"] = 1e3 * statistics.median(prefix)


def ppo_update(bench: Bench, peer: Any) -> None:
    """Forward and backward of one update of the expert, batch 32. The peer recomputes its frozen prefix."""
    inputs = bench.inputs(bench.ppo_batch)
    peer.model.paligemma_with_expert.train_expert_only = True
    peer.model.paligemma_with_expert._set_requires_grad()
    peer.eval()

    def peer_step():
        peer.zero_grad(set_to_none=True)
        error = peer_velocity(peer, inputs) - inputs["actions"]
        error.square().mean().backward()

    bench.reset_memory()
    theirs = bench.seconds(peer_step)
    peer_gb = bench.peak_gb()
    peer.zero_grad(set_to_none=True)
    peer.to("cpu")  # so that our peak holds our memory alone
    for joint in (False, True):
        _our_ppo_update(bench, peer, inputs, joint, theirs, peer_gb)
    peer.to(bench.device)
    for parameter in peer.parameters():
        parameter.requires_grad_(True)
    peer.model.paligemma_with_expert.train_expert_only = False


def _our_ppo_update(bench: Bench, peer, inputs, joint: bool, theirs: list[float], peer_gb: float) -> None:
    bench.reset_memory()
    flow = FlowConfig(method="flow_noise" if joint else "flow_sde", joint=joint)
    policy = our_policy(bench, peer, flow=flow, add_value_head=True, num_action_chunks=min(10, bench.model.horizon))
    valid = policy._prefix_valid(inputs["image_mask"], inputs["token_mask"])
    keys_values, pooled = policy._prefix_graph(*our_inputs(inputs)[:4])
    prepared = Prepared(inputs["state"], valid, keys_values=keys_values, pooled=pooled)
    bench.details["kept_prefix_mb_a_sample"] = keys_values[0].numel() * keys_values.element_size() / 1e6
    rollout = policy.sample(prepared)
    advantage = torch.randn(bench.ppo_batch, 1, 1, device=bench.device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    fused = bench.device.type == "cuda"
    optimiser = torch.optim.AdamW(trained, lr=1e-6, fused=fused)

    def our_step():
        optimiser.zero_grad(set_to_none=True)
        scores = policy.scores(prepared, rollout.chain, rollout.denoise_index)
        ratio = torch.exp(scores.log_prob - rollout.log_prob)
        surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        (surrogate + 0.5 * scores.value.square().mean() - 0.005 * scores.entropy.mean()).backward()
        return scores

    def with_optimiser():
        our_step()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()

    name = "joint" if joint else "single"
    bench.details[f"kept_to_recomputed_prefix_{name}"] = kept_to_recomputed(policy, prepared, inputs, rollout)
    policy._infer_graph.clear()
    policy._prefix_graph.clear()
    policy._sample_graph.clear()
    bench.reset_memory()
    start = time.perf_counter()
    scores = our_step()
    bench.synchronise()
    first_call_s = time.perf_counter() - start
    gap = (scores.log_prob.detach() - rollout.log_prob).abs()
    bench.details[f"rollout_to_update_log_prob_difference_{name}"] = {
        "max": float(gap.max()),
        "mean": float(gap.mean()),
    }
    ours = bench.seconds(our_step)
    ours_gb = bench.peak_gb()
    stepped = bench.seconds(with_optimiser)
    if joint:
        bench.details["ppo_update_joint_4_steps_ms"] = 1e3 * statistics.median(ours)
        bench.details["ppo_update_joint_4_steps_gb"] = ours_gb
        return
    bench.record(
        "ppo_update_b32_ms",
        1e3 * statistics.median(ours),
        1e3 * statistics.median(theirs),
        "ms",
        len(ours),
        with_optimiser_ms=1e3 * statistics.median(stepped),
        first_call_s=first_call_s,
    )
    bench.record("ppo_update_b32_gb", ours_gb, peer_gb, "GB", 1, with_optimiser_gb=bench.peak_gb())


def kept_to_recomputed(policy: Pi0Policy, kept: Prepared, inputs: dict[str, torch.Tensor], rollout) -> dict[str, float]:
    """What keeping the prefix changes: log-probabilities (largest difference) and all gradients together (norm of the
    difference over norm). Recomputed as a kept one is (`same_kernels`), and by the kernels of a prefix that trains."""

    def scored(prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
        policy.zero_grad(set_to_none=True)
        scores = policy.scores(prepared, rollout.chain, rollout.denoise_index)
        scores.log_prob.sum().backward()
        return scores.log_prob.detach(), torch.cat(
            [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        )

    names = ("images", "image_mask", "tokens", "token_mask")
    raw = Prepared(kept.state, kept.valid, **{name: inputs[name] for name in names})
    with torch.enable_grad():
        prefix, pooled = policy._run_prefix(*raw.raw_inputs())
    stacked = torch.stack([torch.stack(pair, dim=1) for pair in prefix.keys_values], dim=1).detach()
    trained = Prepared(kept.state, kept.valid, keys_values=stacked, pooled=pooled.detach())
    log_prob, gradient = scored(kept)
    found = {}
    for name, prepared in (("same_kernels", raw), ("training_kernels", trained)):
        other_log_prob, other = scored(prepared)
        found[f"{name}_log_prob"] = float((other_log_prob - log_prob).abs().max())
        found[f"{name}_gradient"] = relative_error(other, gradient)
    policy.zero_grad(set_to_none=True)
    return found


def sft_update(bench: Bench, peer: Any) -> None:
    """Forward, backward, clipping and AdamW of the whole model, same batch on both sides."""
    inputs, batch = bench.inputs(bench.sft_batch), bench.sft_batch
    ours, ours_gb, first_call_s = _our_sft(bench, peer, inputs)
    bench.reset_memory()
    theirs = _peer_sft(bench, peer, inputs)
    bench.record(
        "sft_update_samples_per_s",
        batch / statistics.median(ours),
        batch / statistics.median(theirs),
        "samples/s",
        len(ours),
        rate=True,
        batch=batch,
        ours_gb=ours_gb,
        peer_gb=bench.peak_gb(),
        first_call_s=first_call_s,
    )


def _our_sft(bench: Bench, peer: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[float], float, float]:
    """Seconds of each update, peak GB, seconds of the first. The peer waits in host memory."""
    policy = our_policy(bench, peer, train_expert_only=False)
    policy.train()
    peer.to("cpu")
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-6, fused=bench.device.type == "cuda")
    x = inputs["t"][:, None, None] * inputs["noise"] + (1 - inputs["t"][:, None, None]) * inputs["actions"]
    target = inputs["noise"] - inputs["actions"]

    def our_step():
        prefix = policy.model.prefix(*our_inputs(inputs)[:4])
        v, _ = policy.model.velocity(prefix, inputs["state"], x, inputs["t"])
        (v - target)[..., :7].square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    bench.reset_memory()
    start = time.perf_counter()
    our_step()
    bench.synchronise()
    first_call_s = time.perf_counter() - start
    ours = bench.seconds(our_step, max(3, bench.repeats // 2), warm_up=1)
    return ours, bench.peak_gb(), first_call_s


def _peer_sft(bench: Bench, peer: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
    peer.to(bench.device).train()
    parameters = list(peer.parameters())
    peer_optimiser = torch.optim.AdamW(parameters, lr=1e-6)

    def peer_step():
        losses = peer.model.forward(*peer_arguments(inputs), inputs["actions"], inputs["noise"], inputs["t"])
        losses[..., :7].mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        peer_optimiser.step()
        peer_optimiser.zero_grad(set_to_none=True)

    return bench.seconds(peer_step, max(3, bench.repeats // 2), warm_up=1)


def machine(device: torch.device) -> dict[str, Any]:
    import os

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(memory),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["parity", "chunks", "ppo_update", "sft_update"])
    parser.add_argument("--commit", default=None, help="recorded commit, where there is no git")
    args = parser.parse_args()
    if args.tiny:
        bench = Bench(torch.device("cpu"), replace(tiny(horizon=10), prompt_tokens=200), 4, 4, 4, 5, "float32")
    else:
        bench = Bench(torch.device("cuda"), ModelConfig(), 64, 32, 16, 10, "bfloat16")
    with torch.device(bench.device):
        peer = build_peer(bench.model, device=str(bench.device))
    print(f"peer built: {sum(p.numel() for p in peer.parameters()) / 1e6:.0f} M parameters", flush=True)
    if "parity" not in args.only:  # which leaves the peer in the bench's dtype
        peer.model.paligemma_with_expert.to_bfloat16_for_selected_params(bench.dtype)
    began = time.perf_counter()
    for name in args.only:
        {"parity": parity, "chunks": chunks, "ppo_update": ppo_update, "sft_update": sft_update}[name](bench, peer)
        bench.reset_memory()
        print(f"-- {name} done at {time.perf_counter() - began:.0f} s", flush=True)
        result = {
            "name": "policy",
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit or commit(),
            "command": "python -m tests.bench.bench_policy" + " --tiny" * args.tiny,
            "machine": machine(bench.device),
            "figures": bench.figures,
            "details": bench.details,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
