import copy

import numpy as np
import pytest
import torch

from sim.scan.gaussians import INVISIBLE, MAX_COPIES, Gaussians, draw, into_camera, split
from sim.splat.cloud import GaussianCloud
from sim.splat.sample import flat_colour
from tests.sim.splat.scenes import cameras, poses, psnr_db, tabletop, with_sheen

K = torch.tensor([[50.0, 0, 24.0], [0, 50.0, 16.0], [0, 0, 1]])


def cloud_of(num: int) -> GaussianCloud:
    generator = torch.Generator().manual_seed(0)
    return GaussianCloud(
        means_m=torch.randn(num, 3, generator=generator),
        quats_wxyz=torch.randn(num, 4, generator=generator),
        log_scales=torch.full((num, 3), -2.0),
        opacity_logits=torch.linspace(-8.0, 3.0, num),
        sh=torch.randn(num, 4, 3, generator=generator),
        segment_ids=torch.arange(num) % 2,
        segment_names=("world", "cube"),
    )


@pytest.mark.parametrize("copies", [1, 2, 3, 7, MAX_COPIES])
def test_a_split_gaussian_lets_as_much_light_through(copies):
    """Alphas of n copies compose to the old one at the centre, and their integral along a line is the old one's."""
    opacity, x = 0.7, np.linspace(-8, 8, 4001)
    one, shrink = (float(v) for v in split(torch.tensor([opacity]), torch.tensor([copies])))
    assert 1 - (1 - one) ** copies == pytest.approx(opacity, abs=1e-5)
    together = 1 - (1 - one * np.exp(-0.5 * (x / shrink) ** 2)) ** copies
    assert together.sum() == pytest.approx((opacity * np.exp(-0.5 * x**2)).sum(), rel=1e-3)
    assert (one, shrink) == (pytest.approx(opacity), pytest.approx(1.0)) if copies == 1 else shrink < 1


def test_the_invisible_move_to_the_visible_with_their_segment():
    gaussians = Gaussians(cloud_of(40), 1.0, torch.zeros(3))
    before = cloud_of(40)
    dead = before.opacities <= INVISIBLE
    assert 0 < int(dead.sum()) < 20
    assert gaussians.relocate() == int(dead.sum())
    after = gaussians.cloud(1)
    assert bool((after.opacities > INVISIBLE).all())
    alive = before.means_m[~dead]
    for index in dead.nonzero()[:, 0]:
        parent = (alive == after.means_m[index]).all(dim=1).nonzero()[:, 0]
        assert len(parent) == 1
        assert after.segment_ids[index] == before.segment_ids[~dead][parent[0]]
    torch.testing.assert_close(after.means_m[~dead], alive)
    assert gaussians.relocate() == 0


def test_only_the_invisible_are_shaken():
    gaussians = Gaussians(cloud_of(40), 1.0, torch.zeros(3))
    before = cloud_of(40)
    gaussians.explore()
    moved_m = (gaussians.params["means_m"].detach() - before.means_m).norm(dim=1)
    assert float(moved_m[before.opacities > 0.2].max()) < 1e-6
    assert float(moved_m[before.opacities < 0.002].min()) > 1e-4


def test_state_comes_back():
    one, two = Gaussians(cloud_of(30), 1.0, torch.zeros(3)), Gaussians(cloud_of(30), 1.0, torch.ones(3))
    for _ in range(2):
        one.cloud(1).means_m.square().sum().backward()
        one.optimizer.step()
    one.relocate()
    two.load(copy.deepcopy(one.state()))
    for gaussians in (one, two):
        gaussians.optimizer.zero_grad()
        gaussians.cloud(1).means_m.square().sum().backward()
        gaussians.optimizer.step()
    for key in one.params:
        torch.testing.assert_close(one.params[key], two.params[key])
    torch.testing.assert_close(one.segment_ids, two.segment_ids)


def test_what_gsplat_is_given_is_what_the_reference_draws():
    """The cloud taken into the camera's frame, flat in the colours that it sees, drawn from the origin."""
    cloud, T = with_sheen(tabletop(600, 0), 3, 0.1, seed=1), poses(1)[0]
    cams = cameras(1, 48, 32)
    T_cam_segment = (torch.linalg.inv(cams.T_world_cam[0, 0]) @ T).float()
    means, quats, rgb = into_camera(cloud, T_cam_segment)
    ids = torch.zeros(len(cloud), dtype=torch.int64)
    moved = GaussianCloud(means, quats, cloud.log_scales, cloud.opacity_logits, flat_colour(rgb), ids)
    expected, alpha = draw(cloud, T_cam_segment, K, 48, 32)
    got, got_alpha = draw(moved, torch.eye(4)[None], K, 48, 32)
    assert float(alpha.max()) > 0.9
    assert psnr_db(got, expected) > 60
    torch.testing.assert_close(got_alpha, alpha, atol=1e-3, rtol=0)


def test_gradients_point_where_the_picture_changes():
    """Against finite differences, which also see what no gradient does: alphas that pass the limit of a drawn one."""
    num = 5
    start = cloud_of(num)
    means = torch.tensor([[0.0, 0.0, 1.0]]) + 0.1 * start.means_m
    fields = {"means_m": means, "opacity_logits": torch.zeros(num), "log_scales": start.log_scales - 0.5}
    target = torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(3))

    def loss(**changed: torch.Tensor) -> torch.Tensor:
        parts = {"quats_wxyz": start.quats_wxyz, "sh": start.sh, "segment_ids": 0 * start.segment_ids}
        parts |= fields | changed
        return ((draw(GaussianCloud(**parts), torch.eye(4)[None], K, 48, 32)[0] - target) ** 2).sum()

    for key, value in fields.items():
        leaf = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(**{key: leaf}), leaf)
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(4))
        step = 1e-3
        numeric = (loss(**{key: value + step * direction}) - loss(**{key: value - step * direction})) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=0.15, abs=0.02), key


@pytest.mark.gpu
def test_gsplat_draws_and_teaches_what_the_reference_does():
    cloud, T, cams = tabletop(2000, 2), poses(1)[0], cameras(1, 96, 64)
    T_cam_segment = (torch.linalg.inv(cams.T_world_cam[0, 0]) @ T).float()
    K_half = cams.K[0, 0].float().clone()
    K_half[:2, 2] += 0.5
    found = {}
    for device in ("cpu", "cuda"):
        gaussians = Gaussians(cloud.to(device), 1.0, torch.zeros(3))
        picture, _ = draw(gaussians.cloud(2), T_cam_segment.to(device), K_half.to(device), 96, 64)
        picture.square().sum().backward()
        found[device] = picture.detach().cpu(), gaussians.params["means_m"].grad.cpu()
    assert psnr_db(found["cuda"][0], found["cpu"][0]) > 40
    a, b = (found[device][1].flatten() for device in ("cpu", "cuda"))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.98
