"""Seeded damage to DICOM files, and whether medclr takes a damaged series for something that it is not."""

from __future__ import annotations

import io
import resource
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.data import get_testdata_file

from medclr.data.dicom_header import NotDicom, read_header
from medclr.data.dicom_series import SeriesVolume, volumes_of
from medclr.data.dicom_volume import read_volume
from medclr.errors import ScanError

SERIES = (
    "dicom2nifti_tests/hitachi/anatomical/001",
    "dicom2nifti_tests/generic/anatomical/002_non_isotropic",
    "dicom2nifti_tests/generic/anatomical/001_implicit",
    "dicom2nifti_tests/generic/compressed/001",
    "dicom2nifti_tests/generic/compressed_rle/001",
    "dicom2nifti_tests/ge/anatomical/001",
    "dicom2nifti_tests/philips_enhanced/anatomical/001",
    "dicom2nifti_tests/failing/gantrytilting/001",
    "dicom2nifti_tests/siemens/fmri/001",
)
SYNTAXES = "dcm_qa_ts"
WHEEL = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_truncated.dcm",
    "image_dfl.dcm",
    "JPEG2000.dcm",
    "JPGExtended.dcm",
    "rtplan_truncated.dcm",
    "no_meta.dcm",
    "nested_priv_SQ.dcm",
    "SC_rgb_small_odd.dcm",
    "liver_1frame.dcm",
)
# Tags whose loss or change may change geometry, pixels, or what the image is: everything else is harmless.
MATTERS = {
    0x00080008, 0x00080016, 0x00180088, 0x00181120, 0x00200032, 0x00200037, 0x00200052, 0x00280002, 0x00280004,
    0x00280006, 0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x00280100, 0x00280101, 0x00280102, 0x00280103,
    0x00281052, 0x00281053, 0x52009229, 0x52009230, 0x7FE00010, 0x00290010, 0x00190010, 0x0019100A, 0x00291010,
    0x00291020, 0x00080060, 0x00200100,
}  # fmt: skip
SIZES = (0x00280010, 0x00280011, 0x00280008, 0x00280100, 0x00280002)


@dataclass
class Case:
    """A damaged series and what came of it."""

    source: str
    kind: str
    seed: int
    outcome: str = ""
    """``accepted``, ``partly``, ``refused``, or what is wrong."""
    harmless: bool = False
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def load_sources(root: Path) -> dict[str, dict[str, bytes]]:
    """Small series by name, each a dictionary of file contents."""
    sources = {name: {path.name: path.read_bytes() for path in sorted((root / name).iterdir())} for name in SERIES}
    for path in sorted((root / SYNTAXES).iterdir()):
        sources[f"{SYNTAXES}/{path.name}"] = {path.name: path.read_bytes()}
    for name in WHEEL:
        sources[name] = {name: Path(str(get_testdata_file(name))).read_bytes()}
    return sources


def truncate(data: bytes, random: np.random.Generator) -> tuple[bytes, bool]:
    return data[: int(random.integers(0, len(data)))], False


def flip(data: bytes, random: np.random.Generator) -> tuple[bytes, bool]:
    """One to three bits, mostly in the header."""
    changed, harmless = bytearray(data), True
    regions = harmless_regions(data)
    for _ in range(int(random.integers(1, 4))):
        place = int(random.integers(132, min(len(data), int(random.choice([1500, 4000, len(data)])))))
        changed[place] ^= 1 << int(random.integers(0, 8))
        harmless = harmless and any(start <= place < end for start, end in regions)
    return bytes(changed), harmless


def remove_tag(data: bytes, random: np.random.Generator) -> tuple[bytes, bool]:
    try:
        image = dcmread(io.BytesIO(data), force=True)
        tags = list(image.keys())
        tag = tags[int(random.integers(0, len(tags)))]
        del image[tag]
        out = io.BytesIO()
        image.save_as(out)
        return out.getvalue(), int(tag) not in MATTERS and not tag.is_private
    except Exception:
        return data, False


def absurd_size(data: bytes, random: np.random.Generator) -> tuple[bytes, bool]:
    """A huge value in a tag of sizes, or a huge length of some element."""
    changed = bytearray(data)
    if random.random() < 0.5:
        try:
            image = dcmread(io.BytesIO(data), force=True)
            tag = int(random.choice(SIZES))
            start, length = element_at(image, tag)
            if length == 2:
                changed[start : start + 2] = struct.pack("<H", int(random.choice([0, 1, 65535, 40000, 9999])))
                return bytes(changed), False
        except Exception:  # damaged already: any other place will do
            pass
    place = int(random.integers(132, min(len(data) - 4, 3000)))
    changed[place : place + 4] = struct.pack("<I", int(random.choice([0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x40000000])))
    return bytes(changed), False


def nested_garbage(data: bytes, random: np.random.Generator) -> tuple[bytes, bool]:
    """Sequences within sequences, or noise, between two elements of the header."""
    place = 132
    try:
        image = dcmread(io.BytesIO(data), force=True, stop_before_pixels=True)
        starts = [start + length for start, length in (element_at(image, tag) for tag in list(image.keys())) if length]
        place = starts[int(random.integers(0, len(starts)))]
    except Exception:
        place = int(random.integers(132, min(len(data), 3000)))
    depth = int(random.choice([3, 60, 3000]))
    opened = b"\x09\x00\x10\x10SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
    garbage = {
        0: opened,
        1: opened + b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth,
        2: random.bytes(int(random.integers(1, 5000))),
    }[int(random.integers(0, 3))]
    return data[:place] + garbage + data[place:], False


def blank_out(data: bytes, random: np.random.Generator) -> tuple[bytes, bool]:
    """A block of zeros, as of a lost sector."""
    place = int(random.integers(0, len(data)))
    length = min(int(random.choice([16, 512, 4096])), len(data) - place)
    return data[:place] + bytes(length) + data[place + length :], False


def misplace(data: bytes, random: np.random.Generator) -> tuple[bytes, bool]:
    """A bit of a position, an orientation or a spacing."""
    try:
        image = dcmread(io.BytesIO(data), force=True, stop_before_pixels=True)
        start, length = element_at(image, int(random.choice([0x00200032, 0x00200032, 0x00200037, 0x00280030])))
    except Exception:
        return flip(data, random)
    if not length:
        return flip(data, random)
    changed = bytearray(data)
    changed[start + int(random.integers(0, length))] ^= 1 << int(random.integers(0, 4))
    return bytes(changed), False


KINDS: dict[str, Callable[[bytes, np.random.Generator], tuple[bytes, bool]]] = {
    "truncate": truncate,
    "flip": flip,
    "remove tag": remove_tag,
    "absurd size": absurd_size,
    "nested garbage": nested_garbage,
    "blank out": blank_out,
    "misplace": misplace,
}


def element_at(image: Any, tag: Any) -> tuple[int, int]:
    """Where the value of an element begins in its file, and its bytes; 0 bytes where that is not known."""
    raw = image.get_item(tag)
    length = getattr(raw, "length", 0xFFFFFFFF)
    return (raw.value_tell, length) if length != 0xFFFFFFFF else (0, 0)


def harmless_regions(data: bytes) -> list[tuple[int, int]]:
    """Bytes of values that neither geometry nor pixels depend on."""
    try:
        image = dcmread(io.BytesIO(data), force=True)
    except Exception:
        return []
    regions = []
    for tag in list(image.keys()):
        if int(tag) not in MATTERS and not tag.is_private and tag.element != 0:
            start, length = element_at(image, tag)
            if length and getattr(image.get_item(tag), "VR", "SQ") not in ("SQ", None):
                regions.append((start, start + length))
    return regions


Read = tuple[SeriesVolume, NDArray[Any]]


def read_all(folder: Path) -> list[Read]:
    """All volumes of a folder with their voxels; what is refused is left out."""
    headers = []
    for path in sorted(folder.iterdir()):
        try:
            headers.append(read_header(path, path.name))
        except (NotDicom, ScanError):
            continue
    volumes, refusals = volumes_of(headers)
    paths = {path for volume in volumes for path, _ in volume.slices}
    if paths & refusals.keys() or paths | refusals.keys() != {header.path for header in headers}:
        raise AssertionError("a file is in none or both of the results")
    read = []
    for volume in volumes:
        try:
            read.append((volume, read_volume(volume, lambda name: folder / name)[0]))
        except ScanError:
            continue
    return read


def same_place(one: SeriesVolume, other: SeriesVolume) -> bool:
    return one.shape == other.shape and bool(np.abs(one.affine - other.affine).max() < 1e-3)


def part_of(one: SeriesVolume, whole: SeriesVolume) -> bool:
    """Whether a volume is a run of another's slices, in their places."""
    if one.shape[2] >= whole.shape[2] or np.abs(one.affine[:3, :3] - whole.affine[:3, :3]).max() > 2e-3:
        return False
    lies = np.linalg.inv(whole.affine) @ one.affine[:, 3]
    return bool(np.abs(lies[:3] - [*lies[:2], round(lies[2])]).max() < 0.02)


def as_tags_say(folder: Path, volume: SeriesVolume) -> bool:
    """Whether each slice lies where its own (damaged) tags place it, by pydicom and the formula of the standard."""
    axes = volume.affine[:3, :3] * np.array([[-1.0], [-1], [1]])
    for z, (name, place) in enumerate(volume.slices):
        try:
            image = dcmread(folder / name, force=True, stop_before_pixels=True)
            if "PerFrameFunctionalGroupsSequence" in image:
                group, shared = image.PerFrameFunctionalGroupsSequence[place], image.SharedFunctionalGroupsSequence[0]
                position = group.PlanePositionSequence[0].ImagePositionPatient
                sources = [group, shared]
                measures = next(item for item in sources if "PixelMeasuresSequence" in item).PixelMeasuresSequence[0]
                plane = next(item for item in sources if "PlaneOrientationSequence" in item).PlaneOrientationSequence[0]
            else:
                position, measures, plane = image.ImagePositionPatient, image, image
            spacing = [float(value) for value in measures.PixelSpacing]
            lines = np.array([float(value) for value in plane.ImageOrientationPatient]).reshape(2, 3)
        except Exception:
            return False
        if volume.side:
            corner = (np.array([image.Columns, image.Rows]) * (1 - 1 / volume.side)) / 2 * spacing[::-1]
            first = np.array([float(value) for value in position]) + corner @ lines
            ends = [(volume.affine @ [0, 0, end, 1])[:3] * [-1, -1, 1] for end in (0, volume.shape[2] - 1)]
            return bool(
                min(np.abs(first - end).max() for end in ends) < 1e-2
                and np.abs(axes[:, 0] - lines[0] * spacing[1]).max() < 5e-3
            )
        lies = [volume.start[axis] + z * volume.shift[axis] for axis in (0, 1)]
        stands = (volume.affine @ [*lies, z, 1])[:3] * [-1, -1, 1]
        near = np.abs(stands - [float(value) for value in position]).max() < max(0.06, 0.05 * volume.spacing[2])
        turned = max(np.abs(axes[:, 0] - lines[0] * spacing[1]).max(), np.abs(axes[:, 1] - lines[1] * spacing[0]).max())
        if not near or turned > 5e-3 * max(1.0, *spacing):
            return False
    return True


def run_case(folder: Path, files: dict[str, bytes], whole: Sequence[Read], case: Case) -> Case:
    """Damage one file of a series, read the series, and judge."""
    random = np.random.default_rng(case.seed)
    name = sorted(files)[int(random.integers(0, len(files)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        damaged, case.harmless = KINDS[case.kind](files[name], random)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        here = Path(place)
        for other, data in files.items():
            (here / other).write_bytes(damaged if other == name else data)
        begin = time.perf_counter()
        try:
            read = read_all(here)
        except Exception as error:
            case.outcome = "crash"
            case.wrong.append(f"{type(error).__name__}: {error}"[:200])
            return case
        case.seconds = time.perf_counter() - begin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for volume, _ in read:
                known = any(same_place(volume, other) or part_of(volume, other) for other, _ in whole)
                if not known and not as_tags_say(here, volume):
                    case.wrong.append(f"a wrong place: {volume.shape}, {volume.spacing}")
        intact = len(read) == len(whole) and all(
            any(same_place(one, other) and np.array_equal(voxels, theirs) for other, theirs in whole)
            for one, voxels in read
        )
        if case.harmless and not intact:
            case.wrong.append("harmless damage, and not the same volumes")
        case.outcome = "accepted" if intact and whole else "partly" if read else "refused"
    return case


def run_all(root: Path, folder: Path, seeds: Sequence[int]) -> tuple[list[Case], int]:
    """A case for each seed, and this process's highest memory in bytes."""
    sources = load_sources(root)
    whole = {}
    for source, files in sources.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for name, data in files.items():
                (Path(place) / name).write_bytes(data)
            whole[source] = read_all(Path(place))
    names, kinds = list(sources), list(KINDS)
    cases = []
    for seed in seeds:
        source, kind = names[seed % len(names)], kinds[seed // len(names) % len(kinds)]
        cases.append(run_case(folder, sources[source], whole[source], Case(source, kind, seed)))
    return cases, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
