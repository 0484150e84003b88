"""The embodiment contract: the small document that datasets, checkpoints and connections carry.

Two sides that disagree about any field (rate, frames, cameras, gripper map, ...) must find out before a motor moves,
so everything that matters for an action or a picture is here and is hashed. Source: docs/contract.md, section 3.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import SchemaMismatch


@dataclass
class Camera:
    """Pinhole camera. `mount` is `base` (fixed) or `tcp` (on the hand); `T_mount_cam` is 4x4 row-major, OpenCV axes
    (x right, y down, z forward)."""

    width: int = 640
    height: int = 480
    fx: float = 604.0
    fy: float = 604.0
    cx: float = 319.5
    cy: float = 239.5
    mount: str = "base"
    T_mount_cam: list[float] = field(default_factory=lambda: np.eye(4).ravel().tolist())

    def __post_init__(self):
        if self.mount not in ("base", "tcp"):
            raise ValueError(f"camera mount {self.mount!r}: allowed are 'base' and 'tcp'")
        if len(self.T_mount_cam) != 16:
            raise ValueError(f"T_mount_cam needs 16 numbers (4x4, row-major), got {len(self.T_mount_cam)}")
        T = self.matrix
        if not np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-4) or np.linalg.det(T[:3, :3]) < 0:
            raise ValueError(f"T_mount_cam is not a rigid transform: rotation part {T[:3, :3].tolist()}")

    @property
    def matrix(self) -> np.ndarray:
        """`T_mount_cam` as float64 [4, 4]."""
        return np.array(self.T_mount_cam, dtype=np.float64).reshape(4, 4)

    @property
    def intrinsics(self) -> np.ndarray:
        """K, float64 [3, 3]."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], dtype=np.float64)


@dataclass
class Embodiment:
    """Everything a policy must share with the body it drives."""

    name: str = "fr3_tabletop"
    policy_rate_hz: float = 10.0
    action_translation_frame: str = "base"
    action_rotation_frame: str = "tcp"
    action_reference: str = "target"  # deltas count from the last commanded target
    max_translation_m: float = 0.1  # of one policy step, each axis
    max_rotation_rad: float = 0.1
    gripper_closed_m: float = 0.0  # opening at command -1
    gripper_open_m: float = 0.08  # opening at command +1
    home_joint_pos_rad: list[float] = field(default_factory=lambda: [0.0, -0.2754, 0.0, -2.5895, 0.0, 2.3141, 0.785398])
    cameras: dict[str, Camera] = field(default_factory=dict)
    image_preprocessing: str = "area_resize"  # how a policy's input size is made from a camera picture
    instructions: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not 1.0 <= self.policy_rate_hz <= 50.0:
            raise ValueError(f"policy_rate_hz {self.policy_rate_hz}: allowed are 1 to 50")
        expected = {"action_translation_frame": "base", "action_rotation_frame": "tcp", "action_reference": "target"}
        for key, only in expected.items():
            if getattr(self, key) != only:
                raise ValueError(f"{key} {getattr(self, key)!r}: this runtime implements {only!r} only")
        if len(self.home_joint_pos_rad) != 7:
            raise ValueError(f"home_joint_pos_rad needs 7 numbers, got {len(self.home_joint_pos_rad)}")

    @property
    def period_s(self) -> float:
        return 1.0 / self.policy_rate_hz

    def gripper_opening_m(self, command: float | np.ndarray) -> np.ndarray:
        """Finger travel for a command in [-1, 1]."""
        share = (np.clip(command, -1.0, 1.0) + 1.0) / 2.0
        return self.gripper_closed_m + share * (self.gripper_open_m - self.gripper_closed_m)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Embodiment":
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"embodiment contract has unknown fields {unknown}; known are {sorted(known)}")
        fields = dict(data)
        fields["cameras"] = {name: Camera(**camera) for name, camera in data.get("cameras", {}).items()}
        return cls(**fields)

    @property
    def contract_hash(self) -> str:
        """SHA-256 (hex) over sorted-key JSON with numbers as floats of 9 significant digits."""
        text = json.dumps(_canonical(self.to_dict()), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Embodiment":
        """Raises ValueError (naming the file) when it is not a contract."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is not an embodiment contract: {error}") from error

    def require_same(self, other: "Embodiment", what: str, allow_contract_mismatch: list[str] | None = None) -> None:
        """Raise SchemaMismatch naming every differing field with both values, unless it was allowed by name."""
        differing = differences(self.to_dict(), other.to_dict())
        allowed = allow_contract_mismatch or []
        refused = {k: v for k, v in differing.items() if not any(k == a or k.startswith(a + ".") for a in allowed)}
        if refused:
            lines = "; ".join(f"{key}: ours {ours!r}, theirs {theirs!r}" for key, (ours, theirs) in refused.items())
            raise SchemaMismatch(
                f"{what} was made for another embodiment: {lines}. "
                "Use matching data, or accept a field knowingly with allow_contract_mismatch=[FIELD]."
            )


def differences(ours: Any, theirs: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted leaf names at which two contract dicts differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(set(ours) | set(theirs)):
            found |= differences(ours.get(key), theirs.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if _canonical(ours) == _canonical(theirs) else {prefix: (ours, theirs)}


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if not math.isfinite(value):
        raise ValueError(f"embodiment contract holds a non-finite number: {value}")
    return float(f"{float(value):.9g}") + 0.0  # + 0.0: -0.0 and 0.0 are the same number
