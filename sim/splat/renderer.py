"""`SplatRenderer`: a scene's pictures for the twin's observations, from segment poses and cameras.

The twin calls `pictures` (render: splat) or `composite` (render: composite) once a step for all its environments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bridge.embodiment import Camera
from sim.splat import composite, scene
from sim.splat.cloud import GaussianCloud
from sim.splat.config import SplatConfig
from sim.splat.render import Cameras, RenderOutput, render, to_uint8
from sim.splat.scene import SplatScene


class SplatRenderer:
    """Pictures of one scene on one device."""

    def __init__(self, config: SplatConfig, splat_scene: SplatScene | None = None):
        """`splat_scene` replaces reading `config.scene`."""
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self._config = config
        self.scene = splat_scene or scene.load(Path(config.scene))
        self._cloud = self.scene.cloud.to(device)
        fixed = self.scene.fixed_names
        names = self._cloud.segment_names
        self._fixed_ids = [names.index(name) for name in fixed]
        self._fixed_cloud = self._cloud.select_segments(fixed)
        self._moving_cloud = self._cloud.select_segments(set(names) - set(fixed))
        self._layer: tuple[tuple[Tensor, ...], RenderOutput] | None = None
        self._backgrounds: dict[tuple[int, int], Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self._cloud.device

    def pictures(
        self, T_world_segment: Tensor, cameras: Cameras, fixed: Sequence[bool] = (), light: Tensor | None = None
    ) -> Tensor:
        """uint8 [N, M, H, W, 3] on the device. `T_world_segment` [N, S, 4, 4], e.g. `scene.poses(links, actors)`;
        `light` [N] is the share of the brightness that the scene was seen in.

        `fixed` [M] says which cameras never move (default: none): for these, what is fixed in the world is drawn once
        and laid behind or before the rest by depth. It is drawn anew when their calibration or pose does change.
        """
        output, background = self._lit(T_world_segment, cameras, fixed, light)
        return to_uint8(output.over(background))

    def composite(
        self,
        T_world_segment: Tensor,
        cameras: Cameras,
        sim_rgb: Tensor,
        sim_depth_m: Tensor,
        fixed: Sequence[bool] = (),
        light: Tensor | None = None,
    ) -> Tensor:
        """Splat and simulator in one picture, the nearer at each pixel: uint8 [N, M, H, W, 3].

        `sim_rgb` uint8 [N, M, H, W, 3]; `sim_depth_m` [N, M, H, W], inf where the simulator shows nothing: there the
        scene's background is used. `light` [N] is of the splats and this background: the simulator has its own.
        """
        output, background = self._lit(T_world_segment, cameras, fixed, light)
        sim_depth_m = sim_depth_m.to(self.device)
        sim = torch.where(sim_depth_m.isinf()[..., None], background, sim_rgb.to(self.device) / 255)
        return to_uint8(composite.nearest_wins(output, sim, sim_depth_m))

    def render(self, T_world_segment: Tensor, cameras: Cameras, fixed: Sequence[bool] = ()) -> RenderOutput:
        """Without background. Raises ValueError for shapes that do not fit."""
        num_cameras = cameras.K.shape[1]
        if len(fixed) not in (0, num_cameras):
            raise ValueError(f"fixed has {len(fixed)} entries for {num_cameras} cameras")
        still = [m for m in range(num_cameras) if fixed and fixed[m]]
        if not (still and self._config.cache_fixed and len(self._fixed_cloud)):
            return self._draw(self._cloud, T_world_segment, cameras)
        cached = cameras.select(slice(None), torch.tensor(still))
        front = self._draw(self._moving_cloud, T_world_segment, cached)
        output = composite.layers(front, self._fixed_layer(T_world_segment, cached))
        if len(still) == num_cameras:
            return output
        others = [m for m in range(num_cameras) if m not in still]
        rest = self._draw(self._cloud, T_world_segment, cameras.select(slice(None), torch.tensor(others)))
        order = torch.tensor(still + others).argsort().to(self.device)
        return RenderOutput(
            *(torch.cat([getattr(o, n) for o in (output, rest)], 1)[:, order] for n in ("rgb", "alpha", "depth_m"))
        )

    def _lit(
        self, T_world_segment: Tensor, cameras: Cameras, fixed: Sequence[bool], light: Tensor | None
    ) -> tuple[RenderOutput, Tensor]:
        """The splats and what is behind them."""
        output = self.render(T_world_segment, cameras, fixed)
        background = self._background(cameras.width, cameras.height)
        if light is None:
            return output, background
        share = light.to(output.rgb)[:, None, None, None, None]
        return replace(output, rgb=output.rgb * share), background * share

    def _draw(self, cloud: GaussianCloud, T_world_segment: Tensor, cameras: Cameras) -> RenderOutput:
        config = self._config
        return render(
            cloud,
            T_world_segment,
            cameras,
            backend=config.backend,
            antialiased=config.antialiased,
            images_per_call=config.images_per_call,
        )

    def _fixed_layer(self, T_world_segment: Tensor, cameras: Cameras) -> RenderOutput:
        """What is fixed in the world, for cameras that are: [N, M, ...], or [1, M, ...] where environments agree."""
        T_fixed = T_world_segment[:, self._fixed_ids]
        parts = T_fixed, cameras.K, cameras.T_world_cam
        if all(bool((part == part[:1]).all()) for part in parts):
            cameras, T_world_segment = cameras.select(slice(0, 1), slice(None)), T_world_segment[:1]
            parts = T_fixed[:1], cameras.K, cameras.T_world_cam
        key = (*parts, torch.tensor([cameras.width, cameras.height]))
        if self._layer is None or not all(map(_same, self._layer[0], key)):
            layer = self._draw(self._fixed_cloud, T_world_segment, cameras)
            self._layer = tuple(part.clone() for part in key), layer
        return self._layer[1]

    def _background(self, width: int, height: int) -> Tensor:
        """[3], or [H, W, 3] resized to the picture."""
        size = (width, height)
        if size not in self._backgrounds:
            picture = self.scene.background
            if picture.ndim == 3:
                channels = picture.permute(2, 0, 1)[None]
                picture = torch.nn.functional.interpolate(channels, (height, width), mode="area")[0].permute(1, 2, 0)
            self._backgrounds[size] = picture.to(self.device)
        return self._backgrounds[size]


def contract_cameras(
    cameras: Mapping[str, Camera], width: int, height: int, T_base_tcp: Tensor
) -> tuple[Cameras, list[bool]]:
    """The contract's cameras, sorted by name, at another picture size, and which of them never move.

    `T_base_tcp` [N, 4, 4]; the world is the robot's base. A pixel's corners keep their rays when pictures shrink.
    """
    K, T = [], []
    for _, camera in sorted(cameras.items()):
        scale = torch.tensor([[width / camera.width], [height / camera.height], [1.0]], dtype=torch.float64)
        half = torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]], dtype=torch.float64)
        K.append((torch.from_numpy(camera.intrinsics) + half) * scale - half)
        T_mount_cam = torch.from_numpy(camera.matrix).to(T_base_tcp.device)
        mount = T_base_tcp.double() if camera.mount == "tcp" else torch.eye(4).to(T_mount_cam).expand_as(T_base_tcp)
        T.append(mount @ T_mount_cam)
    poses = torch.stack(T, dim=1)
    intrinsics = torch.stack(K).to(poses).expand(len(poses), len(K), 3, 3)
    return Cameras(intrinsics, poses, width, height), [c.mount == "base" for _, c in sorted(cameras.items())]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
