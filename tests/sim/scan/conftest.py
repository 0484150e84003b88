"""A small scanned cell without a camera: photographs that the reference renderer made of a known cloud."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.pose import matrix_from_rpy, pose
from sim.scan import photos as photo_set
from sim.scan.photos import Photo, store
from sim.scan.views import around
from sim.splat import procedural, sample
from sim.splat.cloud import GaussianCloud, merge
from sim.splat.render import Cameras, render, to_uint8
from sim.splat.scene import load

K = np.array([[60.0, 0, 29.5], [0, 60.0, 21.5], [0, 0, 1]])
WIDTH, HEIGHT = 60, 44


def tabletop() -> GaussianCloud:
    """A chequered table in the world, a two-coloured cube in its own frame."""
    tiles = []
    for i, j in np.ndindex(4, 4):
        tile = sample.box((0.1, 0.1, 0.01), 12, (0.7, 0.6, 0.4) if (i + j) % 2 else (0.2, 0.3, 0.4), "world")
        tiles.append(tile.transform(torch.from_numpy(pose([0.25 + 0.1 * i, -0.15 + 0.1 * j, -0.005], np.eye(3)))))
    cube = sample.box((0.08, 0.08, 0.08), 60, (0.8, 0.1, 0.1), "cube")
    red = cube.means_m[:, 0] > 0
    cube.sh[red] = sample.flat_colour(torch.tensor([[0.1, 0.7, 0.2]]))
    return merge([*tiles, cube])


def write_scene(folder: Path, cloud: GaussianCloud | None = None) -> Path:
    procedural.write(folder, cloud or tabletop(), {"world": {}, "cube": {"actor": "cube"}}, [0.1, 0.1, 0.1])
    return folder


def photograph(scene: Path, folder: Path, num: int = 16) -> list[Photo]:
    """The cube lies elsewhere in every second photograph."""
    folder.mkdir()
    found, made = load(scene), []
    for index, T in enumerate(around([[0.4, 0.0, 0.0]], num, (0.5, 0.7), (0.5, 1.2), (-1.5, 1.5))):
        side = 1 if index % 2 else -1
        cube = pose([0.4, 0.06 * side, 0.04], matrix_from_rpy([0, 0, 0.4 * side]))
        bodies = {"cube": torch.from_numpy(cube)[None]}
        cameras = Cameras(torch.from_numpy(K)[None, None], torch.from_numpy(T)[None, None], WIDTH, HEIGHT)
        picture = render(found.cloud, found.poses({}, bodies), cameras, background=found.background)
        pixels = to_uint8(picture.rgb)[0, 0].numpy()
        made.append(store(folder / f"{index:03d}.png", pixels, K, T, {"cube": cube}))
    photo_set.save(folder, made)
    return made


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="session")
def photographs(scene, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scan") / "photos"
    photograph(scene, folder)
    return folder
