import numpy as np
import pytest
from franky_sim import FR3_URDF

from bridge import pose
from bridge.embodiment import Embodiment
from robot.body import FOLLOWED, Body
from robot.safety import SafetyLimits, safe_step
from sim.stand_in.kinematics import ArmKinematics
from sim.stand_in.scene import T_FLANGE_TCP

HOME = np.array(Embodiment().home_joint_pos_rad)
CROSSED = np.array([0.0, 1.5, 0.0, -2.9, 0.0, 0.5, 0.785])  # the wrist folded back towards the upper arm


@pytest.fixture(scope="module")
def body():
    return Body(FR3_URDF, T_FLANGE_TCP, SafetyLimits())


def test_forward_kinematics_agree_with_the_cells_arm(body):
    other, rng = ArmKinematics(), np.random.default_rng(0)
    for _ in range(20):
        q = HOME + rng.uniform(-0.3, 0.3, 7)
        pos_m, R = other.forward(q)
        T = body.tcp(q)
        assert np.allclose(T[:3, 3], pos_m, atol=1e-5)
        assert np.allclose(T[:3, :3], R, atol=1e-5)


def test_margins_at_home_and_folded(body):
    home, folded = body.margins(HOME), body.margins(CROSSED)
    assert home.joint_rad == pytest.approx(3.077 - 2.5895, abs=1e-3)  # joint 4
    assert home.links_m > 0.1
    assert folded.links_m < 0.02


def test_joints_of_a_pose_are_found_and_lead_there(body):
    T = pose.integrate(body.tcp(HOME), [0.05, -0.08, 0.04, 0.1, 0, 0.2, 0])
    assert np.allclose(body.tcp(body.solve(T, HOME)), T, atol=2e-4)
    T[0, 3] = 2.0
    assert body.solve(T, HOME) is None


def test_speed_near_an_end_stop_is_what_the_joint_can_still_brake_from(body):
    """Joint 2, 0.3361 rad before its stop at 1.8361, slows down by 2.585 rad/s2; 0.25 rad/s are kept in hand."""
    near, there = np.array([0.0, 1.5, 0.0, -1.8, 0.0, 2.1, 0.0]), np.array([0.0, 1.8361, 0.0, -1.8, 0.0, 2.1, 0.0])
    allowed = body.speed_limits(near, np.ones(7))
    assert allowed[0] == 2.62
    assert allowed[1] == pytest.approx((2 * 2.585 * 0.3361) ** 0.5 - 0.25)
    assert body.speed_limits(there, np.ones(7))[1] == 0.0
    assert body.speed_limits(there, -np.ones(7))[1] == 2.62  # away from it


def test_a_target_is_no_faster_than_the_joints_may_be(body):
    """Back towards the base joint 4 folds; 0.2 rad before its stop it may go 0.911 rad/s."""
    q = np.array([0.0, -0.6, 0.0, -2.877, 0.0, 2.3, 0.785])
    T, period_s = body.tcp(q), 0.1
    wild = T.copy()
    wild[0, 3] -= 0.1
    end, clips = body.limit(T, wild, q, period_s)
    assert "speed_joint_rad_s" in {clip.limit for clip in clips}
    assert 0.0 < T[0, 3] - end[0, 3] < 0.1
    way = body.solve(end, q) - q
    assert (np.abs(way) / period_s / body.speed_limits(q + way, way)).max() == pytest.approx(0.6, abs=0.06)
    slow = T.copy()
    slow[0, 3] -= 0.01
    assert body.limit(T, slow, q, period_s)[1] == []


def test_a_followed_path_ends_in_the_joints_where_it_began(body):
    """Fifty squares. Solved alone the elbow goes further with each."""
    corners = [[0.08, 0, 0], [0, 0.12, 0], [-0.08, 0, 0], [0, -0.12, 0]]
    followed, solved, T = HOME, HOME, body.tcp(HOME).copy()
    for way in corners * 50:
        for _ in range(10):
            T[:3, 3] += np.array(way) / 10
            followed, solved = body.follow(T, followed, HOME), body.solve(T, solved, 1e-6)
    assert np.allclose(body.tcp(followed), T, atol=1e-4)
    assert np.abs(followed - HOME).max() < 0.02
    assert np.abs(solved - HOME).max() > 0.05
    T[0, 3] = 2.0
    assert body.follow(T, followed, HOME) is None


def turned(body, q, joint, by_rad):
    """The TCP's pose after one joint has turned."""
    return body.tcp(q + by_rad * np.eye(7)[joint]).copy()


def test_a_stream_stands_rather_than_jump_to_another_posture(body):
    followed = body.follow(turned(body, HOME, 6, 0.45), HOME, HOME)
    assert followed[6] - HOME[6] == pytest.approx(0.45, abs=0.05)
    assert body.follow(turned(body, HOME, 6, 0.6), HOME, HOME) is None


def test_near_a_singularity_the_joints_nearby_are_found(body):
    """5 mm down from an arm almost stretched out: steps without bounds end in another posture, 0.70 rad off."""
    q = np.array([0.5, 0.0, 0.5, -0.4, 1.4, 0.5, 1.0])
    T = body.tcp(q).copy()
    T[2, 3] -= 0.005
    followed = body.follow(T, q, q)
    assert np.allclose(body.tcp(followed), T, atol=1e-3)
    assert np.abs(followed - q).max() < 0.25


def test_a_stream_ends_at_a_joints_end(body):
    """Joint 7 ends at 3.0508 rad; one that is beyond it already may come back."""
    inside, beyond = (np.append(HOME[:6], 3.0508 + offset_rad) for offset_rad in (-0.01, 0.01))
    assert body.follow(turned(body, inside, 6, 0.005), inside, inside) is not None
    assert body.follow(turned(body, inside, 6, 0.02), inside, inside) is None
    assert body.follow(turned(body, beyond, 6, 0.005), beyond, beyond) is None
    assert body.follow(turned(body, beyond, 6, -0.005), beyond, beyond) is not None


def test_the_elbow_does_not_take_a_joint_beyond_its_end(body):
    """Joint 1 ends at 2.9007 rad, and where the elbow is drawn to lies beyond it."""
    q = np.append(2.9, HOME[1:])
    rest, T = q + np.eye(7)[0], body.tcp(q).copy()
    T[2, 3] += 0.02  # no affair of joint 1
    assert np.array_equal(body.follow(T, q, rest), body.solve(T, q, FOLLOWED))
    assert not np.array_equal(body.follow(T, q, q - np.eye(7)[0]), body.solve(T, q, FOLLOWED))


def walk(body, action, num_steps=60):
    """Steps of one action from home, joints following: where it ends, and all that was cut."""
    T, q, cut = body.tcp(HOME), HOME, []
    for _ in range(num_steps):
        step = safe_step(T, action, 0.1, body.limits, lambda a, b, q=q: body.limit(a, b, q, 0.1))
        T, q = step.T_target, body.solve(step.T_target, q)
        cut += [clip.limit for clip in step.clips]
        margins = body.margins(q)
        assert margins.joint_rad > body.limits.joint_margin_rad - 1e-6
        assert margins.links_m > body.limits.self_collision_margin_m - 1e-6
    return T, cut


@pytest.mark.parametrize(
    ("action", "limit"),
    [
        ([0, 0, 0, 0, 0, 0.1, 0], "margin_joint_rad"),  # joint 7 turns until its end
        ([-0.03, 0, 0, 0, 0, 0, 0], "margin_joint_rad"),  # joint 4 folds
        ([0.05, 0.0, 0.05, 0, 0, 0, 0], "reach"),
    ],
)
def test_no_walk_loses_a_margin(body, action, limit):
    T, cut = walk(body, action)
    assert limit in cut
    still = body.limit(T, T, body.solve(T, HOME) if limit != "margin_joint_rad" else HOME, 0.1)
    assert still[0] is T


def test_a_wide_margin_stops_before_the_links_come_near():
    wide = Body(FR3_URDF, T_FLANGE_TCP, SafetyLimits(self_collision_margin_m=0.15))
    _, cut = walk(wide, [-0.02, 0, 0.01, 0, 0, 0, 0], 20)
    assert "margin_links_m" in cut


def test_another_robot_is_refused():
    with pytest.raises(ValueError, match="0 joints"):
        Body('<robot name="x"><link name="base"/></robot>', np.eye(4), SafetyLimits())
