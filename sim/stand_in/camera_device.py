"""The cell's cameras as RealSense devices: scene states in, pictures out through the RealSense SDK's software device.

Runs inside the camera node's process. Everything from `rs.pipeline(cameras.context)` on is what runs with real cameras.
"""

import threading
import time
from dataclasses import dataclass
from types import TracebackType

import msgpack
import numpy as np
import pyrealsense2 as rs
import zmq

from bridge.embodiment import Camera, Embodiment
from sim.stand_in.config import CellConfig, scene_hash
from sim.stand_in.errors import CellGone
from sim.stand_in.scene import PictureMaker, build_model

WINDOW = 3  # pictures that may be under way before the cell's clock waits
HELLO_EVERY_S = 1.0


@dataclass
class _Device:
    """One software camera; `pixels` is reused for every picture, the SDK copies it."""

    name: str
    device: rs.software_device
    sensor: rs.software_sensor
    profile: rs.video_stream_profile
    pixels: np.ndarray

    def push(self, frame_number: int, time_ms: int) -> None:
        width = self.pixels.shape[1]
        frame = rs.software_video_frame()
        frame.pixels = self.pixels
        frame.stride, frame.bpp = width * 3, 3
        frame.timestamp, frame.domain = float(time_ms), rs.timestamp_domain.global_time
        frame.frame_number = frame_number
        frame.profile = self.profile
        self.sensor.set_metadata(rs.frame_metadata_value.frame_counter, frame_number)
        self.sensor.set_metadata(rs.frame_metadata_value.frame_timestamp, time_ms * 1000)  # us
        self.sensor.set_metadata(rs.frame_metadata_value.sensor_timestamp, time_ms * 1000)
        self.sensor.on_video_frame(frame)


class StandInCameras:
    """One colour device (RGB8) for each camera of the embodiment; timestamps are the cell's time in ms.

    `context` finds the devices by the serial numbers of `CellConfig.camera_serials`. Raises ValueError when a camera
    has no serial number.
    """

    def __init__(self, endpoint: str, embodiment: Embodiment, cell_config: CellConfig):
        if missing := sorted(set(embodiment.cameras) - set(cell_config.camera_serials)):
            raise ValueError(f"cameras {missing} have no serial number: set cell.camera_serials.{missing[0]}=...")
        self.endpoint, self.serials = endpoint, dict(cell_config.camera_serials)
        self.pictures = 0  # sets delivered
        self._model = build_model(cell_config, embodiment)
        self._scene_hash = scene_hash(cell_config, embodiment)
        self._stopping = threading.Event()
        self._welcomed = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        # The SDK shows added devices only to a context whose change event somebody keeps.
        self.context = rs.context()
        self._events: list[object] = []
        self.context.set_devices_changed_callback(lambda event: self._events.append((event, event.get_new_devices())))
        rate = round(cell_config.camera_rate_hz)
        self._devices = [
            _device(self.context, name, self.serials[name], camera, rate, uid)
            for uid, (name, camera) in enumerate(embodiment.cameras.items())
        ]

    def start(self, timeout_s: float = 20.0) -> None:
        """Begin to deliver pictures. Raises CellGone without a cell, ValueError when it runs another scene."""
        assert self._thread is None, "started twice"
        self._thread = threading.Thread(target=self._run, name="stand-in-cameras", daemon=True)
        self._thread.start()
        give_up_s = time.monotonic() + timeout_s
        while not self._welcomed.wait(0.05):
            if not self._thread.is_alive():
                raise RuntimeError("the cameras' rendering thread ended: its traceback tells why")
            if time.monotonic() > give_up_s:
                self.stop()
                raise CellGone(f"no cell answers at {self.endpoint} within {timeout_s} s: is `cotwin cell` running?")
        if self._failure is not None:
            self.stop()
            raise self._failure

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "StandInCameras":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop()

    # --- the rendering thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        maker = PictureMaker(self._model)
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 100)
        socket.connect(self.endpoint)
        try:
            for device in self._devices:  # the first picture compiles shaders: before the cell's clock waits for us
                maker.render(device.name, device.pixels)
            self._serve(maker, socket)
        finally:
            socket.send(msgpack.packb({"bye": True}), zmq.NOBLOCK)
            socket.close()
            maker.close()

    def _serve(self, maker: PictureMaker, socket: zmq.Socket) -> None:
        hello = msgpack.packb({"hello": self._scene_hash, "window": WINDOW})
        socket.send(hello)
        while not self._stopping.is_set():
            if not socket.poll(int(1000 * HELLO_EVERY_S)):
                socket.send(hello)  # the cell may have started again, or given us up
                continue
            message = msgpack.unpackb(socket.recv())
            if "frame" in message:
                self._deliver(maker, message)
                socket.send(msgpack.packb({"credit": 1}))
            elif "welcome" in message:
                self._welcomed.set()
            elif "unknown" in message:
                socket.send(hello)
            elif "refused" in message:
                self._failure = ValueError(f"{self.endpoint}: {message['refused']}")
                self._welcomed.set()
                return

    def _deliver(self, maker: PictureMaker, message: dict) -> None:
        maker.set_state(np.frombuffer(message["qpos"]), np.frombuffer(message["plate"]))
        for device in self._devices:
            maker.render(device.name, device.pixels)
            device.push(message["frame"], message["time_ms"])
        self.pictures += 1


def _device(context: rs.context, name: str, serial: str, camera: Camera, rate_hz: int, uid: int) -> _Device:
    """The intrinsics a camera reports are the nominal ones: its error is what nobody knows."""
    device = rs.software_device()
    sensor = device.add_sensor("RGB Camera")
    intrinsics = rs.intrinsics()
    intrinsics.width, intrinsics.height = camera.width, camera.height
    intrinsics.fx, intrinsics.fy, intrinsics.ppx, intrinsics.ppy = camera.fx, camera.fy, camera.cx, camera.cy
    intrinsics.model, intrinsics.coeffs = rs.distortion.none, [0.0] * 5
    stream = rs.video_stream()
    stream.type, stream.index, stream.uid, stream.fmt = rs.stream.color, 0, uid, rs.format.rgb8
    stream.width, stream.height, stream.fps, stream.bpp = camera.width, camera.height, rate_hz, 3
    stream.intrinsics = intrinsics
    profile = sensor.add_video_stream(stream, True).as_video_stream_profile()
    device.register_info(rs.camera_info.name, f"Stand-in camera {name}")
    device.register_info(rs.camera_info.serial_number, serial)
    device.create_matcher(rs.matchers.default)
    device.add_to(context)
    pixels = np.empty((camera.height, camera.width, 3), dtype=np.uint8)
    return _Device(name, device, sensor, profile, pixels)
