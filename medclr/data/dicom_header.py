"""One DICOM file without its pixels: what later steps need to know of it, read in bounded time and memory."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

from medclr.data import dicom_frames, dicom_mosaic
from medclr.data.dicom_bounds import NotDicom, cut_short, open_bounded, refused
from medclr.data.dicom_frames import Frame, frames_of
from medclr.data.dicom_identity import IDENTITY, identity_of
from medclr.data.dicom_mosaic import Mosaic, is_mosaic, mosaic_of
from medclr.data.dicom_parse import MOST_FRAMES, Parsed, PixelData, parse  # fmt: skip
from medclr.errors import ScanError

__all__ = ["DicomHeader", "NotDicom", "read_header"]

DICOMDIR: Final = "1.2.840.10008.1.3.10"
FLOAT_PIXELS: Final = {0x7FE00008: 32, 0x7FE00009: 64}
_CODE = re.compile(r"[A-Z0-9_ .+-]{1,16}")
_MODALITY = re.compile(r"[A-Z]{2,8}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+/()-]{0,63}")
_PUBLIC: Final = sorted(
    {
        0x00080005, 0x00080016, 0x00080060, 0x00080070, 0x00081090, 0x00101010, 0x00100040, 0x00180020, 0x00089209,
        0x00189005, 0x00181120, 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011, 0x00280100, 0x00280101,
        0x00280102, 0x00280103, 0x00280120, *dicom_frames.WANTED, *dicom_mosaic.WANTED,
    }
)  # fmt: skip
WANTED: Final = sorted({*_PUBLIC, *IDENTITY})


@dataclass(frozen=True)
class DicomHeader:
    """A file's header. Private values are in ``identity`` and nowhere else; nothing prints them."""

    path: str
    """Relative to the indexed folder, with ``/``."""
    identity: dict[str, str]
    """Private values by keyword, as text."""
    age: float | None
    """Years."""
    sex: str | None
    """F, M or O."""
    modality: str
    sequence: str | None
    scanner: str | None
    sop_class: str
    syntax: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    samples: int
    photometric: str
    bits: tuple[int, int, int]
    """Allocated, stored, and the highest bit."""
    signed: bool
    pixels: PixelData | None
    tilt: float | None
    """Gantry tilt that the tags state, in degrees."""
    frames: tuple[Frame, ...]
    mosaic: Mosaic | None = None
    unusable: tuple[str, str, str] | None = None
    """Why the mosaic cannot be unfolded: problem, what was got, what was wanted."""

    def __repr__(self) -> str:
        return f"DicomHeader({self.modality}, {self.rows} x {self.columns}, {len(self.frames)} frames)"

    def to_json(self) -> str:
        """One line of JSON; :meth:`from_json` gives the same header."""
        content = asdict(self)
        plain = len(self.frames) > 1 and all(frame is self.frames[0] for frame in self.frames)
        content["frames"] = [(*frame[:6], dict(frame.keys)) for frame in (self.frames[:1] if plain else self.frames)]
        content["copies"] = len(self.frames) if plain else 1
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> DicomHeader:
        """The header that :meth:`to_json` wrote."""
        content: dict[str, Any] = json.loads(text)
        frames = tuple(Frame(*map(_tupled, values)) for values in content["frames"]) * content.pop("copies")
        for key in ("image_type", "bits", "unusable"):
            content[key] = _tupled(content[key])
        pixels, mosaic = content["pixels"], content["mosaic"]
        content["pixels"] = PixelData(*pixels) if pixels else None
        content["mosaic"] = Mosaic(*map(_tupled, mosaic)) if mosaic else None
        return cls(**{**content, "frames": frames})


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_header(path: Path, name: str) -> DicomHeader:
    """Read one file without its pixels, in under ten seconds and little memory.

    Args:
        path: the file, with or without the usual preamble and extension.
        name: what the header calls it: its path relative to the indexed folder.

    Raises:
        NotDicom: it is no DICOM file.
        ScanError: it is a DICOM file that is damaged, cut short, or holds no image.
    """
    return read_parsed(path, name)[0]


def read_parsed(path: Path, name: str, *, private: bool = True) -> tuple[DicomHeader, Parsed]:
    """As :func:`read_header`, with what was parsed; ``identity`` stays empty without ``private``, which is quicker."""
    file, size = open_bounded(path)
    with file:
        parsed = parse(file, size, WANTED if private else _PUBLIC)
        try:
            return _header(parsed, name, private), parsed
        except (NotDicom, ScanError):
            raise
        except RecursionError:
            raise refused("The header is damaged.", "sequences nested without end", "a readable header") from None
        except Exception as error:  # the same as in parse: what is lazily read may be damaged too
            raise refused("The header is damaged.", type(error).__name__, "a readable DICOM header") from None


def _header(parsed: Parsed, name: str, private: bool) -> DicomHeader:
    tags = parsed.tags
    sop_class = tags.text(0x00080016) or parsed.meta.text(0x00020002)
    if DICOMDIR in (sop_class, parsed.meta.text(0x00020002)):
        raise refused("The file is a DICOMDIR, not an image.", "a directory of files", "an image")
    rows, columns = tags.integer(0x00280010, "US"), tags.integer(0x00280011, "US")
    if parsed.pixels is None:
        if rows is None and not sop_class and parsed.meta.text(0x00020010) == "":
            raise NotDicom("no DICOM file")
        whole = "an image with pixel data"
        raise refused("The file holds no image.", "no pixel data: another kind of object, or a cut file", whole)
    if not rows or not columns:
        raise refused("The size of the image is not known.", "no Rows or no Columns", "both, above 0")
    frames = tags.integer(0x00280008, "IS")
    if 0x00280008 not in tags or tags.raw(0x00280008)[1].strip(b" \0") == b"":
        frames = 1
    if frames is None or not 1 <= frames <= MOST_FRAMES:
        raise refused("The number of frames is absurd.", "NumberOfFrames out of range", f"1 to {MOST_FRAMES}")
    samples = tags.integer(0x00280002, "US") or 1
    allocated = FLOAT_PIXELS.get(parsed.pixels.tag) or tags.integer(0x00280100, "US")
    if allocated not in (1, 8, 16, 32, 64):
        raise refused("The pixels' type is not known.", "an unusual BitsAllocated", "8, 16 or 32 bits")
    stored = tags.integer(0x00280101, "US") or allocated
    high = tags.integer(0x00280102, "US")
    high = stored - 1 if high is None else high
    if parsed.pixels.tag == 0x7FE00010 and (stored > allocated or high != stored - 1):
        got = "BitsStored and HighBit that do not fit BitsAllocated"
        raise refused("The pixels' type contradicts itself.", got, "HighBit = BitsStored - 1 < BitsAllocated")
    _check_length(parsed.pixels, rows * columns * samples * frames * allocated)
    image_type = tuple(code for code in tags.texts(0x00080008) if _CODE.fullmatch(code))
    photometric = tags.text(0x00280004)
    described = frames_of(parsed, frames)
    mosaic, unusable = None, None
    if frames == 1 and is_mosaic(list(image_type), tags):
        try:
            mosaic = mosaic_of(tags, described[0], rows, columns)
        except ScanError as error:
            unusable = (error.problem, str(error.got), str(error.wanted))
    identity = identity_of(tags) if private else {}
    return DicomHeader(
        name,
        identity,
        _age(tags.text(0x00101010), identity),
        tags.text(0x00100040).upper() if tags.text(0x00100040).upper() in ("F", "M", "O") else None,
        tags.text(0x00080060) if _MODALITY.fullmatch(tags.text(0x00080060)) else "",
        _sequence(parsed),
        _scanner(tags.text(0x00080070), tags.text(0x00081090)),
        sop_class if re.fullmatch(r"[\d.]{1,64}", sop_class) else "",
        parsed.syntax,
        image_type,
        rows,
        columns,
        samples,
        photometric if _CODE.fullmatch(photometric) else "",
        (allocated, stored, high),
        tags.integer(0x00280103, "US") == 1,
        parsed.pixels,
        tags.number(0x00181120),
        described,
        mosaic,
        unusable,
    )


def _check_length(pixels: PixelData, bits: int) -> None:
    """Native pixels fill their element; a few bytes of padding are let through, a wrong number of rows is not."""
    if pixels.encapsulated:
        return
    wanted = (bits + 7) // 8
    if pixels.length < wanted:
        raise cut_short(f"{pixels.length} bytes of pixels", f"{wanted} bytes by Rows, Columns and BitsAllocated")
    if pixels.length > wanted + 8:
        got = f"{pixels.length} bytes"
        raise refused("The pixel data is longer than the tags say.", got, f"{wanted} bytes by Rows and Columns")


def _sequence(parsed: Parsed) -> str | None:
    """The kind of an MR sequence, from coded tags alone, as in ``t1``, ``diffusion``, ``se`` or ``gr ir``."""
    tags = parsed.tags
    if tags.text(0x00080060) != "MR":
        return None
    contrast = tags.text(0x00089209)
    if contrast in {
        "T1",
        "T2",
        "T2_STAR",
        "PROTON_DENSITY",
        "DIFFUSION",
        "FLUID_ATTENUATED",
        "PERFUSION",
        "TOF",
        "STIR",
    }:
        return contrast.lower()
    kinds = [kind for kind in tags.texts(0x00180020) if kind in ("SE", "IR", "GR", "EP", "RM")]
    return " ".join(kinds).lower() or None


def _scanner(manufacturer: str, model: str) -> str | None:
    words = [" ".join(word.split()) for word in (manufacturer, model) if _WORD.fullmatch(word)]
    return " ".join(words).lower() or None


def _age(stated: str, identity: dict[str, str]) -> float | None:
    match = re.fullmatch(r"\s*(\d{1,3})([DWMY])\s*", stated)
    if match:
        years = int(match[1]) / {"D": 365.25, "W": 52.1775, "M": 12, "Y": 1}[match[2]]
        if years > 0:
            return years
    days = [_day(identity.get(key, "")) for key in ("PatientBirthDate", "StudyDate")]
    if days[0] and days[1] and 0 < (days[1] - days[0]).days < 130 * 366:
        return round((days[1] - days[0]).days / 365.25, 2)
    return None


def _day(text: str) -> date | None:
    match = re.fullmatch(r"(\d{4})\.?(\d\d)\.?(\d\d)", text)
    try:
        return date(int(match[1]), int(match[2]), int(match[3])) if match else None
    except ValueError:
        return None
