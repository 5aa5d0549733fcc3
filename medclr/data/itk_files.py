"""NRRD and MetaImage files through SimpleITK: which files are volumes, whether one can be used, and how it is loaded.

What the header says is read as text first, and held against the size of the file, so that a damaged one asks for no
absurd amount of memory. SimpleITK is imported by the functions that read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from monai.data.image_reader import ImageReader
from numpy.typing import NDArray

from medclr.data.index_content import content_of
from medclr.data.nifti import MAX_SPACING_MM, MIN_SPACING_MM, Probe
from medclr.errors import ConfigError, ScanError

ITK_SUFFIXES: Final = (".nrrd", ".nhdr", ".mha", ".mhd")
LARGEST_BYTES: Final = 1 << 30
"""Voxels of one file, after decompression."""
_MOST_INFLATION = 1100
"""Deflate makes a file at most 1032 times as large."""
_DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file\s*:)\s*(.*?)\s*$", re.IGNORECASE | re.MULTILINE)


def find_itk(files: Iterable[str]) -> list[str]:
    """The files that claim to be NRRD or MetaImage by their name."""
    return [file for file in files if file.lower().endswith(ITK_SUFFIXES)]


def probe_itk(path: Path, *, check_voxels: bool = True, is_label: bool = False) -> Probe:
    """Check one file, as :func:`medclr.data.nifti.probe_nifti` does.

    Args:
        path: the header, or the file that holds header and voxels.
        check_voxels: read every voxel once; without it the header alone is looked at.
        is_label: a segmentation; it may be constant.

    Raises:
        ScanError: it cannot be used.
    """
    reader = _reader(path)
    kind, shape = reader.GetPixelID(), reader.GetSize()
    name = np.dtype(_dtype(kind)).name
    affine = _affine(reader)
    spacing = tuple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    probe = Probe(tuple(shape[:3]), affine, (spacing[0], spacing[1], spacing[2]), name, "")
    if not check_voxels:
        return probe
    voxels, affine = _load(reader)
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise _unusable("The image holds NaN or infinity.", "voxels that are no numbers", "finite numbers")
    if not is_label and (voxels == voxels.flat[0]).all():
        raise _unusable("The image is constant.", "one value in every voxel", "at least two values")
    return probe._replace(digest=content_of(voxels, affine))


class SimpleITKReader(ImageReader):
    """MONAI reader of NRRD and MetaImage: voxels (X, Y, Z), affine in RAS+, and nothing of the header's text.

    Raises:
        ScanError: the file cannot be used.
        ConfigError: SimpleITK is not installed.
    """

    def verify_suffix(self, filename: Sequence[str | Path] | str | Path) -> bool:
        """Whether the name, or each of several, ends like a file of these types."""
        names = [filename] if isinstance(filename, str | Path) else filename
        return all(str(name).lower().endswith(ITK_SUFFIXES) for name in names)

    def read(self, data: Sequence[str | Path] | str | Path, **_: Any) -> Any:
        """The opened file, or a list of them."""
        if isinstance(data, str | Path):
            return _reader(Path(data))
        return [_reader(Path(name)) for name in data]

    def get_data(self, img: Any) -> tuple[NDArray[Any], dict[str, Any]]:
        """Voxels (X, Y, Z), and ``affine``, ``original_affine``, ``space``, ``spatial_shape``, and no channel axis."""
        readers = img if isinstance(img, list) else [img]
        loaded = [_load(reader) for reader in readers]
        voxels, affine = loaded[0]
        if len(loaded) > 1:
            voxels = np.stack([array for array, _ in loaded])
        channel = "no_channel" if len(loaded) == 1 else 0
        return voxels, {
            "affine": affine,
            "original_affine": affine.copy(),
            "space": "RAS",
            "spatial_shape": np.asarray(loaded[0][0].shape),
            "original_channel_dim": float("nan") if channel == "no_channel" else channel,
        }


def _reader(path: Path) -> Any:
    """SimpleITK's reader, the header read and found usable."""
    sitk = _simpleitk()
    size = _stored_bytes(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable() from error
    shape = tuple(reader.GetSize())
    if len(shape) > 3 and set(shape[3:]) == {1}:
        shape = shape[:3]
    if len(shape) > 3:
        raise _unusable("The image has more than three axes.", f"shape {shape}", "one 3D volume a file")
    if len(shape) < 3 or min(shape) < 2:
        raise _unusable("The image is 2D.", f"shape {shape}", "three axes of two voxels or more")
    if reader.GetNumberOfComponents() != 1 or _dtype(reader.GetPixelID()) is None:
        raise _unusable("The voxels are no real numbers.", "colours, vectors or complex numbers", "one number a voxel")
    wanted = math.prod(shape) * np.dtype(_dtype(reader.GetPixelID())).itemsize
    if wanted > LARGEST_BYTES or wanted > size * _MOST_INFLATION:
        got = f"{wanted} bytes of voxels by its header, {size} bytes in the file"
        raise _unusable(
            "The size in the header is absurd.", got, f"what the file can hold, up to {LARGEST_BYTES} bytes"
        )
    affine = _affine(reader)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and ((lengths >= MIN_SPACING_MM) & (lengths <= MAX_SPACING_MM)).all()):
        wanted_mm = f"{MIN_SPACING_MM} to {MAX_SPACING_MM} mm along each axis"
        raise _unusable("The voxel spacing is absurd.", f"{lengths.tolist()} mm", wanted_mm)
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise _unusable("The affine cannot be inverted.", affine[:3].tolist(), "three independent axes")
    return reader


def _load(reader: Any) -> tuple[NDArray[Any], NDArray[np.float64]]:
    sitk = _simpleitk()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _unreadable() from error
    voxels: NDArray[Any] = sitk.GetArrayFromImage(image).T
    return voxels.reshape(voxels.shape[:3]), _affine(reader)


def _stored_bytes(path: Path) -> int:
    """Size of the file that holds the voxels, which must lie beside its header.

    Raises:
        ScanError: it does not, or there is none.
    """
    try:
        size = path.stat().st_size
        if not path.name.lower().endswith((".mhd", ".nhdr")):
            return size
        with path.open("rb") as file:
            found = _DATA_FILE.search(file.read(1 << 16))
        name = found[1].decode("utf-8", "replace") if found else ""
        if name.upper() == "LOCAL":
            return size
        if not name or "/" in name or "\\" in name or "%" in name or name.upper().startswith("LIST"):
            raise _unusable("The voxels lie in other places.", "a list or a path", "one file beside the header")
        return (path.parent / name).stat().st_size
    except OSError as error:
        fix = "Copy the file of the voxels beside its header."
        got = error.strerror or "an error"
        raise ScanError("The file of the voxels cannot be read.", got=got, wanted="a file", fix=fix) from error


def _affine(reader: Any) -> NDArray[np.float64]:
    """(4, 4) in RAS+, from ITK's LPS+."""
    axes = int(reader.GetDimension())
    matrix = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3] * np.array(reader.GetSpacing())[:3]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, np.array(reader.GetOrigin())[:3]
    return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _dtype(kind: int) -> str | None:
    sitk = _simpleitk()
    names = ("UInt8", "Int8", "UInt16", "Int16", "UInt32", "Int32", "UInt64", "Int64", "Float32", "Float64")
    return next((name.lower() for name in names if getattr(sitk, f"sitk{name}") == kind), None)


def _simpleitk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise ConfigError(
            "SimpleITK is not installed.",
            got="an NRRD or MetaImage file",
            wanted="the package SimpleITK",
            fix="pip install SimpleITK, or convert the files to NIfTI.",
        ) from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _unreadable() -> ScanError:
    fix = "Obtain the file again, or convert it anew."
    problem = "The file is no readable NRRD or MetaImage file."
    return ScanError(problem, got="an error of SimpleITK", wanted="a whole file of that type", fix=fix)


def _unusable(problem: str, got: object, wanted: str) -> ScanError:
    return ScanError(problem, got=got, wanted=wanted, fix="Repair the file, or leave it out.")
