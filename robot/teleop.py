"""Move the arm by hand: cotwin teleop device=spacemouse (or gamepad, keyboard, browser, playback).

Hold the clutch to move; while it is held the person has the arm and a running policy waits, and when it is let go the
policy goes on. The gripper button opens and closes, `faster` and `slower` set one of three speeds, and the episode
marks go to whoever records (`cotwin record source=device`).
"""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, String

from bridge import pose
from bridge.config import command_line
from bridge.embodiment import Embodiment
from robot.devices import MARKS, Device, DeviceError, Gamepad, Keyboard, Playback, Reading, Recorded, SpaceMouse
from robot.pad import BrowserPad
from robot.spin import NodeError, run_node
from robot.target import rotation_of

DEVICES = ("spacemouse", "gamepad", "keyboard", "browser", "playback")
SPEED_SHARES = (0.2, 0.5, 1.0)


@dataclass
class TeleopConfig:
    """Keys of `cotwin teleop`."""

    device: str = "keyboard"  # spacemouse, gamepad, keyboard, browser or playback
    path: str = ""  # gamepad: its device file; playback: the recording
    record: str = ""  # file that gets every reading, for device=playback
    host: str = "127.0.0.1"  # browser: where the page is served; a phone needs the address of this machine
    port: int = 8090
    speed_m_s: float = 0.2  # at the highest of the three speeds
    turn_rad_s: float = 0.6
    namespace: str = ""  # of the arm, where there are two
    use_sim_time: bool = False  # true beside the stand-in cell
    embodiment: Embodiment = field(default_factory=Embodiment)

    def __post_init__(self):
        if self.device not in DEVICES:
            raise ValueError(f"device {self.device!r}: allowed are {DEVICES}")
        if self.device == "playback" and not self.path:
            raise ValueError("device playback needs path=FILE, written with record=FILE")
        if not 0 < self.speed_m_s <= 1.0 or not 0 < self.turn_rad_s <= 2.0:
            raise ValueError(f"speed_m_s {self.speed_m_s}, turn_rad_s {self.turn_rad_s}: allowed are (0, 1] and (0, 2]")


class Hand:
    """Readings become actions. Remembers speed and gripper."""

    def __init__(self, period_s: float, speed_m_s: float, turn_rad_s: float):
        self.period_s, self.speed_m_s, self.turn_rad_s = period_s, speed_m_s, turn_rad_s
        self.level = 1
        self.gripper = 1.0
        self._had_clutch = False

    def act(self, reading: Reading, R_base_tcp: np.ndarray, gripper_sent: float) -> np.ndarray | None:
        """The action [7] of one period; None when the person does not hold the arm. Motion is along the base's axes.

        `gripper_sent`: what the hand was told last, by whomever: taking over must not open it.
        """
        for name in reading.pressed:
            self.level += {"faster": 1, "slower": -1}.get(name, 0)
        self.level = max(0, min(len(SPEED_SHARES) - 1, self.level))
        if not self._had_clutch:
            self.gripper = 1.0 if gripper_sent > 0 else -1.0
        toggles = reading.pressed.count("gripper") % 2
        self.gripper *= -1.0 if toggles else 1.0
        self._had_clutch = reading.clutch or bool(toggles)
        if not self._had_clutch:
            return None
        step = np.array(reading.motion) * (SPEED_SHARES[self.level] * self.period_s) * reading.clutch
        dR = R_base_tcp.T @ rotation_of(step[3:] * self.turn_rad_s) @ R_base_tcp
        return np.concatenate([step[:3] * self.speed_m_s, pose.rpy_from_matrix(dR), [self.gripper]])


class TeleopNode(Node):
    """Publishes `teleop/action` at the policy rate while the clutch is held, `teleop/mark` and `deadman`."""

    def __init__(self, config: TeleopConfig, device: Device):
        sim_time = Parameter("use_sim_time", value=config.use_sim_time)
        super().__init__("teleop_node", namespace=config.namespace or None, parameter_overrides=[sim_time])
        period_s = config.embodiment.period_s
        self.device, self.hand = device, Hand(period_s, config.speed_m_s, config.turn_rad_s)
        self._R_base_tcp: np.ndarray | None = None
        self._gripper_sent = 1.0
        few = QoSProfile(depth=10)
        self._actions = self.create_publisher(JointState, "teleop/action", few)
        self._marks = self.create_publisher(String, "teleop/mark", few)
        self._deadman = self.create_publisher(Bool, "deadman", QoSProfile(depth=1))
        self.create_subscription(PoseStamped, "target_pose", self._on_target, QoSProfile(depth=1))
        self.create_subscription(JointState, "gripper_command", self._on_gripper, QoSProfile(depth=1))
        self.create_timer(period_s, self._step)  # the robot's clock, as its ticks

    def _on_target(self, message: PoseStamped) -> None:
        q = message.pose.orientation
        self._R_base_tcp = pose.matrix_from_quat_xyzw([q.x, q.y, q.z, q.w])

    def _on_gripper(self, message: JointState) -> None:
        self._gripper_sent = message.position[0]

    def _step(self) -> None:
        if self._R_base_tcp is None or not self._actions.get_subscription_count():
            return  # no arm yet, or nobody who listens; a recording is not to be played to nobody
        try:
            reading = self.device.read()
        except DeviceError as error:
            raise NodeError(str(error)) from error
        self._deadman.publish(Bool(data=reading.deadman))
        for name in reading.pressed:
            if name in MARKS:
                self._marks.publish(String(data=name))
                self.get_logger().info(f"mark: {name}")
        action = self.hand.act(reading, self._R_base_tcp, self._gripper_sent)
        if action is not None:
            message = JointState(name=list(pose.ACTION_NAMES), position=action.tolist())
            message.header.stamp = self.get_clock().now().to_msg()
            self._actions.publish(message)


def open_device(config: TeleopConfig) -> Device:
    """Raises DeviceError."""
    device: Device
    if config.device == "spacemouse":
        device = SpaceMouse()
    elif config.device == "gamepad":
        device = Gamepad(config.path or "/dev/input/js0")
    elif config.device == "keyboard":
        device = Keyboard()
    elif config.device == "browser":
        device = BrowserPad(config.host, config.port)
    else:
        device = Playback(Path(config.path))
    return Recorded(device, Path(config.record)) if config.record else device


def main(argv: list[str]) -> int:
    config = command_line("teleop", TeleopConfig, argv, __doc__)
    try:
        device = open_device(config)
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    about = f"open {device.url}" if isinstance(device, BrowserPad) else type(device).__doc__
    print(about, flush=True)
    with contextlib.closing(device):  # a terminal gets its settings back, whatever happened
        return run_node(lambda: TeleopNode(config, device), [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
