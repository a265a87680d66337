"""Several processes train one model: ``torchrun --nproc-per-node 2 -m -- ugicm_train run ...``.

Each sees crops of its own. Gradients are averaged after every backward pass. Then each makes Muon's step for
a part of the matrices (a quarter of the time of a small batch) and AdamW's for all the rest.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def _together(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Their values as one vector, to be changed in one exchange and written back."""
    values = torch.cat([tensor.flatten() for tensor in tensors])
    yield values
    for tensor, part in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class Processes:
    """The processes that torchrun started; alone without it."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            # Left alone, its threads can abort a process that ends.
            atexit.register(dist.destroy_process_group)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and decides when to stop."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its mean over all processes."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        with _together(gradients) as values:
            dist.all_reduce(values)
            values /= self.count

    def assign(self, matrices: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Which process works on which matrices, about the same work each; all of them everywhere if few."""
        if len(matrices) < self.count:
            return [list(matrices)]
        assigned: list[list[nn.Parameter]] = [[] for _ in range(self.count)]
        work = [0] * self.count

        def cost(matrix: Tensor) -> int:
            """Orthogonalising is products of the matrix with itself."""
            return matrix.numel() * min(matrix.shape)

        for matrix in sorted(matrices, key=cost, reverse=True):
            least = work.index(min(work))
            assigned[least].append(matrix)
            work[least] += cost(matrix)
        return assigned

    @torch.no_grad()
    def broadcast(self, assigned: Sequence[Sequence[nn.Parameter]]) -> None:
        """Give every process what each made of its matrices."""
        if len(assigned) == 1:
            return
        for owner, matrices in enumerate(assigned):
            with _together(matrices) as values:
                dist.broadcast(values, owner)

    def agree(self, value: float) -> float:
        """What the first process has there."""
        if self.count == 1:
            return value
        shared: Tensor = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)
