import numpy as np
import pytest
import torch

from sim.scan.scores import C1, edge_distance, psnr_db, scores, ssim


def noise(seed: int) -> torch.Tensor:
    return torch.rand(40, 50, 3, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_tenth_everywhere_is_20_db():
    assert psnr_db(torch.full((4, 5, 3), 0.4), torch.full((4, 5, 3), 0.5)) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(noise(0), noise(0)) == 120.0


def test_ssim():
    """Equal pictures: 1. Flat ones inside: 2ab / (a^2 + b^2). Negatives of strong contrast: below 0."""
    assert float(ssim(noise(0), noise(0))) == pytest.approx(1.0, abs=1e-6)
    a, b = torch.full((400, 400, 3), 0.3), torch.full((400, 400, 3), 0.6)
    assert float(ssim(a, b)) == pytest.approx((2 * 0.18 + C1) / (0.09 + 0.36 + C1), abs=0.02)
    board = torch.from_numpy((np.indices((64, 64)).sum(axis=0) // 4 % 2).astype(np.float32))[..., None].repeat(1, 1, 3)
    assert float(ssim(board, 1 - board)) < -0.5
    assert 0.0 < float(ssim(noise(0), (noise(0) + 0.2 * noise(1)) / 1.2)) < 1.0


def test_ssim_has_a_gradient_towards_the_target():
    target, x = noise(0), noise(1).requires_grad_()
    (gradient,) = torch.autograd.grad(ssim(x, target), x)
    x = x.detach()
    assert float(ssim(x + 0.5 * gradient / gradient.abs().max(), target)) > float(ssim(x, target))


def test_edge_distance():
    edge = torch.zeros(32, 32, 3)
    edge[:, 16:] = 1.0
    assert edge_distance(edge, edge) == 0.0
    assert edge_distance(edge, torch.zeros_like(edge)) == pytest.approx(1.0)
    assert edge_distance(edge, 1 - edge) == pytest.approx(1.0)  # the same places, the other way round
    assert edge_distance(edge, torch.roll(edge, 8, dims=0)) == 0.0  # moved along itself
    near, far = (edge_distance(edge, torch.roll(edge, n, dims=1)) for n in (1, 8))
    assert 0.0 < near < far <= 1.0
    assert edge_distance(torch.zeros(9, 9, 3), torch.zeros(9, 9, 3)) == 0.0


def test_a_mask_leaves_out_what_differs():
    """As if only the unmasked part were there; and what differs in this still counts."""
    mask = torch.ones(40, 50, dtype=torch.bool)
    mask[:, 24:] = False
    picture, other = ((255 * noise(seed)).to(torch.uint8) for seed in (0, 1))
    half = picture.clone()
    half[:, 24:] = other[:, 24:]
    assert scores(picture, half)["psnr_db"] < 20
    assert scores(picture, half, mask) == scores(picture, picture)
    cut, masked = scores(picture[:, :24], other[:, :24]), scores(picture, other, mask)
    assert masked == {key: pytest.approx(value, rel=1e-4) for key, value in cut.items()}


def test_scores_of_bytes():
    picture = (255 * noise(0)).to(torch.uint8)
    assert scores(picture, picture) == {"psnr_db": 120.0, "ssim": pytest.approx(1.0), "edge_distance": 0.0}
