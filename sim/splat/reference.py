"""Projection and blending in plain PyTorch, one picture at a time: what a picture is, to be read and tested against.

Elliptical weighted averaging with the constants of gsplat 1.5.3, so that both backends make the same picture. Fine for
some ten thousand Gaussians on a CPU; on a GPU use the `gsplat` backend.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sim.splat import harmonics
from sim.splat.cloud import GaussianCloud

NEAR_M = 0.01
DILATION_PX2 = 0.3  # added to both variances on the screen: no Gaussian is thinner than a pixel's footprint
MIN_ALPHA = 1 / 255  # weaker contributions are dropped: they would not change an 8-bit picture
MAX_ALPHA = 0.999
MIN_TRANSMITTANCE = 1e-4  # a Gaussian that would leave less light than this ends its pixel, undrawn
MAX_EXTENT = 3.33  # standard deviations, where alpha of an opaque Gaussian has fallen to MIN_ALPHA
FRUSTUM_MARGIN = 0.3  # of half a field of view: how far outside it the projection is linearised at most
TILE_PX = 16
BLOCK = 128  # Gaussians that are blended at once


@dataclass(frozen=True)
class Projection:
    """G Gaussians on the screen of one picture (or of I pictures: every field gets a leading I).

    means_px [G, 2], x right, y down, pixel centres at half-integers; conics_px [G, 3]: xx, xy, yy of the inverse
    covariance; depths_m [G] along the optical axis; radii_px int32 [G, 2]: half the bounding box, 0 where not drawn;
    opacities [G]; colours [G, 3], linear RGB from this viewpoint.
    """

    means_px: Tensor
    conics_px: Tensor
    depths_m: Tensor
    radii_px: Tensor
    opacities: Tensor
    colours: Tensor


def project(
    cloud: GaussianCloud, T_cam_segment: Tensor, K: Tensor, width: int, height: int, antialiased: bool = False
) -> Projection:
    """`T_cam_segment` [S, 4, 4] rigid; `K` [3, 3] with pixel centres at half-integers.

    `antialiased` takes back in opacity what the dilation adds in area, so that far things do not swell.
    """
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    R, t = T_cam_segment[:, :3, :3], T_cam_segment[:, :3, 3]
    cam_pos_segment = -(R.mT @ t[:, :, None])[..., 0]  # [S, 3]
    R, t, cam_pos_segment = (per_segment[cloud.segment_ids] for per_segment in (R, t, cam_pos_segment))

    point = (R @ cloud.means_m[:, :, None])[..., 0] + t
    depth = point[:, 2]
    drawn = depth >= NEAR_M
    z = torch.where(drawn, depth, 1.0)
    x, y = point[:, 0] / z, point[:, 1] / z
    means_px = torch.stack([fx * x + cx, fy * y + cy], dim=-1)

    # Far outside the picture the linearised projection explodes, so it is taken at the frustum's widened border.
    margin_x, margin_y = FRUSTUM_MARGIN * 0.5 * width / fx, FRUSTUM_MARGIN * 0.5 * height / fy
    x = x.clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    y = y.clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    rows = [torch.stack([fx / z, zero, -fx * x / z], dim=-1), torch.stack([zero, fy / z, -fy * y / z], dim=-1)]
    M = torch.stack(rows, dim=-2) @ R  # [G, 2, 3], segment frame to screen
    covariance = M @ cloud.covariances_m2 @ M.mT
    xx, xy, yy = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    sharp = xx * yy - xy * xy
    xx, yy = xx + DILATION_PX2, yy + DILATION_PX2
    determinant = xx * yy - xy * xy
    opacities = cloud.opacities
    if antialiased:
        opacities = opacities * (sharp / determinant).clamp_min(0).sqrt()
    drawn = drawn & (determinant > 0) & (opacities >= MIN_ALPHA)  # not in place: autograd keeps the first

    extent = (2 * (opacities / MIN_ALPHA).clamp_min(1).log()).sqrt().clamp_max(MAX_EXTENT)
    radii = (extent[:, None] * torch.stack([xx, yy], dim=-1).sqrt()).ceil()
    size = torch.tensor([width, height], device=radii.device)
    drawn = drawn & ((means_px + radii > 0) & (means_px - radii < size)).all(dim=-1)

    direction = torch.nn.functional.normalize(cloud.means_m - cam_pos_segment, dim=-1)
    return Projection(
        means_px=means_px,
        conics_px=torch.stack([yy, -xy, xx], dim=-1) / determinant[:, None],
        depths_m=depth,
        radii_px=torch.where(drawn[:, None], radii, 0).int(),
        opacities=opacities,
        colours=harmonics.colours(cloud.sh, direction),
    )


def blend(seen: Projection, features: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Blend `features` [G, C] front to back: [height, width, C] over black, and alpha [height, width]."""
    drawn = seen.radii_px.amin(dim=-1).nonzero()[:, 0]
    order = drawn[torch.argsort(seen.depths_m[drawn], stable=True)]
    means_px, conics_px, radii_px = seen.means_px[order], seen.conics_px[order], seen.radii_px[order]
    opacities, features = seen.opacities[order], features[order]
    low, high = means_px - radii_px, means_px + radii_px

    picture = features.new_zeros(height, width, features.shape[1])
    alpha = features.new_zeros(height, width)
    for top in range(0, height, TILE_PX):
        in_row = ((low[:, 1] < top + TILE_PX) & (high[:, 1] > top)).nonzero()[:, 0]
        for left in range(0, width, TILE_PX):
            hits = in_row[(low[in_row, 0] < left + TILE_PX) & (high[in_row, 0] > left)]
            if not len(hits):
                continue
            rows, columns = slice(top, min(top + TILE_PX, height)), slice(left, min(left + TILE_PX, width))
            light = alpha.new_ones(alpha[rows, columns].shape)
            for some in hits.split(BLOCK):
                weights, light = _weights(means_px[some], conics_px[some], opacities[some], rows, columns, light)
                picture[rows, columns] += weights @ features[some]
                alpha[rows, columns] += weights.sum(dim=-1)
                if light.max() <= MIN_TRANSMITTANCE:
                    break  # nothing behind is seen anywhere in the tile
    return picture, alpha


def _weights(
    means_px: Tensor, conics_px: Tensor, opacities: Tensor, rows: slice, columns: slice, light: Tensor
) -> tuple[Tensor, Tensor]:
    """What each of L Gaussians, nearest first, gives to each pixel of a tile, [rows, columns, L], and the light [rows,
    columns] that gets through them, of what there was."""
    y = torch.arange(rows.start, rows.stop, device=means_px.device) + 0.5
    x = torch.arange(columns.start, columns.stop, device=means_px.device) + 0.5
    dx = (means_px[:, 0] - x[:, None])[None]
    dy = (means_px[:, 1] - y[:, None])[:, None]
    xx, xy, yy = conics_px.unbind(-1)
    exponent = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
    alpha = (opacities * torch.exp(-exponent)).clamp_max(MAX_ALPHA)
    alpha = torch.where((exponent < 0) | (alpha < MIN_ALPHA), 0.0, alpha)
    after = light[..., None] * torch.cumprod(1 - alpha, dim=-1)
    before = torch.cat([light[..., None], after[..., :-1]], dim=-1)
    return alpha * before * (after > MIN_TRANSMITTANCE), after[..., -1]
