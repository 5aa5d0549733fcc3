"""Strengths of an augmentation: a number is fixed, a pair is a uniform range. Read such settings, and draw from them.

A transform's draws are dictionaries of CPU tensors with one row a sample (``Params``). They are pure functions of the
draw keys and of ``place``, the text that tells one transform of a recipe from the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from medclr import draws
from medclr.errors import ConfigError

Params = dict[str, Tensor]
"""What was drawn for a batch: tensors (B, ...) on the CPU. ``active`` (B,) bool says which samples change at all."""

Range = tuple[float, float]
Strength = float | Sequence[float]


def read_range(
    owner: object, name: str, value: Strength, *, minimum: float = -math.inf, maximum: float = math.inf
) -> Range:
    """The setting ``name`` of the transform ``owner`` as (low, high).

    Raises:
        ConfigError: it is neither a finite number nor a rising pair of them within [minimum, maximum].
    """
    pair = _numbers(value, 2)
    if pair is None:
        raise _refused(owner, name, value, "a finite number, or a pair (low, high) of them")
    low, high = pair
    if low > high:
        raise _refused(owner, name, value, "a pair (low, high) with low <= high", fix=f"Swap them: ({high}, {low}).")
    if low < minimum or high > maximum:
        raise _refused(owner, name, value, f"{_bounds(minimum, maximum)}")
    return low, high


def read_positive_range(owner: object, name: str, value: Strength) -> Range:
    """As :func:`read_range`, for strengths that multiply and so must be above 0."""
    low, high = read_range(owner, name, value)
    if low <= 0:
        raise _refused(owner, name, value, "above 0")
    return low, high


def read_triple(
    owner: object, name: str, value: Strength, *, minimum: float = 0.0, maximum: float = math.inf
) -> tuple[float, float, float]:
    """The setting ``name`` as one number an axis; a single number holds for all three axes."""
    triple = _numbers(value, 3)
    if triple is None:
        raise _refused(owner, name, value, "a finite number, or three of them, one an axis")
    if min(triple) < minimum or max(triple) > maximum:
        raise _refused(owner, name, value, f"{_bounds(minimum, maximum)}")
    return triple[0], triple[1], triple[2]


def read_probability(owner: object, value: float) -> float:
    """The share of samples that a transform changes, within [0, 1]."""
    low, high = read_range(owner, "probability", value, minimum=0.0, maximum=1.0)
    if low != high:
        raise _refused(owner, "probability", value, "one number in [0, 1]")
    return low


def read_count(owner: object, name: str, value: int, *, minimum: int = 1) -> int:
    """A whole number of at least ``minimum``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise _refused(owner, name, value, f"a whole number of at least {minimum}")
    return int(value)


def read_size(owner: object, name: str, value: Sequence[int]) -> tuple[int, int, int]:
    """Three positive voxel counts."""
    whole = isinstance(value, Sequence) and all(isinstance(n, Integral) and not isinstance(n, bool) for n in value)
    if not whole or len(value) != 3 or min(value) < 1:
        raise _refused(owner, name, value, "three positive whole numbers of voxels, such as (96, 96, 96)")
    return int(value[0]), int(value[1]), int(value[2])


def draw_active(keys: Tensor, purpose: str, probability: float) -> Tensor:
    """Whether each sample (B,) is changed at all, bool."""
    return draws.uniform(keys, f"{purpose}/active")[..., 0] < probability


def draw_range(keys: Tensor, purpose: str, ends: Range, count: int = 1) -> Tensor:
    """Uniform numbers (B, count) float32 between the two ends; exactly the number where both ends are one."""
    low, high = ends
    return (low + (high - low) * draws.uniform(keys, purpose, count)).float()


def draw_log_range(keys: Tensor, purpose: str, ends: Range, count: int = 1) -> Tensor:
    """As :func:`draw_range` with a uniform logarithm, so that halving is as likely as doubling."""
    low, high = ends
    return (low * (high / low) ** draws.uniform(keys, purpose, count)).clamp(low, high).float()


def draw_field_seeds(keys: Tensor, purpose: str) -> Tensor:
    """What seeds one noise field a sample, (B, 1) int64: the key that :func:`medclr.draws.torch_generators` wants."""
    return (draws.uniform(keys, f"{purpose}/field") * 2.0**53).to(torch.int64)


def _numbers(value: object, count: int) -> list[float] | None:
    """``count`` finite numbers, from as many or from a single one; None for anything else."""
    ends = [value] * count if isinstance(value, Real) else list(value) if isinstance(value, Sequence) else []
    numbers = [float(end) for end in ends if isinstance(end, Real) and not isinstance(end, bool)]
    return numbers if len(ends) == len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _bounds(minimum: float, maximum: float) -> str:
    if math.isinf(maximum):
        return f"at least {minimum:g}"
    return f"within [{minimum:g}, {maximum:g}]"


def _refused(owner: object, name: str, value: object, wanted: str, fix: str | None = None) -> ConfigError:
    kind = type(owner).__name__
    return ConfigError(
        f"{kind} cannot use its setting {name!r}.", got=value, wanted=wanted, fix=fix or f"Change {name} of {kind}."
    )
