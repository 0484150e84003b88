import dataclasses

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bridge import pose
from bridge.config import load
from sim.scan.arm import Reach, of_wrist
from sim.scan.board import Board, closed_form, find, hand_eye
from sim.scan.capture import CaptureConfig
from sim.scan.stand_in import StandInPhotographer
from sim.scan.views import around
from sim.stand_in.config import Chessboard

BOARD = Board(columns=9, rows=6, square_m=0.02)
LYING = Chessboard(9, 6, 0.02, [0.52, -0.25])


def flat(board: Board, px: int = 40) -> np.ndarray:
    """The board seen straight from above, a square `px` wide, with a white border of one."""
    dark = (np.indices((board.rows, board.columns)).sum(axis=0) % 2 == 0).astype(np.uint8)
    grey = np.pad(255 * (1 - dark).repeat(px, axis=0).repeat(px, axis=1), px, constant_values=255)
    return grey[..., None].repeat(3, axis=-1)


def test_corners_of_a_chessboard_either_way_up():
    picture = flat(BOARD)
    for seen, turn in ((picture, False), (picture[::-1, ::-1].copy(), True)):
        found = find(seen, BOARD)
        assert found is not None
        on_board, pixels = found
        expected = 80 - 0.5 + on_board[:, :2] / 0.02 * 40
        expected = np.array([picture.shape[1] - 1, picture.shape[0] - 1]) - expected if turn else expected
        np.testing.assert_allclose(pixels, expected, atol=0.1)
    assert find(np.full_like(picture, 128), BOARD) is None


def test_corners_of_a_charuco_board_half_covered():
    board = Board("charuco", columns=7, rows=5, square_m=0.03, marker_m=0.022)
    dictionary = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
    drawn = cv2.aruco.CharucoBoard((7, 5), 0.03, 0.022, dictionary).generateImage((7 * 60, 5 * 60))
    grey = np.pad(drawn, 60, constant_values=255)
    grey[:, : 60 + 3 * 60] = 128
    found = find(grey[..., None].repeat(3, axis=-1), board)
    assert found is not None
    on_board, pixels = found
    assert 6 <= len(on_board) < 24
    np.testing.assert_allclose(pixels, 60 - 0.5 + on_board[:, :2] / 0.03 * 60, atol=0.6)
    assert (pixels[:, 0] > 239).all()


def test_closed_form_finds_the_hand_eye_transform():
    rng = np.random.default_rng(0)
    random = lambda: pose.pose(rng.normal(size=3), Rotation.random(random_state=int(rng.integers(1000))).as_matrix())  # noqa: E731
    X, T_base_board = random(), random()
    hands = np.stack([random() for _ in range(5)])
    boards = np.linalg.inv(hands @ X) @ T_base_board
    np.testing.assert_allclose(closed_form(hands, boards), X, atol=1e-9)


def test_the_stand_ins_wrist_camera_is_found_where_it_is():
    """Its true pose is 3 mm and 11 mrad off the contract's, its focal length 1 %: the board tells."""
    config = load("twin-capture", CaptureConfig, ["source=stand_in"])
    person = StandInPhotographer(dataclasses.replace(config.cell, board=LYING), config.embodiment)
    camera, error = config.embodiment.cameras["wrist"], config.cell.camera_errors["wrist"]
    reach = Reach(config.embodiment.home_joint_pos_rad)
    views = of_wrist(around([[0.48, -0.25, 0]], 12, (0.3, 0.45), (0.8, 1.3), (-1, 1)), camera.matrix, reach)
    pictures = [person.shoot("wrist", reach.joints(T), 0.08) for T in views]
    person.close()
    found = hand_eye(pictures, np.array(views), BOARD, camera.intrinsics)
    assert found.num_pictures >= 10
    assert found.rms_px < 0.6
    T_true = camera.matrix @ pose.pose(error.pos_m, pose.matrix_from_rpy(error.rpy_rad))
    off = np.linalg.inv(T_true) @ found.T_tcp_cam
    assert np.linalg.norm(off[:3, 3]) < 0.001
    assert pose.rotation_angle(off[:3, :3]) < 0.003
    assert found.K[0, 0] == pytest.approx(camera.fx * error.focal_scale, abs=1.0)
    # The board's origin is the inner corner of a dark corner square, its z points into the table.
    corner = np.array(LYING.pos_m) + LYING.square_m * np.array([LYING.columns / 2 - 1, 1 - LYING.rows / 2])
    assert found.T_base_board[2, 2] < -0.999
    np.testing.assert_allclose(found.T_base_board[:2, 3], corner, atol=0.001)
    assert abs(found.T_base_board[2, 3] - 0.0012) < 0.001
    with pytest.raises(ValueError, match="seen in 3 of 3 pictures: at least 6"):
        hand_eye(pictures[:3], np.array(views[:3]), BOARD, camera.intrinsics)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "circles"}, "board.kind 'circles'"),
        ({"columns": 8, "rows": 6}, "one number must be odd"),
        ({"columns": 2, "rows": 5}, "at least 3 x 3"),
        ({"dictionary": "DICT_9"}, "board.dictionary 'DICT_9'"),
    ],
)
def test_boards_that_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        Board(**wrong)
