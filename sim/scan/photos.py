"""Photographs with known cameras: a folder of pictures with `transforms.json`, as nerfstudio and instant-ngp have it.

The world is the robot's base, lengths in m. In the file camera axes are OpenGL's and the corner of the first pixel is
(0, 0); here they are the project's own (OpenCV's axes, the first pixel's centre is (0, 0)). Beyond that convention a
frame may have `mask_path` (a grey picture: what is darker than half is not to be learnt from) and `bodies`: name ->
pose in the world, 4x4 row-major, of what moves between photographs.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FILE = "transforms.json"
OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
DISTORTION = ("k1", "k2", "p1", "p2")


@dataclass(frozen=True)
class Photo:
    """`K` [3, 3], `T_world_cam` [4, 4]; `distortion` k1 k2 p1 p2 as OpenCV has them, taken out by `pixels`."""

    path: Path
    width: int
    height: int
    K: np.ndarray
    T_world_cam: np.ndarray
    bodies: dict[str, np.ndarray] = field(default_factory=dict)
    mask_path: Path | None = None
    distortion: tuple[float, ...] = ()

    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]. Raises ValueError for a picture of another size than the file says."""
        return self._straight(self._read(self.path, "RGB"))

    def mask(self) -> np.ndarray | None:
        """bool [H, W]: what may be learnt from, without the borders that `pixels` leaves black; None for everything.
        Raises ValueError where nothing is left."""
        if self.mask_path is None and not any(self.distortion):
            return None
        white = np.full((self.height, self.width), 255, np.uint8)
        grey = white if self.mask_path is None else self._read(self.mask_path, "L")
        mask = (self._straight(white) == 255) & (self._straight(grey) > 127)
        if not mask.any():
            raise ValueError(f"{self.path}: its mask or its distortion leaves no pixel to learn from")
        return mask

    def _read(self, path: Path, mode: str) -> np.ndarray:
        with Image.open(path) as image:
            if image.size != (self.width, self.height):
                raise ValueError(f"{path} is {image.size[0]}x{image.size[1]}, its camera {self.width}x{self.height}")
            return np.array(image.convert(mode))

    def _straight(self, picture: np.ndarray) -> np.ndarray:
        if not any(self.distortion):
            return picture
        import cv2

        return cv2.undistort(picture, self.K, np.array(self.distortion))


def load(folder: Path) -> list[Photo]:
    """All photographs in the order of their file names. ValueError, naming file and key, for what is not a set."""
    path = folder / FILE
    try:
        data = json.loads(path.read_text())
        frames = sorted(data["frames"], key=lambda frame: frame["file_path"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no set of photographs: {error!r}") from error
    photos = [_photo({**data, **frame}, folder, f"{path}: {frame['file_path']}") for frame in frames]
    if not photos:
        raise ValueError(f"{path} has no frames")
    return photos


def store(
    path: Path, pixels: np.ndarray, K: np.ndarray, T_world_cam: np.ndarray, bodies: dict[str, np.ndarray]
) -> Photo:
    """Write a picture uint8 [H, W, 3]; what `save` needs to know of it."""
    Image.fromarray(pixels).save(path)
    return Photo(path, pixels.shape[1], pixels.shape[0], K, T_world_cam, bodies)


def save(folder: Path, photos: list[Photo]) -> None:
    """Write `transforms.json`; the pictures lie in `folder` already."""
    frames = []
    for photo in photos:
        K = photo.K
        frame: dict[str, Any] = {"file_path": str(photo.path.relative_to(folder)), "w": photo.width, "h": photo.height}
        frame |= {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2] + 0.5, "cy": K[1, 2] + 0.5}
        frame |= dict(zip(DISTORTION, photo.distortion, strict=False))
        frame["transform_matrix"] = (photo.T_world_cam @ OPENCV_FROM_OPENGL).tolist()
        if photo.mask_path:
            frame["mask_path"] = str(photo.mask_path.relative_to(folder))
        if photo.bodies:
            frame["bodies"] = {name: T.ravel().tolist() for name, T in photo.bodies.items()}
        frames.append(frame)
    (folder / FILE).write_text(json.dumps({"camera_model": "OPENCV", "frames": frames}, indent=1) + "\n")


def _photo(entry: dict[str, Any], folder: Path, where: str) -> Photo:
    try:
        fx, cx, cy = float(entry["fl_x"]), float(entry["cx"]) - 0.5, float(entry["cy"]) - 0.5
        K = np.array([[fx, 0, cx], [0, float(entry.get("fl_y", fx)), cy], [0, 0, 1]])
        photo = Photo(
            path=folder / entry["file_path"],
            width=int(entry["w"]),
            height=int(entry["h"]),
            K=K,
            T_world_cam=_rigid(entry["transform_matrix"], f"{where}: transform_matrix") @ OPENCV_FROM_OPENGL,
            bodies={n: _rigid(T, f"{where}: bodies.{n}") for n, T in entry.get("bodies", {}).items()},
            mask_path=folder / entry["mask_path"] if "mask_path" in entry else None,
            distortion=tuple(float(entry.get(key, 0.0)) for key in DISTORTION),
        )
    except KeyError as error:
        raise ValueError(f"{where}: {error} is missing") from error
    if not photo.path.is_file():
        raise ValueError(f"{where}: there is no such picture")
    return photo


def _rigid(numbers: Any, where: str) -> np.ndarray:
    T = np.array(numbers, dtype=np.float64)
    if T.size != 16 or not np.allclose(T.reshape(4, 4)[:3, :3] @ T.reshape(4, 4)[:3, :3].T, np.eye(3), atol=1e-4):
        raise ValueError(f"{where} is not a rigid transform (4x4, row-major)")
    return T.reshape(4, 4)
