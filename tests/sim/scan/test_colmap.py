"""Structure from motion on pictures of two textured planes, which OpenCV draws from known places."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from bridge import pose
from bridge.config import load
from sim.scan import photos as photo_set
from sim.scan.capture import CaptureConfig, capture
from sim.scan.photos import Photo, store
from sim.scan.views import around

pytest.importorskip("pycolmap")
K = np.array([[280.0, 0, 159.5], [0, 280.0, 119.5], [0, 0, 1]])
SIZE = (320, 240)
TEXELS_M = 1000.0


def texture(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (1000, 1000, 3))
    layers = [cv2.GaussianBlur(noise, (0, 0), sigma) for sigma in (6, 15)]
    return np.mean([255 * (layer - layer.min()) / np.ptp(layer) for layer in layers], axis=0).astype(np.uint8)


def draw(T_world_cam: np.ndarray, planes: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Planes of 1 m x 1 m, each a texture and its pose; the last lies in front."""
    picture = np.full((SIZE[1], SIZE[0], 3), 128, np.uint8)
    for image, T_world_plane in planes:
        T = np.linalg.inv(T_world_cam) @ T_world_plane
        H = K @ T[:3, [0, 1, 3]] @ np.diag([1 / TEXELS_M, 1 / TEXELS_M, 1.0])
        picture = cv2.warpPerspective(image, H, SIZE, dst=picture, borderMode=cv2.BORDER_TRANSPARENT)
    return picture


@pytest.mark.slow
def test_hand_held_photographs_are_placed_among_known_ones(tmp_path):
    table = texture(0), pose.pose([-0.1, -0.5, 0.0], np.eye(3))
    block = texture(1)[:300, :300], pose.pose([0.3, -0.15, 0.15], np.eye(3))
    views = around([[0.45, 0.0, 0.0]], 12, (0.8, 1.0), (0.8, 1.3), (-0.9, 0.9))
    known, hand = tmp_path / "known", tmp_path / "hand"
    for folder in (known, hand):
        folder.mkdir()
    made: list[Photo] = []
    for index, T in enumerate(views):
        folder = known if index % 3 == 0 else hand
        made.append(store(folder / f"{index:02d}.png", draw(T, [table, block]), K, T, {}))
    photo_set.save(known, made[::3])
    settings = ["source=colmap", f"pictures={hand}", f"known={known}", f"out={tmp_path}/out"]
    assert capture(load("twin-capture", CaptureConfig, settings))["photographs"] == 8
    true = {photo.path.name: photo for photo in made}
    for photo in photo_set.load(tmp_path / "out"):
        off = np.linalg.inv(true[photo.path.name].T_world_cam) @ photo.T_world_cam
        assert np.linalg.norm(off[:3, 3]) < 0.01
        assert pose.rotation_angle(off[:3, :3]) < 0.01
        assert photo.K[0, 0] == pytest.approx(280, rel=0.01)
        assert photo.pixels().shape == (240, 320, 3)
        assert "panda_hand" in photo.bodies
    far = [replace(photo, T_world_cam=np.diag([1.0, -1, -1, 1]) @ photo.T_world_cam) for photo in made[::3]]
    photo_set.save(known, [replace(p, T_world_cam=T) for p, T in zip(far, views[1::3], strict=True)])
    with pytest.raises(ValueError, match="fewer than 3 known places fit"):
        capture(load("twin-capture", CaptureConfig, settings))
