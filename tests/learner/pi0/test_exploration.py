"""Noise kinds, entropies, critics and gradients of whole policies, through the interface that the loop calls."""

import math

import pytest
import torch

from learner.flow import FlowConfig, sample_sft_time
from learner.noise import NoiseConfig
from learner.pi0.adapters import LoraConfig
from learner.pi0.inputs import pad_width
from learner.policy import SftBatch
from learner.rollouts import Rollouts
from learner.update import AlgoConfig, Updater, make_optimizer
from tests.learner.pi0.test_policy import PLAIN, assert_same, gradients, make, no_padding, observation

KINDS = ["flow_ode", "flow_sde", "flow_cps", "flow_noise", "reinflow"]


def entropy_of(std: float) -> float:
    return 0.5 * math.log(2 * math.pi * math.e * std**2)


def rolled_out(policy, seed=1):
    prepared = policy.prepare(observation())
    sample = policy.sample(prepared, torch.Generator().manual_seed(seed))
    return prepared, sample, policy.scores(prepared, sample.chain, sample.denoise_index)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("method", KINDS)
def test_every_noise_kind(method, joint):
    policy = make(flow=FlowConfig(method=method, num_steps=3, joint=joint), num_action_chunks=2, action_env_dim=7)
    _, sample, scores = rolled_out(policy)
    assert sample.actions.shape == (3, 6, 7)
    assert sample.chain.shape == (3, 4, 6, 32)
    assert scores.log_prob.shape == sample.log_prob.shape == (3, 2, 7)
    assert scores.log_prob.dtype == scores.entropy.dtype == torch.float32
    assert (scores.log_prob - sample.log_prob).abs().max() <= 1e-5
    assert sample.denoise_index.tolist() == [[0, 1, 2]] * 3 or not joint
    if method == "flow_ode" and not joint:
        assert torch.count_nonzero(sample.log_prob) == torch.count_nonzero(scores.entropy) == 0
    learned = method in ("flow_noise", "reinflow")
    assert (policy.noise_head is not None) == scores.entropy.requires_grad == learned
    other = policy.sample(policy.prepare(observation()), torch.Generator().manual_seed(2))
    assert not torch.equal(other.actions, sample.actions)


def test_an_ode_rollout_is_the_deployed_chunk():
    policy = make(flow=FlowConfig(method="flow_ode", num_steps=4), num_inference_steps=4)
    sample = policy.sample(policy.prepare(observation()), torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample.actions, policy.infer(observation(), torch.Generator().manual_seed(1)))


def test_entropies_follow_the_noise():
    """flow_sde's from its schedule (K 4: std 0.5, 0.433, 0.25, 0.144), and half the level is ln 2 less."""
    policy = make(flow=FlowConfig(method="flow_sde", num_steps=4, noise_level=0.5))
    _, sample, scores = rolled_out(policy)
    table = [entropy_of(std) for std in (0.5, 0.4330127, 0.25, 0.1443376)]
    assert scores.entropy.tolist() == pytest.approx([table[k] for k in sample.denoise_index[:, 0]], abs=1e-5)
    policy.set_noise_level(0.25)
    quieter = rolled_out(policy)[2].entropy
    torch.testing.assert_close(quieter, scores.entropy - math.log(2))
    joint = make(flow=FlowConfig(method="flow_sde", num_steps=4, noise_level=0.5, joint=True))
    assert rolled_out(joint)[2].entropy.tolist() == pytest.approx([(sum(table) + entropy_of(1.0)) / 5] * 3, abs=1e-5)


def test_learned_noise_stays_in_its_range():
    flow = FlowConfig(method="flow_noise", num_steps=2, joint=True)
    low, high = 0.2, 0.3
    policy = make(flow=flow, noise=NoiseConfig(std_min=low, std_max=high))
    with torch.no_grad():
        policy.noise_head.mlp[-1].weight.normal_(std=50.0)  # tanh at both ends
    entropy = rolled_out(policy)[2].entropy * 3 - entropy_of(1.0)
    assert (entropy > 2 * entropy_of(low)).all()
    assert (entropy < 2 * entropy_of(high)).all()


def test_the_joint_ratios_temperature_is_explicit():
    scores = {}
    for temperature in (None, 1.0):
        policy = make(flow=FlowConfig(method="flow_sde", num_steps=4, joint=True, temperature=temperature))
        scores[temperature] = rolled_out(policy)[2].log_prob
    torch.testing.assert_close(scores[1.0], 5 * scores[None])


def test_rows_of_a_batch_are_independent():
    policy = make()
    images, image_mask, tokens, token_mask, state = policy._inputs(observation())
    noise = torch.randn(3, 6, 32)
    with torch.no_grad():
        (together,) = policy._infer(images, image_mask, tokens, token_mask, state, noise)
        for row in range(3):
            own = (x[row : row + 1] for x in (images, image_mask, tokens, token_mask, state, noise))
            torch.testing.assert_close(policy._infer(*own)[0], together[row : row + 1], rtol=0, atol=1e-5)


def test_critics_read_what_they_are_told_to():
    options = dict(add_value_head=True, state_in_prompt=False)
    policy = make(**options)
    prepared = policy.prepare(observation())
    inputs = policy._inputs(observation())[:4]
    output = policy.model.prefix(*inputs, need_output=True).output
    mean = torch.stack([row[valid].mean(0) for row, valid in zip(output, prepared.valid, strict=True)])
    torch.testing.assert_close(prepared.pooled, mean, rtol=0, atol=1e-5)
    assert not prepared.valid.all()
    unmasked = make(value_masked_pooling=False, **options).prepare(observation()).pooled
    torch.testing.assert_close(unmasked, output.mean(1), rtol=0, atol=1e-5)  # both cameras are there
    assert (unmasked - mean).abs().max() > 1e-3
    features = torch.randn(3, 1, 6, 32)
    beyond = features.clone()
    beyond[:, :, 3:] += 1.0
    for chunk in (True, False):
        critic = make(add_value_head=True, value_after_vlm=False, chunk_critic_input=chunk)
        values = [critic._value(torch.empty(3, 0), x) for x in (features, beyond)]
        assert torch.equal(*values) == chunk


WHOLE = dict(train_expert_only=False)
ADAPTED = dict(lora=LoraConfig(4, on_expert=True))
EXPERT_CRITIC = dict(add_value_head=True, value_after_vlm=False)


@pytest.mark.parametrize("variant", ["pi05", pytest.param("pi0", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        WHOLE | dict(add_value_head=True),
        ADAPTED | EXPERT_CRITIC,
        *(pytest.param(options, marks=pytest.mark.slow) for options in (WHOLE, WHOLE | ADAPTED, EXPERT_CRITIC)),
    ],
)
def test_gradient_checkpointing_changes_nothing(variant, options):
    """Losses of SFT and PPO, and all gradients: whole model, frozen prefix, adapters, either critic, learned noise."""
    found = []
    for on in (False, True):
        flow = FlowConfig(method="flow_noise", num_steps=2, joint=True)
        policy = make(variant, flow=flow, gradient_checkpointing=on, **options)
        batch = SftBatch(observation(), torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(1)), no_padding())
        scores = rolled_out(policy)[2]
        loss = policy.sft_loss(batch, torch.Generator().manual_seed(2))
        loss = loss + scores.log_prob.mean() + scores.entropy.mean() + scores.value.mean()
        loss.backward()
        found.append((loss, gradients(policy)))
    assert abs(found[0][0] - found[1][0]) <= 1e-6
    assert_same(found[0][1], found[1][1], 2e-6)


@pytest.mark.parametrize("options", [dict(value_after_vlm=False), dict(train_expert_only=False)])
def test_a_critic_on_features_that_train_warms_up_alone(options):
    policy = make(add_value_head=True, flow=FlowConfig(num_steps=3), **options)
    sample = policy.sample(policy.prepare(observation()), torch.Generator().manual_seed(1))
    valid, numbers = torch.ones(3, 3, dtype=torch.bool), torch.arange(3)
    rollouts = Rollouts(
        sample.prepared, sample.chain, sample.denoise_index, sample.log_prob, sample.value, valid,
        torch.randn(3), torch.ones(3), numbers, torch.zeros(3, dtype=torch.int64), [],
    )  # fmt: skip
    algo = AlgoConfig(beta=0.0, critic_warmup_steps=2, batch_size=3, micro_batch_size=3)
    updater = Updater(policy, make_optimizer(policy, algo), algo, None, torch.Generator())
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for _ in range(2):
        updater.step(rollouts, numbers)
    moved = {name.split(".")[0] for name, p in policy.named_parameters() if not p.equal(before[name])}
    assert moved == {"value_head"}


def test_sft_loss_by_hand_and_masked_past_the_episodes_end():
    """The mean over real dims (all 32 where asked) of steps inside the episode, and of those alone."""
    actions = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(4))
    is_pad = torch.zeros(3, 6, dtype=torch.bool)
    is_pad[0, 4:], is_pad[2, 1:] = True, True
    for padded_dims, dims in ((False, 7), (True, 32)):
        policy = make(sft_padded_dims=padded_dims, augment=PLAIN)
        draw = torch.Generator().manual_seed(1)
        target_actions = pad_width(policy.action_normaliser(actions), 32)
        noise, t = torch.randn(3, 6, 32, generator=draw), sample_sft_time(3, draw, "cpu")
        share = t[:, None, None]
        images, image_mask, tokens, token_mask, state = policy._inputs(observation())
        prefix = policy.model.prefix(images, image_mask, tokens, token_mask)
        v = policy.model.velocity(prefix, state, share * noise + (1 - share) * target_actions, t)[0]
        error = (v - (noise - target_actions))[..., :dims].square()
        by_hand = torch.cat([error[0, :4], error[1], error[2, :1]]).mean()
        loss = policy.sft_loss(SftBatch(observation(), actions, is_pad), torch.Generator().manual_seed(1))
        torch.testing.assert_close(loss, by_hand)
        everything = policy.sft_loss(SftBatch(observation(), actions, no_padding()), torch.Generator().manual_seed(1))
        torch.testing.assert_close(everything, error.mean())
