"""Kernels: how much the scans of two patients attract each other, by what is known of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from medclr import keys
from medclr.affinity.columns import Row, number_of, require_columns
from medclr.affinity.meta import Meta, both_known, distance, entry_of, equal
from medclr.errors import ConfigError, DatalistError

Rule = Literal["scott", "silverman"]
_FACTORS = {"scott": 1.0, "silverman": (3 / 4) ** -0.2}


class Kernel(Protocol):
    """What a kernel offers."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the datalist that it reads."""

    def __call__(self, query: Meta, key: Meta) -> tuple[Tensor, Tensor]:
        """Weights, float32 (B, K) in [0, 1], and where they hold, bool (B, K): elsewhere a value is missing."""


class Gaussian:
    r"""``exp(-(a - b)^2 / (2 bandwidth^2))`` of a number such as age: the kernel of y-aware InfoNCE (arXiv:2106.08808).

    Args:
        column: column of the datalist; numbers.
        bandwidth: in the column's unit, > 0; or ``scott`` or ``silverman``: the spread of the training patients times
            their number to the power of -1/5, and for ``silverman`` 1.06 times that, as ``scipy.stats.gaussian_kde``
            has it in one dimension. Each patient counts once, with the mean of its scans.
        rows: the training rows, for a rule; where given, they must have the column.

    Raises:
        ConfigError: for a bandwidth that is not > 0, an unknown rule, or a rule without rows.
        DatalistError: where no row has the column, a value is no number, or all patients are alike.

    Example:
        >>> weight, _ = Gaussian("age", 5.0)({"age": torch.tensor([40.0])}, {"age": torch.tensor([45.0])})
        >>> round(weight.item(), 4)
        0.6065
    """

    def __init__(self, column: str, bandwidth: float | Rule, rows: Sequence[Row] | None = None) -> None:
        self.column = column
        if rows is not None:
            require_columns(rows, (column,), f"The kernel Gaussian({column!r})")
        if isinstance(bandwidth, str) and bandwidth in _FACTORS:
            self.bandwidth = _by_rule(column, bandwidth, rows)
        else:
            self.bandwidth = checked_bandwidth(bandwidth)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that it reads."""
        return (self.column,)

    def __call__(self, query: Meta, key: Meta) -> tuple[Tensor, Tensor]:
        """Weights (B, K), and where both numbers are known."""
        known = both_known(query[entry_of(self.column)], key[entry_of(self.column)])
        return fading(distance(query, key, self.column), self.bandwidth).nan_to_num(0.0), known


class Same:
    """1 where a category or number is the same, and another weight where it differs.

    Over labels it makes the pairs of supervised contrast (arXiv:2004.11362).

    Args:
        column: column of the datalist: ``label``, ``sex``, ``site``, a diagnosis, ...
        otherwise: the weight of two different values, from 0 to below 1.

    Raises:
        ConfigError: for another ``otherwise``.

    Example:
        >>> Same("sex")({"sex": torch.tensor([0])}, {"sex": torch.tensor([0, 1, -1])})[0].tolist()
        [[1.0, 0.0, 0.0]]
    """

    def __init__(self, column: str, otherwise: float = 0.0) -> None:
        if isinstance(otherwise, bool) or not isinstance(otherwise, int | float) or not 0 <= otherwise < 1:
            raise ConfigError(
                "A kernel is unusable.",
                got=f"otherwise {otherwise!r} for {column!r}",
                wanted="a weight from 0 to below 1",
                fix="Set otherwise: 0.",
            )
        self.column, self.otherwise = column, float(otherwise)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that it reads."""
        return (self.column,)

    def __call__(self, query: Meta, key: Meta) -> tuple[Tensor, Tensor]:
        """Weights (B, K), and where both values are known."""
        one, other = query[entry_of(self.column)], key[entry_of(self.column)]
        return equal(one, other).float().clamp_min(self.otherwise), both_known(one, other)


def fading(distance: Tensor, bandwidth: float) -> Tensor:
    """The Gaussian of a distance, in float32; NaN where that is NaN."""
    return torch.exp(-0.5 * (distance / bandwidth) ** 2).to(torch.float32)


def checked_bandwidth(bandwidth: object) -> float:
    """The bandwidth as a number.

    Raises:
        ConfigError: unless it is finite and > 0.
    """
    if isinstance(bandwidth, int | float) and not isinstance(bandwidth, bool) and 0 < bandwidth < math.inf:
        return float(bandwidth)
    raise ConfigError(
        "The bandwidth is unusable.",
        got=repr(bandwidth),
        wanted="a number > 0 in the unit of the column, or for a kernel scott or silverman",
        fix="Give the difference at which the weight has fallen to 0.6, for example bandwidth: 5 for years of age.",
    )


def _by_rule(column: str, rule: str, rows: Sequence[Row] | None) -> float:
    if rows is None:
        raise ConfigError(
            "The bandwidth cannot be found by rule.",
            got=f"bandwidth {rule!r} of {column!r} without rows",
            wanted="the training rows",
            fix="Add rows: $@data.training, or give the bandwidth as a number.",
        )
    of_patient = defaultdict(list)
    for row in rows:
        value = number_of(row, column)
        if value is not None:
            of_patient[str(row[keys.PATIENT_ID])].append(value)
    means = [float(np.mean(values)) for values in of_patient.values()]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    if not spread > 0:
        raise DatalistError(
            "The bandwidth cannot be found by rule.",
            got=f"{len(means)} patient(s) with {column!r}, all alike",
            wanted="at least two patients that differ",
            fix="Give the bandwidth as a number, or leave this kernel out.",
        )
    return float(_FACTORS[rule] * spread * len(means) ** -0.2)
