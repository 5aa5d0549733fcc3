"""One scan of a synthetic patient: pose, field of view, contrast, resolution, bias field and noise of a scanner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medclr.data.phantom_anatomy import REFERENCE_FOV, TISSUES, Anatomy, Look
from medclr.data.phantom_shapes import Field, Matrix, Waves, rotation


class PhantomScan(NamedTuple):
    """A scan and its truth."""

    image: NDArray[np.int16]
    """(X, Y, Z); arbitrary units in MR, Hounsfield units in CT."""
    mask: NDArray[np.uint8]
    """(X, Y, Z); 0 background, 1 organ, 2 lesion."""
    affine: Matrix
    """(4, 4); voxel index to the scan's world space in millimetres."""
    pose: Matrix
    """(4, 4), rigid; the scan's world space to the patient's own space, in which all scans of the patient agree."""
    columns: dict[str, int | float | str | None]
    """What a table says of the scan and its patient; None where a value is missing."""


class Scanner(NamedTuple):
    """What is the same in all scans of one scanner."""

    weight: float
    """Of T2 in MR, 0 to 1; in CT the strength of the contrast agent."""
    gamma: float
    """Exponent of the contrast curve (MR)."""
    scale: float
    """Intensity of the brightest tissue (MR)."""
    blur: float
    """Standard deviation of the resolution, in units of the anatomy."""
    noise: float
    """Standard deviation, as a share of the brightest tissue (MR), or in units of 200 HU (CT)."""
    axes: tuple[int, int, int]
    """Direction of the three axes of the grid, against RAS."""


SCANNERS: Mapping[str, Scanner] = {
    "scanner_a": Scanner(0.05, 0.9, 900.0, 0.6, 0.026, (1, 1, 1)),
    "scanner_b": Scanner(0.12, 1.2, 180.0, 0.8, 0.034, (-1, -1, 1)),
    "scanner_c": Scanner(0.95, 0.8, 4000.0, 0.7, 0.034, (-1, -1, 1)),
    "scanner_d": Scanner(0.85, 1.1, 12000.0, 0.9, 0.030, (1, 1, 1)),
}

_T1 = dict(zip(TISSUES, (0.02, 0.90, 0.48, 0.12, 0.70, 0.25, 0.53, 0.25, 0.33, 0.08, 0.17), strict=True))
_T2 = dict(zip(TISSUES, (0.02, 0.70, 0.42, 0.10, 0.55, 0.75, 0.48, 0.72, 0.75, 0.08, -0.17), strict=True))
_PLAIN = dict(zip(TISSUES, (-1000.0, -100.0, 50.0, 450.0, 180.0, 50.0, 57.0, -10.0, 10.0, 22.0, 50.0), strict=True))
_AGENT = dict(zip(TISSUES, (-1000.0, -100.0, 60.0, 450.0, 180.0, 200.0, 85.0, 150.0, 20.0, 25.0, 58.0), strict=True))


def draw_scan(
    anatomy: Anatomy,
    random: np.random.Generator,
    *,
    scanner: str,
    modality: str,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> PhantomScan:
    """Scan a patient once.

    Args:
        anatomy: the patient.
        random: draws pose, field of view, contrast and noise.
        scanner: one of ``SCANNERS``.
        modality: ``mr`` or ``ct``.
        shape: voxels of the largest field of view; a scan has 80 to 100 % of them along each axis.
        spacing: millimetres.
    """
    machine = SCANNERS[scanner]
    unit = min(n * mm / fov for n, mm, fov in zip(shape, spacing, REFERENCE_FOV, strict=True))
    seen = np.array([math.ceil(n * random.uniform(0.8, 1.0)) for n in shape])
    step, half = np.array(spacing), seen * spacing / 2

    turn = rotation(*np.deg2rad(random.uniform([-12, -12, -25], [12, 12, 25])))
    shift = unit * random.uniform(-5, 5, 3)
    # The organ stays in view, though the field of view may cut it.
    middle = turn @ anatomy.organ.centre * unit + shift
    room = np.maximum(half - 0.8 * unit * anatomy.reach, 0)
    shift += np.clip(middle, -room, room) - middle

    affine = np.diag([*(step * machine.axes), 1.0])
    table = random.uniform(-30, 30, 3).round(1)
    affine[:3, 3] = table - affine[:3, :3] @ ((seen - 1) / 2)
    pose = np.eye(4)
    pose[:3, :3] = turn.T
    pose[:3, 3] = -turn.T @ (table + shift)

    points = _points(pose @ affine / unit, seen)
    # A voxel averages over its own size too, about a third of it as a standard deviation.
    voxel = float(np.cbrt(step.prod())) / unit
    blur = math.hypot(machine.blur, 0.3 * voxel)
    weight = float(np.clip(machine.weight + random.normal(0, 0.06), 0, 1))
    first, second = (_T1, _T2) if modality == "mr" else (_PLAIN, _AGENT)
    values, mask = anatomy.paint(points, _mix(first, second, weight, random, modality), blur)
    finish = _mr if modality == "mr" else _ct
    columns: dict[str, int | float | str | None] = {"modality": modality.upper(), "scanner": scanner}
    return PhantomScan(finish(values, points, machine, random), mask, affine, pose, columns)


def _mix(first: Look, second: Look, weight: float, random: np.random.Generator, modality: str) -> dict[str, float]:
    jitter = dict(zip(TISSUES, random.normal(0, 1, len(TISSUES)), strict=True))
    size = 0.03 if modality == "mr" else 4.0
    still = ("air", "grain", "layer", "organ", "soft")
    look = {tissue: (1 - weight) * first[tissue] + weight * second[tissue] for tissue in TISSUES}
    look = {tissue: value + (0 if tissue in still else size * jitter[tissue]) for tissue, value in look.items()}
    if modality == "mr":
        # Layers never fade out altogether, whatever the weighting.
        look["layer"] = math.copysign(max(abs(look["layer"]), 0.10), look["layer"])
    return look


def _mr(values: Field, points: Field, machine: Scanner, random: np.random.Generator) -> NDArray[np.int16]:
    gamma = machine.gamma * math.exp(random.normal(0, 0.1))
    scale = machine.scale * math.exp(random.normal(0, 0.25))
    bias = Waves.draw(random, 3, 50.0, 120.0).at(points, 0.0)
    signal = np.clip(values, 0, 1.5) ** np.float32(gamma) * np.exp(np.float32(0.18) * bias)
    size = machine.noise * math.exp(random.normal(0, 0.2))
    # The magnitude of a complex signal with noise in both parts, which is Rician.
    signal = np.hypot(signal + _noise(random, values.shape, size), _noise(random, values.shape, size))
    return np.clip(np.rint(signal * np.float32(scale)), 0, 32767).astype(np.int16)


def _ct(values: Field, points: Field, machine: Scanner, random: np.random.Generator) -> NDArray[np.int16]:
    size = 200 * machine.noise * math.exp(random.normal(0, 0.2))
    noise = _noise(random, values.shape, size)
    # Reconstruction correlates the noise of neighbours.
    noise[1:] = np.float32(0.8) * noise[1:] + np.float32(0.6) * noise[:-1]
    noise[:, 1:] = np.float32(0.8) * noise[:, 1:] + np.float32(0.6) * noise[:, :-1]
    return np.clip(np.rint(values + noise), -1024, 3071).astype(np.int16)


def _noise(random: np.random.Generator, shape: tuple[int, ...], size: float) -> Field:
    return random.standard_normal(shape, dtype=np.float32) * np.float32(size)


def _points(matrix: Any, shape: NDArray[np.int64]) -> Field:
    """Where the voxels of a grid lie, (3, X, Y, Z), by the matrix (4, 4) that takes their indices there."""
    x, y, z = (np.arange(n, dtype=np.float64) for n in shape)
    rows = [
        (row[0] * x)[:, None, None] + (row[1] * y)[None, :, None] + (row[2] * z + row[3])[None, None, :]
        for row in matrix[:3]
    ]
    return np.stack(rows).astype(np.float32)
