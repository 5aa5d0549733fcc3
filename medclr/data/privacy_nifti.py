"""NIfTI files that hold voxels and their place in space, and not a word."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import ArrayLike, NDArray

from medclr.disk import replacing
from medclr.errors import DatalistError, ScanError


def export_nifti(volume: NDArray[Any], affine: ArrayLike, path: str | Path) -> None:
    """Write a volume as NIfTI, without free text (descrip, aux_file, db_name, intent_name) and without extensions.

    A compressed file has neither name nor time in its gzip header: the same voxels give the same bytes.

    Args:
        volume: (X, Y, Z) whole numbers of up to 32 bits, booleans, or floating-point numbers; their type stays
            (booleans become uint8, float16 becomes float32).
        affine: (4, 4), voxel index to RAS+ millimetres; written as sform and qform of code 1 (scanner).
        path: ends in ``.nii`` or ``.nii.gz``; folders are made.

    Raises:
        ScanError: the volume is not 3D, or of another type.
        DatalistError: the file cannot be written.
    """
    path = Path(path)
    kinds: dict[Any, Any] = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32}
    voxels = np.asarray(volume)
    voxels = voxels.astype(kinds.get(voxels.dtype, voxels.dtype.newbyteorder("=")), copy=False)
    if voxels.ndim != 3 or voxels.dtype.kind not in "iuf" or voxels.dtype in (np.int64, np.uint64, np.longdouble):
        raise ScanError(
            "A volume cannot be written as NIfTI.",
            got=f"shape {voxels.shape}, type {voxels.dtype}",
            wanted="three axes, and whole numbers of up to 32 bits or floating-point numbers",
            fix="Convert the voxels, for instance to float32.",
        )
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        wanted, fix = "a name that ends in .nii or .nii.gz", "Give such a name."
        raise DatalistError("A copy has no NIfTI name.", got=f"suffix {path.suffix!r}", wanted=wanted, fix=fix)
    matrix = np.asarray(affine, dtype=np.float64)
    image = nibabel.Nifti1Image(voxels, matrix)
    image.header.set_xyzt_units("mm")
    image.set_sform(matrix, code=1)
    image.set_qform(matrix, code=1, strip_shears=True)
    content = io.BytesIO()
    image.to_file_map({"image": nibabel.FileHolder(fileobj=content), "header": nibabel.FileHolder(fileobj=content)})
    try:
        with replacing(path) as file:
            if name.endswith(".gz"):
                with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as packed:
                    packed.write(content.getbuffer())
            else:
                file.write(content.getbuffer())
    except OSError as error:
        raise DatalistError(
            "A copy cannot be written.",
            got=error.strerror or type(error).__name__,
            wanted="a folder that you may write to, with space left",
            fix="Give another folder to --export-nifti.",
        ) from error
