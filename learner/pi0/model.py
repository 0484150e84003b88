"""pi0 and pi0.5 as one network: a prefix of pictures and words, and an expert that turns noise into actions.

    prefix = model.prefix(images, image_mask, tokens, token_mask)     # once for an observation
    v, features = model.velocity(prefix, state, x_t, t)               # once for a denoising step

Shapes: B batch, I cameras, S prefix tokens (I * 256 + prompt), L layers, H horizon, D padded action width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learner.pi0 import fused_attention, small_matmul
from learner.pi0.config import ModelConfig
from learner.pi0.gemma import GemmaStack, KeysValues, Modulations, Scene
from learner.pi0.layers import key_bias, rotary_table, timestep_embedding
from learner.pi0.runner import Runner
from learner.pi0.vision import VisionTower


@dataclass
class Prefix:
    """What the expert needs of an observation. `output` is the normed last layer, [B, S, C], if it was asked for."""

    keys_values: list[KeysValues]
    valid: Tensor  # bool [B, S]
    output: Tensor | None = None
    suffix: Scene | None = None  # what every denoising step needs besides, made by the first

    @classmethod
    def from_stacked(cls, keys_values: Tensor, valid: Tensor) -> "Prefix":
        """From keys and values [B, L, 2, S, W], as rollouts keep them."""
        return cls([(layer[:, 0], layer[:, 1]) for layer in keys_values.unbind(1)], valid)

    def repeat(self, times: int) -> "Prefix":
        """Each sample `times` times in a row."""
        if times == 1:
            return self
        keys_values = [tuple(x.repeat_interleave(times, dim=0) for x in pair) for pair in self.keys_values]
        return Prefix(keys_values, self.valid.repeat_interleave(times, dim=0))  # type: ignore[arg-type]


class Pi0Model(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        width = config.expert.width
        self.vision = VisionTower(config.vision, config.language.width)
        self.embed = nn.Embedding(config.vocabulary, config.language.width)
        self.language = GemmaStack(config.language, adaptive=False)
        adaptive = config.variant == "pi05"
        self.expert = GemmaStack(config.expert, adaptive, leading_state=not adaptive)
        self.narrow = Runner(_narrow_product)
        self.action_in = nn.Linear(config.action_width, width)
        self.action_out = nn.Linear(width, config.action_width)
        if adaptive:
            self.time_in, self.time_out = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.state_in = nn.Linear(config.state_width, width)
            self.time_in, self.time_out = nn.Linear(2 * width, width), nn.Linear(width, width)

    def embed_prefix(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """images [B, I, 3, size, size] in [-1, 1], image_mask bool [B, I], tokens int64 [B, T], token_mask bool [B, T]
        -> embeddings float32 [B, S, C] and which of them are real, bool [B, S]."""
        batch, cameras = image_mask.shape
        pictures = self.vision(images.flatten(0, 1), self.dtype).unflatten(0, (batch, cameras))
        # Rounded as a frozen table is stored, so that a prefix that trains computes what a kept one holds.
        words = self.embed(tokens).to(self.dtype).float() * self.config.language.width**0.5
        embeddings = torch.cat([pictures.flatten(1, 2).float(), words], dim=1)
        valid = torch.cat([image_mask.repeat_interleave(pictures.shape[2], dim=1), token_mask], dim=1)
        return embeddings, valid

    def prefix(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, need_output: bool = False
    ) -> Prefix:
        """Every real token attends to every real token. Padding tokens do too, but nobody looks at them."""
        embeddings, valid = self.embed_prefix(images, image_mask, tokens, token_mask)
        cos, sin = rotary_table(valid.cumsum(1) - 1, self.config.language.head_width)
        fused = fused_attention.fits(embeddings, self.config.language.head_width)
        bias = None if fused else key_bias(valid, self.dtype)[:, None, None]
        scene = Scene(cos, sin, valid, bias, self.dtype)
        output, keys_values = self.language(embeddings, scene, need_output=need_output)
        return Prefix(keys_values, valid, output)

    def modulations(self, t: Tensor) -> Modulations | None:
        """pi0.5: the time t [B] as adaRMS modulations (None for pi0, which mixes time into its action tokens)."""
        if self.config.variant != "pi05":
            return None
        embedded = F.silu(self.time_out(F.silu(self.time_in(timestep_embedding(t, self.config.expert.width)))))
        return self.expert.modulations(embedded)

    def velocity(
        self, prefix: Prefix, state: Tensor, x: Tensor, t: Tensor, modulations: Modulations | None = None
    ) -> tuple[Tensor, Tensor]:
        """x float32 [B, H, D] at flow time t [B], state float32 [B, state_width] (pi0 only) -> velocity float32
        [B, H, D] and the features float32 [B, H, C] that it is a linear map of. `modulations`: those of t, if the
        caller has them already."""
        suffix = self._embed_suffix(state, x, t)
        if modulations is None:
            modulations = self.modulations(t)
        fused = fused_attention.fits(suffix, self.config.expert.head_width)
        if prefix.suffix is None or fused != (prefix.suffix.bias is None):
            prefix.suffix = self._suffix_scene(prefix.valid, fused)
        output, _ = self.expert(suffix, prefix.suffix, prefix.keys_values, modulations)
        assert output is not None
        features = output[:, -self.config.horizon :]
        return self._exact(self.action_out, features), features

    def _embed_suffix(self, state: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Suffix tokens float32 [B, suffix_tokens, C]."""
        actions = self._exact(self.action_in, x)
        if self.config.variant == "pi05":
            return actions
        time = timestep_embedding(t, self.config.expert.width)[:, None].expand_as(actions)
        mixed = self.time_out(F.silu(self.time_in(torch.cat([actions, time], dim=-1))))
        return torch.cat([self.state_in(state)[:, None], mixed], dim=1)

    def compile_layers(self) -> None:
        """torch.compile for every kind of layer."""
        for part in (self.vision, self.language, self.expert):
            part.compile_layers()
        self.narrow.compile()

    def _exact(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """A float32 projection to or from the 32 action dims; of few rows on a GPU, where libraries take 15 us."""
        rows = x.shape[0] * x.shape[1]
        if x.is_cuda and not torch.is_grad_enabled() and rows <= small_matmul.MAX_ROWS:
            return self.narrow(x, layer.weight, layer.bias)
        return layer(x)

    def _suffix_scene(self, prefix_valid: Tensor, fused: bool) -> Scene:
        """Positions go on after the real prefix. All see the real prefix and the whole suffix, but pi0's state sees no
        actions: bias [B, 1, 1 or Q, S + Q]. The fused kernel knows these rules by itself."""
        queries = self.config.suffix_tokens
        position = prefix_valid.sum(1, keepdim=True) + torch.arange(queries, device=prefix_valid.device)
        cos, sin = rotary_table(position, self.config.expert.head_width)
        if fused:
            return Scene(cos, sin, prefix_valid, None, self.dtype)
        valid = torch.cat([prefix_valid, prefix_valid.new_ones(len(prefix_valid), queries)], dim=1)[:, None]
        if self.config.variant == "pi0":
            valid = valid.repeat(1, queries, 1)
            valid[:, 0, prefix_valid.shape[1] + 1 :] = False
        return Scene(cos, sin, prefix_valid, key_bias(valid, self.dtype)[:, None], self.dtype)


def _narrow_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x[..., None, :] * weight).sum(-1) + bias


class TimeTable:
    """adaRMS modulations of a whole time grid. A rollout's times never change and these are a quarter of the expert's
    weights, so they are computed when the weights change, and kept in place (CUDA graphs hold on to them)."""

    def __init__(self):
        self.versions: list[int] = []
        self.modulations: Modulations | None = None

    def refresh(self, model: Pi0Model, times: Tensor) -> None:
        """times [K]."""
        if model.config.variant != "pi05":
            return
        modules = (model.time_in, model.time_out, model.expert.modulate, model.expert.modulate_final)
        parameters = [parameter for module in modules for parameter in module.parameters()]
        versions = [parameter._version for parameter in parameters]
        if self.modulations is not None and self.modulations.layers.device != times.device:
            self.modulations = None
        if versions == self.versions and self.modulations is not None:
            return
        fresh = model.modulations(times)
        assert fresh is not None
        if self.modulations is None:
            self.modulations = fresh
        else:
            self.modulations.layers.copy_(fresh.layers)
            self.modulations.final.copy_(fresh.final)
        self.versions = versions

    def row(self, index: int) -> Modulations | None:
        """One step's, for any batch; None for pi0."""
        return None if self.modulations is None else self.modulations.row(index)
