"""Write what the nodes of a robot say into an MCAP file, for Foxglove, PlotJuggler or any other reader of the format.

Every topic of the namespace, `/diagnostics` and `/rosout`; pictures as JPEG on `<camera>/image_raw/compressed`. A file
whose writer was killed lacks its index and at most the last second: Foxglove reads it, `mcap recover` makes it whole.
"""

import array
import contextlib
import importlib
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mcap.well_known import MessageEncoding, Profile, SchemaEncoding
from mcap.writer import Writer
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image

from bridge.config import command_line
from robot.images import jpeg_of
from robot.spin import NodeError, run_node

CHUNK_BYTES = 32_768  # a second of the arm's topics alone; only whole chunks survive a kill
LOOK_PERIOD_S = 0.5
QUEUE = 60  # messages of a topic that may wait
SHARED = ("/diagnostics", "/rosout")
LEFT_OUT = ("/clock", "/parameter_events")
PICTURES = ("jpeg", "raw", "none")


@dataclass
class SessionLogConfig:
    """Keys of `cotwin session-log`."""

    folder: str = "runs/sessions"  # gets session_<date and time>.mcap, or <namespace>_...
    namespace: str = ""  # of the arm, where there are two
    pictures: str = "jpeg"  # or raw (55 MB/s for two cameras), or none
    jpeg_quality: int = 90

    def __post_init__(self):
        if self.pictures not in PICTURES:
            raise ValueError(f"pictures {self.pictures!r}: allowed are {PICTURES}")


class SessionLog:
    """One MCAP file of serialised ROS messages. Raises FileExistsError: nothing is written over."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb")  # until `close`
        self._writer = Writer(self._file, chunk_size=CHUNK_BYTES)
        self._writer.start(profile=Profile.ROS2, library="cotwin")
        self._schemas: dict[str, int] = {}

    def channel(self, topic: str, kind: str) -> int:
        """`kind`: such as sensor_msgs/msg/Image. Raises ValueError for a message without a known definition."""
        if kind not in self._schemas:
            text = definition(kind).encode()
            self._schemas[kind] = self._writer.register_schema(kind, SchemaEncoding.ROS2, text)
        return self._writer.register_channel(topic, MessageEncoding.CDR, self._schemas[kind])

    def add(self, channel: int, data: bytes) -> None:
        """The time is the system's at the arrival; the robot's is in the message's header."""
        now_ns = time.time_ns()
        self._writer.add_message(channel, now_ns, data, now_ns)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        with self._file:
            self._writer.finish()


class SessionLogNode(Node):
    def __init__(self, config: SessionLogConfig):
        super().__init__("session_log", namespace=config.namespace or None)
        self.config = config
        self._known = set(LEFT_OUT)
        whose = self.get_namespace().strip("/").replace("/", "_") or "session"
        self.path = Path(config.folder) / time.strftime(f"{whose}_%Y%m%d_%H%M%S.mcap")
        with _failing(self.path):
            self.log = SessionLog(self.path)
        self.create_timer(LOOK_PERIOD_S, self._look, clock=Clock(clock_type=ClockType.STEADY_TIME))
        print(f"writing {self.path}", flush=True)

    def close(self) -> None:
        try:
            self.log.close()
        except OSError as error:
            print(f"error: {self.path} has no index: {error.strerror}", file=sys.stderr)

    def _look(self) -> None:
        """Listen to topics that are new."""
        own = self.get_namespace().rstrip("/") + "/"
        for topic, kinds in self.get_topic_names_and_types():
            is_ours = topic.startswith(own) or topic in SHARED
            if is_ours and topic not in self._known and (there := self.get_publishers_info_by_topic(topic)):
                self._known.add(topic)
                self._listen(topic, kinds[0], [info.qos_profile for info in there])
        with _failing(self.path):
            self.log.flush()

    def _listen(self, topic: str, kind: str, offered: list[QoSProfile]) -> None:
        package, _, name = kind.split("/")
        is_picture, receive = kind == "sensor_msgs/msg/Image", self._on_message
        if is_picture and self.config.pictures == "none":
            return
        try:
            if is_picture and self.config.pictures == "jpeg":
                receive = self._on_image
                channel = self.log.channel(f"{topic}/compressed", "sensor_msgs/msg/CompressedImage")
            else:
                channel = self.log.channel(topic, kind)
        except ValueError as error:
            self.get_logger().warning(f"{topic} is not written: {error}")
            return
        qos = QoSProfile(depth=QUEUE)
        if any(profile.reliability is not ReliabilityPolicy.RELIABLE for profile in offered):
            qos.reliability = ReliabilityPolicy.BEST_EFFORT
        if all(profile.durability is DurabilityPolicy.TRANSIENT_LOCAL for profile in offered):
            qos.durability = DurabilityPolicy.TRANSIENT_LOCAL
        self.create_subscription(_class_of(package, name), topic, partial(receive, channel), qos, raw=True)

    def _on_message(self, channel: int, raw: bytes) -> None:
        with _failing(self.path):
            self.log.add(channel, raw)

    def _on_image(self, channel: int, raw: bytes) -> None:
        message = deserialize_message(raw, Image)
        data = array.array("B", jpeg_of(message, self.config.jpeg_quality))
        compressed = CompressedImage(header=message.header, format="jpeg", data=data)
        self._on_message(channel, serialize_message(compressed))


def definition(kind: str) -> str:
    """The .msg text of a message such as geometry_msgs/msg/Pose, followed by those of all messages within it.

    Raises ValueError when one of them is not installed.
    """
    names = [(kind.split("/")[0], kind.split("/")[2])]
    for package, name in names:  # grows
        for field in _class_of(package, name).get_fields_and_field_types().values():
            names += [inner for inner in re.findall(r"(\w+)/(\w+)", field) if inner not in names]
    first, *others = (_text_of(*name) for name in names)
    heads = [f"\n{'=' * 80}\nMSG: {package}/{name}\n" for package, name in names[1:]]
    return first + "".join(head + text for head, text in zip(heads, others, strict=True))


def _class_of(package: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{package}/{name} is not installed: {error}") from error


def _text_of(package: str, name: str) -> str:
    prefixes = [*os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep), sys.prefix]
    for prefix in filter(None, prefixes):
        if (path := Path(prefix, "share", package, "msg", f"{name}.msg")).is_file():
            return path.read_text()
    raise ValueError(f"no {package}/msg/{name}.msg below share/ of {prefixes}")


@contextlib.contextmanager
def _failing(path: Path) -> Any:
    """A full disk ends the log with one line, and nothing else."""
    try:
        yield
    except OSError as error:
        raise NodeError(f"{path}: {error.strerror}") from error


def main(argv: list[str]) -> int:
    config = command_line("session-log", SessionLogConfig, argv, __doc__)
    return run_node(lambda: SessionLogNode(config), [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
