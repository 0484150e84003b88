"""Drives the arm's wrist camera from view to view over the running ROS graph, and takes a picture at each.

It is a person's device to the arm: `teleop/action` at the policy rate, counted from the last target, so that every
limit of the robot side holds. Time is the robot's own, as its joint states are stamped. The same for a real arm
(`cotwin up launch/robot.launch.yaml`) and the stand-in cell (`cotwin up launch/cell.launch.yaml`).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, JointState
from tqdm import tqdm

from bridge import pose
from sim.scan.arm import Links
from sim.scan.capture import ROBOT, CaptureConfig, Shot
from sim.stand_in.expert_node import TargetEstimate

START_PATIENCE_S = 20.0  # of wall time, for the first messages
SLOWEST = 20  # a robot whose seconds take longer than so many of ours has stopped
NEAR_M, NEAR_RAD = 5e-4, 2e-3
STILL_M, STILL_RAD = 2e-4, 1e-3  # of the measured TCP over a policy period
TURN_RAD_M = 2.0  # turning speed for a metre a second


class CaptureNode(Node):
    def __init__(self, config: CaptureConfig, context: rclpy.Context):
        super().__init__("capture", context=context, namespace=config.namespace or None, enable_rosout=False)
        self.config = config
        self._links = Links()
        self.T_base_tcp: np.ndarray | None = None
        self.T_base_target: np.ndarray | None = None
        self.joints: JointState | None = None
        self.image: Image | None = None
        self._actions = self.create_publisher(JointState, "teleop/action", 10)
        few = QoSProfile(depth=10)
        self.create_subscription(PoseStamped, "tcp_pose", lambda m: self._set("T_base_tcp", _matrix(m)), few)
        self.create_subscription(PoseStamped, "target_pose", lambda m: self._set("T_base_target", _matrix(m)), few)
        self.create_subscription(JointState, "joint_states", lambda m: self._set("joints", m), few)
        topic = f"{config.camera}/image_raw"
        self.create_subscription(Image, topic, lambda m: self._set("image", m), QoSProfile(depth=4))
        self._executor = rclpy.executors.SingleThreadedExecutor(context=context)
        self._executor.add_node(self)
        heard = lambda: None not in (self.joints, self.image) and self.T_base_target is not None  # noqa: E731
        self._wait(heard, START_PATIENCE_S, f"joint_states, target_pose and {topic} were not heard: is the graph up?")

    @property
    def now_s(self) -> float:
        """The robot's time."""
        return _seconds(self.joints)

    def take(self, T_base_view: np.ndarray) -> Shot | None:
        """Go there and take a picture; None where the view is not reached in time."""
        if not self._go(T_base_view):
            return None
        rested_s = self.now_s + self.config.settle_s
        what = f"no picture of {self.config.camera} came"
        self._wait(lambda: min(_seconds(self.image), self.now_s) > rested_s, SLOWEST * (1 + self.config.settle_s), what)
        image, T = self.image, self.T_base_tcp
        assert image is not None
        assert T is not None
        if image.encoding != "rgb8":
            raise ValueError(f"pictures are {image.encoding!r}: rgb8 is expected")
        pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.step // 3, 3)[:, : image.width]
        position = dict(zip(self.joints.name, self.joints.position, strict=True))
        opening_m = position.pop("gripper_opening")
        known = self._links.poses(np.array(list(position.values())), opening_m)
        return Shot(pixels.copy(), T, {name: known[name] for name in ROBOT})

    def _go(self, T_goal: np.ndarray) -> bool:
        embodiment = self.config.embodiment
        step_m = min(self.config.speed_m_s * embodiment.period_s, embodiment.max_translation_m)
        step_rad = min(TURN_RAD_M * step_m, embodiment.max_rotation_rad)
        began_s, estimate, before = self.now_s, TargetEstimate(self.T_base_target), self.T_base_tcp
        while self.now_s - began_s < self.config.view_timeout_s:
            T = estimate.correct(self.T_base_target)
            if _within(self.T_base_tcp, T_goal, NEAR_M, NEAR_RAD) and _within(
                before, self.T_base_tcp, STILL_M, STILL_RAD
            ):
                return True
            before = self.T_base_tcp
            distance_m, angle = (
                np.linalg.norm(T_goal[:3, 3] - T[:3, 3]),
                pose.rotation_angle(T[:3, :3].T @ T_goal[:3, :3]),
            )
            share = 1.0 / max(1.0, distance_m / step_m, angle / step_rad)
            action = np.append(pose.delta(T, pose.interpolate(T, T_goal, share)), 1.0)
            message = JointState(name=list(pose.ACTION_NAMES), position=action.tolist())
            message.header.stamp = self.joints.header.stamp
            self._actions.publish(message)
            estimate.add(action)
            self._pass(embodiment.period_s)
        return False

    def _pass(self, duration_s: float) -> None:
        until_s = self.now_s + duration_s - 1e-3
        self._wait(lambda: self.now_s >= until_s, SLOWEST * (1 + duration_s), "the arm's states stopped")

    def _set(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def _wait(self, ready: Callable[[], bool], patience_s: float, otherwise: str) -> None:
        until_s = time.monotonic() + patience_s
        while not ready():
            if time.monotonic() > until_s:
                raise TimeoutError(otherwise)
            self._executor.spin_once(timeout_sec=0.05)


def shots_of(config: CaptureConfig, views: Sequence[np.ndarray]) -> list[Shot]:
    """A shot at each pose `T_base_tcp` that is reached. TimeoutError where the graph does not answer."""
    context = rclpy.Context()
    rclpy.init(context=context)
    try:
        node = CaptureNode(config, context)
        shots = [shot for T in tqdm(views, desc=config.camera, unit="view") if (shot := node.take(T)) is not None]
        node.destroy_node()
    finally:
        rclpy.shutdown(context=context)
    if not shots:
        raise ValueError("the arm reached none of the views: does it move by hand (cotwin teleop)?")
    return shots


def _within(a: np.ndarray, b: np.ndarray, distance_m: float, angle_rad: float) -> bool:
    apart = _apart(a, b)
    return apart[0] <= distance_m and apart[1] <= angle_rad


def _apart(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Distance in m and angle in rad."""
    return float(np.linalg.norm(a[:3, 3] - b[:3, 3])), float(pose.rotation_angle(a[:3, :3].T @ b[:3, :3]))


def _matrix(message: PoseStamped) -> np.ndarray:
    p, q = message.pose.position, message.pose.orientation
    return pose.pose([p.x, p.y, p.z], pose.matrix_from_quat_xyzw([q.x, q.y, q.z, q.w]))


def _seconds(message: Any) -> float:
    return message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
