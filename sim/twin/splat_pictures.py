"""The twin's observations drawn from splats, for all environments in one call: `render: splat` and `composite`.

Whoever steps the twins sends a `View` of each; what is drawn has the same names, sizes and types as SAPIEN's pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bridge.embodiment import Embodiment
from sim.splat.render import Cameras
from sim.splat.renderer import SplatRenderer, contract_cameras
from sim.splat.scene import carriers
from sim.twin.config import TwinConfig


@dataclass(frozen=True)
class View:
    """What is drawn of one moment. SAPIEN's part: `rgb` uint8 [H, W, 3] and (render: composite) `depth_m` float32
    [H, W], inf where nothing is, for each camera. For splats: float32 poses in base of the bodies that the splat scene
    binds [B, 4, 4], in its order, and of the cameras by name [M, 4, 4], and the light's share of its nominal."""

    rgb: dict[str, np.ndarray]
    depth_m: dict[str, np.ndarray]
    T_base_body: np.ndarray
    T_base_cam: np.ndarray
    light: float


class SplatPictures:
    """One renderer with the bodies and cameras of one twin configuration."""

    def __init__(self, config: TwinConfig, embodiment: Embodiment):
        self._renderer = SplatRenderer(config.splat)
        self._links, self._actors, _ = carriers(Path(config.splat.scene))
        self._names = sorted(embodiment.cameras)
        size = config.picture_width, config.picture_height
        nominal, fixed = contract_cameras(embodiment.cameras, *size, torch.eye(4)[None])
        self._size, self._K = size, nominal.K[0].float()
        self._composite = config.render == "composite"
        r = config.randomization
        still = r.camera_pos_m == r.camera_rot_rad == 0.0
        self._fixed = [still and one for one in fixed]

    @property
    def device(self) -> torch.device:
        return self._renderer.device

    def draw(self, views: Sequence[View]) -> dict[str, np.ndarray]:
        """uint8 [N, H, W, 3] for each camera."""
        bodies = torch.from_numpy(np.stack([view.T_base_body for view in views]))
        links = {name: bodies[:, index] for index, name in enumerate(self._links)}
        actors = {name: bodies[:, len(links) + index] for index, name in enumerate(self._actors)}
        device = self._renderer.device
        T_world_cam = torch.from_numpy(np.stack([view.T_base_cam for view in views])).to(device)
        K = self._K.to(device).expand(len(views), -1, 3, 3)
        cameras, poses = Cameras(K, T_world_cam, *self._size), self._renderer.scene.poses(links, actors).to(device)
        if len(poses) != len(views):  # a scene that is wholly fixed
            poses = poses.expand(len(views), -1, 4, 4)
        light = torch.tensor([view.light for view in views])
        light = None if bool((light == 1.0).all()) else light  # a pass over all pictures less
        if self._composite:
            rgb, depth_m = (self._stacked([getattr(view, key) for view in views]) for key in ("rgb", "depth_m"))
            pictures = self._renderer.composite(poses, cameras, rgb, depth_m, self._fixed, light)
        else:
            pictures = self._renderer.pictures(poses, cameras, self._fixed, light)
        return dict(zip(self._names, on_host(pictures.transpose(0, 1)), strict=True))

    def _stacked(self, views: list[Mapping[str, np.ndarray]]) -> torch.Tensor:
        """[N, M, H, W, ...] of the cameras' own arrays."""
        return torch.from_numpy(np.stack([[view[name] for name in self._names] for view in views]))


def on_host(pictures: torch.Tensor) -> np.ndarray:
    """A copy in host memory; from a GPU into page-locked memory, which takes a fraction of the time."""
    if pictures.device.type == "cpu":
        return pictures.contiguous().numpy()
    return torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True).copy_(pictures.contiguous()).numpy()
