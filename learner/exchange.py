"""Tensors between the processes of one training run: broadcasts and point to point, by NCCL or through host memory.

A group is formed anew, under another name, when a process was replaced.
"""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.rollouts import Rollouts, mapped

PATIENCE = timedelta(minutes=10)  # a first rollout compiles for minutes


def open_store(meeting: str) -> dist.Store:
    """Where processes find each other: `file:PATH` on one machine, `tcp:HOST:PORT` on several."""
    kind, _, place = meeting.partition(":")
    if kind == "file":
        return dist.FileStore(place, -1)
    name, _, port = place.rpartition(":")
    return dist.TCPStore(name, int(port), wait_for_workers=False, timeout=PATIENCE)


class Exchange:
    """This process's seat in the group `name`. NCCL needs a GPU for every seat; gloo carries host memory."""

    def __init__(self, meeting: str, name: str, seat: int, seats: int, backend: str):
        store = dist.PrefixStore(f"exchange/{name}", open_store(meeting))
        self.seat = seat
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = PATIENCE
            self.group: Any = dist.ProcessGroupNCCL(store, seat, seats, options)
            self.wire = torch.device("cuda", torch.cuda.current_device())
        else:
            self.group = dist.ProcessGroupGloo(store, seat, seats, PATIENCE)
            self.wire = torch.device("cpu")

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """What `source` has, on the wire's device; `tensor` there is sent, elsewhere it says how large that is."""
        carried = tensor.detach().to(self.wire).contiguous() if self.seat == source else self._like(tensor)
        self.group.broadcast([carried], _from(source)).wait()
        return carried

    def send(self, tensor: Tensor, to: int) -> Tensor:
        self.group.send([tensor.detach().to(self.wire).contiguous()], to, 0).wait()
        return tensor

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> Tensor:
        carried = torch.empty(shape, dtype=dtype, device=self.wire)
        self.group.recv([carried], source, 0).wait()
        return carried

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.wire)


def _from(seat: int) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = seat, 0
    return options


@dataclass
class Kept:
    """Model inputs that stayed with the worker that made them, for rows of `Rollouts`: which worker (by its seat) and
    which of its rows, int64 [N] each. `forms`, by seat: no row of what is kept there."""

    seat: Tensor
    row: Tensor
    forms: dict[int, Rollouts] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, rows: Tensor) -> "Kept":
        return replace(self, seat=self.seat[rows], row=self.row[rows])

    @classmethod
    def concatenate(cls, parts: list["Kept"]) -> "Kept":
        forms = {seat: form for part in parts for seat, form in part.forms.items()}
        return cls(torch.cat([part.seat for part in parts]), torch.cat([part.row for part in parts]), forms)


@dataclass(frozen=True)
class Parcel:
    """Rows (int64 [n]) of what `source` keeps, for `to`."""

    source: int
    to: int
    rows: Tensor
    form: Rollouts


class Pantry:
    """Samples kept where they were made, and where they are needed."""

    def __init__(self, seat: int):
        self.seat = seat
        self.kept: list[Rollouts] = []

    def keep(self, rollouts: Rollouts) -> Rollouts:
        """Stores samples; returns what the trainer wants of them, on the CPU."""
        first = sum(map(len, self.kept))
        self.kept.append(rollouts)
        row = torch.arange(first, first + len(rollouts))
        form = rollouts[torch.zeros(0, dtype=torch.int64)].to("cpu")
        kept = Kept(torch.full_like(row, self.seat), row, {self.seat: replace(form, episodes=[])})
        light = replace(rollouts, prepared=kept, chain=row, denoise_index=row, old_log_prob=row)
        return light.to("cpu")

    def clear(self) -> None:
        self.kept = []

    def rows(self, rows: Tensor) -> Rollouts:
        if len(self.kept) > 1:
            self.kept = [Rollouts.concatenate(self.kept)]
        return self.kept[0][rows]

    def trade(self, parcels: list[Parcel], exchange: Exchange) -> dict[int, Rollouts]:
        """Everybody goes through the same list in the same order; returns what came, by source."""
        came = {}
        for parcel in parcels:
            if parcel.source == self.seat:
                mapped(self.rows(parcel.rows), lambda tensor, to=parcel.to: exchange.send(tensor, to))
            elif parcel.to == self.seat:
                n = len(parcel.rows)
                came[parcel.source] = mapped(
                    parcel.form,
                    lambda t, n=n, source=parcel.source: exchange.receive((n, *t.shape[1:]), t.dtype, source),
                )
        return came
