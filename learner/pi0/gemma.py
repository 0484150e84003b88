"""A Gemma stack: the prefix (PaliGemma's language model) and the action expert are both one of these.

The prefix never looks at the suffix, so it runs first and hands each layer's keys and values to the expert's layer of
the same depth; that is the same computation as running both side by side, with and without gradient.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.pi0.config import GemmaConfig
from learner.pi0.fused_attention import fused_attention
from learner.pi0.layers import Linear, RMSNorm, multi_query_attention, rotate
from learner.pi0.runner import Runner
from learner.pi0.small_matmul import fits, gated_product, product_parts

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, [B, S, head width] each, keys already rotated."""


@dataclass
class Modulations:
    """adaRMS scale, shift and gate: float32 [depth, B, 1, 6C] for each layer's two norms, [B, 1, 3C] for the last."""

    layers: Tensor
    final: Tensor

    def row(self, index: int) -> "Modulations":
        """One row, broadcast over whatever batch it meets."""
        return Modulations(self.layers[:, index : index + 1], self.final[index : index + 1])


class Stream(NamedTuple):
    """The residual stream x + gate * branch, float32 [B, Q, C]. The sum is left to the next norm, to fuse with it."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def joined(self) -> Tensor:
        if self.branch is None:
            return self.x
        branch = self.branch.float()
        if branch.ndim > self.x.ndim:  # parts of a product (learner/pi0/small_matmul.py), added as they are read
            branch = functools.reduce(torch.add, branch.unbind(0))
        return self.x + (branch if self.gate is None else branch * self.gate)


class Scene(NamedTuple):
    """What all layers of a pass share: cos and sin float32 [B, Q, 1, W/2], which prefix keys are real (bool [B, S]),
    and the dtype of the arithmetic. `bias` is added to attention scores; None: the fused kernel, which needs none."""

    cos: Tensor
    sin: Tensor
    valid: Tensor
    bias: Tensor | None
    dtype: torch.dtype


class GemmaLayer(nn.Module):
    def __init__(self, config: GemmaConfig, adaptive: bool, leading_state: bool):
        super().__init__()
        self.heads, self.head_width = config.heads, config.head_width
        self.leading_state = leading_state  # pi0's expert: the first token sees no later one
        self.attn_norm = RMSNorm(config.width, adaptive)
        self.qkv = Linear(config.width, (config.heads + 2) * config.head_width, bias=False)
        self.out = Linear(config.heads * config.head_width, config.width, bias=False)
        self.mlp_norm = RMSNorm(config.width, adaptive)
        self.gate_up = Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, stream: Stream, scene: Scene, past: KeysValues | None, modulation: Tensor | None):
        """One layer -> the residual stream, and this layer's own keys and values (None on the fused path)."""
        attn_modulation, mlp_modulation = (None, None) if modulation is None else modulation.chunk(2, dim=-1)
        x = stream.joined()
        h, gate = self.attn_norm(x, attn_modulation)
        qkv = self.qkv(h.to(scene.dtype))
        if scene.bias is None:
            mixed, own = self.fused(qkv, scene, past)
        else:
            q, k, v = self.rotated(qkv, scene)
            keys, values = (k, v) if past is None else (torch.cat([past[0], k], 1), torch.cat([past[1], v], 1))
            mixed, own = multi_query_attention(q, keys, values, scene.bias), (k, v)
        small = scene.bias is None and self._is_small(x)
        x = Stream(
            x, product_parts(mixed, self.out.multiplier(scene.dtype)) if small else self.out(mixed), gate
        ).joined()
        h, gate = self.mlp_norm(x, mlp_modulation)
        h = h.to(scene.dtype)
        if small:
            fed = gated_product(h, self.gate_up.multiplier(scene.dtype))
            return Stream(x, product_parts(fed, self.down.multiplier(scene.dtype)), gate), own
        first, second = self.gate_up(h).chunk(2, dim=-1)
        return Stream(x, self.down(F.gelu(first, approximate="tanh") * second), gate), own

    def _is_small(self, x: Tensor) -> bool:
        """Whether this fused pass of few rows multiplies through learner/pi0/small_matmul.py. Not with adapters."""
        products = (self.out, self.gate_up, self.down)
        rows = x.shape[0] * x.shape[1]
        return all(type(p) is Linear for p in products) and fits(rows, *(p.weight for p in products))

    def fused(self, qkv: Tensor, scene: Scene, past: KeysValues | None) -> tuple[Tensor, KeysValues | None]:
        """Attention through learner/pi0/fused_attention.py; a suffix keeps no keys and values of its own."""
        own = None
        if past is None:
            own = self.rotated(qkv, scene)[1:]
        keys, values = past or own  # type: ignore[misc]
        tables = scene.cos[:, :, 0], scene.sin[:, :, 0]
        has_suffix = past is not None
        mixed = fused_attention(qkv, *tables, keys, values, scene.valid, self.heads, has_suffix, self.leading_state)
        return mixed, own

    def keys_values(self, stream: Stream, scene: Scene) -> KeysValues:
        """All that the expert reads of a last prefix layer."""
        h, _ = self.attn_norm(stream.joined(), None)
        return self.rotated(self.qkv(h.to(scene.dtype)), scene)[1:]

    def rotated(self, qkv: Tensor, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
        width = self.head_width
        q, k, v = qkv.split([self.heads * width, width, width], dim=-1)
        q = rotate(q.unflatten(-1, (self.heads, width)), scene.cos, scene.sin)
        return q, rotate(k[:, :, None], scene.cos, scene.sin)[:, :, 0], v


def _finish(norm: RMSNorm, stream: Stream, modulation: Tensor | None) -> Tensor:
    return norm(stream.joined(), modulation)[0]


class GemmaStack(nn.Module):
    def __init__(self, config: GemmaConfig, adaptive: bool, leading_state: bool = False):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(GemmaLayer(config, adaptive, leading_state) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, adaptive)
        if adaptive:
            self.modulate = nn.Linear(config.width, config.depth * 6 * config.width)
            self.modulate_final = nn.Linear(config.width, 3 * config.width)
        self.run, self.finish = Runner(GemmaLayer.forward), Runner(_finish)

    def compile_layers(self) -> None:
        self.run.compile()
        self.finish.compile()

    def modulations(self, condition: Tensor) -> Modulations:
        """float32 [B, C] (the embedded time) -> what every norm of the stack needs, in float32."""
        layers = self.modulate(condition).view(len(condition), self.config.depth, 1, -1)
        return Modulations(layers.transpose(0, 1), self.modulate_final(condition)[:, None])

    def forward(
        self,
        x: Tensor,
        scene: Scene,
        past: Sequence[KeysValues] | None = None,
        modulations: Modulations | None = None,
        need_output: bool = True,
    ) -> tuple[Tensor | None, list[KeysValues]]:
        """x float32 [B, Q, C] -> normed output float32 [B, Q, C] and each layer's keys and values.

        Without `need_output` the last layer stops at its keys and values, which is all that the expert reads.
        """
        stream, kept = Stream(x), []
        for depth, layer in enumerate(self.layers):
            if not need_output and depth == len(self.layers) - 1:
                return None, [*kept, layer.keys_values(stream, scene)]
            modulation = None if modulations is None else modulations.layers[depth]
            stream, own = self.run(layer, stream, scene, None if past is None else past[depth], modulation)
            kept.append(own)
        return self.finish(self.norm, stream, None if modulations is None else modulations.final), kept
