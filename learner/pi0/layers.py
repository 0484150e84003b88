"""The few pieces that vision tower, prefix and expert are made of.

Weights that train are float32 masters; the arithmetic runs in the input's dtype (bfloat16 on a GPU). Without gradient
a linear layer multiplies by a working copy of its weight, so that a rollout's ten denoising steps do not convert 300 M
numbers ten times; `refresh_working_copies` brings the copies up to date and is cheap when nothing changed.

Shapes: B batch, Q queries, S keys, N heads, W head width, C model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` whose weight may be kept in another dtype than it computes in."""

    working: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("working", None, persistent=False)
        self.working_version = -1

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.multiplier(input.dtype), bias)

    def multiplier(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`; without gradient the working copy, if there is one."""
        if self.working is not None and self.working.dtype == dtype and not torch.is_grad_enabled():
            return self.working
        return self.weight.to(dtype)


def refresh_working_copies(module: nn.Module, dtype: torch.dtype) -> None:
    """Make every linear layer's working copy equal its weight, in place where it exists (CUDA graphs hold on to it)."""
    for layer in module.modules():
        if not isinstance(layer, Linear) or layer.weight.dtype == dtype:
            continue
        if layer.working is None or layer.working.device != layer.weight.device:
            layer.working = layer.weight.detach().to(dtype)
        elif layer.working_version != layer.weight._version:
            layer.working.copy_(layer.weight.detach())
        layer.working_version = layer.weight._version


class RMSNorm(nn.Module):
    """Gemma's: x / rms(x) * (1 + weight), in float32. `modulation` [B or 1, 1, 3C] (adaRMS) replaces the weight by a
    scale, adds a shift, and gates the residual branch."""

    def __init__(self, width: int, adaptive: bool):
        super().__init__()
        self.weight = None if adaptive else nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if self.weight is not None:
            return normed * (1.0 + self.weight.float()), None
        assert modulation is not None
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return normed * (1.0 + scale) + shift, gate


def rotary_table(position: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [B, Q, 1, W/2] for positions [B, Q], base 10000."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device=position.device) / head_width
    angle = position[..., None].float() * (10000.0**-exponent)
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, Q, N, W] in float32, back in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def multi_query_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q [B, Q, N, W]; k, v [B, S, W], shared by all heads; bias [B, 1, 1 or Q, S], added to the scores. -> [B, Q, N*W].

    The mask does not depend on the head, so heads become queries of a single head: no copy of keys or values, and no
    transposition.
    """
    batch, queries, heads, width = q.shape
    if bias is not None and bias.shape[2] > 1:
        bias = bias.repeat_interleave(heads, dim=2)
    folded = q.reshape(batch, 1, queries * heads, width)
    if bias is not None:
        bias = bias.expand(batch, 1, queries * heads, k.shape[1])
    out = F.scaled_dot_product_attention(folded, k[:, None], v[:, None], attn_mask=bias)
    return out.reshape(batch, queries, heads * width)


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [...] -> 0 where valid, -inf elsewhere."""
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, float("-inf"))


def timestep_embedding(t: Tensor, width: int, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """Sine and cosine features float32 [B, width] of the flow time t [B]; angles in float64, as the released models."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    angle = t.double()[:, None] * (2 * torch.pi / (min_period * (max_period / min_period) ** fraction))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()
