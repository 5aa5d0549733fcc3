"""A digest of voxels that is the same in any file type, compression, byte order and order of axes.

A volume is seen in canonical orientation: each axis is the one of right, anterior, superior that it lies closest to,
and runs that way. The digest is multilinear: voxel (x, y, z), as the bits of its float32 value, is weighed by ``a[x]
b[y] c[z]`` with pseudo-random 64-bit weights, and the sum is taken modulo 2**64, twice over. So it can be taken piece
by piece, in the order in which a file stores its voxels, in the memory of one piece. It finds copies, nothing else: it
is no seal against someone who wants two volumes to look alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

_LANES = 2
_MIX = np.uint64(0x9E3779B97F4A7C15)


class ContentDigest:
    """Takes the rows of a volume in order, x fastest, then y, then z.

    Args:
        shape: voxels along the three stored axes.
        affine: (4, 4) voxel index to millimetres, RAS+.
    """

    def __init__(self, shape: Sequence[int], affine: NDArray[np.float64]) -> None:
        axes = _orientation(affine)
        self._weights = [
            _weights(int(axis), length, bool(flip < 0)) for length, (axis, flip) in zip(shape, axes, strict=True)
        ]
        self._columns = shape[1]
        self._row = 0
        self._sum = np.zeros(_LANES, np.uint64)
        canonical = [0, 0, 0]
        for length, (axis, _) in zip(shape, axes, strict=True):
            canonical[int(axis)] = int(length)
        self._shape = canonical

    def update(self, rows: NDArray[np.generic], scaling: tuple[float, float] = (1.0, 0.0)) -> None:
        """Take the next rows.

        Args:
            rows: (R, X) as stored.
            scaling: slope and intercept, which make values of them.
        """
        number = np.arange(self._row, self._row + len(rows))
        self._row += len(rows)
        if scaling == (1.0, 0.0):
            some = rows.any(axis=1)  # 0 weighs nothing, and most of a mask is background
            if not some.all():
                rows, number = rows[some], number[some]
            values = rows.astype(np.float32)
        else:
            values = (rows.astype(np.float64) * scaling[0] + scaling[1]).astype(np.float32)
        bits = (values + np.float32(0)).view(np.uint32).astype(np.uint64)  # -0 is 0
        bits *= _MIX
        bits ^= bits >> np.uint64(29)
        across, along = self._weights[1][number % self._columns], self._weights[2][number // self._columns]
        self._sum += (bits @ self._weights[0] * across * along).sum(axis=0)

    def skip(self, rows: int) -> None:
        """Take so many rows of zeros."""
        self._row += rows

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(f"{self._shape} {self._sum.tolist()}".encode()).hexdigest()


def content_of(voxels: NDArray[np.generic], affine: NDArray[np.float64]) -> str:
    """The digest of a whole volume.

    Args:
        voxels: (X, Y, Z).
        affine: (4, 4), RAS+.
    """
    digest = ContentDigest(voxels.shape, affine)
    for place in range(voxels.shape[2]):
        digest.update(np.ascontiguousarray(voxels[:, :, place].T))
    return digest.hexdigest()


def _orientation(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    axes: NDArray[np.float64] = io_orientation(affine)
    return axes if np.isfinite(axes).all() else np.array([[0.0, 1], [1, 1], [2, 1]])


def _weights(axis: int, length: int, flipped: bool) -> NDArray[np.uint64]:
    """(length, lanes) splitmix64 of axis and index."""
    index = np.arange(length, dtype=np.uint64)[:, None] * np.uint64(8) + np.arange(_LANES, dtype=np.uint64)
    state = np.asarray((index + np.uint64(axis) * np.uint64(1 << 40) + np.uint64(1)) * _MIX, dtype=np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed[::-1] if flipped else mixed
