"""Grasping by contact, through the real franky.Gripper, and the expert's whole task."""

import time

import franky
import numpy as np
import pytest

from bridge.pose import integrate, pose
from sim.expert import PickPlaceExpert
from sim.stand_in.errors import ResetRefused
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


def test_stop_answers_the_pending_command(gripper, cell):
    future = gripper.move_async(0.0, 0.001)
    time.sleep(0.1)
    gripper.stop()
    assert future.wait(5.0)
    with pytest.raises(franky.CommandException, match="abort"):
        future.get()


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


def test_the_scripted_expert_does_the_task(timed_cell, config):
    """As the robot runtime drives it: seven numbers a step, integrated, absolute poses streamed, 10 Hz."""
    embodiment, cell = config.embodiment, timed_cell.client
    robot, gripper = timed_cell.robot(), franky.Gripper(timed_cell.address)
    gripper.open(0.1)
    robot.move(franky.JointMotion(HOME))
    cell.reset(21)
    expert, T = PickPlaceExpert(embodiment, seed=1), cell.poses()["tcp"]
    closed, pending = False, None
    for _ in range(150):
        poses = cell.poses()
        begin_s = poses["time_s"]
        action = expert.act(T, poses["gripper_opening_m"], poses["cube"][:3, 3], poses["plate"][:3, 3])
        if expert.done:
            break
        if (action[6] < 0) != closed:
            closed = not closed
            gripper.stop()
            if pending is not None:
                pending.wait(5.0)
            pending = gripper.grasp_async(0.04, 0.1, 20.0, 0.04, 0.04) if closed else gripper.move_async(0.08, 0.1)
        if np.abs(action[:6]).max() > 1e-6:
            T = integrate(T, action)
            robot.move(franky.CartesianMotion(franky.Affine(T), return_when_finished=False), asynchronous=True)
        while cell.poses()["time_s"] < begin_s + embodiment.period_s:
            time.sleep(0.01)
    robot.move(franky.CartesianStopMotion())
    assert expert.done
    assert cell.success()
