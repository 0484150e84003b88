"""A Gemma stack: the prefix (PaliGemma's language model) and the action expert are both one of these.

The prefix never looks at the suffix, so it runs first and hands each layer's keys and values to the expert's layer of
the same depth; that is the same computation as running both side by side, with and without gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.pi0.config import GemmaConfig
from learner.pi0.layers import Linear, RMSNorm, multi_query_attention, rotary_table, rotate

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


class GemmaLayer(nn.Module):
    def __init__(self, config: GemmaConfig, adaptive: bool):
        super().__init__()
        self.heads, self.head_width = config.heads, config.head_width
        self.attn_norm = RMSNorm(config.width, adaptive)
        self.qkv = Linear(config.width, (config.heads + 2) * config.head_width, bias=False)
        self.out = Linear(config.heads * config.head_width, config.width, bias=False)
        self.mlp_norm = RMSNorm(config.width, adaptive)
        self.gate_up = Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = Linear(config.mlp_width, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor | None,
        past: KeysValues | None,
        modulation: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x float32 [B, Q, C], the residual stream -> x, and this layer's own keys and values."""
        attn_modulation, mlp_modulation = (None, None) if modulation is None else modulation.chunk(2, dim=-1)
        h, gate = self.attn_norm(x, attn_modulation)
        q, k, v = self.queries_keys_values(h.to(dtype), cos, sin)
        keys, values = (k, v) if past is None else (torch.cat([past[0], k], 1), torch.cat([past[1], v], 1))
        mixed = self.out(multi_query_attention(q, keys, values, bias)).float()
        x = x + mixed if gate is None else x + mixed * gate
        h, gate = self.mlp_norm(x, mlp_modulation)
        first, second = self.gate_up(h.to(dtype)).chunk(2, dim=-1)
        fed = self.down(F.gelu(first, approximate="tanh") * second).float()
        return x + fed if gate is None else x + fed * gate, k, v

    def queries_keys_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.head_width
        q, k, v = self.qkv(h).split([self.heads * width, width, width], dim=-1)
        q = rotate(q.unflatten(-1, (self.heads, width)), cos, sin)
        return q, rotate(k[:, :, None], cos, sin)[:, :, 0], v


class GemmaStack(nn.Module):
    def __init__(self, config: GemmaConfig, adaptive: bool):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(GemmaLayer(config, adaptive) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, adaptive)
        if adaptive:
            self.modulate = nn.ModuleList(nn.Linear(config.width, 6 * config.width) for _ in range(config.depth))
            self.modulate_final = nn.Linear(config.width, 3 * config.width)
        self.run_layer = GemmaLayer.forward
        self.gradient_checkpointing = False

    def modulations(self, condition: Tensor) -> Modulations:
        """float32 [B, C] (the embedded time) -> what every norm of the stack needs, in float32."""
        layers = torch.stack([modulate(condition) for modulate in self.modulate])
        return Modulations(layers[:, :, None], self.modulate_final(condition)[:, None])

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        past: Sequence[KeysValues] | None = None,
        modulations: Modulations | None = None,
        need_output: bool = True,
    ) -> tuple[Tensor | None, list[KeysValues]]:
        """x float32 [B, Q, C] at positions [B, Q] -> normed output float32 [B, Q, C] and each layer's keys and values.

        Without `need_output` the last layer stops at its keys and values, which is all that the expert reads.
        """
        cos, sin = rotary_table(position, self.config.head_width)
        kept: list[KeysValues] = []
        for depth, layer in enumerate(self.layers):
            modulation = None if modulations is None else modulations.layers[depth]
            if not need_output and depth == len(self.layers) - 1:
                h, _ = layer.attn_norm(x, modulation)
                kept.append(layer.queries_keys_values(h.to(dtype), cos, sin)[1:])
                return None, kept
            arguments = (layer, x, cos, sin, bias, None if past is None else past[depth], modulation, dtype)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, k, v = checkpoint(self.run_layer, *arguments, use_reentrant=False)
            else:
                x, k, v = self.run_layer(*arguments)
            kept.append((k, v))
        return self.norm(x, None if modulations is None else modulations.final)[0], kept
