"""The Franka hand: one thread owns `franky.Gripper`. It never makes the arm wait.

A command in [-1, 1] becomes `grasp` (below -hysteresis) or `move` to the commanded opening (above +hysteresis); what
lies between changes nothing. Calls into the hand have no timeout of their own and can spin for ever when the server
dies (measured), so each runs as a future under a watchdog, and what does not come back is left behind.

One command at a time, never interrupted: libfranka erases an answered command from its table of answers outside the
lock that a second command fills it under, so a `stop` beside a running `move` corrupts the heap (seen: one crash of
the process in about fifty). A hand that changes its mind finishes first, in 0.8 s at most at the default speed. For
the same reason a hand is not destroyed while its command runs.
"""

import logging
import threading
import time
from collections.abc import Callable

import franky

from bridge.embodiment import Embodiment
from robot.config import GripperConfig

log = logging.getLogger(__name__)

FRANKY_ERRORS = (franky.Exception, RuntimeError)
POLL_S = 1 / 30
LEAVE_S = 1.5  # a command under way may finish before the hand is let go
SAME_OPENING_M = 0.004
GRASP_EPSILON_M = 0.1  # wide: whatever is between the fingers is the object

Task = tuple[str, float, float]  # "grasp" or "move" or "homing", opening, what `sent` is then

_left_behind: list[object] = []  # destroying a future that never ends would wait for it


class GripperDriver:
    """`opening_m` and `sent` may be read from any thread; `command` returns at once.

    `on_fault(reason)` is called once, from the hand's own thread or from `check`, and the thread ends after it.
    """

    def __init__(self, host: str, config: GripperConfig, embodiment: Embodiment, on_fault: Callable[[str], None]):
        self.host, self.config, self.embodiment = host, config, embodiment
        self.opening_m: float | None = None  # None until the first state
        self.sent = 1.0  # what the hand was last told, in [-1, 1]
        self.requested = 1.0
        self.is_grasped = False
        self.dead = self.is_silent = False
        self._on_fault = on_fault
        self._wanted: Task | None = None
        self._doing: Task | None = None  # or done last
        self._future: franky.BoolFuture | None = None
        self._began_s = 0.0
        self._beat_s = time.monotonic()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="gripper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=LEAVE_S + 0.5)

    def command(self, value: float) -> None:
        """`value` in [-1, 1], finite."""
        self.requested = value
        if value < -self.config.hysteresis:
            wanted = ("grasp", self.embodiment.gripper_closed_m, -1.0)
        elif value > self.config.hysteresis:
            wanted = ("move", float(self.embodiment.gripper_opening_m(value)), value)
        else:
            return
        with self._lock:
            self.sent = wanted[2]
            if self._wanted is None or not _same(self._wanted, wanted):
                self._wanted = wanted

    def forget(self) -> None:
        """Begin nothing any more that was asked for till now. What is under way ends (see above)."""
        with self._lock:
            self._wanted = None
            if self._doing is not None:
                self.sent = self._doing[2]

    def rehome(self) -> None:
        """Find the finger travel anew; a hand that was just switched on does not know it."""
        with self._lock:
            self._wanted, self._doing = ("homing", 0.0, self.sent), None

    @property
    def knows_its_width(self) -> bool:
        return self._max_width_m > 0.01

    _max_width_m = 0.0

    def check(self, now_s: float) -> None:
        """Watchdog, from another thread: a call that does not return ends in a fault, and its thread is left behind."""
        if not self.dead and self._thread.is_alive() and now_s - self._beat_s > self.config.command_timeout_s:
            self._give_up(f"gripper did not answer for {self.config.command_timeout_s:.1f} s")

    def _run(self) -> None:
        gripper, heard_s = None, time.monotonic()
        while gripper is None and not self._closing.is_set():
            self._beat_s = time.monotonic()
            try:
                gripper = franky.Gripper(self.host)
            except FRANKY_ERRORS:
                self._closing.wait(0.3)  # not there yet; the arm waits for both
        while not self._closing.is_set() and not self.dead:
            self._beat_s = time.monotonic()
            try:
                self._look(gripper)
                heard_s, self.is_silent = self._beat_s, False
            except FRANKY_ERRORS as error:
                # Nothing for a second is an exception already ("Timeout", or after it a bare "Net Exception"), and a
                # busy hand may be silent for longer; what is really lost stays lost.
                self.is_silent = any(text in str(error) for text in ("Timeout", "Net Exception"))
                if not self.is_silent or time.monotonic() - heard_s > self.config.silence_s:
                    self._give_up(f"lost link to the gripper: {_first_line(error)}")
            self._closing.wait(POLL_S)
        if self._future is not None and (self.dead or not self._future.wait(LEAVE_S)):
            # Destroying what waits for a dead hand would wait too, and hold up every thread of the process.
            _left_behind.extend((self._future, gripper))

    def _look(self, gripper: franky.Gripper) -> None:
        state = gripper.state
        self._max_width_m, self.is_grasped = state.max_width, state.is_grasped
        self.opening_m = state.width
        self._advance(gripper)

    def _advance(self, gripper: franky.Gripper) -> None:
        """Wait for what runs; then begin what is wanted by now."""
        if self._future is not None:
            if not self._future.wait(0):
                if time.monotonic() - self._began_s > self.config.command_timeout_s:
                    self._give_up(f"gripper did not finish {self._doing[0]} in {self.config.command_timeout_s:.1f} s")
                return
            self._finish()
        with self._lock:
            wanted = self._wanted
        if wanted is not None and (self._doing is None or not _same(wanted, self._doing)):
            kind, opening_m, _ = self._doing = wanted
            self._began_s = time.monotonic()
            speed = self.config.speed_m_s
            if kind == "grasp":
                epsilon = GRASP_EPSILON_M
                self._future = gripper.grasp_async(opening_m, speed, self.config.force_n, epsilon, epsilon)
            elif kind == "move":
                self._future = gripper.move_async(opening_m, speed)
            else:
                self._future = gripper.homing_async()

    def _finish(self) -> None:
        future, self._future = self._future, None
        try:
            future.get()  # False: a grasp that found nothing
        except franky.CommandException as error:
            log.info("gripper %s: %s", self._doing[0], _first_line(error))  # stopped, or nothing to grasp: no fault

    def _give_up(self, reason: str) -> None:
        if not self.dead:  # else another one is in use already
            self.dead = True
            self._on_fault(reason)


def _same(a: Task, b: Task) -> bool:
    return a[0] == b[0] and abs(a[1] - b[1]) < SAME_OPENING_M


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
