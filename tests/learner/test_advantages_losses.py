import math

import pytest
import torch

from learner.advantages import gae, group_relative, informative_groups, normalized
from learner.losses import actor_loss, critic_loss, level_log_prob, loss_ratio, per_sample


def column(*numbers):
    return torch.tensor(numbers)[:, None]


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5: delta_2 = 1 + 0.5*4 - 3 = 0; delta_1 = 2 + 0.5*3 - 2 = 1.5; delta_0 = 0 + 0.5*2 - 1 = 0
    # A_2 = 0; A_1 = 1.5 + 0.25*0; A_0 = 0 + 0.25*1.5
    rewards, values, next_values = column(0.0, 2.0, 1.0), column(1.0, 2.0, 3.0), column(2.0, 3.0, 4.0)
    advantages, returns = gae(rewards, values, next_values, column(False, False, False), 0.5, 0.5)
    torch.testing.assert_close(advantages, column(0.375, 1.5, 0.0))
    torch.testing.assert_close(returns, column(1.375, 3.5, 3.0))


def test_termination_and_truncation_both_cut_the_recursion_and_only_truncation_bootstraps():
    rewards, values = column(0.0, 1.0, 5.0), column(1.0, 2.0, 3.0)
    ended = column(False, True, False)
    # terminated: nothing follows. A_1 = 1 - 2 = -1, A_0 = 0.5*2 - 1 + 0.25*(-1)
    advantages, _ = gae(rewards, values, column(2.0, 0.0, 0.0), ended, 0.5, 0.5)
    torch.testing.assert_close(advantages, column(-0.25, -1.0, 2.0))
    # truncated with V(final) = 8: A_1 = 1 + 0.5*8 - 2 = 3, A_0 = 0 + 0.25*3
    advantages, _ = gae(rewards, values, column(2.0, 8.0, 0.0), ended, 0.5, 0.5)
    torch.testing.assert_close(advantages, column(0.75, 3.0, 2.0))


def test_advantages_are_normalised_over_what_counts():
    advantages = torch.tensor([1.0, 2.0, 3.0, 1000.0])
    mask = torch.tensor([True, True, True, False])
    torch.testing.assert_close(normalized(advantages, mask), torch.tensor([-1.0, 0.0, 1.0, 0.0]), atol=2e-5, rtol=0)
    assert not normalized(advantages, torch.tensor([True, False, False, False])).any()


def test_groups_are_compared_within_themselves_by_hand():
    scores, group = torch.tensor([1.0, 0.0, 1.0, 5.0, 0.0, 5.0]), torch.tensor([7, 7, 7, 3, 7, 3])
    # Group 7: 1, 0, 1, 0: mean 0.5, unbiased std sqrt(4 * 0.25 / 3). Group 3: equal, says nothing.
    step = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    expected = torch.tensor([step, -step, step, 0.0, -step, 0.0])
    torch.testing.assert_close(group_relative(scores, group), expected)
    assert group_relative(torch.ones(1), torch.zeros(1, dtype=torch.int64)).tolist() == [0.0]
    success = torch.tensor([True, False, True, True, False, True])
    assert informative_groups(success, group, 0.1, 0.9).tolist() == [7]
    assert informative_groups(success, group, 0.0, 1.0).tolist() == [3, 7]


def test_only_executed_steps_enter_the_log_probability():
    log_prob, valid = torch.arange(12.0).view(1, 3, 4), torch.tensor([[True, True, False]])
    chunk, counts = level_log_prob(log_prob, valid, "chunk")
    assert (chunk.tolist(), counts.tolist()) == ([sum(range(8))], [True])
    action, counts = level_log_prob(log_prob, valid, "action")
    assert (action.tolist(), counts.tolist()) == ([[6.0, 22.0, 0.0]], valid.tolist())
    token, counts = level_log_prob(log_prob, valid, "token")
    assert token[0, :2].tolist() == log_prob[0, :2].tolist()
    assert counts[0].all(-1).tolist() == [True, True, False]
    assert per_sample(torch.tensor([2.0]), token).shape == (1, 1, 1)


def test_the_dual_clip_bounds_bad_actions_only():
    ratio, advantages = torch.tensor([9.0, 9.0, 2.0]), torch.tensor([-1.0, 1.0, -1.0])
    loss, metrics = actor_loss(ratio.log(), torch.zeros(3), advantages, torch.ones(3) / 3, 0.2, 0.2, dual_clip=3.0)
    # 9 A is bounded to 3 |A|; a good action stays at -1.2; 2 is below the bound
    assert loss.item() == pytest.approx((3.0 - 1.2 + 2.0) / 3)
    assert metrics["actor/dual_clipfrac"].item() == pytest.approx(1 / 3)


def test_the_surrogate_is_clipped_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 9.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 7.0])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]) / 4
    loss, metrics = actor_loss(ratio.log(), torch.zeros(5), advantages, weight, 0.2, 0.3)
    # -min: 1.5 is clipped to 1.3 for A > 0, kept for A < 0; 0.5 kept for A > 0, clipped to 0.8 for A < 0
    assert loss.item() == pytest.approx((-1.3 + 1.5 - 0.5 + 0.8) / 4)
    assert metrics["actor/pg_clipfrac"].item() == 0.5
    k3 = sum(2 * (r - 1 - math.log(r)) for r in (1.5, 0.5)) / 4
    assert metrics["actor/approx_kl"].item() == pytest.approx(k3)


def test_the_value_is_held_near_its_old_one_and_the_ratio_counts_who_left():
    value, old = torch.tensor([0.5, 0.1, -1.0, 3.0]), torch.zeros(4)
    returns, weight = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3
    loss, metrics = critic_loss(value, old, returns, weight, 0.2, 10.0)
    # held: 0.2, 0.1, -0.2. Worse of both: (1 - 0.2)^2/2, 0.1^2/2, 1^2/2
    assert loss.item() == pytest.approx((0.32 + 0.005 + 0.5) / 3)
    assert metrics["actor/value_clip_ratio"].item() == pytest.approx(2 / 3)
    far, _ = critic_loss(torch.tensor([20.0]), torch.tensor([20.0]), torch.zeros(1), torch.ones(1), 0.2, 10.0)
    assert far.item() == pytest.approx(10 * (20 - 5))


def test_the_loss_ratio_has_beta_in_it():
    assert loss_ratio(0.2, 0.5, -0.1) == pytest.approx(1.0)
    assert loss_ratio(0.2, 0.5, 0.0) == math.inf
