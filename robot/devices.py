"""What a person holds: SpaceMouse, gamepad, keyboard, a page in a browser, or a recording of one of them. No ROS.

Every device says the same (`Reading`): how fast to move in the base frame, whether the person has a grip on the arm
(clutch), and which buttons went down.
"""

import contextlib
import json
import os
import select
import struct
import sys
import termios
import time
import tty
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MARKS = ("start", "success", "failure", "discard", "undo")
BUTTONS = ("gripper", "faster", "slower", *MARKS)
STILL = (0.0,) * 6


class DeviceError(RuntimeError):
    """The device is not there, has gone, or its library is not installed. Says what to do."""


@dataclass(frozen=True)
class Reading:
    """`motion`: x y z and turns about them, base frame, each in [-1, 1]. `pressed`: of BUTTONS, since the last reading.
    `deadman`: whether the dead-man switch is held; every clutch is one too."""

    motion: tuple[float, ...] = STILL
    clutch: bool = False
    deadman: bool = False
    pressed: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.motion) != 6 or not all(-1.0 <= value <= 1.0 for value in self.motion):  # NaN is refused too
            raise ValueError(f"motion {self.motion}: needed are six numbers in [-1, 1]")
        if unknown := set(self.pressed) - set(BUTTONS):
            raise ValueError(f"buttons {sorted(unknown)}: known are {BUTTONS}")


class Device(Protocol):
    def read(self) -> Reading:
        """What holds now; never waits. Raises DeviceError."""

    def close(self) -> None: ...


class Keyboard:
    """A terminal. It tells of keys going down only, so a key moves for as long as the terminal repeats it.

    wasd move, r f up and down, j l turn, i k pitch, u o roll; space: gripper; + - speed; Enter start, y success,
    n failure, x discard, z undo.
    """

    MOVES = {
        "w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1),
        "u": (3, -1), "o": (3, 1), "i": (4, 1), "k": (4, -1), "j": (5, 1), "l": (5, -1),
    }  # fmt: skip
    PRESSES = {
        " ": "gripper", "+": "faster", "-": "slower", "\n": "start", "\r": "start",
        "y": "success", "n": "failure", "x": "discard", "z": "undo",
    }  # fmt: skip
    HELD_S = 0.2

    def __init__(self, fd: int | None = None):
        self._fd = sys.stdin.fileno() if fd is None else fd
        if not os.isatty(self._fd):
            raise DeviceError("device keyboard needs a terminal; standard input is none")
        self._before = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)
        self._down_s: dict[str, float] = {}

    def read(self) -> Reading:
        pressed, now_s = [], time.monotonic()
        while select.select([self._fd], [], [], 0)[0]:
            text = os.read(self._fd, 64).decode(errors="ignore")
            if not text:
                raise DeviceError("the terminal was closed")
            for key in text.lower():
                if key in self.MOVES:
                    self._down_s[key] = now_s
                elif key in self.PRESSES:
                    pressed.append(self.PRESSES[key])
        self._down_s = {key: t for key, t in self._down_s.items() if now_s - t < self.HELD_S}
        motion = [0.0] * 6
        for key in self._down_s:
            axis, sign = self.MOVES[key]
            motion[axis] = max(-1.0, min(1.0, motion[axis] + sign))
        held = bool(self._down_s)
        return Reading(tuple(motion), held, held, tuple(pressed))

    def close(self) -> None:
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)


class Gamepad:
    """A pad with the usual layout, read from the kernel's joystick device; nothing to install.

    Hold LB to move (clutch); RB is the dead-man switch alone. Left stick: x y; right stick: turn and pitch; triggers:
    down and up. A gripper, X success, B failure, Y start, Back discard, Start undo; the cross sets the speed.
    """

    EVENT = struct.Struct("=IhBB")
    AXIS, INITIAL = 0x02, 0x80
    PRESSES = {0: "gripper", 1: "failure", 2: "success", 3: "start", 6: "discard", 7: "undo"}
    CLUTCH, DEADMAN, CROSS_Y = 4, 5, 7

    def __init__(self, path: str = "/dev/input/js0"):
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise DeviceError(
                f"gamepad {path}: {error.strerror}; plug one in, or name its device with path="
            ) from error
        self._axes, self._held, self._rest = dict.fromkeys((2, 5), -1.0), set[int](), b""

    def read(self) -> Reading:
        pressed: list[str] = []
        for value, kind, number in self._events():
            if kind & ~self.INITIAL == self.AXIS:
                share = max(-1.0, value / 32767)
                if number == self.CROSS_Y and abs(share) > 0.5:
                    pressed.append("faster" if share < 0 else "slower")
                self._axes[number] = share
            elif value:
                self._held.add(number)
                if number in self.PRESSES and not kind & self.INITIAL:
                    pressed.append(self.PRESSES[number])
            else:
                self._held.discard(number)
        axis = lambda number: self._axes.get(number, 0.0)  # noqa: E731
        up = (axis(5) - axis(2)) / 2  # triggers rest at -1
        motion = (-axis(1), -axis(0), up, 0.0, -axis(4), -axis(3))
        clutch = self.CLUTCH in self._held
        return Reading(motion, clutch, clutch or self.DEADMAN in self._held, tuple(pressed))

    def _events(self) -> list[tuple[int, int, int]]:
        while True:
            try:
                data = os.read(self._fd, 64 * self.EVENT.size)
            except BlockingIOError:
                break
            except OSError as error:
                raise DeviceError(f"the gamepad has gone: {error.strerror}") from error
            if not data:
                raise DeviceError("the gamepad has gone")
            self._rest += data
        whole = len(self._rest) // self.EVENT.size * self.EVENT.size
        events, self._rest = list(self.EVENT.iter_unpack(self._rest[:whole])), self._rest[whole:]
        return [(value, kind, number) for _, value, kind, number in events]

    def close(self) -> None:
        os.close(self._fd)


class SpaceMouse:
    """A 3Dconnexion SpaceMouse through pyspacemouse. It springs back, so moving it is holding it: clutch and dead-man.

    Left button: gripper; right button: start, and success when pressed again.
    """

    REPORTS = 32  # that may wait between two readings

    def __init__(self, dead_zone: float = 0.05):
        try:
            import pyspacemouse
        except (ImportError, OSError) as error:
            raise DeviceError(
                f"device spacemouse needs pyspacemouse and hidapi: pip install pyspacemouse ({error})"
            ) from error
        try:
            self._device: Any = pyspacemouse.open(axis_convention=pyspacemouse.AxisConvention.ROS)
        except (RuntimeError, OSError) as error:
            raise DeviceError(f"no SpaceMouse: {error}") from error
        self._dead_zone, self._buttons, self._started = dead_zone, [0, 0], False

    def read(self) -> Reading:
        try:
            for _ in range(self.REPORTS):  # each call takes one report off the queue
                state = self._device.read()
        except OSError as error:
            raise DeviceError(f"the SpaceMouse has gone: {error}") from error
        axes = (state.x, state.y, state.z, state.roll, state.pitch, state.yaw)
        motion = tuple(max(-1.0, min(1.0, v)) if abs(v) > self._dead_zone else 0.0 for v in axes)
        pressed = []
        for number, down in enumerate(list(state.buttons)[:2]):
            if down and not self._buttons[number]:
                if number == 1:
                    self._started = not self._started
                pressed.append("gripper" if number == 0 else "start" if self._started else "success")
            self._buttons[number] = down
        return Reading(motion, any(motion), any(motion), tuple(pressed))

    def close(self) -> None:
        self._device.close()


class Playback:
    """Readings of a file that `Recorded` wrote, one for each call; after the last one, nothing is held."""

    def __init__(self, path: Path):
        try:
            lines = path.read_text().splitlines()
            rows = [json.loads(line) for line in lines if line]
            readings = [Reading(**r | {k: tuple(r[k]) for k in ("motion", "pressed")}) for r in rows]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DeviceError(f"{path} is no recording of a device: {error}") from error
        self._readings = iter(readings)

    def read(self) -> Reading:
        return next(self._readings, Reading())

    def close(self) -> None:
        pass


class Recorded:
    """Passes a device on and writes each reading to a file, one JSON line each."""

    def __init__(self, device: Device, path: Path):
        self._device, self._file = device, path.open("w")  # until `close`

    def read(self) -> Reading:
        reading = self._device.read()
        self._file.write(json.dumps(vars(reading)) + "\n")
        return reading

    def close(self) -> None:
        with contextlib.closing(self._file):
            self._device.close()
