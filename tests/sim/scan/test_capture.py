import json

import numpy as np
import pytest

from bridge.config import load
from sim.scan import photos as photo_set
from sim.scan.capture import CALIBRATION, ROBOT, CaptureConfig, capture, main
from sim.scan.stand_in import HAND_HELD


def test_photographs_of_the_stand_in_show_things_where_they_are(tmp_path):
    """The cube's centre falls on red pixels; the contract's wrist camera is some pixels off, the cube is 40 wide."""
    settings = [f"out={tmp_path}", "source=stand_in", "num_views=6", "hand_held=8", "arm_poses=2", "arrangements=2"]
    found = capture(load("twin-capture", CaptureConfig, settings))
    photos = photo_set.load(tmp_path)
    assert found["photographs"] == len(photos) == 8 + found["wrist_photographs"]
    assert found["wrist_photographs"] >= 5
    red = {"wrist": 0, HAND_HELD: 0}
    for photo in photos:
        assert set(photo.bodies) == {*ROBOT, "cube", "plate"}
        centre = np.linalg.inv(photo.T_world_cam) @ photo.bodies["cube"][:, 3]
        u, v = np.round((photo.K @ centre[:3])[:2] / centre[2]).astype(int)
        if centre[2] > 0 and 0 <= u < photo.width and 0 <= v < photo.height:
            r, g, b = photo.pixels()[v, u].astype(int)
            red[photo.path.name.rsplit("_", 1)[0]] += r > 2 * max(g, b)
    assert red[HAND_HELD] >= 5  # the arm may stand before it
    assert red["wrist"] >= 2
    poses = {photo.bodies["panda_hand"].tobytes() for photo in photos if HAND_HELD in photo.path.name}
    assert len(poses) == 2
    for body in ("cube", "plate"):  # the wrist camera and the hand-held one see both arrangements
        for camera in red:
            assert len({photo.bodies[body].tobytes() for photo in photos if camera in photo.path.name}) == 2


def test_a_board_calibrates_and_later_captures_take_it_over(tmp_path, capsys):
    lying = "board={columns: 9, rows: 6, square_m: 0.02}"
    board = ["cell.board={columns: 9, rows: 6, square_m: 0.02, pos_m: [0.52, -0.25]}", lying]
    look = ["targets_m=[[0.48, -0.25, 0.0]]", "distance_m=[0.3, 0.45]", "num_views=8", "hand_held=0"]
    assert main([f"out={tmp_path}/board", "source=stand_in", *board, *look]) == 0
    assert json.loads(capsys.readouterr().out)["board_rms_px"] < 0.6
    made = json.loads((tmp_path / "board" / CALIBRATION).read_text())
    settings = [f"calibration={tmp_path}/board/{CALIBRATION}", "source=stand_in", "num_views=2", "hand_held=0"]
    assert main([f"out={tmp_path}/photos", *settings]) == 0
    photo = photo_set.load(tmp_path / "photos")[0]
    np.testing.assert_allclose(photo.K, made["K"])
    assert main([f"out={tmp_path}/none", "source=stand_in", lying, "num_views=2", "hand_held=0"]) == 1
    assert "the board is seen in 0 of 2 pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["camera=third_person"], "is fixed to the base"),
        (["calibration=nowhere.json"], "calibration nowhere.json"),
    ],
)
def test_what_cannot_be_captured_is_named(settings, said, tmp_path, capsys):
    assert main([f"out={tmp_path}", "source=stand_in", *settings]) == 1
    assert said in capsys.readouterr().err


def test_settings_are_checked():
    with pytest.raises(ValueError, match="source 'drone'"):
        CaptureConfig(source="drone")
    with pytest.raises(ValueError, match="distance_m"):
        CaptureConfig(distance_m=[0.2])
