"""What several tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

WriteScan = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def private_home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test makes or reads a key of the user's; other processes that a test starts inherit the folder."""
    folder = tmp_path_factory.mktemp("private_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCLR_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real scans: $MEDCLR_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("MEDCLR_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real scans not found: {folder} is no folder; set MEDCLR_DATA to run this test")
    return folder


@pytest.fixture
def write_scan(tmp_path: Path) -> WriteScan:
    """``write_scan(name, voxels, affine=None)`` writes a NIfTI file below ``tmp_path`` and returns its path."""

    def write(name: str, voxels: NDArray[Any], affine: NDArray[Any] | None = None) -> str:
        path = tmp_path / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
        return str(path)

    return write


def affine_of(spacing: tuple[float, ...], axes: NDArray[Any], origin: tuple[float, ...]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = origin
    return affine


FLIPPED = np.diag([-1.0, 1.0, 1.0])
PERMUTED = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
OBLIQUE = Rotation.from_euler("xyz", [12, -7, 20], degrees=True).as_matrix()
AFFINES = {
    "plain": affine_of((1.0, 1.0, 1.0), np.eye(3), (0, 0, 0)),
    "anisotropic": affine_of((0.8, 1.1, 2.5), np.eye(3), (-10, 4, 30)),
    "flipped": affine_of((1.0, 1.3, 1.7), FLIPPED, (25, -40, 12)),
    "permuted": affine_of((0.9, 1.4, 2.1), PERMUTED, (5, 6, -70)),
    "oblique": affine_of((0.8, 1.1, 2.5), OBLIQUE, (-3, 50, 8)),
    "oblique and flipped": affine_of((1.2, 0.9, 1.6), OBLIQUE @ FLIPPED, (17, -9, -21)),
}


@pytest.fixture(scope="session")
def affines() -> dict[str, NDArray[np.float64]]:
    """Voxel-to-world matrices with anisotropic voxels, flipped, permuted and oblique axes, by name."""
    return {name: affine.copy() for name, affine in AFFINES.items()}


@pytest.fixture(scope="session")
def cohort_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cohort")
    random = np.random.default_rng(20)
    shapes = [(21, 17, 13), (18, 23, 11), (15, 16, 19), (24, 14, 12), (13, 20, 17)]
    rows: list[dict[str, Any]] = []
    for patient, scans in enumerate((3, 1, 2, 2, 1)):
        anatomy = gaussian_filter(random.standard_normal((24, 24, 24)), 3)
        for _ in range(scans):
            number = len(rows)
            shape = shapes[number % len(shapes)]
            affine = list(AFFINES.values())[number % len(AFFINES)]
            smooth = anatomy[: shape[0], : shape[1], : shape[2]] / anatomy.std()
            voxels = (smooth + 0.1 * random.standard_normal(shape)) * 10.0 ** (number % 4) + 5
            mask = (smooth > np.quantile(smooth, 0.9)).astype(np.uint8)
            row: dict[str, Any] = {"patient_id": f"patient {patient}", "days": 30 * number}
            for key, values in (("image", voxels.astype(np.float32)), ("label", mask)):
                path = folder / f"scan_{number}_{key}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(values, affine), path)
                row[key] = str(path)
            rows.append(row)
    return rows


@pytest.fixture
def cohort(cohort_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of five patients with 3, 1, 2, 2 and 1 scans: NIfTI of odd sizes, all kinds of affines, with masks."""
    return [dict(row) for row in cohort_rows]
