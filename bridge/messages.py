"""What travels between robot, twin and learner. Shapes, units and frames: docs/contract.md, sections 1 and 2."""

from dataclasses import dataclass, field

import numpy as np

PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class Observation:
    """One aligned look at the world.

    images: uint8 [H, W, 3] RGB for each camera name. state: float32 [7] (see `bridge.pose.STATE_NAMES`).
    stamp_ns: exposure of the newest camera frame on the robot's clock; state is interpolated to it.
    age_ns: for each source, how old it was when the observation was assembled.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str
    stamp_ns: int
    age_ns: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ActionChunk:
    """`actions` float32 [horizon, 7]; the first one is meant for `start_ns` (robot's clock), then one each period."""

    actions: np.ndarray
    start_ns: int
    period_ns: int
    policy_version: int


@dataclass(frozen=True)
class CheckpointInfo:
    """An announcement: which version exists, what it replaces, and the hash that its manifest must have."""

    version: int
    parent_version: int
    training_step: int
    manifest_sha256: str
    contract_hash: str
    rollback: bool = False
