"""Putting splat pictures and simulator pictures together."""

import torch
from torch import Tensor

from sim.splat.render import RenderOutput

NEARER_M = 0.005  # a splat surface is some millimetres thick: within this it counts as in front


def nearest_wins(splat: RenderOutput, sim_rgb: Tensor, sim_depth_m: Tensor) -> Tensor:
    """At each pixel the nearer of both, e.g. a scanned robot among simulated objects.

    `splat` without a background; `sim_rgb` float32 [N, M, H, W, 3] in [0, 1]; `sim_depth_m` [N, M, H, W] along the
    optical axis, inf where the simulator shows nothing. Where the splat is nearer it is laid over the simulator's
    picture by its alpha, so soft edges stay soft. Returns rgb [N, M, H, W, 3].
    """
    _require_shapes(splat, sim_rgb, sim_depth_m)
    in_front = splat.depth_m <= sim_depth_m.to(splat.depth_m) + NEARER_M
    return torch.where(in_front[..., None], splat.over(sim_rgb), sim_rgb.to(splat.rgb))


def layers(front: RenderOutput, back: RenderOutput) -> RenderOutput:
    """Two renders without a background, of different segments seen by the same cameras, as one.

    At each pixel the one with the smaller depth is laid over the other. Exact where one is wholly in front of the
    other; where they interpenetrate (a hand half inside a pile) a render of both clouds together differs. There is no
    segment mask.
    """
    swap = back.depth_m < front.depth_m
    over, under = _where(swap, back, front), _where(swap, front, back)
    light = 1 - over.alpha
    alpha = over.alpha + light * under.alpha
    weighted = _finite(over.depth_m) * over.alpha + _finite(under.depth_m) * light * under.alpha
    return RenderOutput(
        rgb=over.rgb + light[..., None] * under.rgb,
        alpha=alpha,
        depth_m=torch.where(alpha > 0, weighted / alpha, torch.inf),
    )


def _where(condition: Tensor, a: RenderOutput, b: RenderOutput) -> RenderOutput:
    return RenderOutput(
        rgb=torch.where(condition[..., None], a.rgb, b.rgb),
        alpha=torch.where(condition, a.alpha, b.alpha),
        depth_m=torch.where(condition, a.depth_m, b.depth_m),
    )


def _finite(depth_m: Tensor) -> Tensor:
    return torch.where(depth_m.isinf(), 0.0, depth_m)


def _require_shapes(splat: RenderOutput, sim_rgb: Tensor, per_pixel: Tensor) -> None:
    if sim_rgb.shape != splat.rgb.shape or per_pixel.shape != splat.alpha.shape or not sim_rgb.is_floating_point():
        raise ValueError(
            f"simulator pictures {tuple(sim_rgb.shape)} ({sim_rgb.dtype}) with {tuple(per_pixel.shape)} do not match "
            f"splat pictures {tuple(splat.rgb.shape)} (float32 in [0, 1])"
        )
