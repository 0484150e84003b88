"""Wire formats of the FR3 (robot server 10) and the Franka hand (gripper server 3). All packed, little-endian.

Request: header, body. Response: the request's command and id, a status, maybe more. The robot streams `StateBuffer`s by
UDP and, during a motion, gets one `COMMAND` datagram for each.
"""

import enum
import struct
from types import SimpleNamespace

import numpy as np

ROBOT_VERSION, ROBOT_PORT, ROBOT_HEADER = 10, 1337, struct.Struct("<III")
GRIPPER_VERSION, GRIPPER_PORT, GRIPPER_HEADER = 3, 1338, struct.Struct("<HII")

MOVE_REQUEST = struct.Struct("<II3d3dB7d")
COLLISION_REQUEST = struct.Struct("<52d")
LOAD_REQUEST = struct.Struct("<13d")
GRASP_REQUEST = struct.Struct("<5d")  # width, epsilon inner, epsilon outer, speed, force
GRIPPER_MOVE_REQUEST = struct.Struct("<2d")  # width, speed
GRIPPER_STATE = struct.Struct("<Idd?H")  # id, width, max width, grasped, temperature


class Command(enum.IntEnum):
    CONNECT = 0
    MOVE = 1
    STOP_MOVE = 2
    SET_COLLISION_BEHAVIOR = 3
    SET_JOINT_IMPEDANCE = 4
    SET_CARTESIAN_IMPEDANCE = 5
    SET_GUIDING_MODE = 6
    SET_EE_TO_K = 7
    SET_NE_TO_EE = 8
    SET_LOAD = 9
    AUTOMATIC_ERROR_RECOVERY = 10
    GET_ROBOT_MODEL = 11


BODY_BYTES = {
    Command.CONNECT: 4, Command.MOVE: MOVE_REQUEST.size, Command.STOP_MOVE: 0,
    Command.SET_COLLISION_BEHAVIOR: COLLISION_REQUEST.size, Command.SET_JOINT_IMPEDANCE: 56,
    Command.SET_CARTESIAN_IMPEDANCE: 48, Command.SET_GUIDING_MODE: 7, Command.SET_EE_TO_K: 128,
    Command.SET_NE_TO_EE: 128, Command.SET_LOAD: LOAD_REQUEST.size, Command.AUTOMATIC_ERROR_RECOVERY: 0,
    Command.GET_ROBOT_MODEL: 0,
}  # fmt: skip


class GripperCommand(enum.IntEnum):
    CONNECT = 0
    HOMING = 1
    GRASP = 2
    MOVE = 3
    STOP = 4


class MoveStatus(enum.IntEnum):
    SUCCESS = 0
    STARTED = 1
    PREEMPTED = 2
    SAFETY_REJECTED = 4
    NOT_POSSIBLE = 5
    SINGULAR_START = 6
    INVALID_ARGUMENT = 7
    REFLEX = 8
    USER_STOP = 9
    ABORTED = 11


class SetterStatus(enum.IntEnum):
    OK = 0
    NOT_POSSIBLE = 1
    INVALID_ARGUMENT = 2


class RecoveryStatus(enum.IntEnum):
    OK = 0
    NOT_POSSIBLE = 1
    USER_STOP = 5


class GripperStatus(enum.IntEnum):
    OK = 0
    FAIL = 1
    UNSUCCESSFUL = 2
    ABORTED = 3


class Controller(enum.IntEnum):
    """As a Move request counts them; a state has the same numbers, and OTHER when nothing moves."""

    JOINT_IMPEDANCE = 0
    CARTESIAN_IMPEDANCE = 1
    EXTERNAL = 2
    OTHER = 3


class Generator(enum.IntEnum):
    """As a Move request counts them. A state has one more than that (5: none), and 0 when nothing moves."""

    JOINT_POSITION = 0
    JOINT_VELOCITY = 1
    CARTESIAN_POSE = 2
    CARTESIAN_VELOCITY = 3
    NONE = 4


class RobotMode(enum.IntEnum):
    OTHER = 0
    IDLE = 1
    MOVE = 2
    GUIDING = 3
    REFLEX = 4
    USER_STOPPED = 5
    RECOVERY = 6


ERRORS = (
    "joint_position_limits", "cartesian_position_limits", "self_collision_avoidance", "joint_velocity",
    "cartesian_velocity", "force_control_safety", "joint_reflex", "cartesian_reflex", "max_goal_pose_deviation",
    "max_path_pose_deviation", "cartesian_velocity_profile_safety", "joint_position_start_pose_invalid",
    "joint_generator_position_limits", "joint_generator_velocity_limits", "joint_generator_velocity_discontinuity",
    "joint_generator_acceleration_discontinuity", "cartesian_start_pose_invalid", "cartesian_elbow_limit",
    "cartesian_generator_velocity_limits", "cartesian_generator_velocity_discontinuity",
    "cartesian_generator_acceleration_discontinuity", "cartesian_elbow_sign_inconsistent",
    "cartesian_start_elbow_invalid", "force_tolerance", "start_elbow_sign_inconsistent", "communication_constraints",
    "power_limit", "cartesian_generator_joint_position_limits", "cartesian_generator_joint_velocity_limits",
    "cartesian_generator_joint_velocity_discontinuity", "cartesian_generator_joint_acceleration_discontinuity",
    "cartesian_position_generator_invalid_frame", "controller_torque_discontinuity", "p2p_insufficient_torque",
    "tau_j_range", "instability", "force_wrong_direction", "cartesian_spline", "via_plan", "base_acceleration_startup",
    "base_acceleration_reading",
)  # fmt: skip

# Little-endian packed: id, q 7, dq 7, O_T_EE 16, O_dP_EE 6, elbow 2, valid_elbow, motion finished, tau_J_d 7, torque
# finished.
COMMAND = np.dtype(
    [
        ("message_id", "<u8"), ("q", "<f8", 7), ("dq", "<f8", 7), ("O_T_EE", "<f8", 16), ("O_dP_EE", "<f8", 6),
        ("elbow", "<f8", 2), ("valid_elbow", "?"), ("motion_finished", "?"), ("tau_J_d", "<f8", 7),
        ("torque_finished", "?"),
    ]
)  # fmt: skip

STATE_FIELDS = (
    ("O_T_EE", 16), ("O_T_EE_d", 16), ("F_T_EE", 16), ("EE_T_K", 16), ("F_T_NE", 16), ("NE_T_EE", 16), ("m_ee", 1),
    ("I_ee", 9), ("F_x_Cee", 3), ("m_load", 1), ("I_load", 9), ("F_x_Cload", 3), ("elbow", 2), ("elbow_d", 2),
    ("tau_J", 7), ("tau_J_d", 7), ("dtau_J", 7), ("q", 7), ("q_d", 7), ("dq", 7), ("dq_d", 7), ("ddq_d", 7),
    ("joint_contact", 7), ("cartesian_contact", 6), ("joint_collision", 7), ("cartesian_collision", 6),
    ("tau_ext_hat_filtered", 7), ("O_F_ext_hat_K", 6), ("K_F_ext_hat_K", 6), ("O_dP_EE_d", 6), ("O_ddP_O", 3),
    ("elbow_c", 2), ("delbow_c", 2), ("ddelbow_c", 2), ("O_T_EE_c", 16), ("O_dP_EE_c", 6), ("O_ddP_EE_c", 6),
    ("theta", 7), ("dtheta", 7), ("accelerometer_top", 18), ("accelerometer_bottom", 18),
)  # fmt: skip
NUM_STATE_FLOATS = sum(count for _, count in STATE_FIELDS)
STATE_BYTES = 1377
_MODES_AT, _ERRORS_AT, _REFLEX_AT, _ROBOT_MODE_AT, _RATE_AT = 1288, 1290, 1331, 1372, 1373


class StateBuffer:
    """The robot's state, written in place. `value.NAME` is a float64 view (matrices column-major, as on the wire)."""

    def __init__(self):
        self.bytes = bytearray(STATE_BYTES)
        self._floats = np.frombuffer(self.bytes, dtype="<f4", count=NUM_STATE_FLOATS, offset=8)
        self._values = np.zeros(NUM_STATE_FLOATS)
        self.value = SimpleNamespace()
        start = 0
        for name, count in STATE_FIELDS:
            setattr(self.value, name, self._values[start : start + count])
            start += count
        for name in ("O_T_EE", "O_T_EE_d", "O_T_EE_c", "F_T_EE", "F_T_NE", "NE_T_EE", "EE_T_K"):
            getattr(self.value, name)[[0, 5, 10, 15]] = 1.0
        self.message_id = 0
        self.set_modes(None, Controller.OTHER, RobotMode.IDLE)

    def set_modes(self, generator: Generator | None, controller: Controller, robot: RobotMode) -> None:
        self.bytes[_MODES_AT] = 0 if generator is None else generator + 1
        self.bytes[_MODES_AT + 1] = controller
        self.bytes[_ROBOT_MODE_AT] = robot
        struct.pack_into("<f", self.bytes, _RATE_AT, 1.0 if robot == RobotMode.MOVE else 0.0)

    def set_errors(self, current: set[int], last_reflex: set[int]) -> None:
        """Indices into `ERRORS`: what is wrong now, and what ended the last motion."""
        for at, bits in ((_ERRORS_AT, current), (_REFLEX_AT, last_reflex)):
            self.bytes[at : at + len(ERRORS)] = bytes(i in bits for i in range(len(ERRORS)))

    def pack(self, message_id: int) -> bytearray:
        self.message_id = message_id
        struct.pack_into("<Q", self.bytes, 0, message_id)
        self._floats[:] = self._values
        return self.bytes


def error_bits(names: list[str]) -> set[int]:
    """Indices of named errors. Raises ValueError for a name that no robot reports."""
    if unknown := [name for name in names if name not in ERRORS]:
        raise ValueError(f"unknown robot errors {unknown}; known are {list(ERRORS)}")
    return {ERRORS.index(name) for name in names}
