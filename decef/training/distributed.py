"""Several processes on one run: how torchrun starts them, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def all_reduce(self, *values: Tensor) -> list[Tensor]:
        """The sum of each scalar over all processes, in float64."""
        stacked = torch.stack([value.detach().double() for value in values])
        if self.count > 1:
            dist.all_reduce(stacked)
        return list(stacked)

    def least(self, value: Tensor) -> Tensor:
        """The least of a scalar over all processes."""
        value = value.detach().clone()
        if self.count > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return value

    def broadcast(self, value: Any) -> Any:
        """The first process's `value`, returned in all processes. The others' own `value` is ignored."""
        if self.count == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's buffers."""
        if self.count > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


def launched() -> Processes:
    """The processes that torchrun started, from the environment that it sets; a single one without torchrun."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Connect the processes that torchrun started, while the context lasts: NCCL on GPUs, gloo on CPUs."""
    processes = launched()
    if processes.count == 1 or dist.is_initialized():
        yield processes
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait for the first while it reads and prepares the data: torch's ten minutes may not be enough.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield processes
    finally:
        dist.destroy_process_group()
