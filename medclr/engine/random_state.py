"""The state of all random generators of a process, as tensors that a checkpoint takes; of all ranks, if there are many.

medclr draws pairs, crops and views as functions of their place, which needs no generator. Dropout and what users add
draw from these.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medclr import distributed

RandomState = dict[str, Tensor]


def take() -> RandomState:
    """The state of Python's, NumPy's and torch's generators, CUDA's among them where it is in use."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  # whoever draws from it, it has a state
    assert kind == "MT19937"
    state = {
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.tensor([position, has_gauss, *np.asarray(keys).tolist()], dtype=torch.int64),
        "numpy_gauss": _optional(cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def put_back(state: Mapping[str, Tensor]) -> None:
    """Let all generators go on from a state that :func:`take` gave."""
    version, *numbers = state["python"].tolist()
    random.setstate((version, tuple(numbers), _number(state["python_gauss"])))
    position, has_gauss, *keys = state["numpy"].tolist()
    cached = _number(state["numpy_gauss"]) or 0.0
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def of_all_ranks(state: RandomState, device: torch.device) -> list[RandomState]:
    """The states of all ranks, in their order; every rank must call it.

    Args:
        state: of this rank.
        device: where collectives work: the CPU for gloo, a GPU for NCCL.
    """
    ranks: list[RandomState] = [{} for _ in range(distributed.world_size())]
    for name, value in state.items():
        with torch.no_grad():
            everyone = distributed.gather(value[None].to(device)).cpu()
        for rank, row in enumerate(everyone):
            ranks[rank][name] = row.clone()
    return ranks


def _optional(value: Any) -> Tensor:
    """A number that may be None, bit for bit: (present, its 64 bits)."""
    bits = 0 if value is None else int(np.float64(value).view(np.int64))
    return torch.tensor([value is not None, bits], dtype=torch.int64)


def _number(value: Tensor) -> float | None:
    present, bits = value.tolist()
    return float(np.int64(bits).view(np.float64)) if present else None
