"""Forward and inverse kinematics of the commanded arm, on an MuJoCo model of the bare chain."""

import mujoco
import numpy as np
from scipy.linalg.lapack import dposv

from sim.stand_in.scene import ARM_JOINTS, arm_spec, set_site

DAMPING = 1e-6  # squared; keeps steps finite at singular poses
MAX_STEPS = 2
CONVERGED, ONE_STEP_IS_ENOUGH = 1e-9, 1e-3  # m and rad; a step leaves about the square of the error


class ArmKinematics:
    """Poses [4, 4] in base. `q` float64 [7] rad. Not for several threads."""

    def __init__(self):
        spec = arm_spec()
        self._model = spec.compile()
        self._data = mujoco.MjData(self._model)
        self._site = self._model.site("ee").id
        self._jacobian = np.zeros((6, self._model.nv))
        self._pos, self._rot = self._data.site_xpos[self._site], self._data.site_xmat[self._site].reshape(3, 3)
        self._augmented = np.zeros((7, 7))  # the last row asks for joint 3, the elbow
        self._error = np.zeros(7)
        self._eye = DAMPING * np.eye(7)
        limits = np.array([self._model.joint(name).range for name in ARM_JOINTS])
        self.lower_rad, self.upper_rad = limits.T.copy()

    def set_ee(self, T_hand_ee: np.ndarray) -> None:
        """Where the end effector sits on the hand body."""
        set_site(self._model, self._site, T_hand_ee)

    def forward(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Views of position [3] and rotation [3, 3], valid until the next call."""
        self._data.qpos[:7] = q
        mujoco.mj_kinematics(self._model, self._data)
        return self._pos, self._rot

    def jacobian(self, q: np.ndarray) -> np.ndarray:
        """View [6, 7]: linear over angular velocity of the end effector in base, per joint velocity."""
        self.forward(q)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._site)
        return self._jacobian[:, :7]

    def solve(self, q: np.ndarray, pos_m: np.ndarray, rot: np.ndarray, elbow_rad: float | None) -> float:
        """Move `q` in place towards the pose by damped Newton steps; returns the error before the last one.

        From one millisecond's target to the next, one step leaves less than a micrometre, which the next millisecond
        takes up. Without an elbow angle the joints move as little as possible.
        """
        residual = 0.0
        for _ in range(MAX_STEPS):
            jacobian = self.jacobian(q)
            error = self._error
            error[:3] = pos_m - self._pos
            turn = rot @ self._rot.T
            error[3] = 0.5 * (turn[2, 1] - turn[1, 2])
            error[4] = 0.5 * (turn[0, 2] - turn[2, 0])
            error[5] = 0.5 * (turn[1, 0] - turn[0, 1])
            rows = 6
            if elbow_rad is not None:
                rows, error[6] = 7, elbow_rad - q[2]
            residual = max(map(abs, error[:rows].tolist()))
            if residual < CONVERGED:
                break
            J = self._augmented[:rows]
            J[:6] = jacobian
            if rows == 7:
                J[6] = 0.0
                J[6, 2] = 1.0
            _, x, _ = dposv(J @ J.T + self._eye[:rows, :rows], error[:rows])
            q += J.T @ x
            np.maximum(q, self.lower_rad, out=q)
            np.minimum(q, self.upper_rad, out=q)
            if residual < ONE_STEP_IS_ENOUGH:
                break
        return residual
