"""Golden tables of the published kernels, and that samples follow the stated density."""

import math

import pytest
import torch

from learner.flow import (
    FlowConfig,
    aggregate,
    annealed_noise_level,
    denoise,
    draw_denoise_index,
    gaussian_entropy,
    gaussian_log_prob,
    held,
    held_log_prob,
    masked_sft_loss,
    sample_chain,
    sample_sft_time,
    score_chain,
    sft_pair,
    step_mean,
    time_grid,
    transition,
)
from learner.noise import NoiseConfig, NoiseHead

FLOW_SDE = [  # K, a, i, std, w0, w1
    (3, 0.5, 0, 0.500000, 0.333333, 0.541667),
    (3, 0.5, 1, 0.408248, 0.666667, 0.208333),
    (3, 0.5, 2, 0.204124, 1.0, -0.062500),
    (4, 0.5, 0, 0.500000, 0.25, 0.625000),
    (4, 0.5, 1, 0.433013, 0.50, 0.375000),
    (4, 0.5, 2, 0.250000, 0.75, 0.187500),
    (4, 0.5, 3, 0.144338, 1.0, -0.041667),
    (5, 0.5, 0, 0.500000, 0.2, 0.675000),
    (5, 0.5, 1, 0.447214, 0.4, 0.475000),
    (5, 0.5, 2, 0.273861, 0.6, 0.337500),
    (5, 0.5, 3, 0.182574, 0.8, 0.158333),
    (5, 0.5, 4, 0.111803, 1.0, -0.031250),
    (5, 0.3, 0, 0.300000, 0.2, 0.755000),
    (5, 0.3, 4, 0.067082, 1.0, -0.011250),
]


@pytest.mark.parametrize(("num_steps", "level", "index", "std", "w0", "w1"), FLOW_SDE)
def test_flow_sde_golden(num_steps, level, index, std, w0, w1):
    step = transition("flow_sde", num_steps, index, level)
    assert step.std is not None
    assert [step.std.item(), step.w0.item(), step.w1.item()] == pytest.approx([std, w0, w1], abs=2e-6)


@pytest.mark.parametrize(("index", "value"), [(0, 0.530330), (1, 0.353553), (2, 0.176777), (3, 0.0)])
def test_flow_cps_golden(index, value):
    step = transition("flow_cps", 4, index, 0.5)
    assert step.std is not None
    assert [step.w1.item(), step.std.item()] == pytest.approx([value, value], abs=2e-6)


def test_ode_kernel_is_forward_euler():
    x, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    step = transition("flow_ode", 5, torch.tensor([0, 2, 4]), 0.0)
    torch.testing.assert_close(step_mean(x, v, step), x - v / 5, atol=1e-6, rtol=0)
    assert time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_noise_head_range_and_entropy_golden():
    head = NoiseHead(8, 3, NoiseConfig())
    assert head(torch.randn(4, 2, 8) * 100).min() >= 0.08 - 1e-6
    assert head(torch.randn(4, 2, 8)).max() <= 0.16 + 1e-6
    torch.nn.init.zeros_(head.mlp[-1].weight)
    torch.nn.init.zeros_(head.mlp[-1].bias)
    std = head(torch.randn(1, 1, 8))
    assert std[0, 0, 0].item() == pytest.approx(0.113137, abs=1e-6)
    assert gaussian_entropy(std)[0, 0, 0].item() == pytest.approx(-0.760217, abs=1e-5)
    assert (1.418939 + 4 * gaussian_entropy(std)[0, 0, 0].item()) / 5 == pytest.approx(-0.324385, abs=1e-5)


def test_density_matches_torch_and_zero_std_is_exactly_nothing():
    value, mean = torch.randn(5), torch.randn(5, requires_grad=True)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(value)
    torch.testing.assert_close(gaussian_log_prob(value, mean, torch.tensor(0.3)), expected)
    silent = gaussian_log_prob(value, mean, torch.zeros(5))
    assert silent.tolist() == [0.0] * 5
    silent.sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == [0.0] * 5
    assert gaussian_entropy(torch.zeros(2)).tolist() == [0.0, 0.0]


def linear_velocity(scale=1.0):
    def velocity(x, t):
        return scale * (0.7 * x + 0.2 * t[:, None, None]), x

    return velocity


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "flow_noise"])
@pytest.mark.parametrize("joint", [False, True])
def test_scores_of_a_chain_equal_those_of_its_rollout(method, joint):
    config = FlowConfig(method=method, num_steps=4, joint=joint)
    std = NoiseHead(3, 3, NoiseConfig())
    chain = sample_chain(linear_velocity(), torch.randn(6, 5, 3), config, 0.5, std)
    scores = score_chain(linear_velocity(), chain.states, chain.denoise_index, config, 0.5, std)
    torch.testing.assert_close(scores.log_prob, chain.log_prob, atol=1e-5, rtol=0)
    other = score_chain(linear_velocity(1.1), chain.states, chain.denoise_index, config, 0.5, std)
    if method != "flow_cps" or joint:  # flow_cps' last step is deterministic, so a single draw may carry no density
        assert not torch.allclose(other.log_prob, chain.log_prob)


@pytest.mark.parametrize(("method", "joint"), [("flow_sde", True), ("flow_cps", True), ("flow_noise", True)])
def test_samples_follow_the_density_that_log_prob_states(method, joint):
    """Importance identity: E_p[q(x) / p(x)] = 1 with both densities from log_prob at temperature 1, and the mean of
    -log p is the sum of the entropies."""
    torch.manual_seed(0)
    config = FlowConfig(method=method, num_steps=3, joint=joint, temperature=1.0)
    std = NoiseHead(1, 1, NoiseConfig(std_min=0.3, std_max=0.5))
    with torch.no_grad():
        chain = sample_chain(linear_velocity(), torch.randn(200_000, 1, 1), config, 0.5, std)
        shifted = score_chain(linear_velocity(1.05), chain.states, chain.denoise_index, config, 0.5, std)
        own = score_chain(linear_velocity(), chain.states, chain.denoise_index, config, 0.5, std)
    assert torch.exp(shifted.log_prob - chain.log_prob).mean().item() == pytest.approx(1.0, abs=0.01)
    assert -chain.log_prob.mean().item() == pytest.approx(4 * own.entropy.mean().item(), abs=0.02)


def test_sampled_step_has_the_stated_moments():
    torch.manual_seed(0)
    config = FlowConfig(method="flow_sde", num_steps=2, joint=True)
    noise = torch.full((100_000, 1, 1), 0.3)
    chain = sample_chain(linear_velocity(), noise, config, 0.5)
    step = transition("flow_sde", 2, 0, 0.5)
    mean = step_mean(noise[:1], linear_velocity()(noise[:1], torch.ones(1))[0], step)
    assert chain.states[:, 1].mean().item() == pytest.approx(mean.item(), abs=0.01)
    assert step.std is not None
    assert chain.states[:, 1].std().item() == pytest.approx(step.std.item(), abs=0.01)


def test_joint_temperature_is_the_power_of_the_path_ratio():
    states = torch.randn(4, 5, 3, 2)
    index = draw_denoise_index(FlowConfig(num_steps=4, joint=True), 4, None, "cpu")
    gaps = []
    for temperature in (None, 1.0):
        config = FlowConfig(num_steps=4, joint=True, temperature=temperature)
        new = score_chain(linear_velocity(1.1), states, index, config, 0.5)
        old = score_chain(linear_velocity(), states, index, config, 0.5)
        gaps.append(new.log_prob - old.log_prob)
    torch.testing.assert_close(gaps[0] * 5, gaps[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("options", "steps"), [({"ignore_last": True}, {0, 1, 2, 3}), ({"last_steps": 2}, {3, 4})])
def test_single_step_touches_one_transition_only(options, steps):
    config = FlowConfig(num_steps=5, **options)
    torch.manual_seed(0)
    chain = sample_chain(linear_velocity(), torch.randn(64, 2, 2), config, 0.5)
    assert set(chain.denoise_index.flatten().tolist()) == steps
    assert (chain.denoise_index == chain.denoise_index[:, :1]).all()
    for k in range(5):
        x, following = chain.states[:, k], chain.states[:, k + 1]
        euler = x - linear_velocity()(x, torch.full((64,), 1 - k / 5))[0] / 5
        exact = (following - euler).abs().amax((1, 2)) < 1e-5
        assert (exact == (chain.denoise_index[:, 0] != k)).all()


def test_held_noise_is_one_draw_and_its_density_that_of_the_mean_deviation():
    draws = torch.arange(10.0).view(1, 5, 2)
    assert held(draws, 2)[0, :, 0].tolist() == [0, 0, 4, 4, 8]
    value = torch.tensor([[[1.0], [3.0], [5.0], [6.0], [2.0]]])
    found = held_log_prob(value, torch.ones(1, 5, 1), torch.tensor(2.0), 2)
    # Deviations 0, 2 | 4, 5 | 1: means 1, 4.5 and 1, in standard deviations of 2.
    expected = [-0.5 * (d / 2) ** 2 - math.log(2) - 0.5 * math.log(2 * math.pi) for d in (1, 4.5, 1)]
    assert found[0, :, 0].tolist() == pytest.approx([expected[0], 0, expected[1], 0, expected[2]])


@pytest.mark.parametrize("hold", [1, 3, 4])
def test_a_held_chain_scores_as_it_was_drawn(hold):
    config = FlowConfig(num_steps=5, last_steps=2, hold=hold)
    torch.manual_seed(0)
    chain = sample_chain(linear_velocity(), torch.randn(64, 8, 2), config, 0.5)
    scores = score_chain(linear_velocity(), chain.states, chain.denoise_index, config, 0.5)
    torch.testing.assert_close(scores.log_prob, chain.log_prob)
    own = torch.arange(8) % hold == 0
    assert (scores.log_prob[:, ~own] == 0).all()
    assert (scores.log_prob[:, own] != 0).all()
    assert (scores.entropy[:, ~own] == 0).all()
    # What one draw moves, it moves alike: the deviation from the ODE's step is the same over the steps that share it.
    last = chain.denoise_index[:, 0] == 4
    x, following = chain.states[last, 4], chain.states[last, 5]
    step = transition("flow_sde", 5, 4, 0.5)
    deviation = following - step_mean(x, linear_velocity()(x, torch.full((len(x),), 0.2))[0], step)
    for first in range(0, 8, hold):
        torch.testing.assert_close(
            deviation[:, first : first + hold], deviation[:, first : first + 1].expand(-1, min(hold, 8 - first), -1)
        )


def test_options_that_contradict_are_refused():
    with pytest.raises(ValueError, match="no noise on its last step"):
        FlowConfig(method="flow_cps", last_steps=1)  # nothing would be explored, and PPO's gradient 0
    with pytest.raises(ValueError, match="last_steps 6: allowed are 0 to num_steps"):
        FlowConfig(num_steps=5, last_steps=6)
    with pytest.raises(ValueError, match="hold 0: at least 1"):
        FlowConfig(hold=0)
    for option in ("joint", "ignore_last"):
        with pytest.raises(ValueError, match="last_steps 1 contradicts"):
            FlowConfig(num_steps=5, last_steps=1, **{option: True})


def test_flow_ode_rollout_is_the_deployed_path():
    config = FlowConfig(method="flow_ode", num_steps=4)
    noise = torch.randn(2, 3, 2)
    chain = sample_chain(linear_velocity(), noise, config, 0.5)
    torch.testing.assert_close(chain.states[:, -1], denoise(linear_velocity(), noise, 4), atol=1e-6, rtol=0)
    assert chain.log_prob.abs().max() == 0


def test_the_generator_alone_decides():
    config = FlowConfig(num_steps=3)
    noise = torch.randn(2, 3, 2)
    chains = [
        sample_chain(linear_velocity(), noise, config, 0.5, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(chains[0].states, chains[1].states)
    assert not torch.equal(chains[0].states, chains[2].states)


def test_levels():
    log_prob = torch.ones(2, 3, 4)
    shapes = {level: aggregate(log_prob, level) for level in ("token", "action", "chunk")}
    assert shapes["token"].shape == (2, 3, 4)
    assert shapes["action"].tolist() == [[4.0] * 3] * 2
    assert shapes["chunk"].tolist() == [12.0] * 2
    with pytest.raises(ValueError, match="chunk"):
        aggregate(log_prob, "sequence")


def test_annealing_and_config_checks():
    config = FlowConfig(noise_level=0.7, noise_level_end=0.3, noise_anneal_steps=400)
    assert [annealed_noise_level(config, s) for s in (0, 200, 400, 900)] == pytest.approx([0.7, 0.5, 0.3, 0.3])
    assert FlowConfig(method="reinflow").method == "flow_noise"
    with pytest.raises(ValueError, match="flow_sde"):
        FlowConfig(method="ddpm")
    with pytest.raises(ValueError, match="num_steps"):
        FlowConfig(num_steps=0)
    with pytest.raises(ValueError, match="noise head"):
        sample_chain(linear_velocity(), torch.zeros(1, 1, 1), FlowConfig(method="flow_noise", joint=True), 0.5)


def test_sft_pair_time_and_masked_loss():
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x, target = sft_pair(actions, noise, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(x[0], actions[0])
    torch.testing.assert_close(x[1], noise[1])
    torch.testing.assert_close(target, noise - actions)
    t = sample_sft_time(100_000, torch.Generator().manual_seed(0), "cpu")
    assert t.min() >= 0.001
    assert t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.001 + 0.999 * 0.6, abs=0.005)
    is_pad = torch.tensor([[False, False, True], [False, True, True]])
    v = torch.zeros(2, 3, 4)
    expected = ((target[..., :2] ** 2).mean(-1) * ~is_pad).sum() / 3
    torch.testing.assert_close(masked_sft_loss(v, target, is_pad, 2), expected)
    assert math.isfinite(masked_sft_loss(v, target, torch.ones_like(is_pad), 2).item())
