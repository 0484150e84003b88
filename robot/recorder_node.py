"""ROS node that records episodes. All thinking is in `robot.recorder`; here messages become calls and back.

`save_episode` puts the episode into the local data set, or hands it to the sender when `demos_endpoint` is set. Its
answer's message is JSON: rows, seconds of CPU, gaps, and where the episode went. `end_episode` ends the episode before
that, while a person is still to say how it went.
"""

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.task import Future
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import SetBool, Trigger

from bridge.dataset import DatasetStore
from bridge.demo_stream import DemoSender
from bridge.episode import finished_episodes, remove_episode, remove_unfinished, set_aside_unfinished
from bridge.errors import BridgeError
from bridge.keys import Keys
from robot import params
from robot.config import setting
from robot.diagnostics import Diagnostics
from robot.images import picture_of_raw
from robot.recorder import EpisodeRecorder, RecorderConfig
from robot.spin import run_node
from robot.stamped import matrix_of, stamp_ns, stamp_ns_of_raw

STATUS_PERIOD_S = 0.5
LOOK_PERIOD_S = 0.05
FIND_S = 5.0  # nodes that have just started find each other one by one
CATCH_UP_S = 10.0  # how long the end of an episode waits for pictures that are under way
QUEUE = 60  # messages of each topic that may wait, two seconds of pictures: a busy machine must not cost a row


@dataclass
class RecorderNodeConfig:
    """Where episodes go, and how streams are matched."""

    dataset_root: str = setting("", "data set that saved episodes go to, when demos_endpoint is empty")
    repo_id: str = setting("cotwin/demonstrations", "LeRobot's name of the data set")
    spool_dir: str = setting("", "where episodes are written and wait to be sent")
    demos_endpoint: str = setting("", "learner that takes episodes, such as tcp://127.0.0.1:5602; empty: none")
    keys: str = setting("", "folder of our keys (`cotwin keys`); empty: clear text, on loopback only")
    peer: str = setting("", "name of the key at the other end, where several could be")
    domain: str = setting("real", "real, stand_in or twin")
    instruction: str = setting("", "what is shown; empty: the first instruction of the embodiment contract")
    recorder: RecorderConfig = field(default_factory=RecorderConfig)


class RecorderNode(Node):
    def __init__(self):
        # Stamps come with the messages: following /clock would be hundreds of callbacks a second for nothing.
        super().__init__("recorder_node", parameter_overrides=[Parameter("use_sim_time", value=False)])
        self.embodiment = params.declare_embodiment(self)
        self.config = params.declare(self, RecorderNodeConfig)
        if not self.config.spool_dir:
            raise ValueError("parameter spool_dir: name the folder where episodes are written")
        self.spool = Path(self.config.spool_dir)
        self.instruction = self.config.instruction or next(iter(self.embodiment.instructions), "")
        if not self.instruction:
            raise ValueError("parameter instruction: the embodiment contract has none to fall back on")
        self.recordings = self.spool / "recordings"
        self.recorder = EpisodeRecorder(self.embodiment, self.config.recorder, self.recordings, self.config.domain)
        self._open_destination()
        self._cpu_s = 0.0

        track = self.recorder.aligner.sample
        for name in ("tcp_pose", "target_pose", "requested_pose"):
            self._subscribe(PoseStamped, name, lambda m, n=name: track(n, stamp_ns(m), matrix_of(m)))
        self._subscribe(JointState, "joint_states", self._on_joints)
        self._subscribe(JointState, "gripper_command", lambda m: track("gripper", stamp_ns(m), tuple(m.position)))
        self._subscribe(JointState, "teleop/action", lambda m: self.recorder.aligner.teleop(stamp_ns(m)))
        for camera in self.embodiment.cameras:
            self._subscribe(Image, f"{camera}/image_raw", lambda m, c=camera: self._on_image(c, m), raw=True)
        # Of groups of their own: while they wait for what is under way, all others must go on.
        self.create_service(Trigger, "start_episode", self._on_start, callback_group=ReentrantCallbackGroup())
        self.create_service(SetBool, "save_episode", self._on_save, callback_group=ReentrantCallbackGroup())
        self.create_service(Trigger, "end_episode", self._on_end, callback_group=ReentrantCallbackGroup())
        self.create_service(Trigger, "discard_episode", self._on_discard)
        self._status = self.create_publisher(DiagnosticStatus, "recorder_status", QoSProfile(depth=10))
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(STATUS_PERIOD_S, lambda: self._status.publish(self._figures()), clock=steady)
        self.diagnostics = Diagnostics(self, lambda: [self._figures()])
        self._caught_up: tuple[Future, float] | None = None  # what `save_episode` waits for, and until when (steady s)
        self._all_heard: tuple[Future, float] | None = None  # the same of `start_episode`
        self.create_timer(LOOK_PERIOD_S, self._look, clock=steady)

    def close(self) -> None:
        if self.recorder.recording:
            self.recorder.discard()
        if self.sender is not None:
            self.sender.close()

    def _open_destination(self) -> None:
        """Also takes care of what an earlier process left in the folder of recordings."""
        self.sender: DemoSender | None = None
        self.store: DatasetStore | None = None
        if self.recordings.is_dir():
            for partial in set_aside_unfinished(self.recordings, self.spool / "interrupted"):
                self.get_logger().warning(f"{partial.name} was interrupted; see cotwin data repair spool={self.spool}")
            remove_unfinished(self.recordings)
        if self.config.demos_endpoint:
            keys = Keys.at(self.config.keys, self.config.peer)
            self.sender = DemoSender(self.config.demos_endpoint, self.embodiment, self.spool / "outgoing", keys=keys)
        elif self.config.dataset_root:
            root, fps = Path(self.config.dataset_root), self.config.recorder.fps
            self.store = DatasetStore.open_or_create(root, self.config.repo_id, self.embodiment, fps)
        else:
            raise ValueError("parameter dataset_root: name the data set's folder, or set demos_endpoint")
        for folder in finished_episodes(self.recordings):
            self._deliver(folder)

    def _subscribe(self, kind: Any, topic: str, callback: Any, raw: bool = False) -> None:
        self.create_subscription(kind, topic, callback, QoSProfile(depth=QUEUE), raw=raw)

    def _on_joints(self, message: JointState) -> None:
        if message.name and message.name[-1] == "gripper_opening":
            self.recorder.aligner.sample("opening", stamp_ns(message), message.position[-1])

    def _on_image(self, camera: str, raw: bytes) -> None:
        if self.recorder.recording:  # between episodes pictures are not even unpacked
            self.recorder.image(camera, stamp_ns_of_raw(raw), picture_of_raw(raw))

    async def _on_start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        aligner = self.recorder.aligner
        if aligner.unheard and not self.recorder.recording and self._all_heard is None:
            ready = Future()
            self._all_heard = ready, time.monotonic() + FIND_S
            await ready
        with self._answering(response):
            if aligner.unheard:  # a publisher that was not found yet would break the episode two seconds later
                raise ValueError(f"no {', '.join(aligner.unheard)} in {FIND_S} s: does the arm's node run?")
            response.message = self.recorder.start(self.instruction)
            self._cpu_s = time.process_time()
        return response

    async def _on_end(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        await self._end()
        with self._answering(response):
            self.recorder.finish()
        return response

    async def _on_save(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        await self._end()
        with self._answering(response):
            folder, stats = self.recorder.save(request.data)
            place = self._deliver(folder)
            figures = asdict(stats) | {"repeated": sum(stats.repeated.values()), "fps": self.config.recorder.fps}
            figures |= {"cpu_s": round(time.process_time() - self._cpu_s, 3), "episode": place}
            response.message = json.dumps(figures)
        return response

    def _on_discard(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._answering(response):
            self.recorder.discard()
        return response

    async def _end(self) -> None:
        """The running episode, and wait for the pictures of it that are under way."""
        if self.recorder.recording and self._caught_up is None:
            self.recorder.end()
            ready = Future()
            self._caught_up = ready, time.monotonic() + CATCH_UP_S
            await ready

    def _look(self) -> None:
        if self._caught_up is not None and (self.recorder.caught_up or time.monotonic() > self._caught_up[1]):
            (ready, _), self._caught_up = self._caught_up, None
            ready.set_result(None)
        if self._all_heard is not None and (not self.recorder.aligner.unheard or time.monotonic() > self._all_heard[1]):
            (ready, _), self._all_heard = self._all_heard, None
            ready.set_result(None)

    def _deliver(self, folder: Path) -> str:
        """Into the data set, or into the sender's spool; where it is safe the recording may go."""
        place = folder.name
        if self.sender is not None:
            self.sender.enqueue(folder)
        elif self.store is not None:
            place = str(self.store.append(folder))
        remove_episode(folder)
        return place

    @contextlib.contextmanager
    def _answering(self, response: Any):
        """What a caller can get wrong, and what broke the episode, is the answer and not the end of the node."""
        try:
            yield
            response.success = True
        except (ValueError, RuntimeError, OSError, BridgeError) as error:  # OSError: a full disk
            response.success, response.message = False, str(error)
            self.get_logger().error(str(error))

    def _figures(self) -> DiagnosticStatus:
        stats, broken = self.recorder.aligner.stats, self.recorder.broken
        values = {
            "recording": self.recorder.recording,
            "rows": stats.rows,
            "repeated": sum(stats.repeated.values()),
            "max_gap_ms": round(stats.max_gap_ms, 1),
            "backlog": stats.max_backlog,
            "pending": self.sender.pending() if self.sender is not None else 0,
            "send_error": (self.sender.stats()["error"] or "") if self.sender is not None else "",
        }
        pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        level = DiagnosticStatus.ERROR if broken else DiagnosticStatus.OK
        text = broken or ("recording" if self.recorder.recording else "waiting")
        return DiagnosticStatus(level=level, name="recorder", message=text, values=pairs)


def main(argv: list[str] | None = None) -> int:
    return run_node(RecorderNode, argv)


if __name__ == "__main__":
    sys.exit(main())
