"""Attention of passes without gradient on a GPU: rotate, attend under a mask of real keys, in one kernel.

Eight heads share one key, so the denoising loop's B samples of 50 actions are 400 query rows each over some 760 keys.
General kernels start seven blocks for that at batch 1 and leave 125 multiprocessors idle; this one also splits the keys
(and adds the parts in a second kernel), reads query, key and value where the projection left them, rotates them on the
way in, and never copies the prefix. The prefix itself goes through it too: a mask halves library kernels' speed.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64
TILES_PER_SPLIT = 2
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _tile(acc, row_max, row_sum, q1, q2, k1, k2, v, allowed, scale):
    """One block of keys, online softmax in base 2."""
    scores = (tl.dot(q1, tl.trans(k1)) + tl.dot(q2, tl.trans(k2))) * scale
    scores = tl.where(allowed, scores, -1e38)
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
    return acc, new_max, row_sum


@triton.jit
def _attend(
    qkv, cos, sin, past_k, past_v, valid, out, part, part_max, part_sum,
    queries, prefix, rows, qkv_b, qkv_q, rot_b, rot_q, k_b, k_s, v_b, v_s, scale,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr, HAS_SUFFIX: tl.constexpr, STATE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, B, SPLITS). With more than one split the last has the suffix, the others share the prefix."""
    batch, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // HEADS, row % HEADS
    half, full = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    in_rows = (row < rows)[:, None]
    q_at = qkv + batch * qkv_b + token[:, None] * qkv_q + head[:, None] * (2 * HALF) + half[None, :]
    rot_at = batch * rot_b + token[:, None] * rot_q + half[None, :]
    c, s = tl.load(cos + rot_at, in_rows, 0.0), tl.load(sin + rot_at, in_rows, 0.0)
    first, second = tl.load(q_at, in_rows, 0.0).to(tl.float32), tl.load(q_at + HALF, in_rows, 0.0).to(tl.float32)
    q1 = (first * c - second * s).to(qkv.dtype.element_ty)
    q2 = (second * c + first * s).to(qkv.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, 2 * HALF], tl.float32)
    row_max, row_sum = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)

    start, stop = 0, prefix
    if SPLITS > 1:
        start = split * SPLIT_KEYS
        stop = tl.minimum(prefix, start + SPLIT_KEYS)
    for begin in range(start, stop, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        here = (key < prefix)[:, None]
        k_at = past_k + batch * k_b + key[:, None] * k_s + half[None, :]
        k1, k2 = tl.load(k_at, here, 0.0), tl.load(k_at + HALF, here, 0.0)
        v = tl.load(past_v + batch * v_b + key[:, None] * v_s + full[None, :], here, 0.0)
        allowed = (tl.load(valid + batch * prefix + key, key < prefix, 0) != 0)[None, :]
        acc, row_max, row_sum = _tile(acc, row_max, row_sum, q1, q2, k1, k2, v, allowed, scale)

    if HAS_SUFFIX and split == SPLITS - 1:
        # One or two tiles: not worth the shared memory that a second pipelined loop would take from the first.
        for begin in tl.range(0, queries, BLOCK_N, num_stages=1):
            own = begin + tl.arange(0, BLOCK_N)
            inside = (own < queries)[:, None]
            own_at = qkv + batch * qkv_b + own[:, None] * qkv_q + HEADS * (2 * HALF)
            rot_own = batch * rot_b + own[:, None] * rot_q + half[None, :]
            ck, sk = tl.load(cos + rot_own, inside, 0.0), tl.load(sin + rot_own, inside, 0.0)
            left = tl.load(own_at + half[None, :], inside, 0.0).to(tl.float32)
            right = tl.load(own_at + HALF + half[None, :], inside, 0.0).to(tl.float32)
            own_k1 = (left * ck - right * sk).to(qkv.dtype.element_ty)
            own_k2 = (right * ck + left * sk).to(qkv.dtype.element_ty)
            own_v = tl.load(own_at + 2 * HALF + full[None, :], inside, 0.0)
            seen = (own < queries)[None, :]
            if STATE_TOKEN:  # pi0's state, token 0, sees no actions
                seen = seen & ((token[:, None] > 0) | (own[None, :] == 0))
            acc, row_max, row_sum = _tile(acc, row_max, row_sum, q1, q2, own_k1, own_k2, own_v, seen, scale)

    at = batch * rows + row
    if SPLITS == 1:
        result = acc / row_sum[:, None]
        tl.store(out + at[:, None] * (2 * HALF) + full[None, :], result.to(out.dtype.element_ty), in_rows)
    else:
        at = at * SPLITS + split
        tl.store(part + at[:, None] * (2 * HALF) + full[None, :], acc, in_rows)
        tl.store(part_max + at, row_max, row < rows)
        tl.store(part_sum + at, row_sum, row < rows)


@triton.jit
def _combine(part, part_max, part_sum, out, SPLITS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Grid (B * rows): add one row's parts."""
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    there = split < SPLITS
    peak = tl.load(part_max + row * SPLITS + split, there, LOWEST)
    weight = tl.exp2(peak - tl.max(peak, axis=0))
    total = tl.sum(weight * tl.load(part_sum + row * SPLITS + split, there, 0.0), axis=0)
    parts = tl.load(part + (row * SPLITS + split[:, None]) * WIDTH + column[None, :], there[:, None], 0.0)
    mixed = tl.sum(parts * weight[:, None], axis=0) / total
    tl.store(out + row * WIDTH + column, mixed.to(out.dtype.element_ty))


def tiling(batch: int, rows: int, keys: int, has_suffix: bool, processors: int) -> tuple[int, int, int, int]:
    """Rows of a block, warps, pipeline stages, and prefix tiles of a split (all of them where nothing is split).

    Measured on an H200: large blocks once they fill it, small ones and splits of the keys before.
    """
    tiles = math.ceil(keys / BLOCK_N)
    if batch * math.ceil(rows / 128) >= processors:
        return 128, 8, 2, tiles
    if not has_suffix:
        return 64, 4, 3, tiles
    blocks = batch * math.ceil(rows / 32)
    if 3 * blocks > 2 * processors:
        return 32, 4, 2, tiles
    return 32, 4, 2, max(TILES_PER_SPLIT, math.ceil(tiles * blocks / processors))


@torch.library.custom_op("cotwin::fused_attention", mutates_args=())
def fused_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    heads: int,
    has_suffix: bool,
    state_token: bool,
) -> Tensor:
    """qkv [B, Q, (heads + 2) W], not rotated; cos, sin float32 [B, Q, W/2]; keys (rotated), values [B, S, W]; valid
    bool [B, S] -> [B, Q, heads W]. No gradient.

    Queries see the valid keys and, with `has_suffix`, the keys of their own qkv (the first query, if it is a
    `state_token`, only its own).
    """
    batch, queries, packed = qkv.shape
    width, prefix, rows = packed // (heads + 2), keys.shape[1], queries * heads
    assert qkv.stride(2) == keys.stride(2) == values.stride(2) == cos.stride(2) == 1
    assert cos.stride() == sin.stride()
    assert valid.is_contiguous()
    out = torch.empty((batch, queries, heads * width), dtype=qkv.dtype, device=qkv.device)
    processors = torch.cuda.get_device_properties(qkv.device).multi_processor_count if qkv.is_cuda else 132
    block_m, warps, stages, per_split = tiling(batch, rows, prefix, has_suffix, processors)
    tiles = math.ceil(prefix / BLOCK_N)
    splits = 1 if per_split >= tiles else math.ceil(tiles / per_split) + 1
    shape = (batch, rows, splits) if splits > 1 else (1, 1, 1)
    part = torch.empty((*shape, width), dtype=torch.float32, device=qkv.device)
    part_max, part_sum = torch.empty((2, *shape), dtype=torch.float32, device=qkv.device)
    _attend[(math.ceil(rows / block_m), batch, splits)](
        qkv, cos, sin, keys, values, valid.view(torch.uint8), out, part, part_max, part_sum,
        queries, prefix, rows, qkv.stride(0), qkv.stride(1), cos.stride(0), cos.stride(1),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), width**-0.5 * math.log2(math.e),
        HEADS=heads, HALF=width // 2, BLOCK_M=block_m, BLOCK_N=BLOCK_N, SPLITS=splits, SPLIT_KEYS=per_split * BLOCK_N,
        HAS_SUFFIX=has_suffix, STATE_TOKEN=state_token, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        _combine[(batch * rows,)](part, part_max, part_sum, out, SPLITS=splits, PADDED=padded, WIDTH=width, num_warps=4)
    return out


@fused_attention.register_fake
def _(qkv, cos, sin, keys, values, valid, heads, has_suffix, state_token):
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // (heads + 2) * heads))


def fits(x: Tensor, head_width: int) -> bool:
    """Whether a pass over x can use it: on a GPU, without gradient, and with heads that its tiles can hold."""
    return x.is_cuda and not torch.is_grad_enabled() and head_width in (32, 64, 128, 256)
