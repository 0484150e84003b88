"""The arm that carries the camera: views that it can take, and its links' poses there."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pinocchio as pin

from sim.splat.procedural import panda_urdf
from sim.stand_in.kinematics import ArmKinematics

UPSIDE_DOWN = np.diag([-1.0, -1.0, 1.0, 1.0])  # a roll by 180 degrees
IK_TRIES = 30
IK_TOLERANCE = 1e-6  # m and rad
LIMIT_MARGIN_RAD = 0.05


class Reach:
    """Joint angles for poses of the TCP, searched from home."""

    def __init__(self, home_rad: Sequence[float], min_height_m: float = 0.08):
        self._arm, self._home, self._min_height_m = ArmKinematics(), np.array(home_rad, dtype=np.float64), min_height_m

    def joints(self, T_base_tcp: np.ndarray) -> np.ndarray | None:
        """[7] rad; None where the TCP would be too low, or no angles within the limits reach the pose."""
        if T_base_tcp[2, 3] < self._min_height_m:
            return None
        q = self._home.copy()
        for _ in range(IK_TRIES):
            if self._arm.solve(q, T_base_tcp[:3, 3], T_base_tcp[:3, :3], None) < IK_TOLERANCE:
                inside = (q > self._arm.lower_rad + LIMIT_MARGIN_RAD) & (q < self._arm.upper_rad - LIMIT_MARGIN_RAD)
                return q if inside.all() else None
        return None


def of_wrist(T_base_cam: Sequence[np.ndarray], T_tcp_cam: np.ndarray, reach: Reach) -> list[np.ndarray]:
    """The poses `T_base_tcp` among those that show these views, either way up, that the arm can take."""
    T_cam_tcp = np.linalg.inv(T_tcp_cam)
    tried = [[T @ T_cam_tcp, T @ UPSIDE_DOWN @ T_cam_tcp] for T in T_base_cam]
    return [ways[0] for both in tried if (ways := [T for T in both if reach.joints(T) is not None])]


class Links:
    """Poses of the twin's links in the base frame, by the names that its splat scenes bind."""

    def __init__(self, urdf: Path | None = None):
        self._model = pin.buildModelFromUrdf(str(urdf or panda_urdf()))
        self._data = self._model.createData()
        self._frames = {frame.name: i for i, frame in enumerate(self._model.frames) if frame.type == pin.FrameType.BODY}

    def poses(self, q_rad: np.ndarray, opening_m: float) -> dict[str, np.ndarray]:
        """`q_rad` [7] and the fingers' opening: name -> [4, 4]."""
        full = np.array([*q_rad, opening_m / 2, opening_m / 2])
        pin.framesForwardKinematics(self._model, self._data, full)
        return {name: self._data.oMf[index].homogeneous.copy() for name, index in self._frames.items()}
