"""Weights from the process that trains to those that roll out: the tensors that were written since, and no others.

All begin with the same weights. Writes are found by autograd's version counters: optimisers, `copy_` and
`load_state_dict` count, a write through `.data` does not.
"""

from torch import Tensor, nn

from learner.exchange import Exchange


def shared_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """What training may change: parameters that train, and saved buffers."""
    parameters = dict(policy.named_parameters())
    return {
        name: tensor
        for name, tensor in policy.state_dict(keep_vars=True).items()
        if name not in parameters or parameters[name].requires_grad
    }


class WeightSource:
    """Remembers what it told others of. Of a sharded policy every rank needs one, and all are called together."""

    def __init__(self, policy: nn.Module):
        self.policy = policy
        self.told = self._versions()

    def changed(self, everything: bool = False) -> list[str]:
        """Names of the tensors to send now; of all that training may ever have changed for one who begins anew."""
        versions = self._versions()
        names = [name for name, version in versions.items() if everything or version != self.told[name]]
        self.told = versions
        return names

    def send(self, names: list[str], exchange: Exchange | None) -> int:
        """Returns the bytes that each receiver got. Without an exchange it only helps to gather."""
        ours, sent_bytes = shared_tensors(self.policy), 0
        for name in names:
            tensor = whole(ours[name])
            if exchange:
                sent_bytes += exchange.broadcast(tensor, exchange.seat).nbytes
        return sent_bytes

    def _versions(self) -> dict[str, int]:
        return {name: tensor._version for name, tensor in shared_tensors(self.policy).items()}


def receive(policy: nn.Module, names: list[str], exchange: Exchange, source: int = 0) -> None:
    """Puts what `source` sends into `policy`."""
    ours = shared_tensors(policy)
    for name in names:
        ours[name].detach().copy_(exchange.broadcast(ours[name], source))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from its ranks, any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather().detach() if gather else tensor.detach()
