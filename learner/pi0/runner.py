"""How a stack calls its layers: eagerly or compiled, and with gradient checkpointing if asked."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


class Runner:
    """`layer_forward` is a plain function of the layer and its inputs, so that one compile serves all depths."""

    def __init__(self, layer_forward: Callable[..., Any]):
        self.forward = layer_forward
        self.gradient_checkpointing = False

    def compile(self) -> None:
        """One compile for each shape, kept in inductor's cache on disk."""
        setattr(torch._dynamo.config, "recompile_limit", 64)  # noqa: B010  one for each shape; typed as its default
        self.forward = torch.compile(self.forward, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.forward, *arguments, use_reentrant=False)
        return self.forward(*arguments)
