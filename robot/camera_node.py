"""ROS node of all cameras of a cell: `<camera>/image_raw` and `<camera>/camera_info`, stamped with the exposure.

Pictures are sent reliably and in order, with room for two seconds of them (a recorder that loses one loses a row, and
on a busy machine ten were lost before it woke); a reader that only wants the newest may subscribe with best effort.
"""

import array
import sys
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from omegaconf import OmegaConf
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image

from bridge.config import CONFIG_DIR
from bridge.embodiment import Camera
from robot import params
from robot.camera import CameraReader, Health, Picture
from robot.config import CameraConfig
from robot.diagnostics import Diagnostics
from robot.frames import Frames, transform
from robot.spin import NodeError, run_node

QUEUE_LENGTH = 60  # pictures: a reader that is busy for two seconds loses none
LEVELS = {"OK": DiagnosticStatus.OK, "STARTING": DiagnosticStatus.WARN}


class CameraNode(Node):
    def __init__(self):
        super().__init__("camera_node")
        self.embodiment = params.declare_embodiment(self)
        self.config = params.declare(self, CameraConfig)
        if unknown := sorted(set(self.config.cameras) - set(self.embodiment.cameras)):
            raise ValueError(f"cameras {unknown} are not in the contract; it has {sorted(self.embodiment.cameras)}")
        self._stand_in = self._open_stand_in() if self.config.device == "stand_in" else None
        self._told: dict[str, Health] = {}
        self.readers = [self._reader(n, name) for n, name in enumerate(self.config.cameras)]
        if self._stand_in is not None:
            self._start_stand_in()
        now_ns, cameras = self.get_clock().now().nanoseconds, self.embodiment.cameras
        mounts = [transform(cameras[n].mount, frame_of(n), cameras[n].matrix, now_ns) for n in self.config.cameras]
        self._frames = Frames(self, is_static=True)
        self._frames.publish(mounts)
        self.diagnostics = Diagnostics(self, lambda: [_status(reader) for reader in self.readers])
        self.create_timer(1.0, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def close(self) -> None:
        if getattr(self, "_stand_in", None) is not None:
            self._stand_in.stop()
        for reader in getattr(self, "readers", []):
            reader.close()

    def _reader(self, index: int, name: str) -> CameraReader:
        config, camera = self.config, self.embodiment.cameras[name]
        context, serial = None, config.serials[index] if index < len(config.serials) else ""
        if self._stand_in is not None:
            context, serial = self._stand_in.context, self._stand_in.serials[name]
        return CameraReader(
            name,
            camera,
            serial,
            config.rate_hz,
            PicturePublisher(self, name, camera).publish,
            context=context,
            frame_timeout_s=config.frame_timeout_s,
            max_repeats=config.max_repeats,
        )

    def _open_stand_in(self) -> Any:
        from sim.stand_in.camera_device import StandInCameras  # no simulator on a real cell

        cell = load_cell(self.config.cell)
        cell.camera_rate_hz = self.config.rate_hz
        return StandInCameras(self.config.cell_frames, self.embodiment, cell)

    def _start_stand_in(self) -> None:
        from sim.stand_in.errors import CellGone

        try:
            self._stand_in.start()
        except CellGone as error:
            raise NodeError(str(error)) from error

    def _report(self) -> None:
        for reader in self.readers:
            health, told = reader.health, self._told.get(reader.name, Health())
            self._told[reader.name] = health
            if health.state != told.state:
                self.get_logger().info(f"{reader.name}: {health.state}")
            if health.num_dropped > told.num_dropped:
                self.get_logger().warning(
                    f"{reader.name}: {health.num_dropped} of {health.num_pictures} dropped so far"
                )


class PicturePublisher:
    """Turns pictures of one camera into messages. Called from the camera's own thread."""

    def __init__(self, node: Node, name: str, camera: Camera):
        qos = QoSProfile(depth=QUEUE_LENGTH)
        self._images = node.create_publisher(Image, f"{name}/image_raw", qos)
        self._infos = node.create_publisher(CameraInfo, f"{name}/camera_info", qos)
        self._image = Image(height=camera.height, width=camera.width, encoding="rgb8", step=3 * camera.width)
        self._info = camera_info(camera)
        self._image.header.frame_id = self._info.header.frame_id = frame_of(name)

    def publish(self, picture: Picture) -> None:
        # array.array is the one type that rclpy copies as a block; a list or bytes would be checked byte by byte.
        data = array.array("B")
        data.frombytes(picture.pixels.data)
        self._image.data = data
        for message in (self._image, self._info):
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(picture.stamp_ns, 1_000_000_000)
        self._images.publish(self._image)
        self._infos.publish(self._info)


def frame_of(camera: str) -> str:
    return f"{camera}_optical_frame"


def camera_info(camera: Camera) -> CameraInfo:
    """The contract's calibration, without distortion."""
    K = camera.intrinsics
    info = CameraInfo(height=camera.height, width=camera.width, distortion_model="plumb_bob", d=[0.0] * 5)
    info.k = K.ravel().tolist()
    info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    info.p = [camera.fx, 0.0, camera.cx, 0.0, 0.0, camera.fy, camera.cy, 0.0, 0.0, 0.0, 1.0, 0.0]
    return info


def _status(reader: CameraReader) -> DiagnosticStatus:
    health = reader.health
    values = [KeyValue(key=key, value=str(value)) for key, value in vars(health).items()]
    level = LEVELS.get(health.state, DiagnosticStatus.ERROR)
    text, serial = f"{health.state}, {health.num_dropped} dropped", reader.serial
    return DiagnosticStatus(level=level, name=reader.name, message=text, hardware_id=serial, values=values)


def load_cell(name: str) -> Any:
    """`CellConfig` of configs/cell/<name>.yaml. Raises ValueError."""
    from sim.stand_in.config import CellConfig

    path = CONFIG_DIR / "cell" / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"cell {name!r}: known are {sorted(p.stem for p in path.parent.glob('*.yaml'))}")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CellConfig), OmegaConf.load(path)))


def main(argv: list[str] | None = None) -> int:
    return run_node(CameraNode, argv)


if __name__ == "__main__":
    sys.exit(main())
