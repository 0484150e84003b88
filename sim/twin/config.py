"""What a twin is made of. Lengths in m, in the robot's base frame; colours are RGB in [0, 1]."""

from dataclasses import dataclass, field

TASKS = ("PutCubeOnPlate-v0",)
SUCCESS = ("stable", "legacy")
REWARDS = ("sparse", "dense")


@dataclass
class Randomization:
    """Half-widths of uniform ranges, drawn anew at each reset from the episode's seed. Zero everywhere: none."""

    light: float = 0.25  # share of the nominal brightness
    colour: float = 0.08  # of table, plate and arm, each channel
    camera_pos_m: float = 0.004
    camera_rot_rad: float = 0.006


@dataclass
class TwinConfig:
    task: str = "PutCubeOnPlate-v0"
    max_steps: int = 100  # policy steps of an episode
    sim_freq: int = 100  # physics steps a second; a multiple of the policy rate
    picture_width: int = 128
    picture_height: int = 96
    supersampling: int = 2  # pictures are drawn this many times larger and averaged down
    success: str = "stable"  # or legacy: the peer's geometric test, true also for a cube held above the plate
    reward: str = "sparse"
    workspace_lower_m: list[float] = field(default_factory=lambda: [0.20, -0.45, 0.018])  # of the TCP target,
    workspace_upper_m: list[float] = field(default_factory=lambda: [0.75, 0.45, 0.75])  # as robot safety has
    arm_stiffness: float = 1000.0
    arm_damping: float = 40.0  # trails its target by 0.04 s; the stand-in cell's arm by 0.036 s (measured)
    gripper_force: float = 60.0  # N, of each finger
    gripper_speed_m_s: float = 0.1  # of the opening
    friction: float = 1.0
    cube_half_size_m: float = 0.02
    cube_center_m: list[float] = field(default_factory=lambda: [0.40, 0.20])
    cube_range_m: list[float] = field(default_factory=lambda: [0.10, 0.05])
    plate_radius_m: float = 0.07
    plate_height_m: float = 0.01
    plate_center_m: list[float] = field(default_factory=lambda: [0.45, 0.0])
    plate_range_m: list[float] = field(default_factory=lambda: [0.05, 0.03])
    success_radius_m: float = 0.05
    home_noise_rad: float = 0.02  # standard deviation of the arm's joints at reset
    table_colour: list[float] = field(default_factory=lambda: [0.46, 0.40, 0.34])
    cube_colour: list[float] = field(default_factory=lambda: [0.75, 0.08, 0.08])
    plate_colour: list[float] = field(default_factory=lambda: [0.92, 0.92, 0.88])
    arm_colour: list[float] = field(default_factory=lambda: [0.85, 0.86, 0.88])
    randomization: Randomization = field(default_factory=Randomization)

    def __post_init__(self):
        for key, allowed in (("task", TASKS), ("success", SUCCESS), ("reward", REWARDS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} {getattr(self, key)!r}: allowed are {', '.join(allowed)}")
        for key in ("max_steps", "picture_width", "picture_height", "supersampling"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} {getattr(self, key)}: allowed are 1 and more")
