"""Poses and the 7-D action: the one place where deltas become targets.

Conventions (docs/contract.md, section 1): a pose is a 4x4 homogeneous matrix `T_base_tcp`. An action is
`[dx, dy, dz, droll, dpitch, dyaw, gripper]`: translation in the robot base frame (m), rotation in the TCP frame
(rad, dR = Rz(yaw) Ry(pitch) Rx(roll)), gripper in [-1, 1] with -1 closed. All functions take leading batch axes.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

ACTION_DIM = 7
STATE_DIM = 7
ACTION_NAMES = ("dx_m", "dy_m", "dz_m", "droll_rad", "dpitch_rad", "dyaw_rad", "gripper")
STATE_NAMES = ("tcp_x_m", "tcp_y_m", "tcp_z_m", "tcp_roll_rad", "tcp_pitch_rad", "tcp_yaw_rad", "gripper_opening_m")


def matrix_from_rpy(rpy_rad: ArrayLike) -> np.ndarray:
    """Rz(yaw) Ry(pitch) Rx(roll), i.e. extrinsic xyz. [..., 3] -> [..., 3, 3]."""
    rpy_rad = np.asarray(rpy_rad, dtype=np.float64)
    sr, sp, sy = np.moveaxis(np.sin(rpy_rad), -1, 0)
    cr, cp, cy = np.moveaxis(np.cos(rpy_rad), -1, 0)
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def rpy_from_matrix(R: ArrayLike, roll_from_zero: bool = False) -> np.ndarray:
    """Inverse of `matrix_from_rpy`. [..., 3, 3] -> [..., 3]; pitch in [-pi/2, pi/2], yaw in (-pi, pi].

    `roll_from_zero` puts roll into [0, 2 pi) instead of (-pi, pi]: a gripper that points down has roll = pi, and the
    observation state must not jump there.
    """
    R = np.asarray(R, dtype=np.float64)
    roll = np.arctan2(R[..., 2, 1], R[..., 2, 2])
    if roll_from_zero:
        roll = np.where(roll < 0, roll + 2 * np.pi, roll)
    pitch = np.arcsin(np.clip(-R[..., 2, 0], -1.0, 1.0))
    yaw = np.arctan2(R[..., 1, 0], R[..., 0, 0])
    return np.stack([roll, pitch, yaw], axis=-1)


def quat_xyzw_from_matrix(R: ArrayLike) -> np.ndarray:
    """[..., 3, 3] -> unit quaternion [..., 4], x y z w (ROS order), w >= 0."""
    R = np.asarray(R, dtype=np.float64)
    if R.ndim == 2:
        return _quat_of_one(R)
    xx, yy, zz = R[..., 0, 0], R[..., 1, 1], R[..., 2, 2]
    # Shepperd's method, all four candidates at once; the one with the largest pivot is the well-conditioned one.
    pivots = np.stack([1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz, 1 + xx + yy + zz], axis=-1)
    xy, xz, yz = R[..., 1, 0] + R[..., 0, 1], R[..., 0, 2] + R[..., 2, 0], R[..., 2, 1] + R[..., 1, 2]
    wx, wy, wz = R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]
    candidates = np.stack(
        [
            np.stack([pivots[..., 0], xy, xz, wx], axis=-1),
            np.stack([xy, pivots[..., 1], yz, wy], axis=-1),
            np.stack([xz, yz, pivots[..., 2], wz], axis=-1),
            np.stack([wx, wy, wz, pivots[..., 3]], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(pivots, axis=-1)[..., None, None]
    quat = np.take_along_axis(candidates, best, axis=-2)[..., 0, :]
    quat = quat / np.linalg.norm(quat, axis=-1, keepdims=True)
    return np.where(quat[..., 3:] < 0, -quat, quat)


def matrix_from_quat_xyzw(quat_xyzw: ArrayLike) -> np.ndarray:
    """[..., 4] (any non-zero norm) -> [..., 3, 3]."""
    q = np.asarray(quat_xyzw, dtype=np.float64)
    q = q / np.sqrt((q * q).sum(axis=-1, keepdims=True))
    x, y, z, w = q.tolist() if q.ndim == 1 else np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows) if q.ndim == 1 else np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def pose(pos_m: ArrayLike, R: ArrayLike) -> np.ndarray:
    """Homogeneous matrix [..., 4, 4] from a position [..., 3] and a rotation [..., 3, 3]."""
    pos_m, R = np.asarray(pos_m, dtype=np.float64), np.asarray(R, dtype=np.float64)
    T = np.zeros((*pos_m.shape[:-1], 4, 4))
    T[..., :3, :3], T[..., :3, 3], T[..., 3, 3] = R, pos_m, 1.0
    return T


def integrate(T_base_target: ArrayLike, action: ArrayLike) -> np.ndarray:
    """The next commanded target: translation added in the base frame, R_next = R_target dR in the TCP frame.

    `T_base_target` [..., 4, 4] is the last *commanded* target, never the measured pose; `action` [..., 7].
    """
    action = np.asarray(action, dtype=np.float64)
    T = np.array(T_base_target, dtype=np.float64)
    T[..., :3, 3] += action[..., :3]
    T[..., :3, :3] = T[..., :3, :3] @ matrix_from_rpy(action[..., 3:6])
    return T


def compose(actions: ArrayLike) -> np.ndarray:
    """One action that moves a target as `actions` do one after another; the last gripper command counts.

    [..., k, 7] -> [..., 7].
    """
    actions = np.asarray(actions, dtype=np.float64)
    T = np.broadcast_to(np.eye(4), (*actions.shape[:-2], 4, 4))
    for k in range(actions.shape[-2]):
        T = integrate(T, actions[..., k, :])
    return np.concatenate([delta(np.eye(4), T), actions[..., -1, 6:]], axis=-1)


def delta(T_from: ArrayLike, T_to: ArrayLike) -> np.ndarray:
    """The six motion numbers with `integrate(T_from, delta + gripper) == T_to`. [..., 4, 4] -> [..., 6]."""
    T_from, T_to = np.asarray(T_from, dtype=np.float64), np.asarray(T_to, dtype=np.float64)
    dR = np.swapaxes(T_from[..., :3, :3], -1, -2) @ T_to[..., :3, :3]
    return np.concatenate([T_to[..., :3, 3] - T_from[..., :3, 3], rpy_from_matrix(dR)], axis=-1)


def interpolate(T_from: np.ndarray, T_to: np.ndarray, share: float) -> np.ndarray:
    """Pose at `share` in [0, 1] of the way: straight line in position, constant angular rate in rotation. [4, 4]."""
    dR = T_from[:3, :3].T @ T_to[:3, :3]
    T = np.eye(4)
    T[:3, 3] = (1 - share) * T_from[:3, 3] + share * T_to[:3, 3]
    T[:3, :3] = T_from[:3, :3] @ _rotation_power(dR, share)
    return T


def rotation_angle(R: ArrayLike) -> np.ndarray:
    """Angle of a rotation matrix in rad. [..., 3, 3] -> [...]."""
    R = np.asarray(R, dtype=np.float64)
    if R.ndim == 2:
        return np.asarray(_turn_of_one(R)[0])[()]
    skew = [R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]]
    sine = 0.5 * np.linalg.norm(np.stack(skew, axis=-1), axis=-1)
    return np.arctan2(sine, 0.5 * (np.trace(R, axis1=-2, axis2=-1) - 1))


def state_vector(T_base_tcp: np.ndarray, gripper_opening_m: ArrayLike) -> np.ndarray:
    """The observation's `state`, float32 [..., 7]: TCP position, rpy (roll in [0, 2 pi)), gripper opening."""
    rpy = rpy_from_matrix(T_base_tcp[..., :3, :3], roll_from_zero=True)
    opening = np.broadcast_to(np.asarray(gripper_opening_m, dtype=np.float64), rpy.shape[:-1])[..., None]
    return np.concatenate([T_base_tcp[..., :3, 3], rpy, opening], axis=-1).astype(np.float32)


# One rotation at a time, as a robot's nodes do hundreds of times a second, in plain numbers: a tenth of numpy's time.


def _quat_of_one(R: np.ndarray) -> np.ndarray:
    (a, b, c), (d, e, f), (g, h, i) = R.tolist()
    pivots = (1 + a - e - i, 1 - a + e - i, 1 - a - e + i, 1 + a + e + i)
    quat = (
        (pivots[0], d + b, c + g, h - f),
        (d + b, pivots[1], h + f, c - g),
        (c + g, h + f, pivots[2], d - b),
        (h - f, c - g, d - b, pivots[3]),
    )[pivots.index(max(pivots))]
    return np.array(quat) / math.copysign(math.hypot(*quat), -1.0 if quat[3] < 0 else 1.0)


def _turn_of_one(R: np.ndarray) -> tuple[float, tuple[float, float, float]]:
    """Angle in rad, and the axis times twice its sine."""
    (a, b, c), (d, e, f), (g, h, i) = R.tolist()
    skew = h - f, c - g, d - b
    return math.atan2(0.5 * math.hypot(*skew), 0.5 * (a + e + i - 1)), skew


def _rotation_power(R: np.ndarray, exponent: float) -> np.ndarray:
    """R**exponent for a rotation by less than pi (Rodrigues)."""
    angle, skew = _turn_of_one(R)
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = (part / (2 * math.sin(angle)) for part in skew)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(exponent * angle) * K + (1 - math.cos(exponent * angle)) * (K @ K)
