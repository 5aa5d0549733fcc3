"""NIfTI files as a source of scans: which files are volumes, and whether one can be used.

A file is streamed once, in pieces, so that a check needs no more memory than one piece.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

import nibabel
import numpy as np
from nibabel.imageglobals import LoggingOutputSuppressor
from numpy.typing import NDArray

from medclr.data.index_content import ContentDigest
from medclr.data.index_gzip import GzipStream
from medclr.errors import ScanError

SUFFIXES = (".nii", ".nii.gz")
VOLUME_SUFFIXES = (*SUFFIXES, ".nrrd", ".nhdr", ".mha", ".mhd")
"""Of all files that hold one volume each."""

MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0
"""Voxel spacing outside these limits is taken for a mistake in the header."""

_PIECE = 1 << 18
_ZEROS = bytes(_PIECE)
_NAME_FIELDS = ("db_name", "descrip", "aux_file")


class Probe(NamedTuple):
    """What a usable volume is like."""

    shape: tuple[int, ...]
    """Voxels along the three axes."""
    affine: NDArray[np.float64]
    """(4, 4); voxel index to millimetres."""
    spacing: tuple[float, float, float]
    """Millimetres along the three axes."""
    dtype: str
    """Voxel type as stored."""
    digest: str
    """Of the voxels, the same in any file type (:mod:`medclr.data.index_content`); empty where they were not read."""

    names: tuple[str, ...] = ()
    """What the header holds where programs put a patient's name; never shown."""

    def to_json(self) -> str:
        """Text that :meth:`from_json` takes."""
        return json.dumps([self.shape, self.affine.tolist(), self.spacing, self.dtype, self.digest, self.names])

    @classmethod
    def from_json(cls, text: str) -> Probe:
        """The probe of a text."""
        shape, affine, spacing, dtype, digest, names = json.loads(text)
        return cls(tuple(shape), np.array(affine), tuple(spacing), dtype, digest, tuple(names))


def stem_of(path: str) -> str:
    """A file name without its folder and volume suffix."""
    name = path.rsplit("/", 1)[-1]
    suffix = next(
        (suffix for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)), ""
    )
    return name[: len(name) - len(suffix)]


def find_nifti(files: Iterable[str]) -> list[str]:
    """The files that claim to be NIfTI volumes by their name."""
    return [file for file in files if file.lower().endswith(SUFFIXES)]


def probe_nifti(path: Path, *, check_voxels: bool = True, is_label: bool = False) -> Probe:
    """Check one file.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        check_voxels: read every voxel once, for constants, NaN and the digest. Without it the size alone is checked.
        is_label: a segmentation; it may be constant.

    Raises:
        ScanError: the file is no NIfTI image, is cut short or too long, is not one 3D volume of real numbers, has an
            unusable spacing or affine, is constant, or holds NaN or infinity.
    """
    try:
        image = _load_header(path)
        probe, size, offset, dtype = _read_header(image)
        if not check_voxels:
            _check_size(path, offset + size)
            return probe
        scaling = (float(image.dataobj.slope), float(image.dataobj.inter))
        return probe._replace(digest=_read_voxels(path, offset, size, dtype, scaling, probe, is_label))
    except ScanError:
        raise
    except Exception as error:  # a damaged file can fail in any way inside the reader; none may end the run
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ScanError(
            "The file is no readable NIfTI image.",
            got=text.replace(str(path), "it").replace(path.name, "it"),  # a name may be a patient's
            wanted="a NIfTI image (.nii, or .nii.gz compressed with gzip)",
            fix="Obtain the file again, or convert it anew.",
        ) from error


def _load_header(path: Path) -> nibabel.Nifti1Image:
    with LoggingOutputSuppressor():
        image = nibabel.load(path)
        with _open(path) as stream:
            kind = type(image.header)
            raw = kind(stream.read(kind.template_dtype.itemsize), check=False)  # without what follows the header
    # nibabel turns a spacing of 0 into 1, and a negative one positive; without an sform the affine is made of it.
    spacing = raw["pixdim"][1:4]
    if int(raw["sform_code"]) <= 0 and not (np.isfinite(spacing) & (spacing > 0)).all():
        raise _bad_spacing(spacing.tolist())
    return image


def _read_header(image: nibabel.Nifti1Image) -> tuple[Probe, int, int, np.dtype[np.generic]]:
    full = tuple(int(length) for length in image.shape)
    shape = full
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if min(shape, default=0) < 1:
        raise _unusable("The image has no voxels.", f"shape {full}", "at least two voxels along each of three axes")
    if len(shape) < 3 or (len(shape) == 3 and min(shape) == 1):
        raise _unusable("The image is 2D.", f"shape {full}", "three axes of two voxels or more")
    if len(shape) > 3:
        raise _unusable("The image has more than three axes.", f"shape {full}", "one 3D volume a file")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise _unusable("The voxels are no real numbers.", f"type {dtype}", "whole or floating-point numbers")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise _unusable("The affine holds NaN or infinity.", affine[:3].tolist(), "finite numbers")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not ((lengths >= MIN_SPACING_MM) & (lengths <= MAX_SPACING_MM)).all():
        raise _bad_spacing(lengths.tolist())
    # The determinant of the unit axes is 1 for a right-angled grid and 0 where two axes fall together.
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise _unusable("The affine cannot be inverted.", affine[:3].tolist(), "three independent axes")
    spacing = (float(lengths[0]), float(lengths[1]), float(lengths[2]))
    size = math.prod(full) * dtype.itemsize
    return Probe(shape, affine, spacing, _name(dtype), "", _names(image)), size, int(image.dataobj.offset), dtype


def _names(image: nibabel.Nifti1Image) -> tuple[str, ...]:
    """The fields in which a name may stand: Analyze's ``db_name``, and a description with DICOM's ``^`` in it."""
    texts = [bytes(image.header[key].tobytes()).decode("latin-1").strip(" \0") for key in _NAME_FIELDS]
    return tuple(
        text for key, text in zip(_NAME_FIELDS, texts, strict=True) if text and (key == "db_name" or "^" in text)
    )


def _read_voxels(
    path: Path,
    offset: int,
    size: int,
    dtype: np.dtype[np.generic],
    scaling: tuple[float, float],
    probe: Probe,
    is_label: bool,
) -> str:
    content = ContentDigest(probe.shape, probe.affine)
    row = probe.shape[0]
    step = max(_PIECE // (row * dtype.itemsize), 1) * row * dtype.itemsize
    first: NDArray[np.generic] | None = None
    constant, bad, read = True, 0, 0
    with _open(path) as stream:
        try:
            stream.seek(offset)
            while piece := stream.read(min(step, size - read)):
                read += len(piece)
                voxels = np.frombuffer(piece, dtype, count=len(piece) // dtype.itemsize)
                if first is None and len(voxels):
                    first = voxels[:1]
                if scaling == (1.0, 0.0) and len(voxels) % row == 0 and piece == _ZEROS[: len(piece)]:
                    constant = constant and not voxels[0] and not first[0]  # type: ignore[index]
                    content.skip(len(voxels) // row)  # most of a mask is background
                    continue
                constant = constant and bool((voxels == first).all())
                if dtype.kind == "f":
                    bad += int(np.count_nonzero(~np.isfinite(voxels)))
                if len(voxels) % row == 0:
                    with np.errstate(all="ignore"):
                        content.update(voxels.reshape(-1, row), scaling)
            surplus = len(stream.read(_PIECE))  # reading past the end also verifies gzip's checksum
        except EOFError as error:
            raise _cut_short("a compressed stream that breaks off", offset + size) from error
    if read < size:
        raise _cut_short(f"{offset + read} bytes", offset + size)
    if surplus == _PIECE:
        raise _too_long(f"at least {offset + size + surplus}", offset + size)
    if bad:
        problem = "The image holds NaN or infinity."
        raise _unusable(problem, f"{bad} of {math.prod(probe.shape)} voxels", "finite numbers")
    if constant and not is_label:
        raise _unusable("The image is constant.", "one value in every voxel", "at least two values")
    return content.hexdigest()


def _check_size(path: Path, wanted: int) -> None:
    """Compare sizes without decompressing, except where gzip's own record of the size does not match."""
    if not path.name.lower().endswith(".gz"):
        got = path.stat().st_size
    else:
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            got = int.from_bytes(file.read(4), "little")
        if got == wanted % 2**32:  # the record is modulo 2**32
            return
        got = 0
        with _open(path) as stream:
            try:
                while (piece := stream.read(_PIECE)) and got <= wanted + _PIECE:
                    got += len(piece)
            except EOFError as error:
                raise _cut_short("a compressed stream that breaks off", wanted) from error
    if got < wanted:
        raise _cut_short(f"{got} bytes", wanted)
    if got >= wanted + _PIECE:
        raise _too_long(f"at least {got}", wanted)


def _open(path: Path) -> IO[bytes] | GzipStream:
    return GzipStream(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _name(dtype: np.dtype[np.generic]) -> str:
    return dtype.newbyteorder("=").name


def _unusable(problem: str, got: object, wanted: str) -> ScanError:
    return ScanError(problem, got=got, wanted=wanted, fix="Repair the file, or leave it out.")


def _bad_spacing(lengths: list[float]) -> ScanError:
    wanted = f"{MIN_SPACING_MM} to {MAX_SPACING_MM} mm along each axis"
    return _unusable("The voxel spacing is absurd.", f"{lengths} mm", wanted)


def _cut_short(got: str, wanted: int) -> ScanError:
    problem = "The file is cut short."
    return ScanError(problem, got=got, wanted=f"{wanted} bytes by its header", fix="Obtain the file again.")


def _too_long(got: str, wanted: int) -> ScanError:
    problem = "The file is longer than its header says."
    return ScanError(problem, got=f"{got} bytes", wanted=f"{wanted} bytes", fix="Convert the file anew.")
