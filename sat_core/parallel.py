"""Several processes that train one model: what they must agree on, and the sums they share.

Plain data parallel without a wrapper: every rank takes its share of each batch, gradients are summed after the last
micro-batch, in few large pieces, and every rank makes the same update. `DistributedDataParallel` is the road not taken: it
keeps gradient accumulators and buckets of fixed shapes, so it would have to be built anew whenever a unit falls asleep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

BUCKET_BYTES = 64 * 2**20


class Parallel:
    """The ranks of a run; alone, every operation is the identity and costs nothing."""

    def __init__(self) -> None:
        """Join the group that torchrun started; alone where there is none."""
        self.rank, self.world = 0, 1
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if not dist.is_torchelastic_launched():
            return
        if self.device == "cuda":
            self.device = f"cuda:{dist.get_node_local_rank()}"
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if self.device != "cpu" else "gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.wait()  # a rank that refuses the run and is gone while others still connect breaks them

    @property
    def first(self) -> bool:
        """Whether this rank writes events and checkpoints."""
        return self.rank == 0

    def share(self, indices: list[int]) -> list[int]:
        """This rank's part of a batch."""
        return indices[self.rank :: self.world]

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks."""
        return tensor if self.world == 1 else self.sum(tensor) / self.world

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def most(self, number: int) -> int:
        """The greatest over ranks."""
        if self.world == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank; how a signal that reached one rank reaches all at the same step."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag))))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum `.grad` over ranks, in place; parameters without a gradient on this rank count as zero."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.nbytes for g in bucket) >= BUCKET_BYTES:
                _sum_bucket(bucket)
                bucket = []
        _sum_bucket(bucket)

    def reseed(self, seed: int, step: int) -> None:
        """Give each other rank than the first random numbers of its own, a pure function of rank and arguments.

        The first one draws on as a run alone does, from the state that checkpoints keep.
        """
        if self.rank:
            mixed = (seed * 1_000_003 + step) * 4096 + self.rank
            torch.manual_seed(mixed % 2**63)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the group in order, after the last operation."""
        if self.world > 1:
            dist.destroy_process_group()


def _sum_bucket(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, piece in zip(
        gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(piece.view_as(gradient))
