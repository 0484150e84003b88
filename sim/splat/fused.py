"""The GPU backend: our own fused projection in Triton, then gsplat's tile sort and blending kernels.

One kernel takes every (picture, Gaussian) pair from the segment frame to the screen, colour included. The canonical
cloud is read in place (it fits the GPU's cache and is shared by all pictures); world-frame copies of means, rotations
or coefficients never exist.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sim.splat import reference
from sim.splat.cloud import GaussianCloud

BLOCK = 128
NUM_FEATURES = 4  # red, green, blue, depth

NEAR_M = tl.constexpr(reference.NEAR_M)
DILATION_PX2 = tl.constexpr(reference.DILATION_PX2)
MIN_ALPHA = tl.constexpr(reference.MIN_ALPHA)
MAX_EXTENT = tl.constexpr(reference.MAX_EXTENT)
FRUSTUM_MARGIN = tl.constexpr(reference.FRUSTUM_MARGIN)


def draw(
    cloud: GaussianCloud,
    T_cam_segment: Tensor,
    K: Tensor,
    width: int,
    height: int,
    extra_features: Tensor | None,
    antialiased: bool,
) -> tuple[Tensor, Tensor]:
    """`T_cam_segment` [I, S, 4, 4], `K` [I, 3, 3] with half-integer pixel centres, `extra_features` [G, E] or None.

    Returns channels [I, H, W, 4 + E] (colour, depth, extra; premultiplied) and alpha [I, H, W].
    """
    seen = project(cloud, T_cam_segment, K, width, height, antialiased)
    features = seen.colours
    if extra_features is not None:
        features = torch.cat([features, extra_features.expand(len(K), *extra_features.shape)], dim=-1)
    tile = reference.TILE_PX
    tiles_x, tiles_y = -(-width // tile), -(-height // tile)
    import gsplat  # compiles its kernels on first use; the projection above does without it

    _, keys, flat_ids = gsplat.isect_tiles(seen.means_px, seen.radii_px, seen.depths_m, tile, tiles_x, tiles_y)
    offsets = gsplat.isect_offset_encode(keys, len(K), tiles_x, tiles_y)
    channels, alpha = gsplat.rasterize_to_pixels(
        seen.means_px, seen.conics_px, features, seen.opacities, width, height, tile, offsets, flat_ids
    )
    return channels, alpha[..., 0]


def project(
    cloud: GaussianCloud, T_cam_segment: Tensor, K: Tensor, width: int, height: int, antialiased: bool = False
) -> reference.Projection:
    """`reference.project` for I pictures: its fields with a leading I, depth also as the fourth of `colours` [I, G, 4].

    Values of a Gaussian with radius 0 are undefined (not written).
    """
    I, S, G = len(K), T_cam_segment.shape[1], len(cloud)
    means, covariances, sh = cloud.planes
    seen = reference.Projection(
        means_px=K.new_empty(I, G, 2),
        conics_px=K.new_empty(I, G, 3),
        depths_m=K.new_empty(I, G),
        radii_px=torch.empty(I, G, 2, dtype=torch.int32, device=K.device),
        opacities=K.new_empty(I, G),
        colours=K.new_empty(I, G, NUM_FEATURES),
    )
    if G:
        # Pictures run fastest, so that a block of the cloud is read from memory once and then from cache.
        _project[(I, triton.cdiv(G, BLOCK))](
            means, covariances, cloud.opacities, sh, cloud.segment_ids, T_cam_segment.contiguous(), K.contiguous(),
            seen.means_px, seen.conics_px, seen.depths_m, seen.radii_px, seen.opacities, seen.colours,
            G, S, width, height, cloud.degree, antialiased, BLOCK,
        )  # fmt: skip
    return seen


@triton.jit
def _colour(sh_ptr, channel: tl.constexpr, g, G, seen, x, y, z, DEGREE: tl.constexpr):
    """One colour channel along the unit direction (x, y, z); see `harmonics.basis`."""
    at = sh_ptr + channel * G + g
    step = 3 * G
    value = 0.28209479177387814 * tl.load(at, seen, 0.0)
    if DEGREE >= 1:
        value += -0.4886025119029199 * y * tl.load(at + step, seen, 0.0)
        value += 0.4886025119029199 * z * tl.load(at + 2 * step, seen, 0.0)
        value += -0.4886025119029199 * x * tl.load(at + 3 * step, seen, 0.0)
    if DEGREE >= 2:
        value += 1.0925484305920792 * x * y * tl.load(at + 4 * step, seen, 0.0)
        value += -1.0925484305920792 * y * z * tl.load(at + 5 * step, seen, 0.0)
        value += 0.31539156525252005 * (3 * z * z - 1) * tl.load(at + 6 * step, seen, 0.0)
        value += -1.0925484305920792 * x * z * tl.load(at + 7 * step, seen, 0.0)
        value += 0.5462742152960396 * (x * x - y * y) * tl.load(at + 8 * step, seen, 0.0)
    if DEGREE >= 3:
        value += -0.5900435899266435 * y * (3 * x * x - y * y) * tl.load(at + 9 * step, seen, 0.0)
        value += 2.890611442640554 * x * y * z * tl.load(at + 10 * step, seen, 0.0)
        value += -0.4570457994644658 * y * (5 * z * z - 1) * tl.load(at + 11 * step, seen, 0.0)
        value += 0.3731763325901154 * z * (5 * z * z - 3) * tl.load(at + 12 * step, seen, 0.0)
        value += -0.4570457994644658 * x * (5 * z * z - 1) * tl.load(at + 13 * step, seen, 0.0)
        value += 1.445305721320277 * z * (x * x - y * y) * tl.load(at + 14 * step, seen, 0.0)
        value += -0.5900435899266435 * x * (x * x - 3 * y * y) * tl.load(at + 15 * step, seen, 0.0)
    return tl.maximum(value + 0.5, 0.0)


@triton.jit
def _project(
    means_ptr, covariances_ptr, opacities_ptr, sh_ptr, ids_ptr, T_ptr, K_ptr,
    means_px_ptr, conics_px_ptr, depths_m_ptr, radii_px_ptr, seen_opacities_ptr, features_ptr,
    G, S, width, height, DEGREE: tl.constexpr, ANTIALIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK Gaussians of one picture; the same steps as `reference.project`."""
    image = tl.program_id(0)
    g = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = g < G
    fx, fy = tl.load(K_ptr + 9 * image), tl.load(K_ptr + 9 * image + 4)
    cx, cy = tl.load(K_ptr + 9 * image + 2), tl.load(K_ptr + 9 * image + 5)

    T = T_ptr + 16 * (image * S + tl.load(ids_ptr + g, valid, 0))  # row-major 4x4 of each Gaussian's segment
    r00, r01, r02, t0 = tl.load(T), tl.load(T + 1), tl.load(T + 2), tl.load(T + 3)
    r10, r11, r12, t1 = tl.load(T + 4), tl.load(T + 5), tl.load(T + 6), tl.load(T + 7)
    r20, r21, r22, t2 = tl.load(T + 8), tl.load(T + 9), tl.load(T + 10), tl.load(T + 11)
    mx = tl.load(means_ptr + g, valid, 0.0)
    my = tl.load(means_ptr + G + g, valid, 0.0)
    mz = tl.load(means_ptr + 2 * G + g, valid, 0.0)
    opacity = tl.load(opacities_ptr + g, valid, 0.0)

    depth = r20 * mx + r21 * my + r22 * mz + t2
    seen = valid & (depth >= NEAR_M)
    z = tl.where(seen, depth, 1.0)
    x = (r00 * mx + r01 * my + r02 * mz + t0) / z
    y = (r10 * mx + r11 * my + r12 * mz + t1) / z
    px, py = fx * x + cx, fy * y + cy

    margin_x, margin_y = FRUSTUM_MARGIN * 0.5 * width / fx, FRUSTUM_MARGIN * 0.5 * height / fy
    x = tl.minimum(tl.maximum(x, -cx / fx - margin_x), (width - cx) / fx + margin_x)
    y = tl.minimum(tl.maximum(y, -cy / fy - margin_y), (height - cy) / fy + margin_y)
    # M = J R, 2x3: from the segment frame to the screen
    ax, bx, ay, by = fx / z, -fx * x / z, fy / z, -fy * y / z
    m00, m01, m02 = ax * r00 + bx * r20, ax * r01 + bx * r21, ax * r02 + bx * r22
    m10, m11, m12 = ay * r10 + by * r20, ay * r11 + by * r21, ay * r12 + by * r22
    sxx, sxy = tl.load(covariances_ptr + g, seen, 0.0), tl.load(covariances_ptr + G + g, seen, 0.0)
    sxz, syy = tl.load(covariances_ptr + 2 * G + g, seen, 0.0), tl.load(covariances_ptr + 3 * G + g, seen, 0.0)
    syz, szz = tl.load(covariances_ptr + 4 * G + g, seen, 0.0), tl.load(covariances_ptr + 5 * G + g, seen, 0.0)
    u0, u1 = m00 * sxx + m01 * sxy + m02 * sxz, m00 * sxy + m01 * syy + m02 * syz
    u2 = m00 * sxz + m01 * syz + m02 * szz
    v0, v1 = m10 * sxx + m11 * sxy + m12 * sxz, m10 * sxy + m11 * syy + m12 * syz
    v2 = m10 * sxz + m11 * syz + m12 * szz
    xx, xy = u0 * m00 + u1 * m01 + u2 * m02, u0 * m10 + u1 * m11 + u2 * m12
    yy = v0 * m10 + v1 * m11 + v2 * m12
    sharp = xx * yy - xy * xy
    xx, yy = xx + DILATION_PX2, yy + DILATION_PX2
    determinant = xx * yy - xy * xy
    if ANTIALIASED:
        opacity *= tl.sqrt(tl.maximum(sharp / determinant, 0.0))
    seen &= (determinant > 0) & (opacity >= MIN_ALPHA)

    extent = tl.minimum(tl.sqrt(2 * tl.log(tl.maximum(opacity / MIN_ALPHA, 1.0))), MAX_EXTENT)
    rx, ry = tl.ceil(extent * tl.sqrt(xx)), tl.ceil(extent * tl.sqrt(yy))
    seen &= (px + rx > 0) & (px - rx < width) & (py + ry > 0) & (py - ry < height)

    # The camera's position in the segment frame is -R^T t: the view direction needs no rotated coefficients.
    dx = mx + r00 * t0 + r10 * t1 + r20 * t2
    dy = my + r01 * t0 + r11 * t1 + r21 * t2
    dz = mz + r02 * t0 + r12 * t1 + r22 * t2
    scale = tl.rsqrt(tl.maximum(dx * dx + dy * dy + dz * dz, 1e-24))
    dx, dy, dz = dx * scale, dy * scale, dz * scale
    red = _colour(sh_ptr, 0, g, G, seen, dx, dy, dz, DEGREE)
    green = _colour(sh_ptr, 1, g, G, seen, dx, dy, dz, DEGREE)
    blue = _colour(sh_ptr, 2, g, G, seen, dx, dy, dz, DEGREE)

    pair = image.to(tl.int64) * G + g
    tl.store(radii_px_ptr + 2 * pair, tl.where(seen, rx, 0.0).to(tl.int32), valid)
    tl.store(radii_px_ptr + 2 * pair + 1, tl.where(seen, ry, 0.0).to(tl.int32), valid)
    tl.store(means_px_ptr + 2 * pair, px, seen)
    tl.store(means_px_ptr + 2 * pair + 1, py, seen)
    tl.store(conics_px_ptr + 3 * pair, yy / determinant, seen)
    tl.store(conics_px_ptr + 3 * pair + 1, -xy / determinant, seen)
    tl.store(conics_px_ptr + 3 * pair + 2, xx / determinant, seen)
    tl.store(depths_m_ptr + pair, depth, seen)
    tl.store(seen_opacities_ptr + pair, opacity, seen)
    tl.store(features_ptr + 4 * pair, red, seen)
    tl.store(features_ptr + 4 * pair + 1, green, seen)
    tl.store(features_ptr + 4 * pair + 2, blue, seen)
    tl.store(features_ptr + 4 * pair + 3, depth, seen)
