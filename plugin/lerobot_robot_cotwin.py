"""LeRobot's own record, teleoperate and rollout commands on a robot whose nodes run (`cotwin up`).

    pip install ./plugin
    lerobot-record --robot.type=cotwin --teleop.type=cotwin --teleop.device=spacemouse --dataset.repo_id=lab/cube ...
    lerobot-rollout --robot.type=cotwin --policy.path=... --return_to_initial_position=false

Actions go the way of a person's at the device: the runtime puts them on its grid and the arm's safety layer has the
last word. They are deltas, so states and actions have no name in common and an unknown one is refused: a rollout that
ends sends the first *state* as an action. LeRobot keeps values whose names end in `.pos`.

Where pyrealsense2 is installed, LeRobot loads it before ROS, and a process with both in that order crashes at its very
end, when all is saved. The other order does not:
    python -c "import rclpy, lerobot.scripts.lerobot_record as command; command.main()" --robot.type=cotwin ...
"""

import threading
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from lerobot.robots import Robot, RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from lerobot.utils.errors import DeviceNotConnectedError
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState

from bridge import pose
from bridge.errors import StaleObservation
from robot.clock import RobotClock
from robot.images import picture_of_raw
from robot.observer import Observer
from robot.params import load_embodiment
from robot.stamped import matrix_of, stamp_ns, stamp_ns_of_raw
from robot.teleop import Hand, TeleopConfig, open_device

STATES = {f"{name}.pos": float for name in pose.STATE_NAMES}
ACTIONS = {f"{name}.pos": float for name in pose.ACTION_NAMES}


@RobotConfig.register_subclass("cotwin")
@dataclass(kw_only=True)
class CotwinConfig(RobotConfig):
    embodiment: str = "fr3_tabletop"  # a name in configs/embodiment, or a contract.json
    namespace: str = ""  # of the arm, where there are two
    use_sim_time: bool = False  # true beside the stand-in cell
    max_age_s: float = 0.5  # an observation older than this is an error
    timeout_s: float = 30.0  # until cameras and arm are heard


@TeleoperatorConfig.register_subclass("cotwin")
@dataclass(kw_only=True)
class CotwinHandConfig(TeleoperatorConfig):
    device: str = "spacemouse"  # or gamepad, keyboard, browser, playback: as `cotwin teleop`
    path: str = ""
    fps: int = 30  # that of the command, which asks so often
    speed_m_s: float = 0.2
    turn_rad_s: float = 0.6
    namespace: str = ""
    timeout_s: float = 30.0


class _Unattended:
    """What LeRobot asks of a device with motors of its own: there is nothing to calibrate or to configure."""

    is_calibrated, is_connected = True, False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...


class _Link:
    """A ROS node that is spun by a thread of its own."""

    def __init__(self, name: str, namespace: str, use_sim_time: bool = False):
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        clock = Parameter("use_sim_time", value=use_sim_time)
        settings: dict[str, Any] = {"namespace": namespace or None, "parameter_overrides": [clock]}
        self.node = Node(name, context=self._context, enable_rosout=False, **settings)
        self._executor = EventsExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._spin, name=name, daemon=True)

    def listen(self, kind: Any, topic: str, callback: Any, **options: Any) -> None:
        self.node.create_subscription(kind, topic, callback, QoSProfile(depth=10), **options)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._executor.remove_node(self.node)
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def _spin(self) -> None:
        while not self._closing.is_set():
            self._executor.spin_once(timeout_sec=0.1)


class Cotwin(_Unattended, Robot):
    """The arm, its hand and its cameras, as the observation of docs/contract.md."""

    config_class, name = CotwinConfig, "cotwin"

    def __init__(self, config: CotwinConfig):
        super().__init__(config)
        self.config, self.embodiment = config, load_embodiment(config.embodiment)
        self.cameras = dict(self.embodiment.cameras)

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        return STATES | {name: (camera.height, camera.width, 3) for name, camera in self.cameras.items()}

    @property
    def action_features(self) -> dict[str, Any]:
        return ACTIONS

    def connect(self, calibrate: bool = True) -> None:
        """DeviceNotConnectedError when the robot's nodes are not heard within `timeout_s`."""
        link, self._observer = self._open()
        self._link, until_s = link, time.monotonic() + self.config.timeout_s
        self.is_connected = True
        while True:
            try:
                self.get_observation()
                if link.node.count_subscribers("teleop/action"):
                    return
                silent = "nobody listens to teleop/action"
            except StaleObservation as error:
                silent = str(error)
            if time.monotonic() > until_s:
                self.disconnect()
                raise DeviceNotConnectedError(f"{silent}; is `cotwin up` running?")
            time.sleep(0.05)

    def get_observation(self) -> dict[str, Any]:
        """At the time of the newest picture of the reference camera. Raises StaleObservation."""
        seen = self._observer.read(self._clock.now_ns(), "")
        return dict(zip(STATES, map(float, seen.state), strict=True)) | seen.images

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """One loop's motion of the commanded target. ValueError for other keys than `action_features`."""
        if set(action) != set(ACTIONS):
            unknown, missing = sorted(set(action) - set(ACTIONS)), sorted(set(ACTIONS) - set(action))
            raise ValueError(f"action has unknown {unknown} and lacks {missing}; states are no actions")
        values = [float(action[key]) for key in ACTIONS]
        if not np.isfinite(values).all():
            raise ValueError(f"action is not finite: {values}")
        self._actions.publish(JointState(name=list(pose.ACTION_NAMES), position=values))
        return action

    def disconnect(self) -> None:
        self.is_connected = False
        self._link.close()

    def _open(self) -> tuple[_Link, Observer]:
        link = _Link("lerobot", self.config.namespace, self.config.use_sim_time)
        self._clock = RobotClock(link.node)
        writable = lambda raw: picture_of_raw(raw).copy()  # LeRobot makes tensors of them  # noqa: E731
        observer = Observer(list(self.cameras), round(self.config.max_age_s * 1e9), writable)
        for name in self.cameras:
            keep = lambda raw, name=name: observer.add_picture(name, stamp_ns_of_raw(raw), raw)  # noqa: E731
            link.listen(Image, f"{name}/image_raw", keep, raw=True)
        link.listen(PoseStamped, "tcp_pose", lambda m: observer.add_pose(stamp_ns(m), matrix_of(m)))
        link.listen(JointState, "joint_states", lambda m: observer.add_opening(stamp_ns(m), m.position[-1]))
        self._actions = link.node.create_publisher(JointState, "teleop/action", QoSProfile(depth=10))
        link.start()
        return link, observer


class CotwinHand(_Unattended, Teleoperator):
    """A person's device. While its clutch is not held the action is to stand still."""

    config_class, name = CotwinHandConfig, "cotwin"
    feedback_features: dict[str, Any] = {}

    def __init__(self, config: CotwinHandConfig):
        super().__init__(config)
        self.config = config
        self._hand = Hand(1 / config.fps, config.speed_m_s, config.turn_rad_s)
        self._R_base_tcp, self._gripper, self._heard = np.eye(3), 1.0, threading.Event()

    @property
    def action_features(self) -> dict[str, Any]:
        return ACTIONS

    def connect(self, calibrate: bool = True) -> None:
        self._device = open_device(TeleopConfig(device=self.config.device, path=self.config.path))
        self._link = _Link("lerobot_hand", self.config.namespace)
        self._link.listen(PoseStamped, "target_pose", self._on_target)
        self._link.listen(JointState, "gripper_command", self._on_gripper)
        self._link.start()
        self.is_connected = True
        if not self._heard.wait(self.config.timeout_s):
            self.disconnect()
            raise DeviceNotConnectedError("no target_pose was heard; is `cotwin up` running?")

    def get_action(self) -> dict[str, Any]:
        action = self._hand.act(self._device.read(), self._R_base_tcp, self._gripper)
        if action is None:
            action = np.append(np.zeros(6), self._gripper)
        return dict(zip(ACTIONS, action.tolist(), strict=True))

    def send_feedback(self, feedback: dict[str, Any]) -> None: ...

    def disconnect(self) -> None:
        self.is_connected = False
        self._link.close()
        self._device.close()

    def _on_target(self, message: PoseStamped) -> None:
        self._R_base_tcp = matrix_of(message)[:3, :3]
        self._heard.set()

    def _on_gripper(self, message: JointState) -> None:
        self._gripper = message.position[0]
