"""The operator's page: cameras, safety state, limits, policy and who is in control, episode marks, and the stop.

Prints an address with a token; open it in a browser on this machine. Space or Esc stops the arm from anywhere on the
page. `host=` opens it to other machines, in clear text: on a network that you trust only. Stop, acknowledge and home
are the arm's own services, start and stop of the policy the runtime's, so whatever they refuse is refused here too.
"""

import base64
import json
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import parameter_value_to_python
from rclpy.parameter_client import AsyncParameterClient
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.task import Future
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import Trigger
from websockets.sync.server import ServerConnection

from bridge.config import command_line
from robot.devices import MARKS
from robot.images import jpeg_of
from robot.page import PageServer
from robot.safety import SafetyLimits
from robot.spin import run_node

STATUSES = ("safety_state", "runtime_status", "recorder_status")
SERVICES = {"stop": "stop", "acknowledge": "acknowledge", "home": "home"}
SERVICES |= {"start policy": "runtime_node/start", "stop policy": "runtime_node/stop"}  # by the word on the page
LIMITS = [field.name for field in fields(SafetyLimits)]
LOOK_PERIOD_S = 0.5
NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@dataclass
class ConsoleConfig:
    """Keys of `cotwin console`."""

    host: str = "127.0.0.1"  # where the page is served
    port: int = 8091
    namespace: str = ""  # of the arm, where there are two
    rate_hz: float = 5.0  # of the page: its pictures and its numbers
    jpeg_quality: int = 75

    def __post_init__(self):
        if not 0.5 <= self.rate_hz <= 30 or not 1 <= self.jpeg_quality <= 100:
            raise ValueError(
                f"rate_hz {self.rate_hz}, jpeg_quality {self.jpeg_quality}: allowed are 0.5 to 30 and 1 to 100"
            )


class ConsoleNode(Node):
    """What is shown is replaced whole in ROS's thread, so that each browser's thread may read it at any time."""

    def __init__(self, config: ConsoleConfig):
        super().__init__("console", namespace=config.namespace or None)
        self.config = config
        self._heard: dict[str, tuple[dict[str, Any], float]] = {}  # (status, when), by topic or by its name
        self._pictures: dict[str, tuple[str, float]] = {}  # (JPEG as base64, when), by camera
        self._limits: dict[str, Any] = {}
        self._prompt = self._note = ""
        self._viewers: set[ServerConnection] = set()
        self._images: dict[str, Any] = {}  # subscriptions by topic
        for topic in STATUSES:
            self.create_subscription(DiagnosticStatus, topic, partial(self._keep, topic), QoSProfile(depth=10))
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, QoSProfile(depth=10))
        self.create_subscription(String, "operator/prompt", self._on_prompt, LATCHED)
        self._marks = self.create_publisher(String, "teleop/mark", QoSProfile(depth=10))
        self._calls = {name: self.create_client(Trigger, service) for name, service in SERVICES.items()}
        self._arm = AsyncParameterClient(self, "arm_node")
        self._asked: dict[str, Future] = {}  # whoever asks must hold on to the answer to come
        self.create_timer(LOOK_PERIOD_S, self._look, clock=Clock(clock_type=ClockType.STEADY_TIME))
        page = Path(__file__).with_name("console.html").read_text()
        self.server = PageServer("console", page, self._talk, config.host, config.port)
        print(f"open {self.server.url}", flush=True)

    def close(self) -> None:
        self.server.close()

    def state(self) -> dict[str, Any]:
        """All that the page shows but the pictures. Ages in seconds."""
        now_s, heard = time.monotonic(), self._heard
        shown = {name: status | {"age_s": round(now_s - at_s, 1)} for name, (status, at_s) in heard.items()}
        statuses = {topic: shown.pop(topic, None) for topic in STATUSES}
        return statuses | {
            "health": [shown[name] for name in sorted(shown)],
            "limits": {name: self._limits[name] for name in LIMITS if name in self._limits},
            "prompt": self._prompt,
            "note": self._note,
        }

    def _talk(self, connection: ServerConnection) -> None:
        """One browser. It asks for each update, so that one is under way at most: on a slow line pictures come less
        often, and a stop never waits behind them."""
        period_s, due_s, is_asked = 1 / self.config.rate_hz, 0.0, False
        told: dict[str, float] = {}  # when the picture was made that this browser has, by camera
        self._viewers.add(connection)
        try:
            while True:
                left_s = max(0.0, due_s - time.monotonic()) if is_asked else None
                try:
                    message = json.loads(connection.recv(left_s))
                except TimeoutError:
                    connection.send(json.dumps(self.state() | {"pictures": self._news(told)}))
                    is_asked, due_s = False, time.monotonic() + period_s
                    continue
                is_asked |= "next" in message
                if "call" in message:
                    self._call(message["call"])
                if "mark" in message:
                    self._mark(message["mark"])
        finally:
            self._viewers.discard(connection)

    def _news(self, told: dict[str, float]) -> dict[str, dict[str, Any]]:
        pictures, now_s = {}, time.monotonic()
        for camera, (jpeg, at_s) in self._pictures.items():
            pictures[camera] = {"age_s": round(now_s - at_s, 1)} | ({"jpeg": jpeg} if told.get(camera) != at_s else {})
            told[camera] = at_s
        return pictures

    def _call(self, name: str) -> None:
        client = self._calls[name]
        if not client.service_is_ready():
            self._note = f"{name}: nobody answers {SERVICES[name]}"
            return
        self._note = f"{name}: asked"
        self._asked[name] = client.call_async(Trigger.Request())
        self._asked[name].add_done_callback(partial(self._on_answer, name))

    def _on_answer(self, name: str, future: Future) -> None:
        answer = future.result()
        self._note = f"{name}: {answer.message}" if answer.success else f"{name} refused: {answer.message}"

    def _mark(self, name: str) -> None:
        if name not in MARKS:
            raise ValueError(f"mark {name!r}: known are {MARKS}")
        self._marks.publish(String(data=name))
        self._note = f"mark: {name}"

    def _keep(self, name: str, status: DiagnosticStatus) -> None:
        values = {pair.key: pair.value for pair in status.values}
        if latencies_ms := json.loads(values.pop("chunk_latency_ms", "[]")):
            p50, p99 = np.percentile(latencies_ms, [50, 99])
            values |= {"chunk_latency_p50_ms": f"{p50:.1f}", "chunk_latency_p99_ms": f"{p99:.1f}"}
        values.pop("tick_jitter_ms", None)  # thousands of numbers, and their percentiles are there too
        told = {"name": status.name, "level": status.level[0], "text": status.message, "values": values}
        self._heard = self._heard | {name: (told, time.monotonic())}

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        """Those of this namespace: `node: part`, or `namespace/node: part`."""
        own = self.get_namespace().strip("/")
        for status in message.status:
            if status.name.partition(":")[0].rpartition("/")[0] == own:
                self._keep(status.name, status)

    def _on_prompt(self, message: String) -> None:
        self._prompt = message.data

    def _on_image(self, camera: str, raw: bytes) -> None:
        _, made_s = self._pictures.get(camera, ("", -np.inf))
        if (now_s := time.monotonic()) - made_s >= 0.9 / self.config.rate_hz:
            jpeg = jpeg_of(deserialize_message(raw, Image), self.config.jpeg_quality)
            self._pictures = self._pictures | {camera: (base64.b64encode(jpeg).decode(), now_s)}

    def _look(self) -> None:
        """Cameras are listened to only while somebody looks: their pictures are most of what this costs."""
        if not self._viewers:
            for subscription in self._images.values():
                self.destroy_subscription(subscription)
            self._images, self._pictures = {}, {}
            return
        own = self.get_namespace().rstrip("/") + "/"
        for topic, _ in self.get_topic_names_and_types():
            camera = topic.removeprefix(own).removesuffix("/image_raw")
            if topic == f"{own}{camera}/image_raw" and "/" not in camera and topic not in self._images:
                receive = partial(self._on_image, camera)
                self._images[topic] = self.create_subscription(Image, topic, receive, NEWEST, raw=True)
        if not self._arm.services_are_ready():
            self._limits = {}  # a new one may have others
            return
        for name in LIMITS:  # one by one: a list with one that is not set is not answered at all
            if name not in self._limits:
                self._asked[name] = self._arm.get_parameters([f"limits.{name}"])
                self._asked[name].add_done_callback(partial(self._on_limit, name))

    def _on_limit(self, name: str, future: Future) -> None:
        self._limits = self._limits | {name: next(map(parameter_value_to_python, future.result().values), None)}


def main(argv: list[str]) -> int:
    config = command_line("console", ConsoleConfig, argv, __doc__)
    return run_node(lambda: ConsoleNode(config), [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
