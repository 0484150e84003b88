"""Splat and simulator in one picture, and layers instead of one render."""

import math

import pytest
import torch

from sim.splat import composite
from sim.splat.render import RenderOutput, render
from tests.sim.splat.scenes import cameras, poses, psnr_db, tabletop

GREEN = (0.0, 1.0, 0.0)


def output(alpha, depth_m, rgb=(1.0, 0.0, 0.0)) -> RenderOutput:
    """One row of pixels; colour premultiplied."""
    alpha, depth_m = torch.tensor(alpha), torch.tensor(depth_m)
    shape = (1, 1, 1, len(alpha))
    return RenderOutput((alpha[:, None] * torch.tensor(rgb)).view(*shape, 3), alpha.view(shape), depth_m.view(shape))


def sim(depth_m) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, 1, 1, len(depth_m))
    return torch.tensor(GREEN).expand(*shape, 3), torch.tensor(depth_m).view(shape)


def test_nearest_wins_by_hand():
    splat = output([0.0, 0.75, 0.75, 0.75], [math.inf, 1.0, 2.0, 1.0])
    rgb = composite.nearest_wins(splat, *sim([1.0, 1.5, 1.5, math.inf]))
    expected = [GREEN, (0.75, 0.25, 0.0), GREEN, (0.75, 0.25, 0.0)]
    torch.testing.assert_close(rgb[0, 0, 0], torch.tensor(expected))


def test_layers_by_hand():
    red, blue = output([0.6, 0.6, 0.0], [1.0, 3.0, math.inf]), output([0.5] * 3, [2.0] * 3, (0.0, 0.0, 1.0))
    both = composite.layers(red, blue)
    expected = [(0.6, 0.0, 0.4 * 0.5), (0.5 * 0.6, 0.0, 0.5), (0.0, 0.0, 0.5)]
    torch.testing.assert_close(both.rgb[0, 0, 0], torch.tensor(expected))
    torch.testing.assert_close(both.alpha[0, 0, 0], torch.tensor([0.8, 0.8, 0.5]))
    torch.testing.assert_close(both.depth_m[0, 0, 0], torch.tensor([(0.6 + 0.4) / 0.8, (1.0 + 0.9) / 0.8, 2.0]))
    nothing = composite.layers(output([0.0], [math.inf]), output([0.0], [math.inf]))
    assert nothing.depth_m.item() == math.inf
    assert nothing.rgb.abs().max() == 0


def test_layers_of_a_scene_are_nearly_one_render():
    cloud, T, cams = tabletop(1500, degree=1), poses(2), cameras(2)
    moving, fixed = cloud.select_segments(["arm", "cube"]), cloud.select_segments(["table"])
    both = composite.layers(render(moving, T, cams), render(fixed, T, cams))
    together = render(cloud, T, cams)
    assert psnr_db(both.rgb, together.rgb) > 30
    assert psnr_db(render(moving, T, cams).rgb, together.rgb) < 20


def test_splat_in_front_of_and_behind_a_simulated_wall():
    cloud, T, cams = tabletop(900, degree=0), poses(1), cameras(1)
    splat = render(cloud, T, cams)
    wall = torch.tensor(GREEN).expand_as(splat.rgb)
    behind = composite.nearest_wins(splat, wall, torch.full_like(splat.alpha, 100.0))
    assert torch.equal(behind, splat.over(wall))
    assert torch.equal(composite.nearest_wins(splat, wall, torch.full_like(splat.alpha, 0.1)), wall)


def test_shapes_and_types_must_match():
    splat, (rgb, depth) = output([1.0, 1.0], [1.0, 1.0]), sim([1.0, 1.0])
    with pytest.raises(ValueError, match="do not match"):
        composite.nearest_wins(splat, rgb, depth[..., :1])
    with pytest.raises(ValueError, match="uint8"):
        composite.nearest_wins(splat, rgb.to(torch.uint8), depth)
