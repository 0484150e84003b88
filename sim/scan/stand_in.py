"""Photographs of the stand-in cell without driving it: its own MuJoCo pictures, for scans that need no running cell.

Two kinds, as at a real table: by the wrist camera with the arm at a view, and by a camera in the hand of somebody who
walks around while the arm stands still. The wrist camera is wrong by what the cell's configuration says.
"""

from collections.abc import Sequence

import numpy as np

from bridge.embodiment import Camera, Embodiment
from bridge.pose import pose, quat_xyzw_from_matrix
from sim.scan.arm import Links
from sim.stand_in.config import CellConfig
from sim.stand_in.scene import PictureMaker
from sim.stand_in.world import World
from sim.twin.config import TwinConfig

HAND_HELD = "hand_held"
HAND_CAMERA = Camera(width=640, height=480, fx=604.0, fy=604.0, cx=319.5, cy=239.5)


class StandInPhotographer:
    """Use from the thread that made it (it owns a GL context)."""

    def __init__(self, cell: CellConfig, embodiment: Embodiment, seed: int = 0):
        cameras = embodiment.cameras | {HAND_HELD: HAND_CAMERA}
        self.cameras = cameras
        held = Embodiment.from_dict(embodiment.to_dict() | {"cameras": {n: vars(c) for n, c in cameras.items()}})
        self._world = World(cell, held)
        self._maker = PictureMaker(self._world.model)
        self._links = Links()
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Cube and plate where the seed puts them."""
        self._world.reset(seed, force=True)

    def shoot(
        self, camera: str, q_rad: np.ndarray, opening_m: float, T_base_cam: np.ndarray | None = None
    ) -> np.ndarray:
        """What a camera shows with the arm there, uint8 [H, W, 3]. `T_base_cam`: where the hand-held one is."""
        if T_base_cam is not None:
            model, index = self._world.model, self._world.model.camera(HAND_HELD).id
            model.cam_pos[index] = T_base_cam[:3, 3]
            model.cam_quat[index] = np.roll(quat_xyzw_from_matrix(T_base_cam[:3, :3] @ np.diag([1.0, -1.0, -1.0])), 1)
        qpos = self._world.data.qpos.copy()
        qpos[:7], qpos[7:9] = q_rad, opening_m / 2
        self._maker.set_state(qpos, self._world.data.mocap_pos[0])
        pixels = np.empty((self.cameras[camera].height, self.cameras[camera].width, 3), np.uint8)
        self._maker.render(camera, pixels)
        return pixels

    def bodies(self, q_rad: np.ndarray, opening_m: float, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Poses of the twin's links and actors of these names, in the twin's own body frames."""
        poses = self._world.poses()
        plate = pose([*poses["plate"][:2, 3], TwinConfig().plate_height_m / 2], poses["plate"][:3, :3])
        known = self._links.poses(q_rad, opening_m) | {"cube": poses["cube"], "plate": plate}
        return {name: known[name] for name in names}

    def close(self) -> None:
        self._maker.close()
