"""What the stand-in cell looks like and weighs, and where things may start. The cell and the camera process each build
the scene from one `CellConfig`, and compare `scene_hash` before the first picture."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

from bridge.embodiment import Embodiment


@dataclass
class CameraError:
    """How the camera that takes the pictures differs from the embodiment's calibration of it.

    T_mount_cam(true) = T_mount_cam(nominal) . T(pos_m, rpy_rad), in the nominal camera's own axes.
    """

    pos_m: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    rpy_rad: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    focal_scale: float = 1.0
    principal_px: list[float] = field(default_factory=lambda: [0.0, 0.0])  # added to cx, cy


@dataclass
class Layout:
    """Where a reset puts things, robot base frame, table plane z = 0. A seed draws uniformly within +- the spread."""

    cube_pos_m: list[float] = field(default_factory=lambda: [0.40, 0.20])
    cube_spread_m: list[float] = field(default_factory=lambda: [0.10, 0.05])
    cube_yaw_spread_rad: float = 0.0
    plate_pos_m: list[float] = field(default_factory=lambda: [0.45, 0.0])
    plate_spread_m: list[float] = field(default_factory=lambda: [0.05, 0.03])


@dataclass
class Bodies:
    """Sizes, masses and friction of what the arm meets."""

    cube_side_m: float = 0.04
    cube_mass_kg: float = 0.06
    plate_radius_m: float = 0.07
    plate_thickness_m: float = 0.006
    friction: float = 0.9  # sliding, cube against table, plate and fingertips
    joint_damping_nms: float = 0.4
    joint_stiffness_nm: list[float] = field(default_factory=lambda: [3e3, 3e3, 3e3, 2.5e3, 2.5e3, 2e3, 2e3])


@dataclass
class Looks:
    """Colours are r g b in [0, 1]. The table is made of planks, each up to `plank_spread` lighter or darker."""

    cube_rgb: list[float] = field(default_factory=lambda: [0.72, 0.13, 0.10])
    plate_rgb: list[float] = field(default_factory=lambda: [0.86, 0.84, 0.78])
    table_rgb: list[float] = field(default_factory=lambda: [0.55, 0.40, 0.27])
    num_planks: int = 12
    plank_spread: float = 0.12
    seed: int = 7  # of the planks' shades
    floor_rgb: list[float] = field(default_factory=lambda: [0.36, 0.38, 0.40])
    wall_rgb: list[float] = field(default_factory=lambda: [0.62, 0.66, 0.70])
    arm_rgb: list[float] = field(default_factory=lambda: [0.88, 0.88, 0.86])
    joint_rgb: list[float] = field(default_factory=lambda: [0.30, 0.31, 0.33])
    ambient: float = 0.32
    lamp_pos_m: list[float] = field(default_factory=lambda: [0.9, -0.7, 1.6])  # above the table, aims at its middle
    lamp_diffuse: float = 0.62
    shadows: bool = False


@dataclass
class Chessboard:
    """For calibrating cameras: so many squares, flat on the table, x along its columns; none: no board."""

    columns: int = 0
    rows: int = 0
    square_m: float = 0.03
    pos_m: list[float] = field(default_factory=lambda: [0.45, 0.0])  # of its centre


@dataclass
class Task:
    """When the cube counts as placed: near the plate's centre, lying on it, let go of, at rest."""

    max_distance_m: float = 0.05
    max_height_error_m: float = 0.008
    max_speed_m_s: float = 0.02


@dataclass
class CellConfig:
    """One stand-in cell: another world than the twin on purpose."""

    layout: Layout = field(default_factory=Layout)
    bodies: Bodies = field(default_factory=Bodies)
    looks: Looks = field(default_factory=Looks)
    task: Task = field(default_factory=Task)
    board: Chessboard = field(default_factory=Chessboard)
    camera_errors: dict[str, CameraError] = field(default_factory=dict)
    camera_serials: dict[str, str] = field(default_factory=dict)  # of the software RealSense devices
    camera_rate_hz: float = 30.0

    def __post_init__(self):
        if not 1.0 <= self.camera_rate_hz <= 100.0:
            raise ValueError(f"camera_rate_hz {self.camera_rate_hz}: allowed are 1 to 100")


def scene_hash(config: CellConfig, embodiment: Embodiment) -> str:
    """SHA-256 (hex) of everything that shapes the scene and its pictures."""
    text = json.dumps([dataclasses.asdict(config), embodiment.contract_hash], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
