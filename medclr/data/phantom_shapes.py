"""Shapes and textures as functions of space, which any scan can evaluate on its own grid without resampling.

Points are float32 arrays (3, X, Y, Z). A shape gives the distance to its surface, negative inside; where the surface
is curved, or the shape deformed, the distance is approximate, and it is exact in its sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Lump:
    """An ellipsoid whose radius varies with direction by harmonics of degree 2 and 3.

    Args:
        centre: (3,).
        turn: (3, 3) rotation whose rows are the ellipsoid's axes.
        semi: (3,) semi-axes.
        wobble: (7,) strength of each harmonic, as a share of the radius; None for a plain ellipsoid.
    """

    centre: Matrix
    turn: Matrix
    semi: Matrix
    wobble: Matrix | None = None

    def distance(self, points: Field) -> Field:
        """Distance to the surface, (X, Y, Z), in the units of the points."""
        x, y, z = (_along(axis / size, points, self.centre) for axis, size in zip(self.turn, self.semi, strict=True))
        radius = np.sqrt(x * x + y * y + z * z) + np.float32(1e-4)
        surface: Field | float = 1.0
        if self.wobble is not None:
            u, v, w = x / radius, y / radius, z / radius
            harmonics = (u * v, v * w, w * u, u * u - v * v, 3 * w * w - 1, u * v * w, u * (u * u - 3 * v * v))
            surface = 1 + sum(np.float32(size) * form for size, form in zip(self.wobble, harmonics, strict=True))
        # The gradient of the radius turns a difference of radii into a length.
        a, b, c = (np.float32(1 / size) for size in self.semi)
        slope = np.sqrt((x * a) ** 2 + (y * b) ** 2 + (z * c) ** 2) + np.float32(1e-6)
        return np.asarray((radius - surface) * radius / slope, dtype=np.float32)


@dataclass(frozen=True)
class Tube:
    """A winding tube.

    Args:
        centre: (3,).
        turn: (3, 3) rotation; its last row is the direction in which the tube runs.
        radius: of the tube.
        swing: how far it swings from its axis, along the other two rows.
        wavelength: of the swing.
        phase: of the swing, in radians.
        reach: half its length.
    """

    centre: Matrix
    turn: Matrix
    radius: float
    swing: float = 0.0
    wavelength: float = 1.0
    phase: float = 0.0
    reach: float = float("inf")

    def along(self, points: Field) -> Field:
        """Position along the direction of the tube, (X, Y, Z)."""
        return _along(self.turn[2], points, self.centre)

    def distance(self, points: Field) -> Field:
        """Distance to the surface, (X, Y, Z), in the units of the points."""
        u, v, w = (_along(axis, points, self.centre) for axis in self.turn)
        if self.swing:
            angle = w * np.float32(2 * np.pi / self.wavelength) + np.float32(self.phase)
            u = u - np.float32(self.swing) * np.sin(angle)
            v = v - np.float32(self.swing) * np.cos(np.float32(0.7) * angle)
        distance = np.sqrt(u * u + v * v) - np.float32(self.radius)
        if np.isfinite(self.reach):
            distance = np.maximum(distance, np.abs(w) - np.float32(self.reach))
        return distance


@dataclass(frozen=True)
class Waves:
    """A random texture: a sum of plane waves of random direction, with mean 0 and standard deviation 1.

    Args:
        numbers: (K, 3) wave vectors, radians per unit.
        phases: (K,) radians.
    """

    numbers: Matrix
    phases: Matrix

    @classmethod
    def draw(cls, random: np.random.Generator, count: int, shortest: float, longest: float) -> Waves:
        """Draw ``count`` waves, with wavelengths between two limits, evenly in their logarithm."""
        direction = random.standard_normal((count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        lengths = np.exp(random.uniform(np.log(shortest), np.log(longest), (count, 1)))
        return cls(2 * np.pi * direction / lengths, random.uniform(0, 2 * np.pi, count))

    def at(self, points: Field, blur: float) -> Field:
        """The texture (X, Y, Z) as a scanner sees it whose resolution is a Gaussian of standard deviation ``blur``."""
        total = np.zeros(points.shape[1:], np.float32)
        for number, phase in zip(self.numbers, self.phases, strict=True):
            strength = np.sqrt(2 / len(self.phases)) * damping(float(np.linalg.norm(number)), blur)
            if strength > 1e-3:
                angle = _along(number, points, np.zeros(3)) + np.float32(phase)
                total += np.float32(strength) * np.cos(angle)
        return total


def damping(number: float, blur: float) -> float:
    """What a Gaussian blur leaves of a wave, given its wave number in radians per unit."""
    return float(np.exp(-0.5 * (number * blur) ** 2))


def inside(distance: Field, blur: float) -> Field:
    """How far each voxel (X, Y, Z) lies inside a shape, 0 to 1, with an edge as wide as the resolution."""
    return np.clip(np.float32(0.5) - distance * np.float32(0.4 / blur), 0, 1)


def rotation(x: float, y: float, z: float) -> Matrix:
    """Rotation by angles in radians about the first, then the second, then the third axis, (3, 3)."""
    matrix = np.eye(3)
    for axis, angle in enumerate((x, y, z)):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[one, one] = step[other, other] = np.cos(angle)
        step[other, one], step[one, other] = np.sin(angle), -np.sin(angle)
        matrix = step @ matrix
    return matrix


def any_rotation(random: np.random.Generator) -> Matrix:
    """A rotation (3, 3) to any direction."""
    low, high = random.uniform(0, 2 * np.pi, 2)
    return rotation(low, float(np.arcsin(random.uniform(-1, 1))), high)


def _along(axis: Matrix, points: Field, centre: Matrix) -> Field:
    """The coordinate of the points along an axis; written out, so that no number of threads changes its rounding."""
    a, b, c = (np.float32(part) for part in axis)
    return a * points[0] + b * points[1] + c * points[2] - np.float32(axis @ centre)
