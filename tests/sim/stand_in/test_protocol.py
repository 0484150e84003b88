"""Sizes and offsets of the wire formats: they belong to the robot, not to us."""

import struct

import numpy as np
import pytest

from sim.stand_in.protocol import (
    BODY_BYTES,
    COMMAND,
    ERRORS,
    GRASP_REQUEST,
    GRIPPER_HEADER,
    GRIPPER_STATE,
    NUM_STATE_FLOATS,
    ROBOT_HEADER,
    Command,
    Controller,
    Generator,
    RobotMode,
    StateBuffer,
    error_bits,
)


def test_sizes():
    assert (ROBOT_HEADER.size, GRIPPER_HEADER.size) == (12, 10)
    assert (GRIPPER_STATE.size, GRASP_REQUEST.size) == (23, 40)
    assert COMMAND.itemsize == struct.calcsize("<Q7d7d16d6d2d??7d?") == 371
    assert (NUM_STATE_FLOATS, len(StateBuffer().bytes), len(ERRORS)) == (320, 1377, 41)
    expected = {"MOVE": 113, "SET_COLLISION_BEHAVIOR": 416, "SET_LOAD": 104, "SET_GUIDING_MODE": 7, "SET_NE_TO_EE": 128}
    assert {name: BODY_BYTES[Command[name]] for name in expected} == expected


def test_state_lands_where_the_client_reads_it():
    state = StateBuffer()
    state.value.q[:] = np.arange(7)
    state.value.accelerometer_bottom[-1] = 5.0
    state.set_modes(Generator.CARTESIAN_POSE, Controller.JOINT_IMPEDANCE, RobotMode.MOVE)
    state.set_errors({7}, {40})
    data = bytes(state.pack(1234567890123))
    assert struct.unpack_from("<Q", data)[0] == 1234567890123
    floats_before_q = 6 * 16 + 1 + 9 + 3 + 1 + 9 + 3 + 2 + 2 + 7 + 7 + 7
    np.testing.assert_array_equal(struct.unpack_from("<7f", data, 8 + 4 * floats_before_q), np.arange(7))
    assert struct.unpack_from("<f", data, 1284)[0] == 5.0
    assert (data[1288], data[1289], data[1372]) == (3, 0, 2)
    assert [i for i in range(41) if data[1290 + i]] == [7]
    assert [i for i in range(41) if data[1331 + i]] == [40]


def test_error_names():
    assert error_bits(["cartesian_reflex", "communication_constraints"]) == {7, 25}
    with pytest.raises(ValueError, match="carthesian"):
        error_bits(["carthesian_reflex"])
