"""Settings of the robot side. Each field becomes a ROS parameter with this description and range (`robot.params`)."""

from dataclasses import dataclass, field
from typing import Any

from robot.safety import SafetyLimits


def setting(default: Any, about: str, between: tuple[float, float] | None = None) -> Any:
    """A dataclass field with a sentence for whoever sets it, and the closed range it may have."""
    metadata = {"about": about} | ({"range": between} if between else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class GripperConfig:
    enabled: bool = setting(True, "whether a Franka hand is mounted")
    speed_m_s: float = setting(0.1, "speed of the fingers", (0.01, 0.2))
    force_n: float = setting(20.0, "grasping force", (1.0, 70.0))
    hysteresis: float = setting(0.1, "commands in [-1, 1] nearer to 0 than this change nothing", (0.0, 0.9))
    silence_s: float = setting(2.5, "a hand that reports nothing for this long is a lost link", (0.5, 30.0))
    command_timeout_s: float = setting(
        6.0, "a command that the hand does not finish in this time is a fault", (0.5, 30.0)
    )


@dataclass
class ArmConfig:
    """One arm and its hand."""

    host: str = setting("172.16.0.2", "address of the robot's control interface (FCI)")
    streaming: str = setting("position", "how poses are tracked: position or impedance")
    stream_rate_hz: float = setting(50.0, "rate at which absolute poses are sent to the arm", (10.0, 200.0))
    poll_rate_hz: float = setting(100.0, "rate at which the arm's state is read", (20.0, 500.0))
    state_rate_hz: float = setting(60.0, "rate at which states are published", (5.0, 200.0))
    dynamics_factor: float = setting(0.9, "share of the joints' speed, acceleration and jerk limits", (0.01, 1.0))
    home_dynamics_factor: float = setting(0.3, "the same for the motion to the home position", (0.01, 1.0))
    translational_stiffness_n_m: float = setting(1500.0, "impedance streaming only", (10.0, 3000.0))
    rotational_stiffness_nm_rad: float = setting(80.0, "impedance streaming only", (1.0, 300.0))
    collision_torque_nm: float = setting(40.0, "joint torque at which the arm stops with a reflex", (1.0, 100.0))
    collision_force_n: float = setting(40.0, "TCP force at which the arm stops with a reflex", (1.0, 150.0))
    realtime: bool = setting(False, "leave the thread that owns the arm under SCHED_FIFO, as a real arm wants it")
    action_timeout_s: float = setting(0.25, "without an action for this long the arm holds", (0.02, 5.0))
    action_max_age_s: float = setting(0.25, "an action whose step began longer ago is refused", (0.02, 5.0))
    state_hold_s: float = setting(0.25, "arm states older than this make the arm hold", (0.05, 1.0))
    state_fault_s: float = setting(1.2, "arm states older than this are a lost link", (0.2, 5.0))
    call_timeout_s: float = setting(3.0, "a call into the robot that takes longer is a lost link", (0.5, 30.0))
    home_timeout_s: float = setting(20.0, "a motion to the home position that takes longer is a fault", (1.0, 60.0))
    deadman_timeout_s: float = setting(
        0.0, "the arm holds unless `deadman` said true within this time; 0: not asked for", (0.0, 5.0)
    )
    heartbeat_timeout_s: float = setting(
        0.0, "the arm holds unless a `heartbeat` came within this time; 0: not asked for", (0.0, 60.0)
    )
    fault_dir: str = setting("", "folder that gets the last 30 s before a fault; empty: they are not kept")
    gripper: GripperConfig = field(default_factory=GripperConfig)
    limits: SafetyLimits = field(default_factory=SafetyLimits)

    def __post_init__(self):
        if self.streaming not in ("position", "impedance"):
            raise ValueError(f"streaming {self.streaming!r}: allowed are 'position' and 'impedance'")
        if self.state_fault_s <= self.state_hold_s:
            raise ValueError(f"state_fault_s {self.state_fault_s} must be longer than state_hold_s {self.state_hold_s}")


@dataclass
class CameraConfig:
    """All cameras of one process. `serials` go with `cameras`, one each."""

    device: str = setting("realsense", "realsense, or stand_in for the software devices of the stand-in cell")
    cameras: list[str] = setting(["third_person", "wrist"], "names, as in the embodiment contract")  # noqa: RUF009
    serials: list[str] = setting(["", ""], "serial numbers in the order of `cameras`; empty: any")  # noqa: RUF009
    rate_hz: float = setting(30.0, "pictures a second", (1.0, 90.0))
    frame_timeout_s: float = setting(1.0, "a camera that delivers nothing for this long is lost", (0.1, 10.0))
    max_repeats: int = setting(3, "the same picture more often than this in a row is a frozen camera", (1, 100))
    cell_frames: str = setting("tcp://127.0.0.1:5611", "stand_in only: where the cell gives out its states")
    cell: str = setting("tabletop", "stand_in only: configs/cell/<name>.yaml, as the cell itself uses")

    def __post_init__(self):
        if self.device not in ("realsense", "stand_in"):
            raise ValueError(f"device {self.device!r}: allowed are 'realsense' and 'stand_in'")
        if self.device == "realsense" and len(self.serials) != len(self.cameras):
            raise ValueError(f"cameras {self.cameras} need a serial number each, got {self.serials}")


@dataclass
class RuntimeConfig:
    """The loop observe, infer, execute."""

    policy_endpoint: str = setting("", "policy server, such as tcp://127.0.0.1:5601; empty: teleoperation only")
    keys: str = setting("", "folder of our keys (`cotwin keys`); empty: clear text, on loopback only")
    peer: str = setting("", "name of the key at the other end, where several could be")
    telemetry_endpoint: str = setting("", "where `cotwin bridge top` may listen, such as tcp://127.0.0.1:5605")
    picture_coding: str = setting("raw", "how pictures travel: raw, or jpeg or png on slow links")
    resize_pictures: bool = setting(False, "prepare pictures at the policy's size before they are sent")
    instruction: str = setting("", "what to do; empty: the first instruction of the embodiment contract")
    realtime: bool = setting(True, "put the node under SCHED_RR, before all ordinary work, where that is permitted")
    autostart: bool = setting(False, "start the policy without waiting for the service `start`")
    num_action_chunks: int = setting(5, "how many actions of a chunk are executed", (1, 100))
    prefetch_ticks: int = setting(1, "ask for the next chunk when this many actions are left", (0, 20))
    deadline_s: float = setting(0.5, "a chunk that takes longer is given up", (0.01, 60.0))
    max_age_s: float = setting(0.2, "pictures or states older than this are not shown to the policy", (0.02, 5.0))
    teleop_speed_m_s: float = setting(0.45, "teleop actions are joined into one up to this speed", (0.01, 1.7))
    teleop_turn_rad_s: float = setting(1.4, "the same for their rotation", (0.01, 2.5))
    teleop_timeout_s: float = setting(0.3, "a person has let go when no teleop action came for this long", (0.05, 5.0))
