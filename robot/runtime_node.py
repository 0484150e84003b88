"""ROS node around `robot.runtime`: cameras and arm in, actions out, on the policy's grid of the robot's clock.

Pictures are kept as they came off the wire; only the few that a policy sees are unpacked. `action` carries its source
(`policy` or `teleop`) in `header.frame_id`.
"""

import json
import sys
import threading
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger

from bridge import pose
from bridge.embodiment import Embodiment
from bridge.keys import Keys
from bridge.policy_client import PolicyClient
from bridge.telemetry import TelemetryPublisher
from robot import params
from robot.clock import RobotClock
from robot.config import RuntimeConfig
from robot.diagnostics import Diagnostics
from robot.images import picture_of_raw
from robot.observer import Observer
from robot.runtime import GridLoop, Runtime
from robot.spin import go_first, run_node
from robot.stamped import matrix_of, stamp_ns, stamp_ns_of_raw

STATUS_PERIOD_S = 0.2


class RuntimeNode(Node):
    def __init__(self):
        super().__init__("runtime_node")
        self.embodiment = params.declare_embodiment(self)
        self.config = params.declare(self, RuntimeConfig, writable=("instruction",))
        if self.config.realtime and not go_first():
            self.get_logger().info("no real-time scheduling (ulimit -r is 0): a busy machine makes ticks late")
        self.clock = RobotClock(self)
        self.observer = Observer(list(self.embodiment.cameras), round(self.config.max_age_s * 1e9), picture_of_raw)
        client = policy_client(self.config, self.embodiment)
        self.runtime = Runtime(
            self.config, self.embodiment, self.observer, client, self._publish_action, self.clock.now_ns
        )
        self.loop = GridLoop(self.runtime.period_ns, self.runtime.tick, self.clock)
        self.add_on_set_parameters_callback(self._on_parameters)

        newest = QoSProfile(depth=10)
        self._action = self.create_publisher(JointState, "action", newest)
        self._status = self.create_publisher(DiagnosticStatus, "runtime_status", newest)
        self._message = JointState(name=list(pose.ACTION_NAMES))
        if client is not None:  # nobody looks at pictures without a policy
            for name in self.embodiment.cameras:
                receive = lambda raw, name=name: self._on_image(name, raw)  # noqa: E731
                self.create_subscription(Image, f"{name}/image_raw", receive, QoSProfile(depth=2), raw=True)
            self.create_subscription(PoseStamped, "tcp_pose", self._on_pose, newest)
            self.create_subscription(JointState, "joint_states", self._on_joints, newest)
        self.create_subscription(JointState, "teleop/action", self._on_teleop, newest)
        self.create_subscription(DiagnosticStatus, "safety_state", self._on_safety_state, newest)
        self.create_service(Trigger, "~/start", self._on_start)
        self.create_service(Trigger, "~/stop", self._on_stop)
        self._telemetry: TelemetryPublisher | None = None
        if endpoint := self.config.telemetry_endpoint:
            self._telemetry = TelemetryPublisher(endpoint, keys=Keys.at(self.config.keys))
        self.create_timer(STATUS_PERIOD_S, self._tell, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.diagnostics = Diagnostics(self, lambda: [self._figures()])
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self.loop.run, args=(self._closing,), name="runtime", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=2.0)
        if self._telemetry is not None:
            self._telemetry.close()

    def _tell(self) -> None:
        self._status.publish(self._figures())
        if self._telemetry is None:
            return
        fields = self._numbers()
        for key in [key for key, value in fields.items() if isinstance(value, list)]:
            if values := fields.pop(key):
                fields |= {f"{key}_{name}": float(np.percentile(values, q)) for name, q in (("p50", 50), ("p99", 99))}
        self._telemetry.send("runtime", fields)
        if self.runtime.policy is not None:
            self._telemetry.send("policy_client", self.runtime.policy.stats())

    def _publish_action(self, action: np.ndarray, stamp_ns: int, source: str) -> None:
        message = self._message
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
        message.header.frame_id = source
        message.position = np.asarray(action, dtype=np.float64).tolist()
        self._action.publish(message)

    def _on_image(self, camera: str, raw: bytes) -> None:
        self.observer.add_picture(camera, stamp_ns_of_raw(raw), raw)

    def _on_pose(self, message: PoseStamped) -> None:
        self.observer.add_pose(stamp_ns(message), matrix_of(message))

    def _on_joints(self, message: JointState) -> None:
        opening_m = message.position[message.name.index("gripper_opening")]
        self.observer.add_opening(stamp_ns(message), opening_m)

    def _on_teleop(self, message: JointState) -> None:
        try:
            if tuple(message.name) != pose.ACTION_NAMES:
                raise ValueError(f"names are {list(message.name)}")
            self.runtime.teleop.add(message.position)
        except ValueError as error:
            self.get_logger().warning(f"teleop action refused: {error}", throttle_duration_sec=1.0)

    def _on_safety_state(self, message: DiagnosticStatus) -> None:
        self.runtime.arm_state(next((pair.value for pair in message.values if pair.key == "state"), ""))

    def _on_start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = self.runtime.arm_ready and self.runtime.policy is not None
        if response.success:
            self.loop.forget()
            self.runtime.start()
            response.message = f"started: {self.runtime.instruction}"
        else:
            response.message = "the arm is not ready" if self.runtime.policy else "no policy_endpoint is set"
        return response

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.runtime.stop()
        response.success, response.message = True, "stopped"
        return response

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            if parameter.name == "instruction":
                self.runtime.instruction = parameter.value or next(iter(self.embodiment.instructions), "")
        return SetParametersResult(successful=True)

    def _numbers(self) -> dict[str, Any]:
        """State and reason of the last tick; figures since the last start."""
        runtime, tick = self.runtime, self.runtime.last
        state = {"teleop": "TELEOP", "policy": "RUNNING", "hold": "HOLD" if runtime.started else "IDLE"}[tick.source]
        numbers = {"state": state, "reason": tick.reason, "intervention": tick.source == "teleop"}
        numbers["instruction"] = runtime.instruction
        return numbers | runtime.figures() | self.loop.figures()

    def _figures(self) -> DiagnosticStatus:
        """`values`: `_numbers`, lists as JSON."""
        numbers = self._numbers()
        state, reason = numbers["state"], numbers["reason"]
        values = [KeyValue(key=k, value=v if isinstance(v, str) else json.dumps(v)) for k, v in numbers.items()]
        level = DiagnosticStatus.WARN if state == "HOLD" else DiagnosticStatus.OK
        text = f"{state}: {reason}" if reason else state
        return DiagnosticStatus(level=level, name="runtime", message=text, values=values)


def policy_client(config: RuntimeConfig, embodiment: Embodiment) -> PolicyClient | None:
    """None without a policy server. Raises ValueError for keys that are missing, and clear text that would leave this
    machine."""
    if not config.policy_endpoint:
        return None
    return PolicyClient(
        config.policy_endpoint,
        embodiment,
        keys=Keys.at(config.keys, config.peer),
        picture_coding=config.picture_coding,
        resize_pictures=config.resize_pictures,
    )


def main(argv: list[str] | None = None) -> int:
    return run_node(RuntimeNode, argv)


if __name__ == "__main__":
    sys.exit(main())
