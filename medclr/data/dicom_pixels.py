"""The pixels of a DICOM file, frame by frame: native ones straight from the file, compressed ones by a decoder.

pydicom finds a decoder among those that are installed; SimpleITK's GDCM takes the rest.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from medclr.data.dicom_bounds import cut_short, quiet, refused
from medclr.data.dicom_header import FLOAT_PIXELS, DicomHeader
from medclr.data.dicom_parse import BIG_ENDIAN
from medclr.errors import ScanError

MOST_PIXELS: Final = 1 << 26
"""Of one compressed frame."""
_RLE = "1.2.840.10008.1.2.5"
_JPEG = {f"1.2.840.10008.1.2.4.{last}" for last in (50, 51, 57, 70)}
_J2K = {f"1.2.840.10008.1.2.4.{last}" for last in (90, 91, 201, 202, 203)}
_JPEG_LS = {f"1.2.840.10008.1.2.4.{last}" for last in (80, 81)}


class Pixels:
    """The frames of one file.

    Args:
        path: the file.
        header: what :func:`medclr.data.dicom_header.read_header` found.
        inflated: the data set, where the file holds it deflated.

    Raises:
        ScanError: the pixels are damaged, cut short, or compressed in a way that nothing installed can decode.
    """

    def __init__(self, path: Path, header: DicomHeader, inflated: bytes | None) -> None:
        self.path, self.header, self.inflated = path, header, inflated
        self.frames: list[bytes] | None = None
        if header.pixels is not None and header.pixels.encapsulated:
            self.frames = self._fragments()

    def frame(self, place: int) -> NDArray[Any]:
        """(rows, columns) stored values of a frame, counted from 0; not rescaled."""
        header = self.header
        try:
            with quiet():
                stored = self._decoded(place) if self.frames is not None else self._native(place)
        except ScanError:
            raise
        except Exception as error:  # decoders fail in any way on damaged streams
            got = f"{type(error).__name__} while decoding"
            raise refused("The pixel data is damaged.", got, "pixels that can be decoded") from None
        if stored.shape != (header.rows, header.columns):
            raise refused("The pixel data contradicts the header.", f"a frame of {stored.shape}", "Rows x Columns")
        return stored

    def _read(self, start: int, length: int) -> bytes:
        if self.inflated is not None:
            data = self.inflated[start : start + length]
        else:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(length)
        if len(data) < length:
            raise cut_short(f"{len(data)} bytes of pixels", f"{length} bytes")
        return data

    def _native(self, place: int) -> NDArray[Any]:
        header = self.header
        assert header.pixels is not None
        count = header.rows * header.columns
        size = count * header.bits[0] // 8
        data = self._read(header.pixels.start + place * size, size)
        order = ">" if header.syntax == BIG_ENDIAN else "<"
        if header.pixels.tag in FLOAT_PIXELS:
            values = np.frombuffer(data, f"{order}f{header.bits[0] // 8}")
        else:
            values = _masked(np.frombuffer(data, f"{order}u{header.bits[0] // 8}"), header)
        return values.reshape(header.rows, header.columns)

    def _fragments(self) -> list[bytes]:
        header = self.header
        assert header.pixels is not None
        data = self._read(header.pixels.start, header.pixels.length)
        try:
            frames = list(generate_frames(data, number_of_frames=len(header.frames)))
        except Exception as error:
            got = f"{type(error).__name__} while finding the frames"
            raise refused("The pixel data is damaged.", got, "fragments of each frame") from None
        if len(frames) != len(header.frames):
            raise refused("The pixel data is damaged.", f"{len(frames)} frames", f"{len(header.frames)} frames")
        return frames

    def _decoded(self, place: int) -> NDArray[Any]:
        header, data = self.header, (self.frames or [])[place]
        if header.rows * header.columns > MOST_PIXELS:
            raise refused(
                "A compressed frame is absurdly large.", "its Rows and Columns", f"up to {MOST_PIXELS} pixels"
            )
        size = _stated_size(header.syntax, data)
        if size is not None and size != (header.rows, header.columns):
            raise refused("The pixel data contradicts the header.", f"a frame of {size}", "Rows x Columns")
        try:
            decoder = get_decoder(UID(header.syntax))
        except NotImplementedError:
            raise _no_decoder() from None
        if not decoder.is_available:
            return _by_gdcm(header, data)
        try:
            values = _by_pydicom(decoder, header, data)
        except Exception:
            if header.syntax not in _JPEG:
                raise
            return _by_gdcm(header, data)  # Pillow, which pydicom finds, decodes 8 bits alone
        return _masked(values.view(f"u{values.dtype.itemsize}"), header) if header.syntax == _RLE else values


def _by_pydicom(decoder: Any, header: DicomHeader, data: bytes) -> NDArray[Any]:
    allocated, stored, _ = header.bits
    values, _ = decoder.as_array(
        encapsulate([data]),
        index=0,
        raw=True,
        transfer_syntax_uid=UID(header.syntax),
        rows=header.rows,
        columns=header.columns,
        samples_per_pixel=1,
        photometric_interpretation=header.photometric or "MONOCHROME2",
        bits_allocated=allocated,
        bits_stored=stored,
        pixel_representation=int(header.signed),
        number_of_frames=1,
        pixel_keyword="PixelData",
    )
    return np.asarray(values)


def _masked(values: NDArray[Any], header: DicomHeader) -> NDArray[Any]:
    """Stored bits only, with their sign; other bits may hold overlays."""
    allocated, stored, high = header.bits
    kind = f"{'i' if header.signed else 'u'}{allocated // 8}"
    native = values.astype(f"u{allocated // 8}")
    if stored == allocated:
        return native.view(kind)
    return (native << (allocated - 1 - high)).view(kind) >> (allocated - stored)


def _by_gdcm(header: DicomHeader, data: bytes) -> NDArray[Any]:
    """Decode a frame with SimpleITK, which reads files only: one that holds nothing but the frame."""
    if header.syntax not in _JPEG | _J2K | _JPEG_LS:
        raise _no_decoder()
    import SimpleITK as sitk  # heavy, and needed for few files
    from pydicom.dataset import Dataset, FileMetaDataset

    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = "2.25.1"
    image.file_meta.TransferSyntaxUID = UID(header.syntax)
    image.Rows, image.Columns, image.SamplesPerPixel = header.rows, header.columns, 1
    image.BitsAllocated, image.BitsStored, image.HighBit = header.bits
    image.PixelRepresentation = int(header.signed)
    image.PhotometricInterpretation = header.photometric or "MONOCHROME2"
    image.PixelData = encapsulate([data])
    image["PixelData"].VR = "OB"
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        image.save_as(file, enforce_file_format=True)
        file.flush()
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(file.name)
        silent = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            values = sitk.GetArrayFromImage(reader.Execute())
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(silent)
    return values[0] if values.ndim == 3 else values


def _stated_size(syntax: str, data: bytes) -> tuple[int, int] | None:
    """Rows and columns by the compressed stream itself, so that no decoder makes room for an absurd size."""
    if syntax in _J2K:
        start = data.find(b"\xff\x4f\xff\x51", 0, 4096)
        if start < 0 or len(data) < start + 24:
            raise refused("The pixel data is damaged.", "no JPEG 2000 stream", "one for each frame")
        width, height, left, top = struct.unpack(">4I", data[start + 8 : start + 24])
        return height - top, width - left
    if syntax in _JPEG | _JPEG_LS:
        place = 2
        while place + 9 < len(data):
            if data[place] != 0xFF:
                break
            marker, length = data[place + 1], struct.unpack(">H", data[place + 2 : place + 4])[0]
            if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
                height, width = struct.unpack(">HH", data[place + 5 : place + 9])
                return height, width
            place += 2 + max(length, 2) if marker != 0xFF else 1
        raise refused("The pixel data is damaged.", "no JPEG stream", "one for each frame")
    return None


def _no_decoder() -> ScanError:
    return refused(
        "No decoder for the compressed pixels is installed.",
        "a transfer syntax that is rare or made for film",
        "native, deflated, RLE, JPEG, JPEG-LS or JPEG 2000",
        "Install a plugin of pydicom for it, or export the images uncompressed.",
    )


def rescaled(stored: NDArray[Any], slope: float | None, intercept: float | None, dtype: str) -> NDArray[Any]:
    """Values of a frame by its slope and intercept, as ``int16`` or ``float32``."""
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    if dtype == "int16":
        whole = stored.astype(np.int32) * int(slope) + int(intercept)
        return whole.astype(np.int16)
    if (slope, intercept) == (1.0, 0.0):
        return stored.astype(np.float32)
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32)


def tile(image: NDArray[Any], side: int, place: int) -> NDArray[Any]:
    """One tile of a mosaic (rows, columns)."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    row, column = divmod(place, side)
    return image[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
