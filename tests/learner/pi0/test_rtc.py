"""Real-time chunking: the method's weights and scale, its step factor and its Jacobian."""

import math

import pytest
import torch

from learner.flow import denoise
from learner.pi0.rtc import guidance_scale, guidance_weights, guided_denoise


def test_weights():
    """H = 8, delay 2, 3 steps of the new chunk beyond the old one: frozen, then decaying, then free."""
    weights = guidance_weights(8, 2, 3)
    assert weights[:2].tolist() == [1.0, 1.0]
    assert weights[5:].tolist() == [0.0, 0.0, 0.0]
    c = [(8 - 3 - i) / (8 - 3 - 2 + 1) for i in (2, 3, 4)]
    expected = [x * (math.exp(x) - 1) / (math.e - 1) for x in c]
    assert weights[2:5].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="delay"):
        guidance_weights(8, 6, 3)


def test_scale():
    """(1 - tau) / (tau r^2): 2 in the middle, clipped at the noise end."""
    assert guidance_scale(0.5, 5.0) == pytest.approx(2.0)
    assert guidance_scale(1.0, 5.0) == 5.0
    assert guidance_scale(0.75, 5.0) == pytest.approx((0.25**2 + 0.75**2) / (0.25 * 0.75))


def nonlinear(x, t):
    return torch.tanh(x) * 2 + t[:, None, None]


def test_one_step_by_hand():
    """x + (-v + scale * J^T W (Y - x0)) / K with the Jacobian of x0 = x - t v, here diagonal."""
    x, previous = torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    weights = guidance_weights(4, 1, 1)
    ours = guided_denoise(nonlinear, x, 1, previous, weights)
    v = nonlinear(x, torch.ones(1))
    jacobian = 1 - 2 * (1 - torch.tanh(x) ** 2)
    pull = jacobian * weights[None, :, None] * (previous - (x - v))
    torch.testing.assert_close(ours, x - v + 5.0 * pull, atol=1e-5, rtol=1e-5)


def test_no_weight_no_change():
    x = torch.randn(2, 4, 3)
    free = denoise(lambda x, t: (nonlinear(x, t), x), x, 5)
    guided = guided_denoise(nonlinear, x, 5, torch.randn(2, 4, 3), torch.zeros(4))
    torch.testing.assert_close(guided, free, atol=1e-6, rtol=0)


def test_frozen_steps_follow_and_free_steps_do_not():
    """A velocity that ends at any data estimate it is given (the perfect denoiser of one point)."""
    target = torch.zeros(1, 6, 2)

    def velocity(x, t):
        return 0.5 * (x - target) / t[:, None, None].clamp(min=0.1)

    previous = torch.full((1, 6, 2), 0.8)
    x = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0))
    guided = guided_denoise(velocity, x, 10, previous, guidance_weights(6, 2, 2))
    free = denoise(lambda x, t: (velocity(x, t), x), x, 10)
    assert (guided[:, :2] - previous[:, :2]).abs().mean() < 0.6 * (free[:, :2] - previous[:, :2]).abs().mean()
    torch.testing.assert_close(guided[:, 4:], free[:, 4:])
