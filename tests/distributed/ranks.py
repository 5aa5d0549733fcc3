"""Run a function in several processes that share a gloo process group."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankError(Exception):
    """What one rank raised, as its traceback."""


def run_ranks(
    folder: Path, function: Callable[..., Any], *arguments: Any, world_size: int = 2, timeout: float = 120.0
) -> list[Any]:
    """Call ``function(*arguments)`` once in each rank, with the process group up.

    Args:
        folder: an empty folder, where the ranks meet and leave their results.
        function: a module's own function: the ranks import it by name. It returns tensors, numbers, text, or lists and
            dictionaries of them.
        arguments: anything that can be sent to another process.
        world_size: how many ranks.
        timeout: seconds until all must have ended.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        RankError: what a rank raised; of several ranks the first, since the others may only have lost their peer.
        TimeoutError: the ranks have not ended in time; they are killed.
    """
    context = mp.start_processes(
        _one_rank,
        (world_size, folder, timeout, function, arguments),
        nprocs=world_size,
        join=False,
        start_method="spawn",
    )
    assert context is not None
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=max(end - time.monotonic(), 0)):
            if time.monotonic() >= end:
                raise TimeoutError(f"{function.__name__} has not ended in {world_size} ranks after {timeout:g} s")
    except mp.ProcessRaisedException as error:
        first = min(folder.glob("*.error"), key=lambda path: int(path.stem))
        raise RankError(first.read_text(encoding="utf-8")) from error
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _one_rank(
    rank: int, world_size: int, folder: Path, timeout: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # The machine's name need not lead to an address of its own.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = (folder / "meeting").as_uri()
    try:
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        torch.save(function(*arguments), folder / f"{rank}.pt")
        dist.barrier()
    except Exception:
        # Written, and timed, before the group is taken down, which makes the other ranks fail in their turn.
        (folder / f"{time.monotonic_ns()}.error").write_text(f"rank {rank}: {traceback.format_exc()}", encoding="utf-8")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
