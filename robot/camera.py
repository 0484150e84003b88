"""One RealSense colour camera through `rs.pipeline`, real or software: stamped pictures, drops and freezes noticed.

No ROS. A camera's thread waits for frames, hands each to `on_picture`, and starts the pipeline again when the camera
was unplugged and comes back.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyrealsense2 as rs

from bridge.embodiment import Camera
from robot.stamps import StampMap

log = logging.getLogger(__name__)

QUEUE_LENGTH = 16  # half a second at 30 Hz, so that a slow moment of this process loses nothing
WAIT_MS = 200
RESTART_S = 1.0


@dataclass(frozen=True)
class Picture:
    """`pixels` uint8 [H, W, 3] RGB, valid inside `on_picture` only. `stamp_ns`: exposure on the robot's clock."""

    pixels: np.ndarray
    stamp_ns: int
    number: int


@dataclass(frozen=True)
class Health:
    state: str = "STARTING"  # then OK, LOST (nothing comes) or FROZEN (the same picture comes)
    num_pictures: int = 0
    num_dropped: int = 0  # numbers that never came
    num_repeated: int = 0  # came again, and were not handed on


class CameraReader:
    """Reads one camera by serial number. `context`: where software devices live; None for the USB bus.

    Raises ValueError when the camera does not offer RGB8 pictures of the contract's size, or is not there at the start.
    """

    def __init__(
        self,
        name: str,
        camera: Camera,
        serial: str,
        rate_hz: float,
        on_picture: Callable[[Picture], None],
        *,
        context: rs.context | None = None,
        frame_timeout_s: float = 1.0,
        max_repeats: int = 3,
    ):
        self.name, self.camera, self.serial, self.rate_hz = name, camera, serial, rate_hz
        self.health = Health()
        self._on_picture = on_picture
        self._context = context if context is not None else rs.context()
        self._is_software = context is not None
        self._timeout_s, self._max_repeats = frame_timeout_s, max_repeats
        self._stamps = StampMap()
        self._last_number: int | None = None
        self._repeats = 0
        self._closing = threading.Event()
        self._queue = rs.frame_queue(QUEUE_LENGTH, keep_frames=True)
        self._pipeline: rs.pipeline | None = None
        try:
            self._open()
        except RuntimeError as error:
            size = f"{camera.width}x{camera.height} RGB8 at {rate_hz:g} Hz"
            raise ValueError(f"camera {name} (serial {serial or 'any'}), {size}: {error}") from error
        self._thread = threading.Thread(target=self._run, name=f"camera-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=2.0)
        if self._pipeline is not None:
            self._pipeline.stop()
            self._pipeline = None

    def intrinsics(self) -> rs.intrinsics:
        """The device's own calibration of the colour stream."""
        profile = self._pipeline.get_active_profile().get_stream(rs.stream.color)
        return profile.as_video_stream_profile().get_intrinsics()

    def _open(self) -> None:
        config = rs.config()
        there = [device.get_info(rs.camera_info.serial_number) for device in self._context.devices]
        if not there or (self.serial and self.serial not in there):  # or the pipeline would wait 15 s for it
            raise RuntimeError(f"not connected; there are {there}")
        if self.serial:
            config.enable_device(self.serial)
        size = (self.camera.width, self.camera.height)
        config.enable_stream(rs.stream.color, *size, rs.format.rgb8, round(self.rate_hz))
        pipeline = rs.pipeline(self._context)
        profile = pipeline.start(config, self._queue)
        self._pipeline, self._last_number = pipeline, None
        for sensor in profile.get_device().query_sensors():
            if sensor.supports(rs.option.global_time_enabled):  # stamps in the computer's time, not the camera's
                sensor.set_option(rs.option.global_time_enabled, 1)

    def _run(self) -> None:
        heard_s = time.monotonic()
        while not self._closing.is_set():
            arrived, frame = self._queue.try_wait_for_frame(WAIT_MS)
            now_s = time.monotonic()
            if arrived:
                heard_s = now_s
                self._take(frame)
            elif now_s - heard_s > self._timeout_s:
                if self.health.state != "LOST":
                    log.error("camera %s: no picture for %.1f s", self.name, now_s - heard_s)
                    self.health = replace(self.health, state="LOST")
                if not self._is_software:
                    self._restart()
                    heard_s = time.monotonic()

    def _restart(self) -> None:
        try:
            self._pipeline.stop()
        except RuntimeError as error:
            log.debug("camera %s: %s", self.name, error)  # it was unplugged: nothing to stop
        while not self._closing.wait(RESTART_S):
            try:
                return self._open()
            except RuntimeError as error:
                log.debug("camera %s: %s", self.name, error)

    def _take(self, frame: rs.frame) -> None:
        if frame.is_frameset():
            frame = frame.as_frameset().get_color_frame()
        number, health = frame.get_frame_number(), self.health
        if number == self._last_number:
            self._repeats += 1
            frozen = self._repeats >= self._max_repeats
            if frozen and health.state != "FROZEN":
                log.error("camera %s: frozen at picture %d", self.name, number)
            state = "FROZEN" if frozen else health.state
            self.health = replace(health, state=state, num_repeated=health.num_repeated + 1)
            return
        dropped = max(0, number - self._last_number - 1) if self._last_number is not None else 0
        if dropped:
            log.warning("camera %s: %d pictures dropped before %d", self.name, dropped, number)
        self._last_number, self._repeats = number, 0
        self.health = Health("OK", health.num_pictures + 1, health.num_dropped + dropped, health.num_repeated)
        pixels = np.asanyarray(frame.get_data())
        self._on_picture(Picture(pixels, self._stamp_ns(frame), number))

    def _stamp_ns(self, frame: rs.frame) -> int:
        """Global time is the robot's clock already (the system's, or the stand-in cell's); another clock is mapped."""
        if frame.get_frame_timestamp_domain() == rs.timestamp_domain.global_time:
            return round(frame.get_timestamp() * 1e6)
        return self._stamps.stamp_ns(frame.get_timestamp(), time.time_ns())
