"""The robot's clock between the ticks that ROS hears of it."""

import threading
import time
from collections import deque

from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from rclpy.node import Node

MAX_AHEAD_NS = 20_000_000  # past the last /clock message time stands still: the world may have stopped
SLEEP_S = 0.005


class RobotClock:
    """ROS time in nanoseconds, never going back.

    On a real cell that is the system clock. With `use_sim_time` ROS only knows the last `/clock` message; between two
    messages this goes on at the pace of the last ones, so that a 200 Hz clock gives ticks better than 5 ms. Any thread
    may ask, one may sleep by it.
    """

    def __init__(self, node: Node):
        self._simulated = bool(node.get_parameter("use_sim_time").value)
        self._anchors: deque[tuple[float, int]] = deque(maxlen=20)  # (steady s, ROS ns)
        self._last_ns = self._wanted_ns = 0
        self._lock = threading.Lock()  # a world that is started anew must not meet a reader of the last one's time
        self._reached = threading.Event()  # a /clock message has come to what `sleep_until` waits for
        self._clock = node.get_clock()
        if self._simulated:
            any_jump = JumpThreshold(min_forward=Duration(nanoseconds=1), min_backward=Duration(nanoseconds=-1))
            self._handle = self._clock.create_jump_callback(any_jump, post_callback=self._on_time)

    def now_ns(self) -> int:
        """0 before the first `/clock` message."""
        if not self._simulated:
            return time.time_ns()
        with self._lock:
            if not self._anchors:
                return 0
            steady_s, ros_ns = self._anchors[-1]
            ahead_ns = min(MAX_AHEAD_NS, (time.monotonic() - steady_s) * self._pace() * 1e9)
            self._last_ns = max(self._last_ns, ros_ns + int(ahead_ns))
            return self._last_ns

    @property
    def pace(self) -> float:
        """ROS seconds in a wall second."""
        with self._lock:
            return self._pace()

    def _pace(self) -> float:
        if not self._simulated or len(self._anchors) < 2:
            return 1.0
        (first_s, first_ns), (last_s, last_ns) = self._anchors[0], self._anchors[-1]
        return min(10.0, (last_ns - first_ns) * 1e-9 / max(1e-6, last_s - first_s))

    def sleep_until(self, until_ns: int, closing: threading.Event) -> bool:
        """False when `closing` was set before that time. Short sleeps, because simulated time may stop; and a message
        that brings the time ends them, because it may leap."""
        self._wanted_ns, before_ns = until_ns, -1
        self._reached.clear()
        while (left_ns := until_ns - (now_ns := self.now_ns())) > 0 and not closing.is_set():
            left_s = left_ns * 1e-9 / max(0.05, self.pace)
            if self._simulated:
                # However little is left: while time stands still, or has not begun, only a message brings it on.
                self._reached.wait(SLEEP_S if now_ns == before_ns else min(left_s, SLEEP_S))
                before_ns = now_ns
                self._reached.clear()  # else a message that came too early for this time would make the wait a spin
            else:
                closing.wait(left_s)
        return not closing.is_set()

    def _on_time(self, jump) -> None:
        ros_ns = self._clock.now().nanoseconds
        with self._lock:
            if self._anchors and ros_ns < self._anchors[-1][1]:  # the world was started anew
                self._anchors.clear()
                self._last_ns = 0
            self._anchors.append((time.monotonic(), ros_ns))
        if ros_ns >= self._wanted_ns:
            self._reached.set()
