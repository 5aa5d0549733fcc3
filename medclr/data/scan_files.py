"""One file becomes one volume, by the reader of its type, with its place in space and nothing else of its header."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from monai.data import MetaTensor
from monai.data.image_reader import ImageReader, NibabelReader
from monai.transforms import EnsureChannelFirst, LoadImage
from monai.transforms.io.array import switch_endianness
from monai.utils import convert_to_dst_type

from medclr.data.privacy import locate
from medclr.data.rows import SERIES_SUFFIX
from medclr.errors import ConfigError, MedclrError, ScanError

FILE_NAME: Final = "filename_or_obj"
"""MONAI's key of the path, from which outputs take their names."""
KEPT: Final = ("affine", "original_affine", "spatial_shape", "space", "original_channel_dim")
"""What is kept of what a reader tells. Headers hold free text too, in NIfTI even whole DICOM headers."""

_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")


class ScanFiles:
    """Reads files as MONAI's ``LoadImage`` does, which would write their paths and headers to logs and metadata.

    References in a path (:mod:`medclr.data.privacy`) are resolved here, and nowhere before: the metadata and all errors
    have the path as it was given.

    Args:
        reader: a MONAI image reader, or the name of one, for all files. By default the type of a file says which:
            ``DicomVolumeReader`` for series files, ``SimpleITKReader`` for NRRD and MetaImage, ``NibabelReader`` else.

    Raises:
        ConfigError: at construction, for an unusable reader; when called, for a reference that cannot be resolved.
        ScanError: when called, for a file that cannot be read.
    """

    def __init__(self, reader: ImageReader | str | None = None) -> None:
        self._given = None if reader is None else _monai_reader(reader)
        self._readers: dict[str, ImageReader] = {}

    def __call__(self, path: str | os.PathLike[str]) -> MetaTensor:
        """The volume (1, X, Y, Z) float32 of a file; more or other axes where the file has such."""
        refusal: MedclrError
        try:
            return self._read(path)
        except MedclrError as error:
            refusal = error
        except Exception as error:  # readers raise many kinds, and their texts hold paths, which may hold names
            refusal = ScanError(
                "A file cannot be read as an image.",
                got=type(error).__name__,
                wanted="a complete file of a known type",
                fix="Copy or convert the file again.",
            )
        refusal.__cause__ = refusal.__context__ = None  # their texts hold the real path
        raise refusal

    def _read(self, path: str | os.PathLike[str]) -> MetaTensor:
        name = os.fspath(path)
        reader = self._given or self._reader_of(name)
        voxels, meta = reader.get_data(reader.read(locate(name)))
        voxels = convert_to_dst_type(voxels, dst=voxels, dtype=np.float32)[0]
        meta = switch_endianness(_kept(meta), "<") | {FILE_NAME: name}
        image = MetaTensor.ensure_torch_and_prune_meta(voxels, meta)
        return EnsureChannelFirst()(image, meta_dict=meta)

    def _reader_of(self, name: str) -> ImageReader:
        kind, make = _kind_of(name.lower())
        if kind not in self._readers:
            self._readers[kind] = make()
        return self._readers[kind]


def _kind_of(name: str) -> tuple[str, Callable[[], ImageReader]]:
    if name.endswith(SERIES_SUFFIX):
        return "dicom", _dicom
    if name.endswith(_ITK):
        return "itk", _itk
    return "nifti", NibabelReader


def _dicom() -> ImageReader:
    from medclr.data.dicom_volume import DicomVolumeReader  # with its codecs, which few runs need

    return DicomVolumeReader()


def _itk() -> ImageReader:
    from medclr.data.itk_files import SimpleITKReader

    return SimpleITKReader()


def _monai_reader(reader: ImageReader | str) -> ImageReader:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells of optional codecs that are not installed
            made: ImageReader = LoadImage(reader=reader).readers[-1]
    except Exception as error:  # an unknown name, or a reader whose package is not installed
        raise ConfigError(
            "The reader is unusable.",
            got=reader,
            wanted="an image reader of MONAI, its name, or null",
            fix="For example reader: NibabelReader.",
        ) from error
    return made


def _kept(meta: Mapping[Any, Any]) -> dict[str, Any]:
    kept = {key: meta[key] for key in KEPT if key in meta}
    if str(kept.get("space")) not in ("RAS", "LPS"):
        kept.pop("space", None)
    if isinstance(kept.get("original_channel_dim"), str) and kept["original_channel_dim"] != "no_channel":
        del kept["original_channel_dim"]
    return kept
