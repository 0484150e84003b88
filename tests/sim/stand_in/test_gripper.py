"""Grasping by contact, through the real franky.Gripper, and the expert's whole task."""

import socket
import time

import franky
import numpy as np
import pytest

from bridge.pose import integrate, interpolate, pose
from sim.expert import PickPlaceExpert
from sim.stand_in.errors import ResetRefused
from sim.stand_in.kinematics import ArmKinematics
from sim.stand_in.motion import CommandTracker
from sim.stand_in.protocol import (
    COMMAND,
    GRIPPER_HEADER,
    GRIPPER_MOVE_REQUEST,
    GRIPPER_PORT,
    GRIPPER_VERSION,
    Generator,
    GripperCommand,
    GripperStatus,
    StateBuffer,
)
from tests.sim.stand_in.test_fci import HOME, go


@pytest.fixture
def gripper(cell) -> franky.Gripper:
    gripper = franky.Gripper(cell.address)
    gripper.open(0.1)
    return gripper


def test_move_and_width(gripper):
    assert gripper.max_width == pytest.approx(0.08)
    assert gripper.move(0.03, 0.1)
    time.sleep(0.05)
    assert gripper.width == pytest.approx(0.03, abs=1e-3)
    assert not gripper.is_grasped
    assert gripper.homing()


def test_grasping_nothing_is_not_grasped(gripper):
    assert not gripper.grasp(0.04, 0.1, 20.0, 0.01, 0.01)
    assert not gripper.is_grasped
    assert gripper.width < 0.002
    gripper.open(0.1)


def test_a_width_no_hand_has_is_refused(gripper):
    with pytest.raises(franky.CommandException):
        gripper.move(0.2, 0.1)


class RawHand:
    """The hand's protocol by hand: libfranka must not have two commands under way (see robot.gripper)."""

    def __init__(self, address: str):
        until_s = time.monotonic() + 5.0
        while True:  # the client before may not be noticed as gone yet
            self.socket = socket.create_connection((address, GRIPPER_PORT), timeout=5.0)
            self.ask(GripperCommand.CONNECT, 1, GRIPPER_VERSION.to_bytes(2, "little") + (40000).to_bytes(2, "little"))
            try:
                self.answer()
                return
            except ConnectionError:
                assert time.monotonic() < until_s
                time.sleep(0.05)

    def ask(self, command: GripperCommand, request_id: int, body: bytes = b"") -> None:
        self.socket.sendall(GRIPPER_HEADER.pack(command, request_id, GRIPPER_HEADER.size + len(body)) + body)

    def answer(self) -> tuple[int, int, GripperStatus]:
        command, request_id, size = GRIPPER_HEADER.unpack(self._receive(GRIPPER_HEADER.size))
        body = self._receive(size - GRIPPER_HEADER.size)
        return command, request_id, GripperStatus(int.from_bytes(body[:2], "little"))

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += (more := self.socket.recv(size - len(data)))
            if not more:
                raise ConnectionError
        return data


def test_stop_answers_the_pending_command(cell):
    hand = RawHand(cell.address)
    hand.ask(GripperCommand.MOVE, 2, GRIPPER_MOVE_REQUEST.pack(0.0, 0.001))
    time.sleep(0.1)
    hand.ask(GripperCommand.STOP, 3)
    answers = [hand.answer(), hand.answer()]
    assert (GripperCommand.MOVE, 2, GripperStatus.ABORTED) in answers
    assert (GripperCommand.STOP, 3, GripperStatus.OK) in answers
    hand.socket.close()


def test_a_client_that_leaves_in_the_middle_of_a_command_leaves_a_cell_that_runs(cell):
    hand = RawHand(cell.address)
    hand.ask(GripperCommand.MOVE, 2, GRIPPER_MOVE_REQUEST.pack(0.0, 0.001))
    time.sleep(0.1)
    hand.socket.close()
    time.sleep(0.1)
    RawHand(cell.address).socket.close()  # answered: the cell goes on
    assert "cube" in cell.client.poses()


def test_the_cube_is_lifted_by_contact_and_put_on_the_plate(gripper, cell, down):
    robot = cell.robot()
    robot.move(franky.JointMotion(HOME))
    poses = cell.client.reset(3)
    cube_pos_m, plate_pos_m = poses["cube"][:3, 3], poses["plate"][:3, 3]
    go(robot, pose(cube_pos_m + [0, 0, 0.1], down))
    go(robot, pose(cube_pos_m, down))
    assert gripper.grasp(0.04, 0.1, 20.0, 0.01, 0.01)
    time.sleep(0.05)
    assert gripper.is_grasped
    assert gripper.width == pytest.approx(0.04, abs=0.003)
    with pytest.raises(ResetRefused, match="open"):
        cell.client.reset(4)
    go(robot, pose(cube_pos_m + [0, 0, 0.15], down))
    lifted_m = cell.client.poses()["cube"][:3, 3] - cube_pos_m
    assert lifted_m[2] == pytest.approx(0.15, abs=0.005), "the cube came along"
    go(robot, pose(plate_pos_m + [0, 0, 0.15], down))
    go(robot, pose(plate_pos_m + [0, 0, 0.022], down))
    assert not cell.client.success(), "still in the hand"
    gripper.move(0.08, 0.1)
    go(robot, pose(plate_pos_m + [0, 0, 0.12], down))
    assert cell.client.success()
    robot.move(franky.JointMotion(HOME))
    cell.client.reset(4)
    assert not cell.client.success()


@pytest.mark.slow  # test_lockstep.py has one that always runs
def test_the_scripted_expert_does_the_task(world, config):
    """Seven numbers a step, integrated and walked to within the step, in one process: no clients, no clock."""
    embodiment, state = config.embodiment, StateBuffer()
    tracker = CommandTracker(world, ArmKinematics(), state)
    expert, command = PickPlaceExpert(embodiment, seed=1), np.zeros(1, COMMAND)[0]
    world.reset(21)
    T = world.poses()["tcp"]
    ticks = round(embodiment.period_s * 1000)
    for _ in range(150):
        poses = world.poses()
        action = expert.act(T, world.width_m, poses["cube"][:3, 3], poses["plate"][:3, 3])
        if expert.done:
            break
        T_from, T = T, integrate(T, action)
        for tick in range(ticks):
            command["O_T_EE"] = interpolate(T_from, T, (tick + 1) / ticks).T.ravel()
            tracker.apply(Generator.CARTESIAN_POSE, command)
            step_m = np.clip(embodiment.gripper_opening_m(action[6]) - world.width_target[0], -1e-4, 1e-4)
            world.width_target[0] += step_m
            world.step()
    assert expert.done
    assert expert.restarts == 0
    assert world.success()
