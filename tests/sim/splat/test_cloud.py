"""Clouds: selecting, merging, moving, and refusing what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bridge.pose import matrix_from_rpy, quat_xyzw_from_matrix
from sim.splat import sample
from sim.splat.cloud import matrix_from_quat_wxyz, merge, multiply_wxyz, quat_wxyz_from_matrix
from tests.sim.splat.scenes import rigid, tabletop


def rotations() -> np.ndarray:
    half_turns = [np.diag([1.0, -1, -1]), np.diag([-1.0, 1, -1]), np.diag([-1.0, -1, 1]), np.eye(3)]
    return np.concatenate([matrix_from_rpy(np.random.default_rng(0).uniform(-3.2, 3.2, (50, 3))), half_turns])


def test_quaternions_agree_with_the_bridge_and_compose():
    R = rotations()
    quats = quat_wxyz_from_matrix(torch.from_numpy(R))
    torch.testing.assert_close(quats, torch.from_numpy(quat_xyzw_from_matrix(R)).roll(1, -1))
    torch.testing.assert_close(matrix_from_quat_wxyz(quats), torch.from_numpy(R))
    product = matrix_from_quat_wxyz(multiply_wxyz(quats[:-1], quats[1:]))
    torch.testing.assert_close(product, torch.from_numpy(R[:-1] @ R[1:]))


def test_covariance_by_hand():
    cloud = tabletop(30).select(torch.tensor([0]))
    half = 0.5**0.5  # a quarter turn about z: x goes to y
    cloud = replace(
        cloud,
        quats_wxyz=torch.tensor([[2 * half, 0, 0, 2 * half]]),  # norm 2: must not matter
        log_scales=torch.tensor([[0.1, 0.2, 0.3]]).log(),
    )
    expected = torch.diag(torch.tensor([0.04, 0.01, 0.09]))[None]
    torch.testing.assert_close(cloud.covariances_m2, expected, atol=1e-7, rtol=0)


def test_merge_shares_segments_and_pads_harmonics():
    a, b = tabletop(30, degree=1), sample.box((1, 1, 1), 5, (1, 0, 0), "cube")
    both = merge([a, b, b.bind("new")])
    assert both.segment_names == ("table", "arm", "cube", "new")
    assert both.segment_ids.tolist() == [*a.segment_ids.tolist(), *[2] * 5, *[3] * 5]
    assert torch.equal(both.sh[:30], a.sh)
    assert not both.sh[30:, 1:].any()
    with pytest.raises(ValueError, match="empty"):
        merge([])


def test_selected_segments_keep_their_ids():
    cloud = tabletop(30)
    some = cloud.select_segments(["cube", "table"])
    assert set(some.segment_ids.tolist()) == {0, 2}
    assert some.segment_names == cloud.segment_names
    assert len(some) + len(cloud.select_segments(["arm"])) == len(cloud)
    with pytest.raises(ValueError, match="no segment 'plate'"):
        cloud.select_segments(["plate"])


def test_transform_and_back():
    cloud, T = tabletop(60), rigid([0.3, -0.2, 1.0], [0.5, 1.0, -2.0])
    back = cloud.transform(T, scale=2.0).transform(torch.linalg.inv(T)).transform(torch.eye(4), scale=0.5)
    moved = rigid((T[:3, :3].T @ -T[:3, 3] + T[:3, :3].T @ T[:3, 3]).tolist(), [0, 0, 0])
    assert torch.equal(moved, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(back.means_m, cloud.means_m, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.covariances_m2, cloud.covariances_m2, atol=1e-8, rtol=1e-4)
    torch.testing.assert_close(back.sh, cloud.sh, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="scale 0"):
        cloud.transform(T, scale=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means_m": torch.zeros(29, 3)}, "quats_wxyz has shape"),
        ({"means_m": torch.zeros(30, 3, dtype=torch.float64)}, "means_m is torch.float64"),
        ({"segment_ids": torch.full((30,), 3)}, r"\[0, 3\)"),
        ({"segment_names": ("a", "a", "b")}, "repeat"),
        ({"sh": torch.zeros(30, 5, 3)}, "5 spherical harmonics"),
        ({"sh": torch.zeros(30, 3)}, "sh has shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(tabletop(30), **change)


def test_sampled_surfaces():
    box = sample.box((0.2, 0.4, 0.6), 3000, (0.2, 0.4, 0.6), "b")
    distance = (box.means_m.abs() - torch.tensor([0.1, 0.2, 0.3])).abs().min(dim=1).values
    assert distance.max() < 1e-6  # all on a face
    on_top = (box.means_m[:, 2] - 0.3).abs() < 1e-6
    assert int(on_top.sum()) == pytest.approx(3000 * 0.08 / (2 * (0.08 + 0.12 + 0.24)), abs=3)  # share of the area
    normal = matrix_from_quat_wxyz(box.quats_wxyz)[:, :, 2]
    assert normal[on_top][:, 2].abs().min() > 0.999
    rod = sample.cylinder(0.05, 0.3, 2000, (1, 1, 1), "c")
    radius, z = rod.means_m[:, :2].norm(dim=1), rod.means_m[:, 2].abs()
    wall = 0.05 * np.cos(np.pi / 32) - 1e-6
    assert ((radius >= wall) | ((z - 0.15).abs() < 1e-6)).all()
    torch.testing.assert_close(sample.box((1, 1, 1), 10, (0.2, 0.4, 0.6), "b").sh, sample.flat_colour(
        torch.tensor([[0.2, 0.4, 0.6]])).expand(10, 1, 3))  # fmt: skip
    with pytest.raises(ValueError, match="triangles of 0"):
        sample.triangles(np.zeros((1, 3, 3)), 5, (0, 0, 0))


def test_mesh_colours_come_from_its_vertices():
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    cloud = sample.mesh(vertices, np.array([[0, 1, 2]]), 500, np.eye(3), "m")
    rgb = 0.5 + cloud.sh[:, 0] * 0.28209479
    x, y = cloud.means_m[:, 0], cloud.means_m[:, 1]
    torch.testing.assert_close(rgb, torch.stack([1 - x - y, x, y], dim=1), atol=1e-5, rtol=0)
