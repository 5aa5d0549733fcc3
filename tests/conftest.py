"""What several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real scans: $MEDCLR_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("MEDCLR_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real scans not found: {folder} is no folder; set MEDCLR_DATA to run this test")
    return folder
