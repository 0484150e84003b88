"""One action sequence, two bodies: the twin's controller and the robot's target path command the same targets."""

import numpy as np

from bridge import pose
from robot.safety import SafetyLimits
from robot.target import TargetPath

PERIOD_NS = 100_000_000


def test_twin_and_robot_command_the_same_targets(twin):
    twin.reset(5)
    limits = SafetyLimits(
        workspace_lower_m=twin.config.workspace_lower_m, workspace_upper_m=twin.config.workspace_upper_m
    )
    path = TargetPath(twin.facts.T_base_target, twin.embodiment.period_s, limits)
    rng = np.random.default_rng(0)
    turned_rad = 0.0
    for n in range(30):
        # Within every limit of the robot, and into the workspace's floor on the way.
        action = np.array([*rng.uniform(-0.012, 0.012, 2), -0.012, *rng.uniform(-0.05, 0.05, 3), 1.0])
        twin.step(action)
        path.step(action, (n + 1) * PERIOD_NS, (n + 1) * PERIOD_NS)
        ours, theirs = twin.facts.T_base_target, path.at((n + 2) * PERIOD_NS).T_base_target
        np.testing.assert_allclose(ours[:3, 3], theirs[:3, 3], atol=1e-4)
        assert pose.rotation_angle(ours[:3, :3].T @ theirs[:3, :3]) < 1e-3
        turned_rad += pose.rotation_angle(pose.matrix_from_rpy(action[3:6]))
    assert turned_rad > 0.5  # it was no straight line
    assert ours[2, 3] < 0.03  # and it reached the floor
