"""Two small transformers that share attention, the pi0.5 shape: the prefix (what is seen, said and felt) is computed
once for an observation; the action expert, with weights of its own, reads the prefix's keys and values at every layer
and is told the flow time through its norms (adaRMS).

B batch, P prefix tokens, H action steps, N heads, W width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeysValues = list[tuple[Tensor, Tensor]]  # one pair [B, N, P, W / N] for each layer


class PrefixLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`mask` bool [B, 1, 1, P], True where a token may be read."""
        q, k, v = split_heads(self.qkv(self.norm_attention(x)), self.heads)
        x = x + self.out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return x + self.mlp(self.norm_mlp(x)), (k, v)


class ExpertLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width, elementwise_affine=False)
        self.norm_mlp = nn.RMSNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, time: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [B, H, W]; time [B, W]; mask bool [B, 1, 1, P + H]. Every action step reads prefix and all steps."""
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = self.modulation(time)[:, None].chunk(6, dim=-1)
        q, k, v = split_heads(self.qkv(self.norm_attention(x) * (1 + scale_a) + shift_a), self.heads)
        k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
        x = x + (1 + gate_a) * self.out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return x + (1 + gate_m) * self.mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m)


class ActionExpert(nn.Module):
    """Velocity of the flow at (x, t), given the prefix's keys and values."""

    def __init__(self, width: int, heads: int, layers: int, horizon: int, action_dim: int):
        super().__init__()
        self.action_in = nn.Linear(action_dim, width)
        self.step_embedding = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.layers = nn.ModuleList(ExpertLayer(width, heads) for _ in range(layers))
        self.norm_out = nn.RMSNorm(width)
        self.action_out = nn.Linear(width, action_dim)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    def forward(
        self, x: Tensor, t: Tensor, prefix: KeysValues, mask: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [B, H, D], t [B], mask bool [B, P] of readable prefix tokens, condition [B, W] for the norms beside the
        time -> velocity [B, H, D], features [B, H, W]."""
        time = self.time_mlp(time_features(t, self.action_in.out_features) + condition)
        readable = F.pad(mask, (0, x.shape[1]), value=True)[:, None, None]
        hidden = self.action_in(x) + self.step_embedding
        for layer, keys_values in zip(self.layers, prefix, strict=True):
            hidden = layer(hidden, time, keys_values, readable)
        features = self.norm_out(hidden)
        return self.action_out(features), features


def time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t in [0, 1] with periods from 0.004 to 4. [B] -> [B, width]. Source: openpi."""
    share = torch.linspace(0, 1, width // 2, device=t.device)
    angle = t[:, None] * (2 * math.pi / (4e-3 * (4.0 / 4e-3) ** share))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3 W] -> three of [B, N, T, W / N]."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def join_heads(x: Tensor) -> Tensor:
    """[B, N, T, W / N] -> [B, T, W]."""
    return x.transpose(1, 2).flatten(2)
