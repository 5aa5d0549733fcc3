"""Rank, world size, and a gather that lets gradients through. Everything works unchanged in one process."""

from __future__ import annotations

from collections.abc import Sequence

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


def collective_device() -> torch.device:
    """Where collectives work: this rank's GPU for NCCL, the CPU elsewhere."""
    if is_distributed() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def any_rank(flags: Sequence[bool], device: torch.device | str = "cpu") -> list[bool]:
    """For each flag, whether it is set on any rank; every rank must call it with as many.

    Args:
        flags: of this rank.
        device: where collectives work: the CPU for gloo, a GPU for NCCL.
    """
    if not is_distributed():
        return list(flags)
    together = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]


def text_of_rank_0(text: str, device: torch.device | str = "cpu") -> str:
    """The text that rank 0 gave, on all ranks; at most 200 bytes."""
    if not is_distributed():
        return text
    content = text.encode()
    row = torch.zeros(201, dtype=torch.int64, device=device)
    row[0] = len(content)
    row[1 : 1 + len(content)] = torch.tensor(list(content), dtype=torch.int64)
    dist.broadcast(row, src=0)
    length, *codes = row.tolist()
    return bytes(codes[:length]).decode()


def join(device: torch.device | str) -> None:
    """Join the process group of the ranks that ``torchrun`` has started, if this process is not in one.

    Args:
        device: of this rank: NCCL joins GPUs, gloo the rest.
    """
    if dist.is_initialized():
        return
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
