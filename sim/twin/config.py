"""What a twin is made of. Lengths in m, in the robot's base frame; colours are RGB in [0, 1], as pictures show them in
full light."""

from dataclasses import dataclass, field
from typing import Any

from bridge.embodiment import Embodiment
from sim.arm_plans import ACCELERATION_RAD_S2
from sim.splat.config import SplatConfig

TASKS = ("PutCubeOnPlate-v0", "PickPlaceTwin-v1")
RENDER = ("sapien", "splat", "composite")
SUCCESS = ("stable", "legacy")
REWARDS = ("sparse", "dense")
PHYSICS = ("physx_cpu", "physx_cuda")
CHOICES = {
    "task": TASKS,
    "physics": PHYSICS,
    "arm_follows": ("plans", "drives"),
    "success": SUCCESS,
    "reward": REWARDS,
    "render": RENDER,
    "objects": ("builtin", "external"),
    "split": ("train", "held_out"),
    "receptacle": ("tray", "bowl", "either"),
}


@dataclass
class Randomization:
    """Half-widths of uniform ranges, drawn anew at each reset from the episode's seed. Zero everywhere: none."""

    light: float = 0.25  # share of the nominal brightness
    colour: float = 0.08  # of table, plate, arm, its dark parts and room, each channel
    planks: float = 0.12  # share of the table's brightness, of each plank
    camera_pos_m: float = 0.008  # calibrations are off by half a centimetre and half a degree
    camera_rot_rad: float = 0.012
    friction: float = 0.0  # share of the nominal
    latency_s: float = 0.0  # upper end of what is added to the nominal, from 0


@dataclass
class TwinConfig:
    task: str = "PutCubeOnPlate-v0"
    physics: str = "physx_cpu"  # in worker processes; or physx_cuda: all of a vector environment in one simulation
    max_steps: int = 100  # policy steps of an episode
    sim_freq: int = 100  # physics steps a second; a multiple of the policy rate
    picture_width: int = 128
    picture_height: int = 96
    supersampling: int = 2  # pictures are drawn this many times larger and averaged down
    success: str = "stable"  # or legacy: the peer's geometric test, true also for a cube held above the plate
    reward: str = "sparse"
    workspace_lower_m: list[float] = field(default_factory=lambda: [0.20, -0.45, 0.018])  # of the TCP target,
    workspace_upper_m: list[float] = field(default_factory=lambda: [0.75, 0.45, 0.75])  # as robot safety has
    arm_follows: str = "plans"  # as the robot side plans its motions; or drives: trails by arm_damping / arm_stiffness
    arm_acceleration_rad_s2: float = ACCELERATION_RAD_S2  # of plans: 9.1 times the robot's dynamics_factor
    arm_stiffness: float = 3000.0  # the FR3's own joint impedance
    arm_damping: float = 100.0
    gripper_force: float = 60.0  # N, of each finger
    gripper_speed_m_s: float = 0.1  # of the opening
    gripper_damping: float = 40.0  # of a stiffness of 1000: trails by 0.04 s, as the stand-in cell's
    friction: float = 1.0
    latency_s: float = 0.0  # from an action to the first motion of arm and fingers
    cube_half_size_m: float = 0.02
    cube_center_m: list[float] = field(default_factory=lambda: [0.40, 0.20])
    cube_range_m: list[float] = field(default_factory=lambda: [0.10, 0.05])
    plate_radius_m: float = 0.07
    plate_height_m: float = 0.006
    plate_center_m: list[float] = field(default_factory=lambda: [0.45, 0.0])
    plate_range_m: list[float] = field(default_factory=lambda: [0.05, 0.03])
    success_radius_m: float = 0.05
    home_noise_rad: float = 0.02  # standard deviation of the arm's joints at reset
    light_direction: list[float] = field(default_factory=lambda: [-0.48, 0.70, -1.60])
    table_planks: int = 12
    table_colour: list[float] = field(default_factory=lambda: [0.54, 0.39, 0.27])
    cube_colour: list[float] = field(default_factory=lambda: [0.72, 0.13, 0.10])
    plate_colour: list[float] = field(default_factory=lambda: [0.86, 0.84, 0.78])
    arm_colour: list[float] = field(default_factory=lambda: [0.88, 0.88, 0.86])
    joint_colour: list[float] = field(default_factory=lambda: [0.30, 0.31, 0.33])  # hand, links 3 and 5, fingertips
    room_colour: list[float] = field(default_factory=lambda: [0.52, 0.56, 0.60])  # walls and floor
    randomization: Randomization = field(default_factory=Randomization)
    render: str = "sapien"  # or splat; or composite: bodies that the splat scene lacks by SAPIEN, the nearer wins
    splat: SplatConfig = field(default_factory=SplatConfig)
    gs_kwargs: dict[str, Any] = field(default_factory=dict)  # GSEnv's names for the keys of `splat`, over these
    objects: str = "builtin"  # of PickPlaceTwin-v1; or external: $MANISKILL_ASSET_DIR/pick_place
    split: str = "train"  # or held_out
    receptacle: str = "tray"  # or bowl, or either: drawn for each episode

    def __post_init__(self):
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} {getattr(self, key)!r}: allowed are {', '.join(allowed)}")
        for key in ("max_steps", "picture_width", "picture_height", "supersampling", "table_planks"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} {getattr(self, key)}: allowed are 1 and more")
        if self.render != "sapien" and not self.splat.scene:
            raise ValueError(f"render {self.render!r} needs a scene folder: splat.scene=FOLDER (cotwin splat-scene)")
        if self.physics == "physx_cuda" and self.arm_follows == "plans":  # which are made arm by arm
            raise ValueError(
                "physics physx_cuda with arm_follows 'plans': set arm_follows to drives, or physics to physx_cpu"
            )
        if self.physics == "physx_cuda":  # one material for all, and colours that SAPIEN's batched cameras do not renew
            looks = ["light", "colour", "planks", "camera_pos_m", "camera_rot_rad"]
            fixed = ["friction", *(looks if self.render != "splat" else [])]
            if varied := [key for key in fixed if getattr(self.randomization, key)]:
                raise ValueError(
                    f"physics physx_cuda with render {self.render!r} cannot vary {', '.join(varied)} by episode: "
                    f"set these keys of randomization to 0, or physics to physx_cpu"
                )
        self.splat, self.gs_kwargs = self.splat.with_gs_kwargs(self.gs_kwargs), {}

    @property
    def draws_splats(self) -> bool:
        return self.render != "sapien"

    def make(self, embodiment: Embodiment, stream: tuple[int, int] = (0, 0), render: bool = True) -> Any:
        """One environment in this process: `sim.twin.worker.Twin`."""
        from sim.twin.worker import Twin

        return Twin(self, embodiment, stream, render)
