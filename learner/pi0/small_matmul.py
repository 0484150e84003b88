"""Matrix products of one denoising step at batch 1, where 50 rows meet megabytes of weights: forward only.

Such a product takes as long as reading its weight, if all multiprocessors read. Library kernels do not split the 1024
output columns finely enough, or sum their parts in a kernel of its own; here the parts are handed on as they are, to be
added by the norm that reads them anyway, and the gate's GELU is applied before anything is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 128
SPLITS = 8


@triton.jit
def _parts(
    x, weight, out, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (columns / BLOCK_N, splits)."""
    split = tl.program_id(1)
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * PER_SPLIT + tl.arange(0, BLOCK_K)
    x_at, weight_at = x + m[:, None] * depth + k[None, :], weight + n[:, None] * depth + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, PER_SPLIT, BLOCK_K):
        a = tl.load(x_at + start, m[:, None] < rows, 0.0)
        acc = tl.dot(a, tl.trans(tl.load(weight_at + start)), acc)
    out_at = out + (split * rows + m[:, None]) * columns + n[None, :]
    tl.store(out_at, acc, m[:, None] < rows)


@triton.jit
def _gated(x, weight, out, rows, columns, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Grid (columns / BLOCK_N): gelu(x gate) * (x up), gate and up being the upper and lower half of the weight."""
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at, gate_at = x + m[:, None] * depth + k[None, :], weight + n[:, None] * depth + k[None, :]
    up_at = gate_at + columns * depth
    gate, up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        a = tl.load(x_at + start, m[:, None] < rows, 0.0)
        gate = tl.dot(a, tl.trans(tl.load(gate_at + start)), gate)
        up = tl.dot(a, tl.trans(tl.load(up_at + start)), up)
    # tanh(z) = 2 sigmoid(2 z) - 1
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    result = gate * tl.sigmoid(2.0 * inner) * up
    tl.store(out + m[:, None] * columns + n[None, :], result.to(out.dtype.element_ty), m[:, None] < rows)


def _block_m(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))


@torch.library.custom_op("cotwin::product_parts", mutates_args=())
def product_parts(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] with at most MAX_ROWS rows, weight [N, K] -> float32 [SPLITS, ..., N], whose sum is x @ weight.T."""
    columns, depth = weight.shape
    rows = x.numel() // depth
    out = torch.empty((SPLITS, *x.shape[:-1], columns), dtype=torch.float32, device=x.device)
    block_n = 32
    _parts[(columns // block_n, SPLITS)](
        x, weight, out, rows, columns, depth,
        BLOCK_M=_block_m(rows), BLOCK_N=block_n, BLOCK_K=128, PER_SPLIT=depth // SPLITS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@product_parts.register_fake
def _(x, weight):
    return x.new_empty((SPLITS, *x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("cotwin::gated_product", mutates_args=())
def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] with at most MAX_ROWS rows, weight [2 N, K] -> gelu(first half) * second half, [..., N]."""
    columns, depth = weight.shape[0] // 2, weight.shape[1]
    rows = x.numel() // depth
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    block_n = 32
    _gated[(columns // block_n,)](
        x, weight, out, rows, columns, depth,
        BLOCK_M=_block_m(rows), BLOCK_N=block_n, BLOCK_K=128, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


@gated_product.register_fake
def _(x, weight):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def fits(rows: int, *weights: Tensor) -> bool:
    """Whether these kernels take such a product: few rows, and widths that their tiles divide."""
    return rows <= MAX_ROWS and all(w.shape[0] % 64 == 0 and w.shape[1] % (128 * SPLITS) == 0 for w in weights)
