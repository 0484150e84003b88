"""What PickPlaceTwin-v1 carries, and what into: bodies of convex parts, made here or read from folders.

25 objects are built in: 20 to train with and 5 that no training episode shows (`split`). Each is a few convex parts of
one colour each, its origin at the centre of its bounding box, at most 6 cm wide along its own y axis, along which a
gripper closes. With `objects: external` they are files `$MANISKILL_ASSET_DIR/pick_place/<split>/*.{glb,obj,ply,stl}`:
metres, z up, each geometry of a file one part, which collides as its convex hull.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from trimesh.creation import box, capsule, cylinder, icosphere, revolve
from trimesh.transformations import rotation_matrix, translation_matrix
from trimesh.visual import TextureVisuals

from sim.twin.config import TwinConfig

ASSET_VARIABLE, ASSET_FOLDER = "MANISKILL_ASSET_DIR", "pick_place"
MESH_FILES = (".glb", ".obj", ".ply", ".stl")
MAX_WIDTH_M = 0.06
SIDES = 20  # of round things
TRAY_HALF_M, TRAY_WALL_M = (0.07, 0.09), 0.03  # inner half sides in x and y; height
BOWL_RADIUS_M, BOWL_WALL_M = 0.075, 0.04
THICKNESS_M = 0.005  # of floor and walls
RED, ORANGE, YELLOW, GREEN = (0.75, 0.1, 0.1), (0.9, 0.45, 0.1), (0.9, 0.8, 0.15), (0.15, 0.6, 0.2)
TEAL, BLUE, PURPLE, PINK = (0.1, 0.6, 0.6), (0.1, 0.25, 0.8), (0.5, 0.2, 0.6), (0.9, 0.5, 0.6)
BROWN, WHITE = (0.4, 0.25, 0.12), (0.9, 0.9, 0.9)

Part = tuple[trimesh.Trimesh, tuple[float, float, float]]


@dataclass(frozen=True)
class Body:
    """Convex parts in a frame whose origin is the centre of their bounding box of `size_m` [3]."""

    name: str
    parts: tuple[Part, ...]
    size_m: np.ndarray

    @property
    def longest_half_m(self) -> float:
        """From the centre to the farthest point, however the body lies."""
        return float(max(np.linalg.norm(mesh.vertices, axis=1).max() for mesh, _ in self.parts))


def body(name: str, parts: Sequence[Part]) -> Body:
    bounds = np.array([mesh.bounds for mesh, _ in parts])
    lower, upper = bounds[:, 0].min(0), bounds[:, 1].max(0)
    shift = translation_matrix(-(lower + upper) / 2)
    return Body(name, tuple((mesh.copy().apply_transform(shift), colour) for mesh, colour in parts), upper - lower)


def objects(config: TwinConfig) -> list[Body]:
    """Those of the configured split, in a fixed order. Raises ValueError for folders that hold none or bad ones."""
    return external(config.split) if config.objects == "external" else builtin()[config.split]


def external(split: str) -> list[Body]:
    root = os.environ.get(ASSET_VARIABLE)
    if not root:
        raise ValueError(f"objects 'external': set {ASSET_VARIABLE} to the folder that holds {ASSET_FOLDER}/{split}/")
    folder = Path(root).expanduser() / ASSET_FOLDER / split
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in MESH_FILES)
    if not files:
        raise ValueError(f"{folder} holds no object: files of {', '.join(MESH_FILES)} are read")
    return [_from_file(path) for path in files]


def _from_file(path: Path) -> Body:
    meshes = [mesh for mesh in trimesh.load_scene(path).dump() if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces)]
    if not meshes:
        raise ValueError(f"{path} holds no triangle")
    found = body(path.stem, [(mesh, _colour(mesh)) for mesh in meshes])
    if found.size_m[1] > MAX_WIDTH_M:
        raise ValueError(f"{path}: {found.size_m[1]:.3f} m along y, a gripper takes {MAX_WIDTH_M}; units are metres")
    return found


def _colour(mesh: trimesh.Trimesh) -> tuple[float, float, float]:
    visual = mesh.visual
    r, g, b = (visual.material if isinstance(visual, TextureVisuals) else visual).main_color[:3] / 255
    return r, g, b


def builtin() -> dict[str, list[Body]]:
    train = {
        "cube": [(box((0.04, 0.04, 0.04)), RED)],
        "brick": [(box((0.07, 0.035, 0.03)), ORANGE)],
        "plank": [(box((0.11, 0.03, 0.02)), BROWN)],
        "tower": [(box((0.04, 0.04, 0.08)), BLUE)],
        "can": [(_rod(0.026, 0.08), TEAL)],
        "puck": [(_rod(0.03, 0.025), PURPLE)],
        "log": [(_turned(_rod(0.02, 0.08)), BROWN)],
        "ball": [(icosphere(2, 0.026), YELLOW)],
        "egg": [(_scaled(icosphere(2, 0.022), (1.35, 1, 1)), WHITE)],
        "pill": [(_turned(capsule(0.05, 0.018, count=[12, 12])), PINK)],
        "cone": [(_lathe((0.028, 0.0), (0.003, 0.06)), ORANGE)],
        "pyramid": [(_hull([0, 0, 0.05], *([x, y, 0] for x in (-0.025, 0.025) for y in (-0.025, 0.025))), YELLOW)],
        "hexagon": [(cylinder(0.028, 0.04, sections=6), GREEN)],
        "carrot": [
            (_turned(_lathe((0.02, 0.0), (0.004, 0.09))), ORANGE),
            (_at(box((0.02, 0.012, 0.012)), x=-0.01), GREEN),
        ],
        "bottle": [
            (_rod(0.025, 0.06), GREEN),
            (_at(_lathe((0.025, 0.0), (0.011, 0.02)), z=0.03), GREEN),
            (_at(_rod(0.011, 0.02), z=0.06), WHITE),
        ],
        "mug": [(_rod(0.028, 0.06), BLUE), (_at(box((0.02, 0.01, 0.035)), x=0.036), BLUE)],
        "hammer": [
            (_at(box((0.08, 0.016, 0.016)), x=-0.03), BROWN),
            (_at(box((0.024, 0.055, 0.024)), x=0.02), TEAL),
        ],
        "dumbbell": [
            (_turned(_rod(0.009, 0.06)), WHITE),
            *((_at(icosphere(2, 0.02), x=x), RED) for x in (-0.03, 0.03)),
        ],
        "l_block": [
            (box((0.07, 0.025, 0.025)), PURPLE),
            (_at(box((0.025, 0.025, 0.025)), x=0.0225, y=0.025), PURPLE),
        ],
        "banana": [
            (_at(_turned(cylinder(0.014, 0.036, sections=12), yaw_rad), x, y), YELLOW)
            for x, y, yaw_rad in ((-0.03, 0.0, 0.45), (0.0, -0.007, 0.0), (0.03, 0.0, -0.45))
        ],
    }
    held_out = {
        "wedge": [
            (_hull(*([x, y, z] for y in (-0.02, 0.02) for x, z in ((-0.03, 0), (0.03, 0), (-0.03, 0.035)))), TEAL)
        ],
        "spool": [(_rod(0.014, 0.04), WHITE), *((_at(_rod(0.027, 0.008), z=z), PINK) for z in (-0.022, 0.022))],
        "gem": [(_scaled(icosphere(0, 0.028), (1.1, 1, 1)), PURPLE)],
        "pear": [(_lathe((0.012, 0.0), (0.027, 0.02), (0.024, 0.034), (0.012, 0.055), (0.006, 0.065)), GREEN)],
        "mushroom": [
            (_rod(0.013, 0.035), WHITE),
            (_at(_lathe((0.029, 0.0), (0.022, 0.014), (0.008, 0.022)), z=0.0175), RED),
        ],
    }
    splits = {"train": train, "held_out": held_out}
    return {split: [body(*entry) for entry in entries.items()] for split, entries in splits.items()}


def receptacles() -> list[Body]:
    """A tray and a bowl, of floor and walls. Their origins lie in the middle of their undersides."""
    (x, y), h, t = TRAY_HALF_M, TRAY_WALL_M, THICKNESS_M
    tray = [
        _at(box((2 * x, 2 * y, t)), z=t / 2),
        *(_at(box((t, 2 * (y + t), h)), x=side * (x + t / 2), z=h / 2) for side in (-1, 1)),
        *(_at(box((2 * x, t, h)), y=side * (y + t / 2), z=h / 2) for side in (-1, 1)),
    ]
    r, h, staves = BOWL_RADIUS_M, BOWL_WALL_M, 16
    stave = box((t, 2 * (r + 0.02) * np.tan(np.pi / staves), h)).apply_transform(
        translation_matrix((r + 0.007, 0, h / 2)) @ rotation_matrix(0.35, (0, 1, 0))
    )
    around = [stave.copy().apply_transform(rotation_matrix(2 * np.pi * k / staves, (0, 0, 1))) for k in range(staves)]
    bowl = [_at(cylinder(r + 0.004, t, sections=24), z=t / 2), *around]
    return [
        Body(name, tuple((mesh, WHITE) for mesh in meshes), np.ptp(trimesh.util.concatenate(meshes).bounds, axis=0))
        for name, meshes in (("tray", tray), ("bowl", bowl))
    ]


def _at(mesh: trimesh.Trimesh, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> trimesh.Trimesh:
    return mesh.apply_translation((x, y, z))


def _turned(mesh: trimesh.Trimesh, yaw_rad: float = 0.0) -> trimesh.Trimesh:
    """What stood along z lies along x, turned about z."""
    return mesh.apply_transform(rotation_matrix(yaw_rad, (0, 0, 1)) @ rotation_matrix(np.pi / 2, (0, 1, 0)))


def _scaled(mesh: trimesh.Trimesh, factors: Sequence[float]) -> trimesh.Trimesh:
    return mesh.apply_transform(np.diag([*factors, 1.0]))


def _rod(radius_m: float, length_m: float) -> trimesh.Trimesh:
    return cylinder(radius_m, length_m, sections=SIDES)


def _lathe(*profile: tuple[float, float]) -> trimesh.Trimesh:
    """A convex profile of (radius, height) turned about z."""
    (_, low), (_, high) = profile[0], profile[-1]
    return revolve([(0.0, low), *profile, (0.0, high)], sections=SIDES)


def _hull(*points: Sequence[float]) -> trimesh.Trimesh:
    return trimesh.convex.convex_hull(np.array(points))
