"""Pictures of the reference renderer: hand-worked pixels, invariances, and batch against one at a time."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sim.splat import harmonics, reference, sample
from sim.splat.cloud import GaussianCloud, merge
from sim.splat.render import Cameras, render, to_uint8
from tests.sim.splat.scenes import SEGMENTS, cameras, mask, poses, psnr_db, rigid, tabletop

EYE = torch.eye(4)[None, None]


def gaussians(*rows: tuple[float, float, float, float, float, tuple[float, float, float]]) -> GaussianCloud:
    """x, y, z, standard deviation (all m), opacity, colour."""
    x, y, z, sigma, opacity, rgb = map(list, zip(*rows, strict=True))
    num = len(rows)
    return GaussianCloud(
        means_m=torch.tensor([x, y, z], dtype=torch.float32).T.contiguous(),
        quats_wxyz=torch.tensor([1.0, 0, 0, 0]).repeat(num, 1),
        log_scales=torch.tensor(sigma).log()[:, None].repeat(1, 3),
        opacity_logits=torch.logit(torch.tensor(opacity)),
        sh=sample.flat_colour(torch.tensor(rgb, dtype=torch.float32)),
        segment_ids=torch.zeros(num, dtype=torch.int64),
    )


def camera(focal_px: float = 100.0, size: int = 33) -> Cameras:
    K = torch.tensor([[focal_px, 0, size // 2], [0, focal_px, size // 2], [0, 0, 1]])
    return Cameras(K[None, None], EYE, size, size)


def test_one_gaussian_by_hand():
    # 2 m away, 0.04 m wide, f = 100 px: variance on the screen is (100 * 0.04 / 2)^2 + 0.3 = 4.3 px^2 in the middle.
    output = render(gaussians((0, 0, 2, 0.04, 0.8, (1.0, 0.5, 0.25))), EYE, camera())
    rgb, alpha, depth = output.rgb[0, 0], output.alpha[0, 0], output.depth_m[0, 0]
    torch.testing.assert_close(alpha[16, 16], torch.tensor(0.8))  # K's principal point is the centre of pixel (16, 16)
    torch.testing.assert_close(rgb[16, 16], torch.tensor([0.8, 0.4, 0.2]))
    torch.testing.assert_close(alpha[16, 19], torch.tensor(0.8 * math.exp(-0.5 * 9 / 4.3)))
    torch.testing.assert_close(alpha[14, 17], torch.tensor(0.8 * math.exp(-0.5 * 5 / 4.3)))
    torch.testing.assert_close(depth[16, 16], torch.tensor(2.0))
    # alpha < 1/255 is dropped: beyond sqrt(2 * 4.3 * ln(0.8 * 255)) = 6.763 px
    assert alpha[16, 22] > 0
    assert alpha[16, 23] == 0
    assert depth[16, 23] == math.inf
    assert torch.equal(rgb[16, 23], torch.zeros(3))


def test_antialiasing_by_hand():
    """2 mm at 2 m are 0.1 px: dilated to 0.01 + 0.3 px^2, whose extra area is taken back in opacity."""
    tiny = gaussians((0, 0, 2, 0.002, 0.8, (1, 1, 1)))
    assert render(tiny, EYE, camera()).alpha[0, 0, 16, 16] == pytest.approx(0.8, abs=1e-5)
    alpha = render(tiny, EYE, camera(), antialiased=True).alpha[0, 0]
    assert alpha[16, 16] == pytest.approx(0.8 * 0.01 / 0.31, abs=1e-5)
    assert alpha[16, 17] == pytest.approx(0.8 * 0.01 / 0.31 * math.exp(-0.5 / 0.31), abs=1e-5)
    # a large one hardly changes: 400 px^2 / 400.3 px^2
    large = gaussians((0, 0, 2, 0.4, 0.8, (1, 1, 1)))
    alpha = render(large, EYE, camera(), antialiased=True).alpha[0, 0, 16, 16]
    assert alpha == pytest.approx(0.8 * 400 / 400.3, abs=1e-5)


def test_a_pixel_to_the_right_and_below():
    # x right, y down: 0.1 m at 2 m is 5 px
    alpha = render(gaussians((0.1, -0.06, 2, 0.01, 0.9, (1, 1, 1))), EYE, camera()).alpha[0, 0]
    assert divmod(int(alpha.argmax()), 33) == (16 - 3, 16 + 5)


def test_nearer_hides_farther_whatever_the_order():
    red, blue = (0, 0, 1.0, 0.02, 0.6, (1, 0, 0)), (0, 0, 2.0, 0.04, 0.5, (0, 0, 1))
    for cloud in (gaussians(red, blue), gaussians(blue, red)):
        output = render(cloud, EYE, camera(), background=torch.tensor([0.0, 1.0, 0.0]))
        # 0.6 red, then 0.4 * 0.5 blue, then 0.4 * 0.5 green
        torch.testing.assert_close(output.rgb[0, 0, 16, 16], torch.tensor([0.6, 0.2, 0.2]), atol=1e-6, rtol=0)
        torch.testing.assert_close(output.depth_m[0, 0, 16, 16], torch.tensor((0.6 * 1 + 0.2 * 2) / 0.8))


def test_alpha_saturates_and_ends_the_pixel():
    near, middle, far = (
        (0, 0, 1, 0.05, 0.9999, (1, 0, 0)),
        (0, 0, 2, 0.1, 0.8, (0, 1, 0)),
        (0, 0, 3, 0.1, 0.8, (0, 0, 1)),
    )
    # 0.9999 is cut to 0.999; the second leaves 1e-3 * 0.2 of the light; the third would leave 4e-5, below 1e-4
    pixel = render(gaussians(near, middle, far), EYE, camera()).rgb[0, 0, 16, 16]
    torch.testing.assert_close(pixel, torch.tensor([0.999, 0.0008, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("z_m", [-1.0, 0.005])
def test_behind_and_too_near_are_not_drawn(z_m):
    assert render(gaussians((0, 0, z_m, 0.05, 0.9, (1, 1, 1))), EYE, camera()).alpha.max() == 0


def test_batch_equals_one_at_a_time():
    cloud, T, cams = tabletop(), poses(4), cameras(4)
    together = render(cloud, T, cams, segments=True)
    assert together.rgb.shape == (4, 2, 48, 56, 3)
    assert psnr_db(together.rgb[0], together.rgb[1]) < 30  # the environments do differ
    for n in range(4):
        for m in range(2):
            alone = render(cloud, T[n : n + 1], cams.select(slice(n, n + 1), slice(m, m + 1)), segments=True)
            assert psnr_db(together.rgb[n, m], alone.rgb[0, 0]) > 45
            assert torch.equal(mask(together)[n, m], mask(alone)[0, 0])


def test_blending_in_blocks_of_any_size_gives_the_same(monkeypatch):
    cloud, T, cams = tabletop(600), poses(1), cameras(1)
    expected = render(cloud, T, cams)
    monkeypatch.setattr(reference, "BLOCK", 3)
    output = render(cloud, T, cams)
    torch.testing.assert_close(output.rgb, expected.rgb, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.alpha, expected.alpha, atol=1e-5, rtol=0)


def test_calls_of_any_size_give_the_same():
    cloud, T, cams = tabletop(300), poses(3), cameras(3)
    assert torch.equal(render(cloud, T, cams).rgb, render(cloud, T, cams, images_per_call=4).rgb)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_world_and_camera_turned_together_show_the_same(degree):
    cloud, T, cams = tabletop(degree=degree), poses(1), cameras(1)
    turn = rigid([0.4, -2.0, 1.0], [0.7, -1.1, 2.3])
    turned = Cameras(cams.K, turn @ cams.T_world_cam, cams.width, cams.height)
    assert psnr_db(render(cloud, T, cams).rgb, render(cloud, turn @ T, turned).rgb) > 60


def test_colour_turns_with_the_segment():
    """A segment turned by its pose looks like the cloud turned with rotated coefficients."""
    cloud, T, cams = tabletop(), poses(1), cameras(1)
    still = torch.eye(4, dtype=torch.float64).expand(1, 3, 4, 4)
    baked = [cloud.select_segments([name]).transform(T[0, i]) for i, name in enumerate(SEGMENTS)]
    expected = render(merge(baked), still, cams).rgb
    assert psnr_db(render(cloud, T, cams).rgb, expected) > 60
    # and without turning the coefficients it would not
    wrong = [replace(part, sh=cloud.select_segments([name]).sh) for part, name in zip(baked, SEGMENTS, strict=True)]
    assert psnr_db(render(merge(wrong), still, cams).rgb, expected) < 45


def test_segment_mask_and_depth():
    cloud, T, cams = tabletop(3000, degree=0), poses(1), cameras(1)
    output = render(cloud, T, cams, segments=True)
    assert set(mask(output).unique().tolist()) == {-1, 0, 1, 2}
    for i, name in enumerate(SEGMENTS):
        alone = render(cloud.select_segments([name]), T, cams)
        here = torch.eq(mask(output), i)
        assert here.any()
        assert (alone.alpha[here] > 0.2).all()
    cube = torch.eq(mask(output), 2)
    distance = torch.linalg.norm(T[0, 2, :3, 3] - cams.T_world_cam[0, :, :3, 3], dim=-1)[0]
    assert output.depth_m[0, 0][cube[0, 0]].median() == pytest.approx(float(distance), abs=0.08)


def test_no_gaussians_is_background():
    cloud = tabletop(30).select(torch.zeros(30, dtype=torch.bool))
    grey = torch.tensor([0.5, 0.5, 0.5])
    output = render(cloud, poses(1), cameras(1), background=grey, segments=True)
    assert torch.equal(output.rgb, grey.expand_as(output.rgb))
    assert torch.eq(mask(output), -1).all()


def test_to_uint8_rounds_and_clips():
    values = to_uint8(torch.tensor([-0.1, 0.0, 0.5, 0.9999, 1.7]))
    assert values.tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "opengl"}, "allowed are auto, gsplat, torch"),
        ({"backend": "gsplat"}, "needs a CUDA device"),
        ({"images_per_call": 0}, "images_per_call 0"),
        ({"T_world_segment": torch.eye(4).expand(1, 2, 4, 4)}, r"expected \(1, 3, 4, 4\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"cloud": tabletop(30), "T_world_segment": poses(1), "cameras": cameras(1)} | change
    with pytest.raises(ValueError, match=message):
        render(**arguments)


def test_fused_projection_equals_the_reference():
    """The GPU kernel in Triton's interpreter, which has to be chosen before the kernel is defined: its own process."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "tests.sim.splat.interpret_fused"]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 pictures agree" in result.stdout


def test_degree_is_what_the_cloud_has():
    assert tabletop(30, degree=2).degree == 2
    assert tabletop(30, degree=2).sh.shape[1] == harmonics.num_coefficients(2)
