"""The fixture that runs a function in several ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks as run_in


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """``run_ranks(function, *arguments, world_size=2, timeout=120.0)``: the results in the order of ranks."""
    runs = itertools.count()

    def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        folder = tmp_path / f"ranks_{next(runs)}"
        folder.mkdir()
        return run_in(folder, function, *arguments, **options)

    return run
