"""Signs, order and scale of the harmonics against scipy, and turning coefficients against turning directions."""

import math

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from bridge.pose import matrix_from_rpy
from sim.splat import harmonics


def directions(num: int) -> torch.Tensor:
    vectors = torch.randn(num, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_basis_against_scipy():
    d = directions(40)
    polar, azimuth = np.arccos(d[:, 2].numpy()), np.arctan2(d[:, 1].numpy(), d[:, 0].numpy())
    values = harmonics.basis(3, d).numpy()
    for l in range(4):
        for m in range(-l, l + 1):
            complex_value = sph_harm_y(l, abs(m), polar, azimuth)  # with the Condon-Shortley phase
            expected = complex_value.real if m >= 0 else complex_value.imag
            expected = expected * (math.sqrt(2) if m else 1)
            np.testing.assert_allclose(values[:, l * l + l + m], expected, atol=1e-14)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_lower_degrees_are_the_first_of_higher_ones(degree):
    d = directions(5)
    assert torch.equal(harmonics.basis(degree, d), harmonics.basis(3, d)[:, : (degree + 1) ** 2])


def test_rotated_coefficients_seen_from_a_rotated_direction():
    sh = torch.randn(7, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d, R = directions(7), torch.from_numpy(matrix_from_rpy(np.array([0.4, -1.2, 2.5])))
    before = torch.einsum("gk,gkc->gc", harmonics.basis(3, d), sh)
    after = torch.einsum("gk,gkc->gc", harmonics.basis(3, d @ R.T), harmonics.rotate(sh, R))
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)


def test_colours_add_a_half_and_stop_at_zero():
    sh = torch.tensor([[[1.0, -1.0, -5.0]]])
    c = 0.5 / math.sqrt(math.pi)
    torch.testing.assert_close(
        harmonics.colours(sh, torch.tensor([[0.0, 0, 1]])), torch.tensor([[0.5 + c, 0.5 - c, 0]])
    )


@pytest.mark.parametrize("num", [0, 2, 15, 25])
def test_numbers_that_are_no_degree(num):
    with pytest.raises(ValueError, match=f"{num} spherical harmonics"):
        harmonics.degree_of(num)
