"""SigLIP vision tower and the projector into the language model: pictures to prefix tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.pi0.config import VisionConfig
from learner.pi0.layers import Linear
from learner.pi0.runner import Runner


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.attn_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.up = Linear(config.width, config.mlp_width)
        self.down = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor, branch: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The residual stream is x + branch, float32 [B, tokens, C]; the sum is left to the next norm."""
        batch, tokens, width = x.shape
        x = x if branch is None else x + branch.float()
        q, k, v = self.qkv(self.attn_norm(x).to(dtype)).view(batch, tokens, 3, self.heads, -1).unbind(2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width)).float()
        hidden = F.gelu(self._raised(self.mlp_norm(x).to(dtype)), approximate="tanh")
        return x, self.down(hidden)

    def _raised(self, h: Tensor) -> Tensor:
        """`up`, its bias left to the GELU's kernel: for 4304 columns the library would copy the bias out first."""
        if type(self.up) is not Linear:  # an adapter around it
            return self.up(h)
        assert self.up.bias is not None
        return F.linear(h, self.up.multiplier(h.dtype)) + self.up.bias.to(h.dtype)


class VisionTower(nn.Module):
    """float [B, 3, size, size] in [-1, 1] -> [B, tokens, out_width] in `dtype`."""

    def __init__(self, config: VisionConfig, out_width: int):
        super().__init__()
        self.config = config
        self.patch = Linear(3 * config.patch_size**2, config.width)
        self.position = nn.Parameter(torch.randn(config.tokens, config.width) * 0.02)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.projector = Linear(config.width, out_width)
        self.run = Runner(VisionLayer.forward)

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.patch(self._patches(images).to(dtype)).float() + self.position.float()
        branch = None
        for layer in self.layers:
            x, branch = self.run(layer, x, branch, dtype)
        x = x if branch is None else x + branch.float()
        return self.projector(self.norm(x).to(dtype))

    def compile_layers(self) -> None:
        self.run.compile()

    def _patches(self, images: Tensor) -> Tensor:
        """[B, 3, size, size] -> [B, tokens, 3 * patch * patch], in the order of a convolution's weight."""
        side, patch = self.config.image_size // self.config.patch_size, self.config.patch_size
        cut = images.reshape(-1, 3, side, patch, side, patch)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, 3 * patch * patch)
