"""Rank, world size, and a gather that lets gradients through. Everything works unchanged in one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def gather(tensor: Tensor) -> Tensor:
    """Concatenate every rank's tensor (B, ...) into (R * B, ...), in the order of ranks.

    Gradients flow back to the rank that owns each row, summed over the ranks that used it. With each rank's loss a mean
    over its own rows and DDP's average over ranks, this gives the gradients of one process on the joined batch.
    All ranks must hold tensors of one shape.
    """
    if not is_distributed():
        return tensor
    if tensor.is_floating_point():
        return torch.cat(list(all_gather(tensor.contiguous())))
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
