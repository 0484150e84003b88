"""The arm's body: how far joints are from their end stops, and links from each other. Pinocchio, no ROS, no robot.

The joints come from the URDF that the robot itself gives out. Its links have no shapes there, so each is a capsule or
two, a little fatter than the link; a hand with its fingers sits on the flange.
"""

from dataclasses import dataclass
from xml.etree import ElementTree

import coal
import numpy as np
import pinocchio as pin

from robot.safety import Clip, SafetyLimits

SHARES = (0.75, 0.5, 0.25, 0.0)  # of a step that goes too far, the largest that does not is taken
MAX_ITERATIONS = 20
DAMPING = 1e-6
ARRIVED, FOLLOWED = 1e-4, 1e-6  # m and rad
ELBOW_SHARE = 0.1
MAX_JUMP_RAD = 0.5  # of a joint, from one pose of a stream to the next
MAX_STEP_RAD = 0.3  # of a joint, in an iteration: at a singularity a step without bounds leads into another posture
SPEED_SHARE = 0.6  # of what joints are allowed, that a target may ask for: an arm that trails has to catch up
# Link (8: the hand, on the flange), one end and the other in the link's frame (m), radius (m).
CAPSULES = (
    (0, (-0.09, 0.0, 0.06), (0.0, 0.0, 0.06), 0.08),
    (1, (0.0, 0.0, -0.333), (0.0, 0.0, -0.05), 0.07),
    (2, (0.0, 0.0, -0.06), (0.0, 0.0, 0.06), 0.07),
    (3, (0.0, 0.0, -0.22), (0.0, 0.0, -0.07), 0.07),
    (4, (0.0, 0.0, -0.06), (0.0, 0.0, 0.06), 0.07),
    (5, (0.0, 0.0, -0.31), (0.0, 0.0, -0.21), 0.07),
    (5, (0.0, 0.08, -0.20), (0.0, 0.08, -0.06), 0.03),
    (6, (0.0, 0.0, -0.07), (0.0, 0.0, 0.01), 0.06),
    (7, (0.0, 0.0, -0.06), (0.0, 0.0, 0.08), 0.05),
    (8, (0.0, -0.06, 0.04), (0.0, 0.06, 0.04), 0.045),
    (8, (0.0, -0.03, 0.09), (0.0, 0.03, 0.09), 0.03),
)
MEETING = {(a, b) for a in (0, 1, 2) for b in (5, 6, 7, 8)} | {(3, 7), (3, 8), (4, 8)}  # others cannot


@dataclass(frozen=True)
class Margins:
    """`joint_rad`: of the joint that is nearest to an end stop. `links_m`: between the two links that are nearest."""

    joint_rad: float
    links_m: float


class Body:
    """`T_flange_tcp` [4, 4]: where the TCP sits; `speed_share`: of the joints' speeds, what motions are planned with.
    Raises ValueError for a URDF that is not of a seven-joint arm."""

    def __init__(self, urdf: str, T_flange_tcp: np.ndarray, limits: SafetyLimits, speed_share: float = 1.0):
        self.limits, self._speed_share = limits, speed_share
        self._model = pin.buildModelFromXML(urdf)
        if self._model.nq != 7 or not self._model.existFrame("link8"):
            raise ValueError(f"the robot's description has {self._model.nq} joints; needed are 7 and a frame link8")
        self._data = self._model.createData()
        flange = self._model.getFrameId("link8")
        self._tcp = self._model.addFrame(
            pin.Frame("tcp", 7, flange, self._model.frames[flange].placement * pin.SE3(T_flange_tcp), pin.OP_FRAME)
        )
        self._data = self._model.createData()
        joints = [joint for joint in ElementTree.fromstring(urdf).iter("joint") if joint.get("type") == "revolute"]
        slowing = [joint.find("position_based_velocity_limits") for joint in joints]
        if None in slowing:
            raise ValueError("the robot's description lacks <position_based_velocity_limits>")
        self._deceleration_rad_s2 = np.array([float(limit.get("deceleration_limit")) for limit in slowing])
        self._speed_offset_rad_s = np.array([float(limit.get("velocity_offset")) for limit in slowing])
        self._shapes = pin.GeometryModel()
        for link, start, end, radius_m in CAPSULES:
            self._add_capsule(link, np.array(start), np.array(end), radius_m)
        for i, (a, *_) in enumerate(CAPSULES):
            for j, (b, *_) in enumerate(CAPSULES):
                if (a, b) in MEETING:
                    self._shapes.addCollisionPair(pin.CollisionPair(i, j))
        self._shape_data = pin.GeometryData(self._shapes)

    def tcp(self, q_rad: np.ndarray) -> np.ndarray:
        """T_base_tcp [4, 4] of joints [7]."""
        pin.framesForwardKinematics(self._model, self._data, q_rad)
        return self._data.oMf[self._tcp].homogeneous

    def margins(self, q_rad: np.ndarray) -> Margins:
        pin.updateGeometryPlacements(self._model, self._data, self._shapes, self._shape_data, q_rad)
        pin.computeDistances(self._shapes, self._shape_data)
        links_m = min(result.min_distance for result in self._shape_data.distanceResults)
        return Margins(float(self._room(q_rad).min()), float(links_m))

    def speed_limits(self, q_rad: np.ndarray, way_rad: np.ndarray) -> np.ndarray:
        """What the arm allows at joints [7] (rad/s) that go the way [7] (its signs count): less towards an end stop
        that is near, so that it can still brake before it."""
        low, high = q_rad - self._model.lowerPositionLimit, self._model.upperPositionLimit - q_rad
        brakeable = np.sqrt(2 * self._deceleration_rad_s2 * np.maximum(0.0, np.where(way_rad < 0, low, high)))
        return np.clip(brakeable - self._speed_offset_rad_s, 0.0, self._model.velocityLimit)

    def follow(self, T_base_tcp: np.ndarray, q_rad: np.ndarray, q_rest_rad: np.ndarray) -> np.ndarray | None:
        """`solve`, exactly, for a stream. Without an end the elbow would wander off: up to a tenth of each motion goes
        into the way back to `q_rest_rad` that leaves the pose as it is.

        None also where the pose is only reached by a jump to another posture, or beyond a joint's end (where one is
        beyond it already: further beyond it).
        """
        q = self.solve(T_base_tcp, q_rad, FOLLOWED)
        if q is None or np.abs(q - q_rad).max() > MAX_JUMP_RAD:
            return None
        null = np.linalg.svd(pin.getFrameJacobian(self._model, self._data, self._tcp, pin.LOCAL))[2][6]
        most = ELBOW_SHARE * float(np.linalg.norm(q - q_rad))
        with_elbow = q + np.clip(null @ (q_rest_rad - q), -most, most) * null
        least = np.minimum(0.0, self._room(q_rad))
        return next((way for way in (with_elbow, q) if (self._room(way) >= least).all()), None)

    def solve(self, T_base_tcp: np.ndarray, q_rad: np.ndarray, arrived: float = ARRIVED) -> np.ndarray | None:
        """Joints [7] of a pose, found by moving as little as possible from `q_rad`; None when they are not found."""
        q, goal = np.array(q_rad), pin.SE3(T_base_tcp)
        for _ in range(MAX_ITERATIONS):
            pin.computeJointJacobians(self._model, self._data, q)
            pin.updateFramePlacement(self._model, self._data, self._tcp)
            error = pin.log6(self._data.oMf[self._tcp].actInv(goal)).vector
            if np.abs(error).max() < arrived:
                return q
            J = pin.getFrameJacobian(self._model, self._data, self._tcp, pin.LOCAL)
            step_rad = J.T @ np.linalg.solve(J @ J.T + DAMPING * np.eye(6), error)
            q += step_rad / max(1.0, np.abs(step_rad).max() / MAX_STEP_RAD)
        return None

    def limit(
        self, T_from: np.ndarray, T_to: np.ndarray, q_rad: np.ndarray, period_s: float
    ) -> tuple[np.ndarray, list[Clip]]:
        """As much of a step of the target as the joints can follow and as leaves the margins; `q_rad`: the arm's joints
        now, `period_s`: what the step takes.

        Where a margin is lost already, only a step that does not make it smaller is let through.
        """
        T_to, clips = self._slow(T_from, T_to, q_rad, period_s)
        at_start = self._margins_at(T_from, q_rad)
        clip = self._judge(T_to, q_rad, at_start)
        if clip is None:
            return T_to, clips
        for share in SHARES[:-1]:
            T = part(T_from, T_to, share)
            if self._judge(T, q_rad, at_start) is None:
                return T, [*clips, clip]
        return T_from, [*clips, clip]

    def _slow(
        self, T_from: np.ndarray, T_to: np.ndarray, q_rad: np.ndarray, period_s: float
    ) -> tuple[np.ndarray, list[Clip]]:
        """So much of the step that no joint has to be faster than the arm allows. An arm that is left behind would
        still be on its way when it is told to hold."""
        q_from = self.solve(T_from, q_rad)
        q_to = None if q_from is None else self.solve(T_to, q_from)
        if q_from is None or q_to is None:
            return T_to, []
        way_rad = q_to - q_from
        speed_rad_s = np.abs(way_rad) / period_s

        def too_fast(share: float) -> np.ndarray:
            """By how much, at the end of so much of the step: there joints may be slower than at its beginning."""
            planned = self._speed_share * self._model.velocityLimit
            allowed = SPEED_SHARE * np.minimum(self.speed_limits(q_from + share * way_rad, way_rad), planned)
            return share * speed_rad_s - np.maximum(allowed, ARRIVED / period_s)

        excess = too_fast(1.0)
        if (excess <= 0).all():
            return T_to, []
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (low, middle) if (too_fast(middle) > 0).any() else (middle, high)
        worst = int(np.argmax(excess))
        clip = Clip("speed_joint_rad_s", float(speed_rad_s[worst]), float(speed_rad_s[worst] - excess[worst]))
        return part(T_from, T_to, low), [clip]

    def _judge(self, T: np.ndarray, q_rad: np.ndarray, before: Margins | None) -> Clip | None:
        """What a pose breaks."""
        now = self._margins_at(T, q_rad)
        if now is None:
            return Clip("reach", 1.0, 0.0) if before is not None else None
        for name, wanted in (
            ("joint_rad", self.limits.joint_margin_rad),
            ("links_m", self.limits.self_collision_margin_m),
        ):
            value = getattr(now, name)
            if value < wanted and (before is None or value < getattr(before, name) - 1e-6):
                return Clip(f"margin_{name}", value, wanted)
        return None

    def _room(self, q_rad: np.ndarray) -> np.ndarray:
        """How far each joint [7] is from the nearer of its ends (rad); negative beyond it."""
        return np.minimum(q_rad - self._model.lowerPositionLimit, self._model.upperPositionLimit - q_rad)

    def _margins_at(self, T: np.ndarray, q_rad: np.ndarray) -> Margins | None:
        q = self.solve(T, q_rad)
        return None if q is None else self.margins(q)

    def _add_capsule(self, link: int, start_m: np.ndarray, end_m: np.ndarray, radius_m: float) -> None:
        way = end_m - start_m
        length_m = float(np.linalg.norm(way))
        R = pin.Quaternion.FromTwoVectors(np.array([0.0, 0.0, 1.0]), way / length_m).matrix()
        frame = self._model.frames[self._model.getFrameId(f"link{link}")]
        placement = frame.placement * pin.SE3(R, (start_m + end_m) / 2)
        name = f"link{link}_{self._shapes.ngeoms}"
        capsule = coal.Capsule(radius_m, length_m)
        self._shapes.addGeometryObject(pin.GeometryObject(name, frame.parentJoint, placement, capsule))


def part(T_from: np.ndarray, T_to: np.ndarray, share: float) -> np.ndarray:
    """The pose that is so much of the way on: straight, and turning evenly."""
    T = pin.SE3.Interpolate(pin.SE3(T_from), pin.SE3(T_to), share).homogeneous
    T[:3, 3] = (1 - share) * T_from[:3, 3] + share * T_to[:3, 3]
    return T
