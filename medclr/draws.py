"""Randomness as a pure function of where a draw stands, not of when it is made.

Every draw of a pair, a crop or a view is named by a *draw key*: the run's seed, the epoch, the patient's place in the
datalist, the patient's occurrence in the epoch, and the view (0 for what both views share, 1 and 2 for each of them).
The same key gives the same numbers in any worker, on any rank and in any order of calls.

Numbers come from a counter-based generator: the key is folded into 64 bits by the finaliser of SplitMix64 (Steele,
Lea and Flood 2014, doi 10.1145/2660193.2660195), vectorised over the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEY_FIELDS = ("seed", "epoch", "place", "occurrence", "view")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draw_key(seed: int, epoch: int, place: int, occurrence: int, view: int) -> Tensor:
    """A draw key: int64 tensor of shape (5,), in the order of ``KEY_FIELDS``."""
    return torch.tensor([seed, epoch, place, occurrence, view], dtype=torch.int64)


def uniform(key: Tensor, purpose: str, count: int = 1) -> Tensor:
    """Independent uniform numbers for each key.

    Args:
        key: int64 draw keys (..., 5).
        purpose: what the numbers are for; two purposes with the same key are independent.
        count: how many numbers a key.

    Returns:
        float64 tensor (..., count) on the CPU, each in [0, 1).
    """
    state = _fold(key.cpu().numpy().astype(np.uint64), purpose)
    with np.errstate(over="ignore"):
        bits = _mix(state[..., None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def generator(key: Tensor, purpose: str) -> np.random.Generator:
    """A NumPy generator for one draw key (5,), for draws whose number is not known beforehand."""
    return np.random.default_rng(int(_fold(key.cpu().numpy().astype(np.uint64), purpose)))


def torch_generators(key: Tensor, purpose: str, device: torch.device) -> list[torch.Generator]:
    """A generator on ``device`` for each draw key (B, 5), for noise fields; torch's CPU and GPU streams differ."""
    seeds = _fold(key.cpu().numpy().astype(np.uint64), purpose) >> np.uint64(1)
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


def _fold(key: NDArray[np.uint64], purpose: str) -> NDArray[np.uint64]:
    salt = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    state = np.full(key.shape[:-1], salt, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in range(key.shape[-1]):
            state = _mix(state + _GOLDEN + key[..., column])
    return state


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def stable_seed(*parts: int | str) -> int:
    """One 63-bit seed from several numbers or names, the same in every process and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def shuffled(count: int, seeds: Sequence[int | str]) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on ``seeds`` alone."""
    return np.random.default_rng(stable_seed(*seeds)).permutation(count)
