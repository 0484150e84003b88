"""The gsplat backend against the reference, on a CUDA device."""

import pytest
import torch

from sim.splat.render import Cameras, render
from tests.sim.splat.scenes import cameras, mask, poses, psnr_db, tabletop

pytestmark = pytest.mark.gpu


def on_gpu(cams: Cameras) -> Cameras:
    return Cameras(cams.K.cuda(), cams.T_world_cam.cuda(), cams.width, cams.height)


@pytest.mark.parametrize(("degree", "antialiased"), [(0, False), (1, False), (2, True), (3, False)])
def test_gsplat_draws_what_the_reference_draws(degree, antialiased):
    cloud, T, cams = tabletop(3000, degree), poses(3), cameras(3, 110, 90)
    background = torch.tensor([0.2, 0.4, 0.6])
    options = {"background": background, "segments": True, "antialiased": antialiased}
    expected = render(cloud, T, cams, backend="torch", **options)
    got = render(cloud.to("cuda"), T.cuda(), on_gpu(cams), **options)
    assert got.rgb.is_cuda
    assert psnr_db(got.rgb.cpu(), expected.rgb) > 40
    assert torch.eq(mask(got).cpu(), mask(expected)).float().mean() > 0.999
    solid = expected.alpha > 0.5
    torch.testing.assert_close(got.depth_m.cpu()[solid], expected.depth_m[solid], atol=1e-3, rtol=0)


def test_batch_equals_one_at_a_time():
    cloud, T, cams = tabletop(20_000).to("cuda"), poses(16).cuda(), on_gpu(cameras(16, 224, 224))
    together = render(cloud, T, cams).rgb
    for n in range(16):
        alone = render(cloud, T[n : n + 1], cams.select(slice(n, n + 1), slice(None))).rgb[0]
        assert psnr_db(together[n].cpu(), alone.cpu()) > 45
    assert psnr_db(together.cpu(), render(cloud, T, cams, images_per_call=5).rgb.cpu()) > 45


def test_no_gaussian_in_sight():
    far = poses(2).cuda()
    far[:, :, 2, 3] = -1000
    assert render(tabletop(300).to("cuda"), far, on_gpu(cameras(2))).alpha.max() == 0
