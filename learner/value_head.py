"""The critic: a small MLP on features that somebody else pooled."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """features [B, width] -> value float32 [B]. Kaiming init, last layer N(0, 0.02): values start near zero."""

    def __init__(self, width: int, hidden: Sequence[int] = (512, 256, 128)):
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((width, *hidden)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
            nn.init.zeros_(layers[-2].bias)
        last = nn.Linear(hidden[-1] if hidden else width, 1)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features.float()).squeeze(-1)


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the tokens that are real. x [B, S, C], valid bool [B, S] -> float32 [B, C]."""
    weight = valid.float()[..., None]
    return (x.float() * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def pool_prefix(output: Tensor, valid: Tensor, image_valid: Tensor, mode: str, masked: bool) -> Tensor:
    """The prefix as one vector, float32 [B, C]. output [B, S, C]; valid bool [B, S].

    mode `mean_token`, `first_token` or `last_token`. Unmasked (RLinf's) counts all prompt positions, padding included,
    but still leaves out absent cameras (`image_valid` bool [B, S]: False on their tokens).
    """
    counted = valid if masked else image_valid
    if mode == "mean_token":
        return masked_mean(output, counted)
    if mode not in ("first_token", "last_token"):
        raise ValueError(f"value_vlm_mode {mode!r}: allowed are mean_token, first_token, last_token")
    order = torch.arange(output.shape[1], device=output.device)
    position = torch.where(counted, order, -1).amax(1) if mode == "last_token" else counted.float().argmax(1)
    return output[torch.arange(len(output), device=output.device), position].float()
