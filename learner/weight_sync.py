"""Weights from the process that trains to those that roll out: only the tensors that changed, one broadcast each time.

Consumes the policy of rank 0 of `group`, produces the same weights in all others. Tensors travel through host memory.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shared_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """What training may change: parameters that train, and saved buffers."""
    parameters = dict(policy.named_parameters())
    return {
        name: tensor
        for name, tensor in policy.state_dict().items()
        if name not in parameters or parameters[name].requires_grad
    }


class WeightSender:
    """Remembers what was sent. Everybody must begin with the weights that `policy` has now."""

    def __init__(self, policy: nn.Module, group: Any):
        self.policy, self.group = policy, group
        self.sent = {name: tensor.detach().cpu().clone() for name, tensor in shared_tensors(policy).items()}

    def send(self, version: int) -> int:
        """Returns how many bytes of weights went out."""
        now = {name: tensor.detach().cpu() for name, tensor in shared_tensors(self.policy).items()}
        changed = {name: tensor for name, tensor in now.items() if not torch.equal(tensor, self.sent[name])}
        dist.broadcast_object_list([version, list(changed)], src=0, group=self.group)
        for dtype in sorted({tensor.dtype for tensor in changed.values()}, key=str):
            tensors = [tensor for tensor in changed.values() if tensor.dtype == dtype]
            dist.broadcast(torch.cat([tensor.flatten() for tensor in tensors]), src=0, group=self.group)
        for name, tensor in changed.items():
            self.sent[name].copy_(tensor)
        return sum(tensor.nbytes for tensor in changed.values())


def receive(policy: nn.Module, group: Any) -> int:
    """Puts what rank 0 sends into `policy`; returns its version."""
    message: list[Any] = [None, None]
    dist.broadcast_object_list(message, src=0, group=group)
    version, names = message
    ours = shared_tensors(policy)
    for dtype in sorted({ours[name].dtype for name in names}, key=str):
        tensors = [ours[name] for name in names if ours[name].dtype == dtype]
        flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
        dist.broadcast(flat, src=0, group=group)
        with torch.no_grad():
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
    return version
