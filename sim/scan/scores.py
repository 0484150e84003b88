"""How near one picture is to another: PSNR, SSIM, and a distance of edges.

Pictures are float [H, W, 3] in [0, 1] on one device; `ssim` is differentiable. What a `mask`, bool [H, W], leaves out
counts as outside of the pictures. None of these is LPIPS: that compares the features of a trained network, and no
weights come with this project. `edge_distance` is the nearest to it that needs none: whether edges of all sizes lie in
the same places.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

WINDOW_PX, SIGMA_PX = 11, 1.5  # of SSIM's Gaussian window, and its constants for pictures in [0, 1]
C1, C2 = 0.01**2, 0.03**2
EDGE_SCALES = (1, 2, 4, 8)
LUMA = (0.299, 0.587, 0.114)


def psnr_db(a: Tensor, b: Tensor) -> float:
    """At most 120, where a picture equals the other."""
    return -10 * math.log10(max(1e-12, float(((a.double() - b.double()) ** 2).mean())))


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity after Wang et al. 2004, mean over pixels and channels; 1 for equal pictures."""
    offsets = torch.arange(WINDOW_PX, device=a.device) - WINDOW_PX // 2
    line = torch.exp(-0.5 * (offsets / SIGMA_PX) ** 2)
    line = line / line.sum()
    if mask is not None:  # black, as around the pictures
        a, b = a * mask[..., None], b * mask[..., None]
    x, y = a.permute(2, 0, 1)[:, None], b.permute(2, 0, 1)[:, None]
    stack = torch.cat([x, y, x * x, y * y, x * y])
    half = WINDOW_PX // 2
    means = conv2d(
        conv2d(stack, line[None, None, None], padding=(0, half)), line[None, None, :, None], padding=(half, 0)
    )
    mx, my, xx, yy, xy = means.split(3)
    similar = (2 * mx * my + C1) * (2 * (xy - mx * my) + C2)
    similar = similar / ((mx * mx + my * my + C1) * (xx - mx * mx + yy - my * my + C2))
    return (similar if mask is None else similar[:, 0, mask]).mean()


def edge_distance(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """In [0, 1]: 0 for equal pictures, 1 where no edge of one is in the other.

    Difference of the brightness gradients over the sum of their sizes, at full size, 1/2, 1/4 and 1/8, averaged.
    """
    shares = []
    mask = torch.ones_like(a[..., 0]) if mask is None else mask.to(a.dtype)
    for scale in EDGE_SCALES:
        grey_a, grey_b = (_grey(picture, scale) for picture in (a, b))
        if min(grey_a.shape) < 2:
            break
        whole = avg_pool2d(mask[None], scale)[0] == 1
        inside = [whole[1:] & whole[:-1], whole[:, 1:] & whole[:, :-1]]
        gradients = [[_gradient(grey, dim)[inside[dim]] for grey in (grey_a, grey_b)] for dim in (0, 1)]
        apart = sum(float((one - other).abs().sum()) for one, other in gradients)
        there = sum(float(one.abs().sum() + other.abs().sum()) for one, other in gradients)
        shares.append(apart / there if there else 0.0)
    return sum(shares) / len(shares)


def scores(a: Tensor, b: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """All three of uint8 pictures [H, W, 3]."""
    x, y = a.float() / 255, b.float() / 255
    psnr = psnr_db(x, y) if mask is None else psnr_db(x[mask], y[mask])
    return {"psnr_db": psnr, "ssim": float(ssim(x, y, mask)), "edge_distance": edge_distance(x, y, mask)}


def _grey(picture: Tensor, scale: int) -> Tensor:
    return avg_pool2d((picture @ picture.new_tensor(LUMA))[None], scale)[0]


def _gradient(grey: Tensor, dim: int) -> Tensor:
    return torch.diff(grey, dim=dim)
