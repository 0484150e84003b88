"""What recording and evaluating share: start the graph once, talk to its nodes, and notice who died.

Every wait has a limit and a message; every wait also watches the graph's processes and the arm's safety state.
"""

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from bridge.embodiment import Embodiment, differences
from bridge.errors import RobotFault
from bridge.pose import ACTION_NAMES
from bridge.video import VideoWriter
from robot.images import picture_of
from robot.params import load_embodiment
from robot.scene import CellScene, OperatorScene, Scene, SessionError
from robot.up import Graph


@dataclass
class SessionConfig:
    """The graph and the scene. `launch_file` empty: the nodes are running already (`cotwin up`)."""

    launch_file: str = "launch/cell.launch.yaml"
    launch_args: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    cell_endpoint: str = "tcp://127.0.0.1:5610"  # empty: a real cell, where a person sets the scene and judges
    start_timeout_s: float = 90.0
    answer_timeout_s: float = 15.0  # of a service that moves nothing
    home_timeout_s: float = 40.0
    min_open_share: float = 0.9  # of the finger travel, before a scene is reset


class Session:
    """Use as a context manager: leaving it stops the graph, whatever happened inside."""

    def __init__(
        self,
        config: SessionConfig,
        embodiment: Embodiment,
        node_name: str,
        needs: list[str],
        launch_args: dict[str, str],
        log: Path,
    ):
        """`needs`: services that must exist before the session is ready. `launch_args` give way to those of `config`.
        `log`: where the graph's output goes. ValueError for a contract that the nodes could not load by name."""
        self.config, self.embodiment, self.log = config, embodiment, log
        self._needs, self._args = needs, launch_args | {"embodiment": contract_name(embodiment)}
        self._status: dict[str, DiagnosticStatus] = {}
        self._opening_m: float | None = None
        self.expert_done: bool | None = None  # whether its script came to its end; None: not heard since set so
        self._newest_stamp = Time()
        self._marks: deque[str] = deque(maxlen=20)  # of the person's device
        self._name = node_name
        self._exits = contextlib.ExitStack()
        self.graph: Graph | None = None
        self.scene: Scene

    def __enter__(self) -> "Session":
        with self._exits:
            if self.config.launch_file:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                out = self._exits.enter_context(open(self.log, "a"))
                self.graph = self._exits.enter_context(Graph(self.config.launch_file, self._launch_args(), out))
            self._open_node()
            cell = self.config.cell_endpoint
            self.scene = CellScene(cell, self.check) if cell else self._operator()
            self._exits.callback(self.scene.close)
            self._wait_until_ready()
            self._exits = self._exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def status(self, topic: str) -> dict[str, str]:
        """The newest values of a DiagnosticStatus topic; empty before the first message."""
        message = self._status.get(topic)
        return {pair.key: pair.value for pair in message.values} if message else {}

    @property
    def safety_state(self) -> str:
        return self.status("safety_state").get("state", "")

    @property
    def safety_reason(self) -> str:
        return self.status("safety_state").get("reason", "")

    def check(self) -> None:
        """Raise SessionError, naming it, when a process of the graph has ended."""
        if self.graph is not None and (ended := self.graph.ended()):
            died = "; ".join(f"{name} ended with code {code}" for name, code in ended.items())
            raise SessionError(f"{died}. Its output is in {self.log}")

    def check_arm(self) -> None:
        """Also raise RobotFault when the arm is in FAULT."""
        self.check()
        if self.safety_state == "FAULT":
            raise RobotFault(self.safety_reason or "the arm is in FAULT")

    def spin(self, duration_s: float) -> None:
        until_s = time.monotonic() + duration_s
        while (left_s := until_s - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left_s)

    def wait(
        self,
        ready: Callable[[], bool],
        timeout_s: float,
        what: str,
        check: Callable[[], None] | None = None,
        every_s: float = 0.0,
    ) -> None:
        """Handle messages until `ready`, which is asked after each of them, or every `every_s`.

        Raises SessionError saying that `what` did not happen, and whatever `check` (default: `self.check`) raises.
        """
        until_s = time.monotonic() + timeout_s
        while not ready():
            (check or self.check)()
            if time.monotonic() > until_s:
                raise SessionError(f"{what} did not happen within {timeout_s:g} s")
            if every_s:
                self.spin(every_s)
            else:
                self._executor.spin_once(timeout_sec=0.02)

    def call(self, service: str, success: bool | None = None, timeout_s: float | None = None) -> str:
        """Call a Trigger (or, with `success`, a SetBool) and return its message. SessionError when it is refused."""
        kind, request = (Trigger, Trigger.Request()) if success is None else (SetBool, SetBool.Request(data=success))
        answer = self._answer(kind, service, request, timeout_s or self.config.answer_timeout_s)
        if not answer.success:
            raise SessionError(f"{service} was refused: {answer.message}")
        return answer.message

    def prepare(self, seed: int) -> None:
        """A fresh scene before an arm at home with an open hand."""
        if self.safety_state == "FAULT":
            self._acknowledge()
        self._open_hand()
        try:
            self.call("home", timeout_s=self.config.home_timeout_s)
        except SessionError:  # an arm that faults on its way gets one more chance; a dead node does not
            self.spin(0.5)  # its state is told apart from its answer
            if self.safety_state != "FAULT":
                raise
            self._acknowledge()
            self.call("home", timeout_s=self.config.home_timeout_s)
        self.wait(self._at_rest, self.config.home_timeout_s, "reaching home", self.check_arm)
        self.scene.reset(seed)

    def record_video(self, camera: str, path: Path) -> "VideoTap":
        return VideoTap(self.node, camera, path)

    def _launch_args(self) -> dict[str, str]:
        cell = {"cell_control": self.config.cell_endpoint} if self.config.cell_endpoint else {}
        return self._args | cell | self.config.launch_args

    def _acknowledge(self) -> None:
        """In the stand-in cell the session is the operator. At a real arm nobody but a person clears a fault."""
        if isinstance(self.scene, OperatorScene):
            raise RobotFault(f"{self.safety_reason}; look at the arm, call the service acknowledge, and start again")
        self.call("acknowledge")
        self.wait(lambda: self.safety_state != "FAULT", self.config.answer_timeout_s, "leaving FAULT")

    def _at_rest(self) -> bool:
        return self.safety_state in ("IDLE", "HOLD", "RUNNING")

    def _open_hand(self) -> None:
        """Through the teleoperation topic, as a person would."""
        wanted_m = self.config.min_open_share * self.embodiment.gripper_opening_m(1.0)
        period_s, next_s = self.embodiment.period_s, 0.0

        def opened() -> bool:
            nonlocal next_s
            if self._opening_m is not None and self._opening_m >= wanted_m:
                return True
            if self._opening_m is not None and time.monotonic() >= next_s:
                next_s = time.monotonic() + period_s
                self._send_open()
            return False

        states = self.node.create_subscription(JointState, "joint_states", self._on_joints, qos_profile_sensor_data)
        self._opening_m = None
        try:
            self.wait(opened, self.config.answer_timeout_s, "opening the hand", self.check_arm)
        finally:
            self.node.destroy_subscription(states)

    def _send_open(self) -> None:
        message = JointState(name=list(ACTION_NAMES), position=[0.0] * 6 + [1.0])
        message.header.stamp = self._newest_stamp
        self._teleop.publish(message)

    def _operator(self) -> OperatorScene:
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        prompts = self.node.create_publisher(String, "operator/prompt", latched)  # the console shows them
        return OperatorScene(self._hear_operator, self._marks, lambda text: prompts.publish(String(data=text)))

    def _hear_operator(self) -> None:
        self.check()
        self.spin(0.01)

    def _on_expert_done(self, message: Bool) -> None:
        self.expert_done = message.data

    def _on_joints(self, message: JointState) -> None:
        if "gripper_opening" in message.name:
            self._opening_m = message.position[list(message.name).index("gripper_opening")]
            self._newest_stamp = message.header.stamp  # the robot's clock, without following it ourselves

    def _open_node(self) -> None:
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._exits.callback(rclpy.shutdown, context=self._context)
        namespace = self.config.namespace or None
        self.node = Node(self._name, context=self._context, namespace=namespace, enable_rosout=False)
        self._exits.callback(self.node.destroy_node)
        self._executor = rclpy.executors.SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._exits.callback(self._executor.shutdown)
        few = QoSProfile(depth=10)
        for topic in ("safety_state", "runtime_status", "recorder_status"):
            keep = lambda message, topic=topic: self._status.update({topic: message})  # noqa: E731
            self.node.create_subscription(DiagnosticStatus, topic, keep, few)
        self.node.create_subscription(Bool, "teleop/done", self._on_expert_done, few)
        self.node.create_subscription(String, "teleop/mark", lambda m: self._marks.append(m.data), few)
        self._teleop = self.node.create_publisher(JointState, "teleop/action", few)
        self._clients: dict[str, Any] = {}

    def _client(self, kind: Any, service: str) -> Any:
        if service not in self._clients:
            self._clients[service] = self.node.create_client(kind, service)
        return self._clients[service]

    def _answer(self, kind: Any, service: str, request: Any, timeout_s: float) -> Any:
        client = self._client(kind, service)
        self.wait(client.service_is_ready, self.config.answer_timeout_s, f"finding the service {service}")
        future = client.call_async(request)
        self.wait(future.done, timeout_s, f"an answer of {service}")
        return future.result()

    def _wait_until_ready(self) -> None:
        limit_s = self.config.start_timeout_s
        for service in ("home", *self._needs):
            kind = SetBool if service == "save_episode" else Trigger
            self.wait(self._client(kind, service).service_is_ready, limit_s, f"the service {service}")
        self.wait(lambda: self.safety_state not in ("", "DISCONNECTED"), limit_s, "connecting to the arm")


@contextlib.contextmanager
def interrupted_when_left() -> Iterator[None]:
    """SIGTERM and SIGHUP (of a terminal that closes) raise KeyboardInterrupt inside the block, once, where by default
    the process would die and stop nothing. What is ignored (nohup) stays so. For the main thread alone."""
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]

    def interrupt(number: int, _: object) -> None:
        for other in taken:  # the shell sends SIGHUP as well: what stops the robot must not be interrupted again
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def ended_by(session: Session, service: str) -> Iterator[None]:
    """Calls the service as soon as the block ends, however it ends. Should that fail too, the block's error is told
    first; and after a failing call nothing goes on, not even after a RobotFault."""
    try:
        yield
    except BaseException as error:
        try:
            session.call(service)
        except SessionError as later:
            if isinstance(error, (SessionError, RobotFault)) and str(later) not in str(error):
                raise SessionError(f"{error}; and then: {later}") from error
            error.add_note(str(later))
        raise
    session.call(service)


def contract_name(embodiment: Embodiment) -> str:
    """The name by which every process of the graph loads this contract. ValueError when that file says otherwise."""
    stored = load_embodiment(embodiment.name)
    if changed := differences(stored.to_dict(), embodiment.to_dict()):
        raise ValueError(
            f"the embodiment contract differs from configs/embodiment/{embodiment.name}.yaml in {sorted(changed)}: "
            "the nodes load it by name, so write a file of its own and choose it with embodiment=NAME"
        )
    return embodiment.name


class VideoTap:
    """What one camera shows, as an H.264 file of half the size, until `close`."""

    def __init__(self, node: Node, camera: str, path: Path, fps: int = 30):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._node, self._path, self._fps = node, path, fps
        self._writer: VideoWriter | None = None
        self._subscription = node.create_subscription(Image, f"{camera}/image_raw", self._on_image, QoSProfile(depth=4))

    def _on_image(self, message: Image) -> None:
        picture = picture_of(message)[::2, ::2]
        if self._writer is None:
            self._writer = VideoWriter(self._path, self._fps, (picture.shape[0], picture.shape[1]))
        self._writer.add(np.ascontiguousarray(picture))

    def close(self) -> Path | None:
        """The file; None when no picture came."""
        self._node.destroy_subscription(self._subscription)
        if self._writer is None:
            return None
        self._writer.close()
        return self._path
