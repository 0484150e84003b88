import math

import pytest
import torch

from learner.advantages import gae, normalized
from learner.losses import actor_loss, chunk_log_prob, critic_loss, loss_ratio


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


def test_only_executed_steps_enter_the_log_probability():
    log_prob = torch.arange(12.0).view(1, 3, 4)
    assert chunk_log_prob(log_prob, torch.tensor([[True, True, False]])).tolist() == [sum(range(8))]


def test_the_surrogate_is_clipped_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 9.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 7.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    loss, metrics = actor_loss(ratio.log(), torch.zeros(5), advantages, mask, 0.2, 0.3)
    # -min: 1.5 is clipped to 1.3 for A > 0, kept for A < 0; 0.5 kept for A > 0, clipped to 0.8 for A < 0
    assert loss.item() == pytest.approx((-1.3 + 1.5 - 0.5 + 0.8) / 4)
    assert metrics["actor/pg_clipfrac"].item() == 0.5
    k3 = sum(2 * (r - 1 - math.log(r)) for r in (1.5, 0.5)) / 4
    assert metrics["actor/approx_kl"].item() == pytest.approx(k3)


def test_the_value_is_held_near_its_old_one_and_the_ratio_counts_who_left():
    value, old = torch.tensor([0.5, 0.1, -1.0, 3.0]), torch.zeros(4)
    returns, mask = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, metrics = critic_loss(value, old, returns, mask, 0.2, 10.0)
    # held: 0.2, 0.1, -0.2. Worse of both: (1 - 0.2)^2/2, 0.1^2/2, 1^2/2
    assert loss.item() == pytest.approx((0.32 + 0.005 + 0.5) / 3)
    assert metrics["actor/value_clip_ratio"].item() == pytest.approx(2 / 3)
    far, _ = critic_loss(torch.tensor([20.0]), torch.tensor([20.0]), torch.zeros(1), torch.ones(1), 0.2, 10.0)
    assert far.item() == pytest.approx(10 * (20 - 5))


def test_the_loss_ratio_has_beta_in_it():
    assert loss_ratio(0.2, 0.5, -0.1) == pytest.approx(1.0)
    assert loss_ratio(0.2, 0.5, 0.0) == math.inf
