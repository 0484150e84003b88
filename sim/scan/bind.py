"""Cut a scan into what moves: cotwin twin bind cloud=FILE.ply joints_rad=[7 numbers] out=SCENE

For a cloud that another trainer made, of an arm at rest in known joint angles, in the robot's base frame. A Gaussian
goes to the robot link whose surface is nearest, if that is nearer than `margin_m`; or to the object in whose box it
lies; all else stays in the world. Each part is written in its own body's frame.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree

from bridge import pose
from bridge.embodiment import Embodiment
from sim.scan import action
from sim.scan.arm import Links
from sim.scan.fit import WORLD
from sim.splat import ply, procedural
from sim.splat.cloud import GaussianCloud, merge
from sim.splat.render import invert_rigid

SURFACE_POINTS = 60_000  # over the whole robot: some 4 mm apart


@dataclass
class Box:
    """Where an object lies, which is called as in the twin: its body's `pos_m` and `yaw_rad`, and a box around that."""

    pos_m: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    size_m: list[float] = field(default_factory=lambda: [0.05, 0.05, 0.05])
    yaw_rad: float = 0.0


@dataclass
class BindConfig:
    """Keys of `cotwin twin bind`. `urdf`: empty for the twin's own robot. `T_base_cloud`: 4x4, row-major."""

    cloud: str = ""
    out: str = "runs/scan/scene"
    joints_rad: list[float] = field(default_factory=list)  # empty: the contract's home
    opening_m: float = 0.08
    margin_m: float = 0.015
    objects: dict[str, Box] = field(default_factory=dict)
    T_base_cloud: list[float] = field(default_factory=lambda: np.eye(4).ravel().tolist())
    scale: float = 1.0  # of the cloud, about its origin, before T_base_cloud
    urdf: str = ""
    background: list[float] = field(default_factory=lambda: [0.55, 0.6, 0.65])
    embodiment: Embodiment = field(default_factory=Embodiment)

    def __post_init__(self):
        if len(self.joints_rad) not in (0, 7):
            raise ValueError(f"joints_rad {self.joints_rad}: seven numbers are needed")
        if len(self.T_base_cloud) != 16:
            raise ValueError(f"T_base_cloud needs 16 numbers (4x4, row-major), got {len(self.T_base_cloud)}")


def bind(cloud: GaussianCloud, config: BindConfig) -> tuple[GaussianCloud, dict[str, dict[str, Any]]]:
    """`cloud` in the base frame, cut into segments in their bodies' frames, and what carries each of these."""
    urdf = Path(config.urdf) if config.urdf else procedural.panda_urdf()
    poses = Links(urdf).poses(np.array(config.joints_rad or config.embodiment.home_joint_pos_rad), config.opening_m)
    links = procedural.robot_links(urdf, SURFACE_POINTS)
    surface = [link.transform(torch.from_numpy(poses[link.segment_names[0]])).means_m.numpy() for link in links]
    owners = np.repeat(np.arange(len(links)), [len(points) for points in surface])
    means = cloud.means_m.numpy()
    distance_m, nearest = KDTree(np.concatenate(surface)).query(means)
    names = [link.segment_names[0] for link in links]
    owner = np.where(distance_m < config.margin_m, owners[nearest], -1)
    carriers: dict[str, dict[str, Any]] = {WORLD: {}} | {name: {"link": name} for name in names}
    for name, box in config.objects.items():
        poses[name] = pose.pose(box.pos_m, pose.matrix_from_rpy([0.0, 0.0, box.yaw_rad]))
        inside = np.abs((means - poses[name][:3, 3]) @ poses[name][:3, :3]) <= np.array(box.size_m) / 2
        owner[inside.all(axis=1) & (owner < 0)] = len(names)
        names.append(name)
        carriers[name] = {"actor": name}
    parts = [cloud.select(torch.from_numpy(owner == -1)).bind(WORLD)]
    for index, name in enumerate(names):
        part = cloud.select(torch.from_numpy(owner == index)).bind(name)
        parts.append(part.transform(invert_rigid(torch.from_numpy(poses[name]))))
    parts = [part for part in parts if len(part)]
    return merge(parts), {part.segment_names[0]: carriers[part.segment_names[0]] for part in parts}


def bind_file(config: BindConfig) -> dict[str, int]:
    """Write the scene folder; how many Gaussians each segment got."""
    if not Path(config.cloud).is_file():
        raise ValueError(f"cloud {config.cloud!r}: there is no such file; name a .ply of Gaussians")
    T = torch.tensor(config.T_base_cloud, dtype=torch.float64).reshape(4, 4)
    bound, carriers = bind(ply.read(Path(config.cloud)).transform(T, config.scale), config)
    procedural.write(Path(config.out), bound, carriers, config.background)
    counts = bound.segment_ids.bincount(minlength=len(bound.segment_names)).tolist()
    return dict(zip(bound.segment_names, counts, strict=True))


def main(argv: list[str]) -> int:
    return action.run("bind", BindConfig, argv, __doc__, bind_file)
