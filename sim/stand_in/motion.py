"""One motion of the arm: received commands become joint targets, and the state's commanded values.

What a state reports as commanded must be exact finite differences of the *received* commands, one millisecond apart:
the client filters and plans on them, and anything else (measured values, late derivatives) makes its plans diverge.
"""

from dataclasses import dataclass, field

import numpy as np

from sim.stand_in.kinematics import ArmKinematics
from sim.stand_in.protocol import Controller, Generator, StateBuffer
from sim.stand_in.world import Drive, World

STEP_S = 0.001
ELBOW_FLIP_RAD = -0.467  # of joint 4
BRAKE_RAD_S2 = 10.0
YIELD_TICKS = 300


@dataclass
class Motion:
    """A Move request that was accepted. `first_id`: commands that answer older states belong to an earlier motion."""

    request_id: int
    controller: Controller
    generator: Generator
    first_id: int
    has_command: bool = False
    errors: set[int] = field(default_factory=set)

    @property
    def is_torque(self) -> bool:
        return self.controller == Controller.EXTERNAL


class CommandTracker:
    """Holds the commanded joint state and moves the arm's servos along it."""

    def __init__(self, world: World, kinematics: ArmKinematics, state: StateBuffer):
        self.world, self.kinematics = world, kinematics
        self.value = state.value
        self._pose = state.value.O_T_EE_c.reshape(4, 4).T  # view: row-major [4, 4] of the column-major field
        self._last_dP, self._last_dq = np.zeros(6), np.zeros(7)
        self._yield_ticks = 0
        self.hold_here()

    def hold_here(self) -> None:
        """Take the measured joints as the commanded ones, at rest: after torque control, and at the start."""
        value = self.value
        value.q_d[:] = self.world.q
        self.rest()
        self.pose_from_joints()

    def rest(self) -> None:
        """No commanded speed."""
        value = self.value
        for view in (value.dq_d, value.ddq_d, value.O_dP_EE_c, value.O_ddP_EE_c, value.delbow_c, value.ddelbow_c):
            view[:] = 0.0
        value.tau_J_d[:] = 0.0

    @property
    def is_at_rest(self) -> bool:
        return not self._yield_ticks and not self.value.dq_d.any()

    def brake(self) -> None:
        """One tick without a motion: what still moves slows down."""
        value = self.value
        if self._yield_ticks:
            self._yield_ticks -= 1
            value.q_d[:], value.dq_d[:] = self.world.q, 0.0
            self.pose_from_joints()
        elif value.dq_d.any():
            value.dq_d -= np.clip(value.dq_d, -BRAKE_RAD_S2 * STEP_S, BRAKE_RAD_S2 * STEP_S)
            value.q_d += STEP_S * value.dq_d
            self.pose_from_joints()
        self._drive()

    def apply(self, generator: Generator, command: np.void) -> None:
        """One tick of position or velocity control."""
        value = self.value
        if generator == Generator.JOINT_POSITION:
            self._joints(command["q"], (command["q"] - value.q_d) / STEP_S)
            self.pose_from_joints()
        elif generator == Generator.JOINT_VELOCITY:
            self._joints(value.q_d + STEP_S * command["dq"], command["dq"])
            self.pose_from_joints()
        else:
            self._cartesian(generator, command)
        self._drive()

    def apply_torque(self, tau_J_d: np.ndarray) -> None:
        """One tick of external control; gravity is compensated by the robot."""
        value, world = self.value, self.world
        world.torque[:] = tau_J_d
        value.tau_J_d[:] = tau_J_d
        value.q_d[:], value.dq_d[:] = world.q, world.dq
        value.ddq_d[:] = 0.0
        self._pose[:3, 3], self._pose[:3, :3] = world.ee_pos_m, world.ee_rot
        self._elbow_from_joints()

    def _joints(self, q: np.ndarray, dq: np.ndarray) -> None:
        value = self.value
        value.ddq_d[:] = (dq - value.dq_d) / STEP_S
        value.dq_d[:] = dq
        value.q_d[:] = q

    def _cartesian(self, generator: Generator, command: np.void) -> None:
        value, T = self.value, self._pose
        self._last_dP[:] = value.O_dP_EE_c
        dP = value.O_dP_EE_c
        if generator == Generator.CARTESIAN_POSE:
            goal = command["O_T_EE"].reshape(4, 4).T
            dP[:3] = (goal[:3, 3] - T[:3, 3]) / STEP_S
            turn = goal[:3, :3] @ T[:3, :3].T
            dP[3:] = turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]
            dP[3:] *= 0.5 / STEP_S  # sine of the angle; exact to 1e-9 rad within one millisecond
            T[:] = goal
        else:
            dP[:] = command["O_dP_EE"]
            T[:3, 3] += STEP_S * dP[:3]
            T[:3, :3] = _turned(T[:3, :3], STEP_S * dP[3:])
        value.O_ddP_EE_c[:] = (dP - self._last_dP) / STEP_S
        elbow = command["elbow"][0] if command["valid_elbow"] else None
        self._last_dq[:] = value.dq_d
        q_before = value.q_d.copy()
        self.kinematics.solve(value.q_d, T[:3, 3], T[:3, :3], elbow)
        value.dq_d[:] = (value.q_d - q_before) / STEP_S
        value.ddq_d[:] = (value.dq_d - self._last_dq) / STEP_S
        if elbow is None:
            self._elbow_from_joints()
        else:
            delbow = (elbow - value.elbow_c[0]) / STEP_S
            value.ddelbow_c[0] = (delbow - value.delbow_c[0]) / STEP_S
            value.delbow_c[0] = delbow
            value.elbow_c[:] = command["elbow"]

    def pose_from_joints(self) -> None:
        """The commanded pose is where the commanded joints put the end effector."""
        pos, rot = self.kinematics.forward(self.value.q_d)
        self._pose[:3, 3], self._pose[:3, :3] = pos, rot
        self._elbow_from_joints()

    def _elbow_from_joints(self) -> None:
        value = self.value
        value.elbow_c[0] = value.q_d[2]
        value.elbow_c[1] = -1.0 if value.q_d[3] < ELBOW_FLIP_RAD else 1.0
        value.delbow_c[0], value.ddelbow_c[0] = value.dq_d[2], value.ddq_d[2]

    def _drive(self) -> None:
        value = self.value
        self.world.follow(value.q_d, value.dq_d, value.ddq_d)

    def begin(self, motion: Motion) -> None:
        """Take up a motion from rest."""
        self._yield_ticks = 0
        self.world.torque[:] = 0.0
        self.world.set_drive(Drive.TORQUE if motion.is_torque else Drive.POSITION)

    def end(self, motion: Motion, aborted: bool) -> None:
        """Back to holding. What still moves is left to `brake`.

        After an abort the arm yields for a moment, damped, and holds where that leaves it: it must not go on pressing.
        """
        value = self.value
        self._yield_ticks = YIELD_TICKS if aborted else 0
        if motion.is_torque or aborted:
            value.q_d[:], value.dq_d[:] = self.world.q, self.world.dq
            value.tau_J_d[:] = 0.0
            self.world.set_drive(Drive.POSITION)
            self.pose_from_joints()
        for view in (value.ddq_d, value.O_dP_EE_c, value.O_ddP_EE_c, value.delbow_c, value.ddelbow_c):
            view[:] = 0.0
        self._drive()


def _turned(R: np.ndarray, rotvec: np.ndarray) -> np.ndarray:
    """exp(rotvec) R, for a rotation of far less than a radian (second order, then made orthonormal)."""
    x, y, z = rotvec
    K = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    turned = R + K @ R + 0.5 * K @ (K @ R)
    return 1.5 * turned - 0.5 * turned @ (turned.T @ turned)
