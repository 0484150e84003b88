"""Model inputs of a batch of observations, as rollouts keep them."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Prepared:
    """Either the frozen prefix's keys and values, or what is needed to compute it. Index it with positions.

    state float32 [B, state_width], normalised and padded; valid bool [B, S], the prefix's real tokens; keys_values
    [B, L, 2, S, W]; pooled float32 [B, C] for a critic on the prefix; images [B, I, 3, size, size] in [-1, 1];
    image_mask bool [B, I]; tokens int64 and token_mask bool [B, T].
    """

    state: Tensor
    valid: Tensor
    keys_values: Tensor | None = None
    pooled: Tensor | None = None
    images: Tensor | None = None
    image_mask: Tensor | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.state)

    def __getitem__(self, positions: Tensor) -> "Prepared":
        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[positions.to(x.device)]

        return Prepared(**{f.name: pick(getattr(self, f.name)) for f in dataclasses.fields(self)})

    @classmethod
    def concatenate(cls, parts: list["Prepared"]) -> "Prepared":
        """One batch of several, in order."""

        def join(values: list[Tensor | None]) -> Tensor | None:
            tensors = [value for value in values if value is not None]
            return torch.cat(tensors) if tensors else None

        return cls(**{f.name: join([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)})

    def raw_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the prefix is computed from."""
        assert self.images is not None
        assert self.image_mask is not None
        assert self.tokens is not None
        assert self.token_mask is not None
        return self.images, self.image_mask, self.tokens, self.token_mask
