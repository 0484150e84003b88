"""`cotwin splat-scene`: a scene folder without a scan, sampled from the twin's own shapes.

The robot's visual meshes, the table and a task's objects become Gaussians bound to the twin's links and actors, so
`render: splat` works before anybody has scanned a cell, and a scan has something to be compared with. Colours are what
the meshes and the twin's config say, under one baked light.
"""

import importlib.util
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
import yaml
from trimesh.visual import ColorVisuals, TextureVisuals

from bridge import pose
from bridge.config import command_line
from sim.splat import ply, sample
from sim.splat.cloud import GaussianCloud, merge
from sim.splat.scene import FORMAT
from sim.twin.config import TASKS, TwinConfig
from sim.twin.objects import builtin, receptacles

TABLE_SIZE_M = (1.2, 1.4, 0.04)
TABLE_CENTER_M = (0.45, 0.0, -0.02)
TO_LIGHT = (0.3, 0.4, 1.0)
AMBIENT = 0.55
UNPAINTED = (0.5, 0.5, 0.5)


@dataclass
class SplatSceneConfig:
    """`out`: the folder to write. `urdf`: a robot with visual meshes, empty for ManiSkill's Panda. Gaussians go half to
    the robot, a third to the table and the rest to the task's objects."""

    out: str = "runs/splat/tabletop"
    task: str = TASKS[0]
    num_gaussians: int = 60_000
    urdf: str = ""
    background: tuple[float, float, float] = (0.55, 0.6, 0.65)

    def __post_init__(self):
        if self.num_gaussians < 100:
            raise ValueError(f"num_gaussians {self.num_gaussians}: at least 100 are needed")
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}: allowed are {', '.join(TASKS)}")


def main(argv: list[str]) -> int | None:
    config = command_line("splat-scene", SplatSceneConfig, argv, __doc__ or "")
    urdf = Path(config.urdf) if config.urdf else panda_urdf()
    cloud, bodies = tabletop(urdf, config.num_gaussians, TwinConfig(task=config.task))
    write(Path(config.out), cloud, bodies, list(config.background))
    print(f"{len(cloud)} Gaussians in {len(cloud.segment_names)} segments: {config.out}/scene.yaml")
    return 0


def panda_urdf() -> Path:
    """ManiSkill's, found without importing it."""
    spec = importlib.util.find_spec("mani_skill")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the default robot comes with mani_skill, which is not installed; name a robot with urdf=FILE")
    return Path(spec.submodule_search_locations[0]) / "assets/robots/panda/panda_v2.urdf"


def tabletop(urdf: Path, num: int, twin: TwinConfig) -> tuple[GaussianCloud, dict[str, dict[str, Any]]]:
    """The cloud, and what carries each of its segments (the `segments` entries of scene.yaml)."""
    robot = robot_links(urdf, num // 2)
    table = sample.box(TABLE_SIZE_M, num // 3, twin.table_colour, "table")
    rest = num - sum(map(len, robot)) - len(table)
    things = cube_and_plate(rest, twin) if twin.task == TASKS[0] else objects_and_receptacles(rest)
    bodies: dict[str, dict[str, Any]] = {part.segment_names[0]: {"link": part.segment_names[0]} for part in robot}
    bodies["table"] = {"T_world_segment": pose.pose(np.array(TABLE_CENTER_M), np.eye(3)).ravel().tolist()}
    bodies |= {part.segment_names[0]: {"actor": part.segment_names[0]} for part in things}
    return merge([sample.shaded(part, TO_LIGHT, AMBIENT) for part in [*robot, table, *things]]), bodies


def cube_and_plate(num: int, twin: TwinConfig) -> list[GaussianCloud]:
    edge = 2 * twin.cube_half_size_m
    return [
        sample.box((edge, edge, edge), num // 2, twin.cube_colour, "cube"),
        sample.cylinder(twin.plate_radius_m, twin.plate_height_m, num - num // 2, twin.plate_colour, "plate"),
    ]


def objects_and_receptacles(num: int) -> list[GaussianCloud]:
    """Of PickPlaceTwin-v1, both splits: as many Gaussians to each body, shared out by area among its parts."""
    made = [one for split in builtin().values() for one in split] + receptacles()
    clouds = []
    for one in made:
        corners = np.concatenate([mesh.triangles for mesh, _ in one.parts])
        colours = np.concatenate([np.tile(colour, (len(mesh.faces), 3, 1)) for mesh, colour in one.parts])
        clouds.append(sample.triangles(corners, max(1, num // len(made)), colours, one.name))
    return clouds


def robot_links(urdf: Path, num: int) -> list[GaussianCloud]:
    """`num` Gaussians, one cloud for each link that has visual meshes, in the links' frames; shared out by area.

    Raises ValueError for a URDF without any.
    """
    links: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}  # triangles [F, 3, 3] and their colour
    for link in ElementTree.parse(urdf).getroot().iter("link"):
        for visual in link.iter("visual"):
            mesh = visual.find("geometry/mesh")
            if mesh is not None:
                found = _mesh_parts(urdf.parent / mesh.attrib["filename"], _origin(visual.find("origin")))
                links.setdefault(link.attrib["name"], []).extend(found)
    if not links:
        raise ValueError(f"{urdf} has no link with a visual mesh")
    parts = [(name, corners, rgb) for name, found in links.items() for corners, rgb in found]
    areas = [trimesh.triangles.area(corners).sum() for _, corners, _ in parts]
    density = num / sum(areas)
    clouds = [
        sample.triangles(corners, max(1, round(density * area)), rgb, name)
        for (name, corners, rgb), area in zip(parts, areas, strict=True)
    ]
    return [merge([cloud for cloud in clouds if cloud.segment_names == (name,)]) for name in links]


def write(folder: Path, cloud: GaussianCloud, bodies: dict[str, dict[str, Any]], background: list[float]) -> None:
    """One .ply for each segment, and scene.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in cloud.segment_names:
        ply.write(folder / f"{name}.ply", cloud.select_segments([name]))
    scene = {
        "format": FORMAT,
        "clouds": [{"file": f"{name}.ply", "segment": name} for name in cloud.segment_names],
        "segments": bodies,
        "background": {"color": background},
    }
    (folder / "scene.yaml").write_text(yaml.safe_dump(scene, sort_keys=False))


def _mesh_parts(path: Path, T_link_mesh: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Triangles [F, 3, 3] in the link's frame and RGB of each part of a mesh file."""
    parts = []
    for mesh in trimesh.load_scene(path).dump():
        if not isinstance(mesh, trimesh.Trimesh):
            continue  # lines and points have no surface
        corners = trimesh.transform_points(mesh.triangles.reshape(-1, 3), T_link_mesh).reshape(-1, 3, 3)
        match mesh.visual:
            case TextureVisuals(material=painted) | (ColorVisuals() as painted):
                parts.append((corners, np.asarray(painted.main_color[:3]) / 255))
            case _:
                parts.append((corners, np.array(UNPAINTED)))
    return parts


def _origin(origin: ElementTree.Element | None) -> np.ndarray:
    """The `origin` element as a matrix [4, 4]; none means identity."""
    attributes = origin.attrib if origin is not None else {}
    xyz, rpy = (np.array(attributes.get(key, "0 0 0").split(), dtype=np.float64) for key in ("xyz", "rpy"))
    return pose.pose(xyz, pose.matrix_from_rpy(rpy))
