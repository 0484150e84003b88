"""ROS node of one arm and its hand. All thinking is in `robot.arm`; here messages become calls and back.

Topics, services and stamps: docs/architecture.md. `joint_states` and `tcp_pose` carry the time of the arm's state,
`target_pose`, `requested_pose` and `gripper_command` the time of sending.
"""

import logging
import os
import sys
from collections import Counter
from concurrent.futures import Future
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Empty
from std_srvs.srv import Trigger

from bridge.pose import ACTION_NAMES, quat_xyzw_from_matrix
from robot import params
from robot.arm import ArmDriver, Snapshot
from robot.clock import RobotClock
from robot.config import ArmConfig
from robot.diagnostics import Diagnostics
from robot.frames import Frames, transform
from robot.safety import State, UnsafeAction
from robot.spin import run_node

JOINT_NAMES = [f"fr3_joint{n}" for n in range(1, 8)] + ["gripper_opening"]
LEVELS = {State.IDLE: DiagnosticStatus.OK, State.RUNNING: DiagnosticStatus.OK, State.FAULT: DiagnosticStatus.ERROR}
STATUS_PERIOD_S = 0.2


class ArmNode(Node):
    def __init__(self):
        super().__init__("arm_node")
        self.embodiment = params.declare_embodiment(self)
        self.config = params.declare(self, ArmConfig)
        self.clock = RobotClock(self)
        self.arm = ArmDriver(self.config, self.embodiment, self.clock.now_ns)
        self._waiting: list[tuple[Future, Any]] = []  # answers that services wait for
        self._refused: Counter[str] = Counter()
        self._last_state_ns = self._last_transition = -1
        self._status_in = 0.0

        states = QoSProfile(depth=10)
        self._joint_states = self.create_publisher(JointState, "joint_states", states)
        self._tcp_pose = self.create_publisher(PoseStamped, "tcp_pose", states)
        self._target_pose = self.create_publisher(PoseStamped, "target_pose", states)
        self._requested_pose = self.create_publisher(PoseStamped, "requested_pose", states)
        self._gripper_command = self.create_publisher(JointState, "gripper_command", states)
        # Whoever joins late still hears the newest state.
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._safety_state = self.create_publisher(DiagnosticStatus, "safety_state", latched)
        self._frames = Frames(self)
        self.diagnostics = Diagnostics(self, lambda: [self._status(self.arm.snapshot())])
        self.create_subscription(JointState, "action", self._on_action, QoSProfile(depth=10))
        self.create_subscription(Bool, "deadman", lambda m: self.arm.hear_deadman(m.data), QoSProfile(depth=1))
        self.create_subscription(Empty, "heartbeat", lambda _: self.arm.hear_heartbeat(), QoSProfile(depth=1))
        # Services of their own group: one that waits must not keep the timer from running, which ends its waiting.
        services = ReentrantCallbackGroup()
        self.create_service(Trigger, "acknowledge", self._on_acknowledge, callback_group=services)
        self.create_service(Trigger, "stop", self._on_stop, callback_group=services)
        self.create_service(Trigger, "home", self._on_home, callback_group=services)

        self._joints = JointState(name=JOINT_NAMES)
        self._gripper = JointState(name=["sent", "requested"])
        self._poses = {p: _pose_message() for p in (self._tcp_pose, self._target_pose, self._requested_pose)}
        self._period_s = 1 / self.config.state_rate_hz
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # goes on when simulated time stands still
        self.create_timer(self._period_s, self._publish, clock=steady)
        self.arm.start()

    def close(self) -> None:
        self.arm.close()

    def _on_action(self, message: JointState) -> None:
        stamp = message.header.stamp
        if tuple(message.name) != ACTION_NAMES:
            self._refused["names"] += 1
            self.get_logger().error(f"action refused: names {list(message.name)}", throttle_duration_sec=1.0)
            return
        try:
            self.arm.command(message.position, stamp.sec * 1_000_000_000 + stamp.nanosec)
        except UnsafeAction as error:
            self.get_logger().warning(f"action refused: {error}", throttle_duration_sec=1.0)

    async def _on_acknowledge(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self.arm.machine.state is not State.FAULT:
            response.success, response.message = True, f"no fault: {self.arm.machine.state}"
            return response
        return await self._answer(self.arm.acknowledge(), response, "fault acknowledged")

    async def _on_home(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return await self._answer(self.arm.home(), response, "at home")

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.arm.stop()
        response.success, response.message = True, "stopping; acknowledge to go on"
        return response

    async def _answer(self, future: Future, response: Trigger.Response, done: str) -> Trigger.Response:
        """Wait without blocking the executor: `_publish` looks whether the arm's thread has finished."""
        ready = rclpy.task.Future()
        self._waiting.append((future, ready))
        await ready
        error = future.exception()
        response.success, response.message = error is None, done if error is None else str(error)
        return response

    def _publish(self) -> None:
        snapshot, now_ns = self.arm.snapshot(), self.clock.now_ns()
        for future, ready in [w for w in self._waiting if w[0].done()]:
            self._waiting.remove((future, ready))
            ready.set_result(None)
        sample, streamed = snapshot.sample, snapshot.streamed
        opening_m = snapshot.gripper_opening_m
        if sample is not None and sample.stamp_ns > self._last_state_ns and opening_m is not None:
            self._last_state_ns = sample.stamp_ns
            _stamp(self._joints, sample.stamp_ns)
            self._joints.position = [*sample.q_rad.tolist(), opening_m]
            self._joint_states.publish(self._joints)
            self._publish_pose(self._tcp_pose, sample.T_base_tcp, sample.stamp_ns)
            self._frames.publish([transform("base", "tcp", sample.T_base_tcp, sample.stamp_ns)])
        if streamed is not None:
            self._publish_pose(self._target_pose, streamed.T_base_target, now_ns)
            self._publish_pose(self._requested_pose, streamed.T_base_requested, now_ns)
            _stamp(self._gripper, now_ns)
            self._gripper.position = [snapshot.gripper_sent, snapshot.gripper_requested]
            self._gripper_command.publish(self._gripper)
        self._status_in -= self._period_s
        if self._status_in <= 0 or snapshot.num_transitions != self._last_transition:
            self._status_in, self._last_transition = STATUS_PERIOD_S, snapshot.num_transitions
            self._safety_state.publish(self._status(snapshot))

    def _publish_pose(self, publisher: Any, T, stamp_ns: int) -> None:
        message = self._poses[publisher]
        _stamp(message, stamp_ns)
        position, orientation = message.pose.position, message.pose.orientation
        position.x, position.y, position.z = T[:3, 3].tolist()
        orientation.x, orientation.y, orientation.z, orientation.w = quat_xyzw_from_matrix(T[:3, :3]).tolist()
        publisher.publish(message)

    def _status(self, snapshot: Snapshot) -> DiagnosticStatus:
        level = LEVELS.get(snapshot.state, DiagnosticStatus.WARN)
        values = {"state": str(snapshot.state), "reason": snapshot.reason, "actions": snapshot.num_actions}
        values["missed"] = snapshot.num_missed
        values |= {f"clipped.{name}": count for name, count in snapshot.num_clips.items()}
        values |= {f"refused.{name}": count for name, count in (self._refused + snapshot.num_rejected).items()}
        values["state_age_ms"] = f"{snapshot.age_s * 1e3:.0f}"
        pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        text = f"{snapshot.state}: {snapshot.reason}"
        return DiagnosticStatus(level=level, name="arm", message=text, hardware_id=self.config.host, values=pairs)


def _pose_message() -> PoseStamped:
    message = PoseStamped()
    message.header.frame_id = "base"
    return message


def _stamp(message: Any, stamp_ns: int) -> None:
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)


def main(argv: list[str] | None = None) -> int:
    code = run_node(ArmNode, argv)
    # A thread that was left behind inside a call to a robot that has gone would keep the process from ending cleanly.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
