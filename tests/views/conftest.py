"""Crops and views for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from medclr import draws
from medclr.geometry import Crop, View


def _keys(count: int, view: int = 1, seed: int = 3) -> Tensor:
    return torch.stack([draws.draw_key(seed, 0, place, 0, view) for place in range(count)])


def _affines(count: int, spacing: Sequence[float]) -> Tensor:
    """Obliquely oriented, another one for each sample, as scans are."""
    random = torch.Generator().manual_seed(5)
    turns = torch.linalg.qr(torch.randn(count, 3, 3, generator=random, dtype=torch.float64)).Q
    affines = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    affines[:, :3, :3] = turns * torch.tensor(spacing, dtype=torch.float64)
    affines[:, :3, 3] = torch.randn(count, 3, generator=random, dtype=torch.float64) * 50
    return affines.float()


@pytest.fixture
def make_keys() -> Callable[..., Tensor]:
    return _keys


@pytest.fixture
def make_crop() -> Callable[..., Crop]:
    def make(
        shape: Sequence[int] = (20, 24, 18),
        count: int = 4,
        channels: int = 1,
        view: int = 1,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        inside: Sequence[Sequence[int]] | None = None,
    ) -> Crop:
        box = torch.tensor(inside if inside is not None else [[0, 0, 0], list(shape)])
        image = torch.rand(count, channels, *shape, generator=torch.Generator().manual_seed(count))
        within = torch.zeros(shape, dtype=torch.bool)
        within[tuple(slice(max(int(a), 0), int(b)) for a, b in box.T)] = True
        return Crop(
            image * within,
            _affines(count, spacing),
            box.repeat(count, 1, 1),
            torch.ones(count, channels, dtype=torch.bool),
            _keys(count, view),
        )

    return make


@pytest.fixture
def make_view() -> Callable[..., View]:
    """Views whose first ``outside`` slices lie outside the scan."""

    def make(
        shape: Sequence[int] = (12, 14, 10),
        count: int = 4,
        channels: int = 1,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        outside: int = 0,
    ) -> View:
        valid = torch.ones(count, 1, *shape, dtype=torch.bool)
        valid[:, :, :outside] = False
        image = torch.rand(count, channels, *shape, generator=torch.Generator().manual_seed(count)) * 1.7 + 0.1
        return View(
            image * valid,
            _affines(count, spacing),
            valid,
            torch.ones(count, channels, dtype=torch.bool),
            _keys(count),
        )

    return make
