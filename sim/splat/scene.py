"""A scanned cell as a folder: `scene.yaml` beside its `.ply` clouds. The format is described in docs/splat.md.

`load` gives one merged cloud whose segments are bound to the twin's links and actors, or fixed in the world.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from bridge.embodiment import Camera
from sim.splat import ply
from sim.splat.cloud import GaussianCloud, merge

FORMAT = "cotwin-splat-1"
KEYS = {
    "scene": ("format", "clouds", "segments", "background", "cameras"),
    "cloud": ("file", "segment", "T_segment_cloud", "scale"),
    "segment": ("link", "actor", "T_world_segment"),
    "background": ("color", "image"),
}


@dataclass(frozen=True)
class Segment:
    """What carries a segment: a robot link, an actor, or (`kind` "fixed") nothing: it stays at `T_world_segment`."""

    name: str
    kind: str
    body: str = ""
    T_world_segment: Tensor | None = None


@dataclass(frozen=True)
class SplatScene:
    """`segments` in the order of `cloud.segment_names`; `background` float32 [3] or [H, W, 3] in [0, 1]."""

    cloud: GaussianCloud
    segments: tuple[Segment, ...]
    background: Tensor
    cameras: dict[str, Camera] = field(default_factory=dict)

    @property
    def fixed_names(self) -> tuple[str, ...]:
        return tuple(segment.name for segment in self.segments if segment.kind == "fixed")

    def poses(self, T_world_link: Mapping[str, Tensor], T_world_actor: Mapping[str, Tensor]) -> Tensor:
        """Segment poses [N, S, 4, 4] from body poses [N, 4, 4] by name; only bound bodies are looked up.

        Raises ValueError for a body that is not there.
        """
        bodies = {"link": T_world_link, "actor": T_world_actor}
        found = {s.name: _body_pose(s, bodies[s.kind]) for s in self.segments if s.kind != "fixed"}
        some = next(iter(found.values()), torch.eye(4)[None])
        fixed = {s.name: s.T_world_segment for s in self.segments if s.T_world_segment is not None}
        found |= {name: T.to(some).expand(len(some), 4, 4) for name, T in fixed.items()}
        return torch.stack([found[segment.name] for segment in self.segments], dim=1)


def load(folder: Path) -> SplatScene:
    """Raises ValueError (naming file and key) for anything that does not fit, FileNotFoundError for a missing file."""
    path = folder / "scene.yaml"
    data, declared = _read(path)
    clouds = data.get("clouds") or []
    if not isinstance(clouds, list) or not clouds:
        raise ValueError(f"{path}: clouds must be a list of at least one cloud")
    cloud = merge([_cloud(entry, folder, f"{path}: clouds[{i}]") for i, entry in enumerate(clouds)])
    for name in cloud.segment_names:
        if name not in declared:
            raise ValueError(f"{path}: a cloud names segment {name!r}, which is not declared.{_near(name, declared)}")
    if empty := sorted(set(declared) - set(cloud.segment_names)):
        raise ValueError(f"{path}: segments {empty} have no cloud")
    return SplatScene(
        cloud=cloud,
        segments=tuple(declared[name] for name in cloud.segment_names),
        background=_background(data.get("background") or {"color": [0, 0, 0]}, folder, f"{path}: background"),
        cameras={name: _camera(entry, f"{path}: cameras.{name}") for name, entry in _items(data, "cameras", path)},
    )


def carriers(folder: Path) -> tuple[list[str], list[str], bool]:
    """The links and actors that a scene binds, sorted, and whether it holds anything fixed. Reads no cloud."""
    declared = _read(folder / "scene.yaml")[1].values()
    links, actors = (sorted({s.body for s in declared if s.kind == kind}) for kind in ("link", "actor"))
    return links, actors, any(s.kind == "fixed" for s in declared)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Segment]]:
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    _check_keys(data, "scene", str(path))
    if data.get("format") != FORMAT:
        raise ValueError(f"{path}: format {data.get('format')!r}, this version reads {FORMAT!r}")
    entries = _items(data, "segments", path)
    return data, {name: _segment(name, entry, f"{path}: segments.{name}") for name, entry in entries}


def _cloud(entry: Any, folder: Path, where: str) -> GaussianCloud:
    _check_keys(entry, "cloud", where)
    for key in ("file", "segment"):
        if not isinstance(entry.get(key), str):
            raise ValueError(f"{where}: {key} is needed (a name)")
    if not (folder / entry["file"]).is_file():
        raise FileNotFoundError(f"{where}: {folder / entry['file']} does not exist")
    cloud = ply.read(folder / entry["file"], entry["segment"])
    if "T_segment_cloud" in entry or "scale" in entry:
        T = _rigid(entry.get("T_segment_cloud", np.eye(4).ravel().tolist()), f"{where}.T_segment_cloud")
        cloud = cloud.transform(T, float(entry.get("scale", 1.0)))
    return cloud


def _segment(name: str, entry: Any, where: str) -> Segment:
    entry = entry or {}
    _check_keys(entry, "segment", where)
    if len(entry) > 1:
        raise ValueError(f"{where}: {sorted(entry)} exclude each other; a segment has one carrier")
    for kind in ("link", "actor"):
        if kind in entry:
            return Segment(name, kind, str(entry[kind]))
    T = entry.get("T_world_segment", np.eye(4).ravel().tolist())
    return Segment(name, "fixed", T_world_segment=_rigid(T, f"{where}.T_world_segment"))


def _camera(entry: Any, where: str) -> Camera:
    try:
        return Camera(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _background(entry: Any, folder: Path, where: str) -> Tensor:
    _check_keys(entry, "background", where)
    if len(entry) != 1:
        raise ValueError(f"{where}: either color or image")
    if "image" in entry:
        from PIL import Image  # only scenes with a background picture need it

        with Image.open(folder / entry["image"]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    color = torch.tensor(entry["color"], dtype=torch.float32)
    if color.shape != (3,) or color.min() < 0 or color.max() > 1:
        raise ValueError(f"{where}.color {entry['color']}: three numbers in [0, 1] are needed")
    return color


def _rigid(numbers: Any, where: str) -> Tensor:
    if not isinstance(numbers, list) or len(numbers) != 16:
        raise ValueError(f"{where}: 16 numbers are needed (4x4, row-major)")
    T = np.array(numbers, dtype=np.float64).reshape(4, 4)
    R = T[:3, :3]
    if not np.allclose(R @ R.T, np.eye(3), atol=1e-4) or np.linalg.det(R) < 0 or not np.allclose(T[3], [0, 0, 0, 1]):
        raise ValueError(f"{where} is not a rigid transform: {T.tolist()}")
    return torch.from_numpy(T)


def _body_pose(segment: Segment, bodies: Mapping[str, Tensor]) -> Tensor:
    if segment.body not in bodies:
        near = _near(segment.body, bodies)
        raise ValueError(
            f"segment {segment.name!r} is bound to {segment.kind} {segment.body!r}, which is not there.{near}"
        )
    return bodies[segment.body]


def _items(data: dict[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    entry = data.get(key) or {}
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {key} must map names to entries")
    return [(str(name), value) for name, value in entry.items()]


def _check_keys(entry: Any, kind: str, where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected keys {', '.join(KEYS[kind])}, got {entry!r}")
    for key in entry:
        if key not in KEYS[kind]:
            raise ValueError(
                f"{where}: unknown key {key!r}; known are {', '.join(KEYS[kind])}.{_near(key, KEYS[kind])}"
            )


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
