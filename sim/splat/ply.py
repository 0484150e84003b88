"""Standard 3D Gaussian Splatting `.ply` files (the layout of the INRIA reference code): binary little-endian floats

    x y z [nx ny nz] f_dc_0..2 f_rest_0..(3 (K-1) - 1) opacity scale_0..2 rot_0..3

with f_rest channel by channel (all of red first), opacity as a logit, scales as natural logarithms of the file's length
unit, rot as a quaternion w x y z. Normals mean nothing: they are skipped when reading and written as zeros.
"""

from pathlib import Path

import numpy as np
import torch

from sim.splat import harmonics
from sim.splat.cloud import GaussianCloud

NORMALS = ("nx", "ny", "nz")
TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8"}


def column_names(degree: int) -> list[str]:
    """The properties of one vertex, in file order."""
    num_rest = 3 * (harmonics.num_coefficients(degree) - 1)
    return [
        *("x", "y", "z"),
        *NORMALS,
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(num_rest)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]


def read(path: Path, segment: str = "world") -> GaussianCloud:
    """All Gaussians of the file in one segment, in the file's frame and unit.

    Raises ValueError, naming the file, when it is not a complete binary 3DGS file or holds a non-finite number.
    """
    vertices = _read_vertices(path)
    present = set(vertices.dtype.names or ())
    num_rest = sum(name.startswith("f_rest_") for name in present)
    try:
        degree = harmonics.degree_of(num_rest // 3 + 1)
    except ValueError:
        degree = -1
    if degree < 0 or num_rest % 3:
        raise ValueError(f"{path}: {num_rest} f_rest properties: allowed are 0, 9, 24 and 45")
    needed = [name for name in column_names(degree) if name not in NORMALS]
    if missing := [name for name in needed if name not in present]:
        raise ValueError(f"{path} lacks {missing}: it is not a 3D Gaussian Splatting file")
    if unknown := sorted(present - set(needed) - set(NORMALS)):
        raise ValueError(f"{path} has properties that no Gaussian has: {unknown}. Export it as standard 3DGS")
    table = np.stack([vertices[name] for name in needed], axis=1, dtype=np.float32, casting="same_kind")
    if bad := [name for name, column in zip(needed, table.T, strict=True) if not np.isfinite(column).all()]:
        raise ValueError(f"{path} holds non-finite numbers in {bad}")
    if len(table) and not table[:, -4:].any(axis=1).all():
        raise ValueError(f"{path} holds rotations that are all zero")
    columns = torch.from_numpy(table)
    dc, rest = columns[:, 3:6], columns[:, 6 : 6 + num_rest]
    sh = torch.cat([dc[:, None], rest.reshape(len(table), 3, num_rest // 3).transpose(1, 2)], dim=1).contiguous()
    opacity, log_scales, quats = columns[:, 6 + num_rest :].split([1, 3, 4], dim=1)
    ids = torch.zeros(len(columns), dtype=torch.int64)
    parts = columns[:, :3], quats, log_scales, opacity[:, 0]
    return GaussianCloud(*(part.contiguous() for part in parts), sh, ids, (segment,))


def write(path: Path, cloud: GaussianCloud) -> None:
    """Write all Gaussians in their segments' frames. The format has no segments: write one file for each."""
    rest = cloud.sh[:, 1:].transpose(1, 2).flatten(1)
    normals = torch.zeros_like(cloud.means_m)
    parts = [cloud.means_m, normals, cloud.sh[:, 0], rest, cloud.opacity_logits[:, None]]
    table = torch.cat([*parts, cloud.log_scales, cloud.quats_wxyz], dim=1)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(cloud)}"]
    header += [f"property float {name}" for name in column_names(cloud.degree)]
    head = "\n".join([*header, "end_header\n"])
    path.write_bytes(head.encode("ascii") + table.cpu().numpy().astype("<f4").tobytes())


def _read_vertices(path: Path) -> np.ndarray:
    """The vertex element as a structured array."""
    data = path.read_bytes()
    head, found, body = data.partition(b"end_header\n")
    lines = head.decode("ascii", errors="replace").split("\n")
    if lines[0].strip() != "ply" or not found:
        raise ValueError(f"{path} is not a .ply file (no 'ply' ... 'end_header')")
    columns: list[tuple[str, str]] = []
    num, elements, binary = 0, [], False
    for line in lines[1:]:
        match line.split():
            case [] | ["comment", *_] | ["obj_info", *_]:
                pass
            case ["format", kind, "1.0"]:
                binary = kind == "binary_little_endian"
            case ["element", name, count] if count.isdigit():
                elements.append(name)
                num = int(count)
            case ["property", kind, name] if kind in TYPES:
                columns.append((name, TYPES[kind]))
            case _:
                raise ValueError(f"{path}: unexpected header line {line.strip()!r}; all properties must be floats")
    if not binary:
        raise ValueError(f"{path}: only 'format binary_little_endian 1.0' is read; convert it")
    if elements != ["vertex"]:
        raise ValueError(f"{path} has elements {elements}, expected 'vertex' alone")
    if len({name for name, _ in columns}) != len(columns):
        raise ValueError(f"{path} names a property twice")
    dtype = np.dtype(columns)
    if len(body) != num * dtype.itemsize:
        raise ValueError(f"{path}: {len(body)} bytes of data, expected {num} x {dtype.itemsize}; the file is damaged")
    return np.frombuffer(body, dtype)
