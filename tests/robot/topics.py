"""What a robot's nodes publish, without the robot: for whatever listens to them and runs in a process of its own."""

import array
import threading

import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, JointState

CAMERAS = ("third_person", "wrist")
POSES = ("tcp_pose", "target_pose", "requested_pose")


class Topics:
    """States and pictures (height, width) at 30 Hz on the wall clock; keeps what comes in on `teleop/action`."""

    def __init__(self, domain_id: int, size: tuple[int, int]):
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain_id)
        self.node = rclpy.create_node("robot", context=self.context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        few = QoSProfile(depth=10)
        self.images = {c: self.node.create_publisher(Image, f"{c}/image_raw", few) for c in CAMERAS}
        self.poses = [self.node.create_publisher(PoseStamped, name, few) for name in POSES]
        self.joints = self.node.create_publisher(JointState, "joint_states", few)
        self.gripper = self.node.create_publisher(JointState, "gripper_command", few)
        self.actions: list[JointState] = []
        self.node.create_subscription(JointState, "teleop/action", self.actions.append, QoSProfile(depth=50))
        height, width = size
        self.pictures = {c: Image(height=height, width=width, step=3 * width, encoding="rgb8") for c in CAMERAS}
        for number, picture in enumerate(self.pictures.values()):
            picture.data = array.array("B", bytes([60 + 100 * number]) * (height * width * 3))
        self.node.create_timer(1 / 30, self.publish)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.spin)
        self.thread.start()

    def spin(self) -> None:
        while not self.closing.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    def publish(self) -> None:
        now = self.node.get_clock().now().to_msg()
        for publisher in self.poses:
            message = PoseStamped()
            message.header.stamp = now
            message.pose.position.x, message.pose.position.z = 0.4, 0.3
            message.pose.orientation.x, message.pose.orientation.w = 1.0, 0.0  # the hand points down
            publisher.publish(message)
        joints = JointState(name=["j", "gripper_opening"], position=[0.0, 0.03])
        gripper = JointState(name=["sent", "requested"], position=[-1.0, -1.0])
        joints.header.stamp = gripper.header.stamp = now
        self.joints.publish(joints)
        self.gripper.publish(gripper)
        for camera, publisher in self.images.items():
            self.pictures[camera].header.stamp = now
            publisher.publish(self.pictures[camera])

    def close(self) -> None:
        self.closing.set()
        self.thread.join()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)
