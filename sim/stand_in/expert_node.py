"""A scripted person at the teleoperation device: picks the cube and puts it on the plate, in the stand-in cell only.

ROS node `expert_node`. Publishes `teleop/action` at the policy rate while it works, then one `teleop/done` (whether its
script came to its end). Services `~/start` and `~/stop`. It knows the cell's object poses, which nobody could at a real
table.
"""

import sys
from collections import deque
from pathlib import Path

import numpy as np
import rclpy
import yaml
from geometry_msgs.msg import PoseStamped
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from bridge.config import CONFIG_DIR
from bridge.embodiment import Embodiment
from bridge.pose import ACTION_NAMES, integrate, matrix_from_quat_xyzw, pose
from sim.expert import PickPlaceExpert
from sim.stand_in.client import CellClient
from sim.stand_in.errors import CellGone

CELL_TIMEOUT_S = 3.0
TRAIL_STEPS = 3  # the stream may be this far behind
AT_REST_M = 2e-4
OFF_THE_WAY_M = 0.005


class TargetEstimate:
    """The last commanded target, [4, 4]. What is streamed walks towards it and trails by a step or two, so this counts
    along; it believes the stream again when both rest, or when the stream leaves the way (clipped, or moved by others).
    """

    def __init__(self, T_base_streamed: np.ndarray):
        self._restart(T_base_streamed)

    def correct(self, T_base_streamed: np.ndarray) -> np.ndarray:
        """The estimate, given what is streamed now, one step after the last call."""
        moved_m = np.linalg.norm(T_base_streamed[:3, 3] - self._streamed_pos_m)
        way_m = [T[:3, 3] for T in self._targets]
        counted_m = np.linalg.norm(way_m[-1] - way_m[0])
        legs = zip(way_m, way_m[1:] or way_m, strict=False)
        off_m = min(_distance_m(T_base_streamed[:3, 3], a, b) for a, b in legs)
        if off_m > OFF_THE_WAY_M or max(moved_m, counted_m) < AT_REST_M:
            self._restart(T_base_streamed)
        self._streamed_pos_m = T_base_streamed[:3, 3]
        return self._targets[-1]

    def add(self, action: np.ndarray) -> None:
        self._targets.append(integrate(self._targets[-1], action))

    def _restart(self, T_base_streamed: np.ndarray) -> None:
        self._targets = deque([T_base_streamed], maxlen=TRAIL_STEPS + 1)
        self._streamed_pos_m = T_base_streamed[:3, 3]


def _distance_m(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """From a point to a line segment."""
    along = end - start
    share = np.clip((point - start) @ along / max(along @ along, 1e-12), 0.0, 1.0)
    return float(np.linalg.norm(point - start - share * along))


class ExpertNode(Node):
    def __init__(self):
        super().__init__("expert_node")
        self.embodiment = _embodiment(self.declare_parameter("embodiment", "fr3_tabletop").value)
        endpoint = self.declare_parameter("cell_control", "tcp://127.0.0.1:5610").value
        self._seed = self.declare_parameter("seed", 0).value
        self._cell = CellClient(endpoint, CELL_TIMEOUT_S)
        self._expert = PickPlaceExpert(self.embodiment, self._seed)
        self._streamed: np.ndarray | None = None
        self._target: TargetEstimate | None = None  # None: quiet
        self._actions = self.create_publisher(JointState, "teleop/action", 10)
        self._done = self.create_publisher(Bool, "teleop/done", 10)
        self.create_subscription(PoseStamped, "target_pose", self._on_target, qos_profile_sensor_data)
        self.create_service(Trigger, "~/start", self._on_start)
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.create_timer(self.embodiment.period_s, self._step)  # ROS time

    def close(self) -> None:
        self._cell.close()

    def _on_target(self, message: PoseStamped) -> None:
        p, q = message.pose.position, message.pose.orientation
        self._streamed = pose([p.x, p.y, p.z], matrix_from_quat_xyzw([q.x, q.y, q.z, q.w]))

    def _on_start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._streamed is None:
            response.success, response.message = False, "no target_pose yet: is the arm node running?"
            return response
        self._expert.reset(self._seed)
        response.success, response.message = True, f"started with seed {self._seed}"
        self._seed += 1
        self._target = TargetEstimate(self._streamed)
        return response

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success, response.message = True, "stopped" if self._target is not None else "was quiet"
        self._target = None
        return response

    def _step(self) -> None:
        if self._target is None or self._streamed is None:
            return
        try:
            poses = self._cell.poses()
        except CellGone as error:
            self.get_logger().error(str(error))
            self._finish(False)
            return
        T_base_target = self._target.correct(self._streamed)
        cube_pos_m, plate_pos_m = poses["cube"][:3, 3], poses["plate"][:3, 3]
        action = self._expert.act(T_base_target, poses["gripper_opening_m"], cube_pos_m, plate_pos_m)
        if self._expert.done:
            self._finish(True)
            return
        message = JointState(name=list(ACTION_NAMES), position=action.astype(np.float64).tolist())
        message.header.stamp = self.get_clock().now().to_msg()
        self._actions.publish(message)
        self._target.add(action)

    def _finish(self, done: bool) -> None:
        self._target = None
        self._done.publish(Bool(data=done))


def _embodiment(name: str) -> Embodiment:
    """A name in configs/embodiment, or the path of a contract (.json)."""
    if name.endswith(".json"):
        return Embodiment.load(Path(name))
    return Embodiment.from_dict(yaml.safe_load((CONFIG_DIR / "embodiment" / f"{name}.yaml").read_text()))


def main(argv: list[str] | None = None) -> int:
    rclpy.init(args=argv)
    node = ExpertNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.close()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
