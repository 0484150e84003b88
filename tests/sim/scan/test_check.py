import dataclasses
import json

import numpy as np
import pytest

from bridge.pose import pose
from sim.scan import photos as photo_set
from sim.scan.check import CheckConfig, check, corner_shifts, main, overlay
from tests.sim.scan.conftest import K


def textured(seed: int = 0) -> np.ndarray:
    """Squares of random colours, uint8 [120, 160, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8).repeat(10, axis=0).repeat(10, axis=1)


def test_a_shifted_picture_is_found_shifted():
    picture = textured()
    corners, there = corner_shifts(picture, np.roll(picture, (3, -2), (0, 1)))
    assert len(corners) > 30
    np.testing.assert_allclose(np.median(there - corners, axis=0), [-2, 3], atol=0.05)
    assert len(corner_shifts(np.full_like(picture, 99), picture)[0]) == 0


def test_what_a_mask_hides_has_no_corners():
    """Beside a masked half that does not fit, all is found where it is."""
    picture, other = textured(), textured()
    other[:, :80] = textured(1)[:, :80]
    mask = np.ones(picture.shape[:2], bool)
    mask[:, :80] = False
    corners, there = corner_shifts(picture, other, mask)
    assert len(corners) > 20
    assert corners[:, 0].min() >= 90  # half a window
    np.testing.assert_allclose(there, corners, atol=0.05)


def test_overlay_is_half_of_each():
    a, b = np.zeros((20, 30, 3), np.uint8), np.full((20, 30, 3), 200, np.uint8)
    both = overlay(a, b, np.array([[5.0, 5.0]]), np.array([[6.0, 5.0]]))
    assert (both[12:, :15] == 0).all()
    assert (both[12:, 15:] == 200).all()
    r, g, b = both[5, 10].tolist()  # on an arrow to (15, 5)
    assert r > 150 > max(g, b)


def test_the_scene_lies_on_its_own_photographs(scene, photographs, tmp_path):
    config = CheckConfig(scene=str(scene), photos=[str(photographs)], every=4, out=str(tmp_path), device="cpu")
    found = check(config)
    assert found["photographs"] == 4
    assert found["error_px"] < 0.05
    assert found["psnr_db"] > 40
    each = json.loads((tmp_path / "check.json").read_text())["each"]
    assert len(each) == len(list(tmp_path.glob("*.png"))) == 4


def test_a_wrong_calibration_shows(scene, photographs, tmp_path, capsys):
    """All cameras said to be turned by 0.05 rad about their vertical axes: 60 px x 0.05 = 3 px."""
    turn = pose([0, 0, 0], np.array([[np.cos(0.05), 0, np.sin(0.05)], [0, 1, 0], [-np.sin(0.05), 0, np.cos(0.05)]]))
    made = [dataclasses.replace(p, T_world_cam=p.T_world_cam @ turn) for p in photo_set.load(photographs)]
    original = (photographs / photo_set.FILE).read_text()
    photo_set.save(photographs, made)
    try:
        settings = [f"scene={scene}", f"photos=[{photographs}]", "every=3", f"out={tmp_path}", "device=cpu"]
        assert main(settings) == 1
    finally:
        (photographs / photo_set.FILE).write_text(original)
    assert "limit_px is 2.0" in capsys.readouterr().err
    assert json.loads((tmp_path / "check.json").read_text())["error_px"] == pytest.approx(0.05 * K[0, 0], abs=0.5)
