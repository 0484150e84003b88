"""Where the wrist camera sits on the hand: hand-eye calibration with a board that lies still.

The closed form of Park and Martin 1994 (as in `calibrateHandEye` of OpenCV 4, which OpenCV 5 lacks) gives a first guess
from pictures of the board and the TCP poses at which they were taken; then camera matrix, hand-eye transform and the
board's pose are refined together until the corners of the board fall where they were seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from bridge import pose

KINDS = ("chessboard", "charuco")
MIN_CORNERS, MIN_PICTURES = 6, 6


@dataclass
class Board:
    """`columns` x `rows` squares (0: no board). A chessboard needs an odd and an even number: it must not look alike
    upside down. `marker_m`, `dictionary`: of a ChArUco board."""

    kind: str = "chessboard"
    columns: int = 0
    rows: int = 0
    square_m: float = 0.03
    marker_m: float = 0.022
    dictionary: str = "DICT_4X4_50"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"board.kind {self.kind!r}: allowed are {', '.join(KINDS)}")
        if self.columns and (min(self.columns, self.rows) < 3 or not 0 < self.square_m < 1):
            raise ValueError(f"board of {self.columns} x {self.rows} squares of {self.square_m} m: at least 3 x 3 in m")
        if self.columns and self.kind == "chessboard" and (self.columns + self.rows) % 2 == 0:
            raise ValueError(f"board of {self.columns} x {self.rows} squares: one number must be odd, the other even")
        if not hasattr(cv2.aruco, self.dictionary):
            raise ValueError(f"board.dictionary {self.dictionary!r} is none of OpenCV's, such as DICT_4X4_50")


@dataclass(frozen=True)
class HandEye:
    """`K` [3, 3], `T_tcp_cam` and `T_base_board` [4, 4]; `rms_px` over all corners of `num_pictures` pictures."""

    K: np.ndarray
    T_tcp_cam: np.ndarray
    T_base_board: np.ndarray
    rms_px: float
    num_pictures: int


def find(picture: np.ndarray, board: Board) -> tuple[np.ndarray, np.ndarray] | None:
    """Corners of the board in a picture uint8 [H, W, 3]: on the board [n, 3] (m) and in the picture [n, 2] (px)."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    if board.kind == "charuco":
        dictionary = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, board.dictionary))
        pattern = cv2.aruco.CharucoBoard((board.columns, board.rows), board.square_m, board.marker_m, dictionary)
        corners, ids, _, _ = cv2.aruco.CharucoDetector(pattern).detectBoard(grey)
        if ids is None or len(ids) < MIN_CORNERS:
            return None
        on_board = np.array(pattern.getChessboardCorners(), np.float64)[ids.ravel()]
        return on_board, corners.reshape(-1, 2).astype(np.float64)
    columns, rows = board.columns - 1, board.rows - 1
    found, corners = cv2.findChessboardCornersSB(grey, (columns, rows), flags=cv2.CALIB_CB_ACCURACY)
    if not found:
        return None
    pixels = corners.reshape(rows, columns, 2).astype(np.float64)
    # From whichever end it was read: the square inside the first four corners is a dark one.
    dark, light = (grey[tuple(np.round(pixels[r : r + 2, :2].mean(axis=(0, 1))).astype(int)[::-1])] for r in (0, 1))
    if dark > light:
        pixels = pixels[::-1, ::-1]
    y, x = np.mgrid[0:rows, 0:columns] * board.square_m
    return np.stack([x, y, 0 * x], axis=-1).reshape(-1, 3), pixels.reshape(-1, 2)


def closed_form(T_base_tcp: np.ndarray, T_cam_board: np.ndarray) -> np.ndarray:
    """`T_tcp_cam` [4, 4] from both poses [N, 4, 4] at N >= 3 stands. Between two of them the hand's motion A and the
    camera's B hold A X = X B, so X turns the axes of B into those of A."""
    i, j = np.triu_indices(len(T_base_tcp), 1)
    A = np.linalg.inv(T_base_tcp[i]) @ T_base_tcp[j]
    B = T_cam_board[i] @ np.linalg.inv(T_cam_board[j])
    axes_a, axes_b = (Rotation.from_matrix(T[:, :3, :3]).as_rotvec() for T in (A, B))
    R = Rotation.align_vectors(axes_a, axes_b)[0].as_matrix()
    left, right = A[:, :3, :3] - np.eye(3), B[:, :3, 3] @ R.T - A[:, :3, 3]
    return pose.pose(np.linalg.lstsq(left.reshape(-1, 3), right.ravel(), rcond=None)[0], R)


def hand_eye(pictures: Sequence[np.ndarray], T_base_tcp: np.ndarray, board: Board, K: np.ndarray) -> HandEye:
    """`T_base_tcp` [N, 4, 4] of each picture; `K` [3, 3] a first guess. ValueError where too few show the board."""
    found = [(T, *seen) for T, picture in zip(T_base_tcp, pictures, strict=True) if (seen := find(picture, board))]
    if len(found) < MIN_PICTURES:
        raise ValueError(f"the board is seen in {len(found)} of {len(pictures)} pictures: at least {MIN_PICTURES}")
    T_cam_board = []
    for _, on_board, pixels in found:
        _, turn, shift = cv2.solvePnP(on_board, pixels, K, None)
        T_cam_board.append(pose.pose(shift[:, 0], cv2.Rodrigues(turn)[0]))
    hands, boards = np.stack([T for T, _, _ in found]), np.stack(T_cam_board)
    T_tcp_cam = closed_form(hands, boards)

    def unpack(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        matrix = np.array([[x[0], 0, x[2]], [0, x[1], x[3]], [0, 0, 1]])
        poses = [pose.pose(part[:3], Rotation.from_rotvec(part[3:]).as_matrix()) for part in (x[4:10], x[10:])]
        return matrix, poses[0], poses[1]

    def off_px(x: np.ndarray) -> np.ndarray:
        matrix, T_hand_eye, T_base_board = unpack(x)
        residuals = []
        for T, on_board, pixels in found:
            T_cam = np.linalg.inv(T @ T_hand_eye) @ T_base_board
            seen = (on_board @ T_cam[:3, :3].T + T_cam[:3, 3]) @ matrix.T
            residuals.append((seen[:, :2] / seen[:, 2:] - pixels).ravel())
        return np.concatenate(residuals)

    guess = [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]
    for T in (T_tcp_cam, hands[0] @ T_tcp_cam @ boards[0]):
        guess += [*T[:3, 3], *Rotation.from_matrix(T[:3, :3]).as_rotvec()]
    best = least_squares(off_px, np.array(guess), x_scale="jac", loss="soft_l1")
    return HandEye(*unpack(best.x), float(np.sqrt(2 * np.mean(off_px(best.x) ** 2))), len(found))
