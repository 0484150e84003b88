"""Run by test_policy.py in a process of its own: the Triton kernels in the interpreter, against plain PyTorch."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from learner.pi0 import fused_attention as kernels
from learner.pi0.layers import key_bias, multi_query_attention, rotary_table, rotate
from learner.pi0.small_matmul import MAX_ROWS, fits, gated_product, product_parts

HEADS, WIDTH = 8, 32


def check_attention(batch: int, queries: int, keys: int, has_suffix: bool, state_token: bool) -> None:
    qkv = torch.randn(batch, queries, (HEADS + 2) * WIDTH)
    cos, sin = rotary_table(torch.arange(queries)[None].expand(batch, queries) + keys, WIDTH)
    past, valid = torch.randn(batch, 2, keys, WIDTH), torch.rand(batch, keys) > 0.3
    ours = kernels.fused_attention(
        qkv, cos[:, :, 0], sin[:, :, 0], past[:, 0], past[:, 1], valid, HEADS, has_suffix, state_token
    )
    q, k, v = qkv.split([HEADS * WIDTH, WIDTH, WIDTH], dim=-1)
    q, k = rotate(q.unflatten(-1, (HEADS, WIDTH)), cos, sin), rotate(k[:, :, None], cos, sin)[:, :, 0]
    if not has_suffix:
        k, v = k[:, :0], v[:, :0]
    allowed = torch.cat([valid, torch.ones(batch, k.shape[1], dtype=torch.bool)], dim=1)[:, None].repeat(1, queries, 1)
    if state_token:
        allowed[:, 0, keys + 1 :] = False
    bias = key_bias(allowed, torch.float32)[:, None]
    plain = multi_query_attention(q, torch.cat([past[:, 0], k], 1), torch.cat([past[:, 1], v], 1), bias)
    assert (ours - plain).abs().max() < 2e-6, (batch, queries, keys, has_suffix, state_token)


def check_products() -> None:
    x, weight = torch.randn(2, 5, 1024), torch.randn(128, 1024) / 32
    assert fits(10, weight)
    assert not fits(MAX_ROWS + 1, weight)
    assert not fits(10, weight[:, :1000])
    assert (product_parts(x, weight).sum(0) - F.linear(x, weight)).abs().max() < 1e-5
    first, second = F.linear(x, weight).chunk(2, dim=-1)
    assert (gated_product(x, weight) - F.gelu(first, approximate="tanh") * second).abs().max() < 1e-5


if __name__ == "__main__":
    torch.manual_seed(0)
    assert kernels.tiling(1, 80, 150, True, 132)[3] == 2  # splits the keys
    check_attention(1, 10, 150, True, False)
    check_attention(2, 9, 130, True, True)
    check_attention(1, 66, 66, False, False)
    kernels.tiling = lambda *_: (128, 8, 2, 9)  # what a batch that fills the device gets
    check_attention(2, 3, 20, True, False)
    check_products()
