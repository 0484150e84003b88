"""The policy's promises that need no peer: stored prefixes, gradients, checkpointing, adapters, critics, inputs."""

import math
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from bridge.config import CONFIG_DIR
from bridge.embodiment import Embodiment
from learner.flow import FlowConfig
from learner.pi0.augment import AugmentConfig
from learner.pi0.config import GemmaConfig, ModelConfig, tiny
from learner.pi0.inputs import load_tokenizer, prepare_images, prompts
from learner.pi0.normalise import Normaliser
from learner.pi0.policy import Pi0Config, Pi0Policy
from learner.pi0.prepared import Prepared
from learner.pi0.weights import released_names
from learner.policy import ObservationBatch, SftBatch
from learner.value_head import ValueHead, pool_prefix
from tests.learner.pi0.words import ByteTokenizer

PREFIX_PARTS = ("model.vision", "model.embed", "model.language")
PLAIN = AugmentConfig(crop=1.0, rotate_deg=0.0, brightness=0.0, contrast=0.0, saturation=0.0)  # pictures as they are
UNITS = Normaliser("QUANTILES", {"q01": -torch.ones(7), "q99": torch.linspace(0.5, 2.0, 7)})


def make(variant="pi05", seed=0, **options) -> Pi0Policy:
    """A tiny policy whose every parameter is random: fresh norms and gates would hide mistakes behind zeros."""
    torch.manual_seed(seed)
    config = Pi0Config(**(dict(model=tiny(variant), dtype="float32", num_action_chunks=3) | options))
    policy = Pi0Policy(config, Embodiment(), UNITS, UNITS, ByteTokenizer())
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" not in name:
                parameter.copy_(
                    torch.randn(parameter.shape) * (0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
                )
    return policy


def observation(batch=3) -> ObservationBatch:
    generator = torch.Generator().manual_seed(5)
    images = {
        name: torch.randint(256, (batch, 30, 40, 3), generator=generator, dtype=torch.uint8)
        for name in ("third_person", "wrist")
    }
    state = torch.rand(batch, 7, generator=generator)
    return ObservationBatch(images, state, ["pick it up", "go", "put the cube down"][:batch])


def gradients(policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("variant", ["pi05", pytest.param("pi0", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "joint"), [("flow_sde", False), ("flow_noise", True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_and_recomputed_prefix_agree(variant, method, joint, dtype):
    """Log-probabilities, values and each of the expert's gradients (as a share of its norm): prefix kept on the device
    for the whole rollout, against kept in host memory, recomputed for each micro-batch, and recomputed with gradient by
    a policy that trains its prefix too."""
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    options = dict(flow=FlowConfig(method=method, joint=joint), dtype=dtype, add_value_head=True)
    policies = {cache: make(variant, prefix_cache=cache, **options) for cache in ("device", "host", "recompute")}
    policies["whole"] = make(variant, train_expert_only=False, **options)
    sample = policies["device"].sample(policies["device"].prepare(observation()), torch.Generator().manual_seed(1))
    assert sample.log_prob.dtype == torch.float32
    found = {}
    for name, policy in policies.items():
        prepared = policy.prepare(observation())
        assert (prepared.keys_values is None) == (name in ("recompute", "whole"))
        parts = []
        for row in ([2], [0, 1]):
            rows = torch.tensor(row)
            scores = policy.scores(prepared[rows], sample.chain[rows], sample.denoise_index[rows])
            (scores.log_prob.sum() + scores.value.sum() + scores.entropy.sum()).backward()
            assert (scores.log_prob - sample.log_prob[rows]).abs().max() <= tolerance
            assert (scores.value - sample.value[rows]).abs().max() <= tolerance
            assert scores.log_prob.dtype == torch.float32
            parts.append(scores.log_prob.detach())
        expert = {key: g for key, g in gradients(policy).items() if not key.startswith(PREFIX_PARTS)}
        assert len(expert) == len(gradients(policy)) or name == "whole"
        assert {key.split(".")[1] for key in expert if key.startswith("model.")} >= {
            "expert",
            "action_in",
            "action_out",
        }
        found[name] = torch.cat(parts), expert
    log_prob, expert = found.pop("device")
    for name, (others_log_prob, others) in found.items():
        assert (others_log_prob - log_prob).abs().max() <= tolerance, name
        assert others.keys() == expert.keys()
        for key, gradient in expert.items():
            assert (others[key] - gradient).norm() <= tolerance * gradient.norm(), (name, key)


def test_updates_on_a_kept_prefix_run_the_expert_alone():
    policy = make(add_value_head=True)
    prepared = policy.prepare(observation())
    assert make(dtype="bfloat16").prepare(observation()).keys_values.dtype == torch.bfloat16
    calls = []
    for part in (policy.model.vision, policy.model.language, policy.model.expert):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    sample = policy.sample(prepared)
    policy.scores(prepared, sample.chain, sample.denoise_index).log_prob.sum().backward()
    assert set(calls) == {policy.model.expert}


def test_prefix_gradient_reaches_the_vision_tower():
    policy = make(train_expert_only=False, add_value_head=True)
    prepared = policy.prepare(observation())
    assert prepared.keys_values is None
    sample = policy.sample(prepared)
    policy.scores(prepared, sample.chain, sample.denoise_index).log_prob.sum().backward()
    assert policy.model.vision.patch.weight.grad.abs().max() > 0


def no_padding() -> torch.Tensor:
    return torch.zeros(3, 6, dtype=torch.bool)


def test_working_copies_follow_the_weights():
    """bfloat16 rollouts multiply by copies of float32 weights; an optimiser step must reach the next chunk."""
    policy = make(dtype="bfloat16")
    before = policy.infer(observation(), torch.Generator().manual_seed(1))
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert policy.model.language.layers[0].qkv.weight.dtype == torch.bfloat16
    optimiser = torch.optim.SGD(trained, lr=0.5)
    batch = SftBatch(observation(), torch.rand(3, 6, 7), no_padding())
    policy.sft_loss(batch).backward()
    optimiser.step()
    after = policy.infer(observation(), torch.Generator().manual_seed(1))
    assert (after - before).abs().max() > 1e-3
    fresh = make(dtype="bfloat16", seed=1)
    fresh.load_state_dict(policy.state_dict())
    assert torch.equal(fresh.infer(observation(), torch.Generator().manual_seed(1)), after)


def test_prepared_batches_split_and_join():
    policy = make(add_value_head=True)
    prepared = policy.prepare(observation())
    order = torch.tensor([2, 0])
    again = Prepared.concatenate([prepared[order], prepared[torch.tensor([1])]])
    sample = policy.sample(prepared, torch.Generator().manual_seed(1))
    picked = torch.tensor([2, 0, 1])
    scores = policy.scores(again, sample.chain[picked], sample.denoise_index[picked])
    assert (scores.log_prob - sample.log_prob[picked]).abs().max() <= 1e-5
    assert (policy.value(again) - sample.value[picked]).abs().max() <= 1e-6


def test_an_absent_camera_changes_nothing_but_its_own_tokens():
    both = make(cameras=["third_person", "wrist", "unused"])
    seen = observation()
    two = make(cameras=["third_person", "wrist"])
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.allclose(both.infer(seen, seeds[0]), two.infer(seen, seeds[1]), atol=1e-5)
    with pytest.raises(ValueError, match="no camera"):
        make(cameras=["wrist"]).prepare(seen)
    ignoring = make(cameras=["wrist"], ignored_cameras=["third_person"])
    wrist = ObservationBatch({"wrist": seen.images["wrist"]}, seen.state, seen.instruction)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(ignoring.infer(seen, seeds[0]), ignoring.infer(wrist, seeds[1]))


def test_real_time_chunking_continues_the_last_chunk():
    policy = make()
    seen = observation(1)
    previous = policy.infer(seen, torch.Generator().manual_seed(1))[:, 2:]  # four steps are left
    jumps = {}
    for name, weight in (("guided", 5.0), ("free", 0.0)):
        chunk = policy.infer_next(seen, previous, 2, torch.Generator().manual_seed(2), max_guidance=weight)
        jumps[name] = (chunk[:, :2] - previous[:, :2]).abs().mean()
    free = policy.infer(seen, torch.Generator().manual_seed(2))
    unguided = policy.infer_next(seen, previous, 2, torch.Generator().manual_seed(2), max_guidance=0.0)
    assert torch.allclose(unguided, free, atol=1e-5)
    assert jumps["guided"] < 0.3 * jumps["free"]


def test_critics():
    output = torch.arange(12.0).view(1, 6, 2)
    valid = torch.tensor([[True, True, False, False, True, False]])  # an absent camera, then a prompt with padding
    present = torch.tensor([[True, True, False, False, True, True]])
    assert pool_prefix(output, valid, present, "mean_token", True)[0].tolist() == pytest.approx([10 / 3, 13 / 3])
    assert pool_prefix(output, valid, present, "mean_token", False).tolist() == [[5.0, 6.0]]
    assert pool_prefix(output, valid, present, "last_token", True).tolist() == [[8.0, 9.0]]
    assert pool_prefix(output, valid, present, "first_token", True).tolist() == [[0.0, 1.0]]
    with pytest.raises(ValueError, match="value_vlm_mode"):
        pool_prefix(output, valid, present, "median", True)
    assert ValueHead(2)(torch.randn(3, 2)).abs().max() < 1.0
    for detach in (True, False):
        policy = make(add_value_head=True, value_after_vlm=False, detach_critic_input=detach)
        prepared = policy.prepare(observation())
        sample = policy.sample(prepared)
        policy.scores(prepared, sample.chain, sample.denoise_index).value.sum().backward()
        assert (policy.model.action_in.weight.grad is None) == detach


def test_pictures_and_prompts():
    picture = torch.full((1, 20, 40, 3), 255, dtype=torch.uint8)
    seen = prepare_images(picture, 28, "cpu")
    assert seen.shape == (1, 3, 28, 28)
    assert (seen[0, 0, 7:21] - 1.0).abs().max() < 1e-6  # a 28 x 14 picture between two black bars
    assert (seen[0, 0, :7] == -1.0).all()
    assert (seen[0, 0, 21:] == -1.0).all()
    state = torch.tensor([[-1.5, -1.0, 0.0, 0.999, 1.5]])
    assert prompts("pi05", [" pick_up\nit "], state) == ["Task: pick up it, State: -1 0 128 255 255;\nAction: "]
    assert prompts("pi05", [" pick_up\nit "], None) == ["pick up it\n"]
    assert prompts("pi0", ["go", "go\n"], state) == ["go\n", "go\n"]
    with pytest.raises(ValueError, match="no PaliGemma tokenizer"):
        load_tokenizer("/nowhere/at/all")


def parameter_count(config: ModelConfig) -> int:
    """Numbers in the released model without its unused heads."""
    return sum(math.prod(shape) for pieces in released_names(config).values() for _, shape in pieces)


def test_full_size_counts_and_bad_configs():
    """4143 M in LeRobot, of which 790 M are language-model heads that are never used."""
    assert parameter_count(ModelConfig()) == 3_353_433_872
    assert parameter_count(ModelConfig(variant="pi0")) == 3_238_048_528
    names = released_names(ModelConfig())
    assert not any("lm_head" in key for pieces in names.values() for key, _ in pieces)
    with pytest.raises(ValueError, match="pi0"):
        ModelConfig(variant="pi1")
    with pytest.raises(ValueError, match="depth"):
        ModelConfig(expert=GemmaConfig(depth=3))
    with pytest.raises(ValueError, match="prefix_cache"):
        Pi0Config(prefix_cache="disk")
    with pytest.raises(ValueError, match="num_action_chunks"):
        Pi0Config(num_action_chunks=51)


def test_kernels_in_tritons_interpreter():
    """The GPU kernels' arithmetic, without a GPU. The interpreter must be chosen before Triton is imported."""
    command = [sys.executable, "-m", "tests.learner.pi0.interpret_kernels"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_config_group_files_fit(name):
    text = (CONFIG_DIR / "policy" / f"{name}.yaml").read_text()
    merged = OmegaConf.merge(OmegaConf.structured(Pi0Config), OmegaConf.create(text))
    assert OmegaConf.to_object(merged).model.variant == name
