"""CUDA graphs without ceremony: call a function of tensors, and from the second call on its kernels are replayed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class Graphed:
    """`fn(*tensors) -> tensors`, captured once for each set of input shapes; plain call on the CPU.

    `fn` must not synchronise, draw random numbers or branch on values. Parameters may change in place between calls.
    Outputs are copies, so a caller may keep them. Not for use with gradient.
    """

    def __init__(self, fn: Callable[..., Tensors], enabled: bool):
        self.fn, self.enabled = fn, enabled
        self.captures: dict[tuple, _Capture] = {}
        self.pool: tuple[int, int] | None = None

    def __call__(self, *inputs: Tensor) -> Tensors:
        with torch.no_grad():
            if not self.enabled or inputs[0].device.type != "cuda":
                return self.fn(*inputs)
            key = tuple((tuple(x.shape), x.dtype) for x in inputs)
            if key not in self.captures:
                self.captures[key] = self._capture(inputs)
            capture = self.captures[key]
            for mine, given in zip(capture.inputs, inputs, strict=True):
                mine.copy_(given)
            capture.graph.replay()
            return tuple(x.clone() for x in capture.outputs)

    def clear(self) -> None:
        """Forget every capture: after weights were replaced, not merely changed in place."""
        self.captures.clear()
        self.pool = None

    def _capture(self, inputs: Tensors) -> _Capture:
        static = tuple(x.clone() for x in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, picks algorithms, allocates workspaces
            for _ in range(2):
                self.fn(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.fn(*static)
        self.pool = graph.pool()
        return _Capture(graph, static, outputs)
