"""Parameters that train, their gradients and their moments in shares: one for each rank (FSDP2).

The whole policy is one unit: its weights are gathered for a forward and backward pass and given back after it, so that
what a rank saves is optimiser state, and weights between steps. Frozen weights stay whole.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from learner.policy import Scores
from learner.rollouts import mapped
from learner.weight_sync import whole


def shard(policy: nn.Module, device: str, ranks: int) -> None:
    """In place; all ranks of the default process group together."""
    from torch.distributed.device_mesh import init_device_mesh  # a second that others need not spend
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    frozen = {parameter for parameter in policy.parameters() if not parameter.requires_grad}
    fully_shard(policy, mesh=init_device_mesh(device, (ranks,)), ignored_params=frozen)
    policy.set_gradient_divide_factor(1.0)  # losses are parts of the batch's mean: gradients add up
    policy.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    _announce_scores()
    for name in ("scores", "sft_loss"):
        register_fsdp_forward_method(policy, name)


@functools.cache  # once a process
def _announce_scores() -> None:
    """How FSDP finds the tensors whose backward pass it waits for."""
    torch.export.register_dataclass(Scores)


def is_sharded(policy: Any) -> bool:
    return hasattr(policy, "set_requires_gradient_sync")


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as one process would have it; all ranks together."""
    return mapped(state, lambda tensor: whole(tensor).cpu())


def load_shards(policy: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], moments: Any) -> None:
    """What `whole_state` gave of policy and optimiser; all ranks together."""
    with torch.no_grad():
        for name, tensor in policy.state_dict(keep_vars=True).items():
            tensor.copy_(_like(weights[name], tensor))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {key: _like(value, parameters[index]) if value.ndim else value for key, value in entry.items()}
        for index, entry in moments["state"].items()
    }
    optimizer.load_state_dict(moments | {"state": state})


def _like(value: Tensor, sharded: Tensor) -> Tensor:
    if not hasattr(sharded, "device_mesh"):
        return value.to(sharded.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
