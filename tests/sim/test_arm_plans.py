"""Plans of the arm's joints, by hand and beside what the robot side sets."""

import numpy as np
import pytest

from robot import stream
from robot.config import ArmConfig
from sim import arm_plans
from sim.arm_plans import ArmPlans

STEP_S = 0.001


def run(plans: ArmPlans, goals, step_s=STEP_S) -> np.ndarray:
    """Joint angles [N, 7] after each of the goals."""
    q = []
    for goal in goals:
        plans.follow(goal, step_s)
        q.append(list(plans.q_rad))
    return np.array(q)


def ramp(speed_rad_s, num, step_s=STEP_S):
    return [np.asarray(speed_rad_s) * step_s * n for n in range(1, num + 1)]


def test_the_limits_are_the_robot_sides():
    factor = ArmConfig(host="127.0.0.1").dynamics_factor
    assert pytest.approx(factor * stream.JOINT_ACCELERATION_RAD_S2) == arm_plans.ACCELERATION_RAD_S2
    assert pytest.approx(factor * stream.JOINT_JERK_RAD_S3) == arm_plans.JERK_RAD_S3
    assert arm_plans.SPEED_RAD_S[0] == pytest.approx(factor * 2.62)
    assert arm_plans.SAME_RAD == stream.SAME


def test_it_arrives_at_rest_within_the_limits():
    plans = ArmPlans()
    goals = ramp(np.linspace(-0.8, 0.8, 7), 300)
    q = run(plans, goals + goals[-1:] * 600)
    assert np.allclose(q[-1], goals[-1], atol=1e-4)
    assert np.allclose(plans.dq_rad_s, 0.0, atol=1e-9)
    speed, acceleration, jerk = (np.diff(q, n=n, axis=0) / STEP_S**n for n in (1, 2, 3))
    assert np.all(np.abs(speed) <= arm_plans.SPEED_RAD_S)
    assert np.abs(acceleration).max() <= arm_plans.ACCELERATION_RAD_S2 * 1.001
    assert np.abs(jerk).max() <= arm_plans.JERK_RAD_S3 * 1.01


def test_an_even_motion_is_trailed_by_the_delay_half_a_stream_period_and_the_way_to_stop():
    """One joint: v^2 / 2a, and v a / 2j more for the jerk; the newest target is between no and one period old."""
    speed, a, j = 0.6, arm_plans.ACCELERATION_RAD_S2, arm_plans.JERK_RAD_S3
    plans = ArmPlans()
    goals = ramp([speed, *[0.0] * 6], 600)
    behind_rad = (np.array(goals) - run(plans, goals))[-200:, 0]
    foreseen_s = arm_plans.STREAM_DELAY_S + arm_plans.STREAM_PERIOD_S / 2 + speed / (2 * a) + a / (2 * j)
    assert behind_rad.mean() / speed == pytest.approx(foreseen_s, rel=0.15)


def test_steps_of_any_length_give_the_same_motion():
    speed = np.linspace(-0.5, 0.7, 7)
    fine, coarse = run(ArmPlans(), ramp(speed, 400)), run(ArmPlans(), ramp(speed, 40, 0.01), 0.01)
    assert np.allclose(fine[9::10], coarse, atol=1e-6)


def test_a_hold_forgets_what_was():
    plans, fresh = ArmPlans(), ArmPlans()
    run(plans, ramp(np.full(7, 0.5), 37))
    for each in (plans, fresh):
        each.hold(np.ones(7))
    goals = [np.ones(7) + goal for goal in ramp(np.full(7, 0.2), 100)]
    assert np.array_equal(run(plans, goals), run(fresh, goals))
