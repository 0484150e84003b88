"""Photograph a cell: cotwin twin capture source=robot|stand_in|colmap out=FOLDER

`robot` drives the arm's wrist camera through views over the running ROS graph (real arm or stand-in cell); `stand_in`
takes the same pictures, and some by a hand-held camera, straight from the stand-in cell's world; `colmap` finds where
the photographs of `pictures` were taken (pycolmap, which is installed apart). With a board on the table
(`board.columns`, `board.rows`) the wrist camera is calibrated first, and `calibration.json` serves later captures.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bridge.embodiment import Embodiment
from sim.scan import action
from sim.scan import photos as photo_set
from sim.scan.arm import Links, Reach, of_wrist
from sim.scan.board import Board, hand_eye
from sim.scan.photos import Photo
from sim.scan.views import around
from sim.stand_in.config import CellConfig

SOURCES = ("robot", "stand_in", "colmap")
CALIBRATION = "calibration.json"
ROBOT = [f"panda_link{i}" for i in range(8)] + ["panda_hand", "panda_leftfinger", "panda_rightfinger"]
HAND_HELD_VIEWS = {"distance_m": (0.7, 1.4), "elevation_rad": (0.2, 1.2), "azimuth_rad": (-1.0, 1.6)}
ARM_SPREAD_RAD = 0.25  # of the joints about home, for the poses that a hand-held camera finds the arm in


@dataclass
class CaptureConfig:
    """Keys of `cotwin twin capture`."""

    source: str = SOURCES[0]
    out: str = "runs/scan/photos"
    camera: str = "wrist"
    num_views: int = 60  # of the wrist camera; views that the arm cannot take are left out
    hand_held: int = 120  # stand_in: photographs by the hand-held camera
    arm_poses: int = 4  # stand_in: that the arm stands in meanwhile
    arrangements: int = 6  # stand_in: of cube and plate; what lies in one place all the time sticks to the table there
    pictures: str = ""  # colmap: a folder of photographs by one hand-held camera
    known: str = ""  # colmap: an earlier capture of the same cell by the wrist camera
    joints_rad: list[float] = field(default_factory=list)  # colmap: where the arm stood; empty: at home, hand open
    targets_m: list[list[float]] = field(
        default_factory=lambda: [
            [0.45, 0.0, 0.0],
            [0.4, 0.2, 0.0],
            [0.55, -0.15, 0.0],
            [0.5, 0.3, 0.0],
            [0.3, -0.1, 0.0],
        ]
    )
    distance_m: list[float] = field(default_factory=lambda: [0.22, 0.4])
    elevation_rad: list[float] = field(default_factory=lambda: [0.7, 1.3])
    azimuth_rad: list[float] = field(default_factory=lambda: [-1.0, 1.0])
    board: Board = field(default_factory=Board)
    calibration: str = ""  # of an earlier capture with a board; empty: the contract's, or from this one's board
    speed_m_s: float = 0.1  # robot: of the TCP between views
    settle_s: float = 0.4  # robot: at rest before a picture is taken
    view_timeout_s: float = 30.0  # robot: a view that is not reached by then is left out
    namespace: str = ""  # robot: of the arm's nodes
    seed: int = 0  # stand_in: of the scene
    embodiment: Embodiment = field(default_factory=Embodiment)
    cell: CellConfig = field(default_factory=CellConfig)

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source {self.source!r}: allowed are {', '.join(SOURCES)}")
        if self.embodiment.cameras and self.camera not in self.embodiment.cameras:
            raise ValueError(f"camera {self.camera!r}: the contract has {sorted(self.embodiment.cameras)}")
        for key in ("distance_m", "elevation_rad", "azimuth_rad"):
            if len(getattr(self, key)) != 2:
                raise ValueError(f"{key} {getattr(self, key)}: a lower and an upper end are needed")


@dataclass(frozen=True)
class Shot:
    """A picture uint8 [H, W, 3], the TCP's pose [4, 4] when it was taken, and where the moving bodies were then."""

    pixels: np.ndarray
    T_base_tcp: np.ndarray
    bodies: dict[str, np.ndarray]


def capture(config: CaptureConfig) -> dict[str, Any]:
    """Photographs and `transforms.json` in the folder `out`; figures of what was found. ValueError where it cannot."""
    out, open_m = Path(config.out), config.embodiment.gripper_open_m
    out.mkdir(parents=True, exist_ok=True)
    if config.source == "colmap":
        from sim.scan.colmap import locate  # needs pycolmap

        links = Links().poses(np.array(config.joints_rad or config.embodiment.home_joint_pos_rad), open_m)
        robot = {name: links[name] for name in ROBOT}
        found = [replace(photo, bodies=robot) for photo in locate(Path(config.pictures), Path(config.known), out)]
        photo_set.save(out, found)
        return {"photographs": len(found)}
    K, T_tcp_cam = _calibration(config)
    reach = Reach(config.embodiment.home_joint_pos_rad)
    asked = around(config.targets_m, config.num_views, config.distance_m, config.elevation_rad, config.azimuth_rad)
    views = of_wrist(asked, T_tcp_cam, reach)
    photos: list[Photo] = []
    if config.source == "robot":
        from sim.scan.drive import shots_of  # needs rclpy

        shots = shots_of(config, views)
    else:
        shots, photos = _stand_in(config, [(T, q) for T in views if (q := reach.joints(T)) is not None], out)
    figures: dict[str, Any] = {"views": len(asked), "views_in_reach": len(views), "wrist_photographs": len(shots)}
    if config.board.columns:
        seen = hand_eye([s.pixels for s in shots], np.array([s.T_base_tcp for s in shots]), config.board, K)
        K, T_tcp_cam = seen.K, seen.T_tcp_cam
        figures |= {"board_rms_px": seen.rms_px, "board_pictures": seen.num_pictures}
        (out / CALIBRATION).write_text(json.dumps({"K": K.tolist(), "T_tcp_cam": T_tcp_cam.tolist()} | figures) + "\n")
    for index, shot in enumerate(shots):
        name = f"{config.camera}_{index:04d}.png"
        photos.append(photo_set.store(out / name, shot.pixels, K, shot.T_base_tcp @ T_tcp_cam, shot.bodies))
    photo_set.save(out, photos)
    return figures | {"photographs": len(photos)}


def _calibration(config: CaptureConfig) -> tuple[np.ndarray, np.ndarray]:
    """K and `T_tcp_cam` of the wrist camera, as far as they are known before."""
    camera = config.embodiment.cameras[config.camera]
    if camera.mount != "tcp":
        raise ValueError(f"camera {config.camera!r} is fixed to the {camera.mount}: the arm cannot carry it around")
    if not config.calibration:
        return camera.intrinsics, camera.matrix
    try:
        data = json.loads(Path(config.calibration).read_text())
        return np.array(data["K"]).reshape(3, 3), np.array(data["T_tcp_cam"]).reshape(4, 4)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"calibration {config.calibration}: {error!r}; an earlier capture writes one") from error


def _stand_in(
    config: CaptureConfig, views: list[tuple[np.ndarray, np.ndarray]], out: Path
) -> tuple[list[Shot], list[Photo]]:
    """The wrist camera's shots, and the hand-held camera's photographs."""
    from sim.scan.stand_in import HAND_CAMERA, HAND_HELD, StandInPhotographer

    rng, open_m = np.random.default_rng(config.seed), config.embodiment.gripper_open_m
    names, photos = [*ROBOT, "cube", "plate"], []
    person = StandInPhotographer(config.cell, config.embodiment, config.seed)

    def arrange(index: int, of: int) -> None:
        """Somebody puts the things elsewhere, now and then."""
        number, before = (n * config.arrangements // of for n in (index, index - 1))
        if number != before:
            person.reset(config.seed + number)

    shots = []
    for index, (T, q) in enumerate(tqdm(views, desc="wrist", unit="view")):
        arrange(index, len(views))
        shots.append(Shot(person.shoot(config.camera, q, open_m), T, person.bodies(q, open_m, names)))
    targets = [(0.35, 0.05, 0.1), (0.2, 0.0, 0.35), (0.45, 0.1, 0.0)]
    held = around(targets, config.hand_held, **HAND_HELD_VIEWS)
    home = np.array(config.embodiment.home_joint_pos_rad)
    stands = [home + rng.uniform(-ARM_SPREAD_RAD, ARM_SPREAD_RAD, 7) * (index > 0) for index in range(config.arm_poses)]
    for index, T in enumerate(tqdm(held, desc="hand-held", unit="view")):
        arrange(index, len(held))
        q = stands[index * len(stands) // len(held)]
        pixels, bodies = person.shoot(HAND_HELD, q, open_m, T), person.bodies(q, open_m, names)
        photos.append(photo_set.store(out / f"{HAND_HELD}_{index:04d}.png", pixels, HAND_CAMERA.intrinsics, T, bodies))
    person.close()
    return shots, photos


def main(argv: list[str]) -> int:
    return action.run("capture", CaptureConfig, argv, __doc__, capture)
