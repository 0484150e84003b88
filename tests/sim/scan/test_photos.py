import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from bridge.pose import matrix_from_rpy, pose
from sim.scan import photos
from sim.scan.photos import store

K = np.array([[500.0, 0, 31.5], [0, 510.0, 23.5], [0, 0, 1]])


def test_a_set_is_read_as_it_was_written(tmp_path):
    rng = np.random.default_rng(0)
    made = [
        store(tmp_path / f"{i}.png", rng.integers(0, 256, (48, 64, 3), np.uint8), K, pose(rng.normal(size=3),
              matrix_from_rpy(rng.normal(size=3))), {"cube": pose(rng.normal(size=3), np.eye(3))})
        for i in range(3)
    ]  # fmt: skip
    photos.save(tmp_path, made)
    for ours, theirs in zip(made, photos.load(tmp_path), strict=True):
        np.testing.assert_allclose(theirs.T_world_cam, ours.T_world_cam, atol=1e-12)
        np.testing.assert_allclose(theirs.K, K, atol=1e-12)
        np.testing.assert_allclose(theirs.bodies["cube"], ours.bodies["cube"])
        np.testing.assert_array_equal(theirs.pixels(), np.array(Image.open(ours.path)))


def test_the_file_speaks_nerfstudios_convention(tmp_path):
    """A camera at (1, 2, 3) whose OpenCV axes are the world's looks along +z, which is -z in OpenGL's axes."""
    photo = store(tmp_path / "a.png", np.zeros((48, 64, 3), np.uint8), K, pose([1, 2, 3], np.eye(3)), {})
    photos.save(tmp_path, [photo])
    (frame,) = json.loads((tmp_path / "transforms.json").read_text())["frames"]
    assert frame["transform_matrix"] == [[1, 0, 0, 1], [0, -1, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1]]
    assert (frame["fl_x"], frame["fl_y"], frame["cx"], frame["cy"]) == (500, 510, 32, 24)
    assert (frame["w"], frame["h"]) == (64, 48)


def test_intrinsics_for_all_frames_serve_each(tmp_path):
    photos.save(tmp_path, [store(tmp_path / "a.png", np.zeros((48, 64, 3), np.uint8), K, np.eye(4), {})])
    data = json.loads((tmp_path / "transforms.json").read_text())
    for key in ("fl_x", "cx", "cy", "w", "h"):
        data[key] = data["frames"][0].pop(key)
    del data["frames"][0]["fl_y"]  # then it is fl_x
    (tmp_path / "transforms.json").write_text(json.dumps(data))
    (photo,) = photos.load(tmp_path)
    assert photo.K.tolist() == [[500, 0, 31.5], [0, 500, 23.5], [0, 0, 1]]


def test_distortion_is_taken_out(tmp_path):
    """A bright dot that a lens with k1 moved outwards comes back to where the pinhole has it."""
    straight = np.array([[[0.05, 0.03, 1.0]]])
    lens = (0.8, 0.0, 0.0, 0.0)
    bent = cv2.projectPoints(straight, np.zeros(3), np.zeros(3), K, np.array(lens))[0].ravel()
    picture = np.zeros((48, 64, 3), np.uint8)
    u, v = np.round(bent).astype(int)
    picture[v - 1 : v + 2, u - 1 : u + 2] = 255
    photo = replace(store(tmp_path / "a.png", picture, K, np.eye(4), {}), distortion=lens)
    photos.save(tmp_path, [photo])
    bright = np.argwhere(photos.load(tmp_path)[0].pixels()[..., 0] > 100).mean(axis=0)
    np.testing.assert_allclose(bright, [510 * 0.03 + 23.5, 500 * 0.05 + 31.5], atol=0.7)


@pytest.mark.parametrize("k1", [0.1, -0.1])
def test_what_a_straightened_picture_leaves_black_is_masked(tmp_path, k1):
    K = np.array([[300.0, 0, 159.5], [0, 300, 119.5], [0, 0, 1]])
    photo = store(tmp_path / "a.png", np.full((240, 320, 3), 255, np.uint8), K, np.eye(4), {})
    photo = replace(photo, distortion=(k1, 0.0, 0.0, 0.0))
    mask = photo.mask()
    assert mask is not None
    np.testing.assert_array_equal(mask, (photo.pixels() == 255).all(axis=2))
    assert mask[120, 160]
    assert mask[0, 0] == (k1 < 0)  # the other lens shows more than the pinhole does
    grey = np.full((240, 320), 255, np.uint8)
    grey[100:140] = 0
    Image.fromarray(grey).save(tmp_path / "mask.png")
    both = replace(photo, mask_path=tmp_path / "mask.png").mask()
    assert both is not None
    assert not both[105:135].any()
    np.testing.assert_array_equal(both[:90], mask[:90])
    Image.fromarray(np.zeros_like(grey)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="a.png: its mask or its distortion leaves no pixel"):
        replace(photo, mask_path=tmp_path / "mask.png").mask()


def test_masks(tmp_path):
    grey = np.full((48, 64), 255, np.uint8)
    grey[:10] = 0
    Image.fromarray(grey).save(tmp_path / "mask.png")
    photo = store(tmp_path / "a.png", np.zeros((48, 64, 3), np.uint8), K, np.eye(4), {})
    assert photo.mask() is None
    photos.save(tmp_path, [replace(photo, mask_path=tmp_path / "mask.png")])
    mask = photos.load(tmp_path)[0].mask()
    assert mask is not None
    assert not mask[:10].any()
    assert mask[10:].all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("frames"), "is no set of photographs"),
        (lambda d: d.update(frames=[]), "has no frames"),
        (lambda d: d["frames"][0].pop("fl_x"), "'fl_x' is missing"),
        (lambda d: d["frames"][0].update(file_path="b.png"), "b.png: there is no such picture"),
        (lambda d: d["frames"][0].update(transform_matrix=[[2, 0, 0, 0]] * 4), "transform_matrix is not a rigid"),
        (lambda d: d["frames"][0].update(bodies={"cube": [1, 2]}), "bodies.cube is not a rigid"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, said):
    photos.save(tmp_path, [store(tmp_path / "a.png", np.zeros((48, 64, 3), np.uint8), K, np.eye(4), {})])
    data = json.loads((tmp_path / "transforms.json").read_text())
    change(data)
    (tmp_path / "transforms.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=said):
        photos.load(tmp_path)


def test_a_picture_of_another_size(tmp_path):
    photo = store(tmp_path / "a.png", np.zeros((48, 64, 3), np.uint8), K, np.eye(4), {})
    with pytest.raises(ValueError, match="a.png is 64x48, its camera 65x48"):
        replace(photo, width=65).pixels()
