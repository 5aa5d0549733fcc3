"""The files of a folder, one after the other, and what each is by its name and its first bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from medclr.data.itk_files import find_itk, probe_itk
from medclr.data.nifti import Probe, find_nifti, probe_nifti
from medclr.errors import ScanError

DICOM: Final = "dicom"
VOLUME: Final = "volume"
REFUSED: Final = "refused"
OTHER: Final = "other"

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".iso")
_ARRAYS = (".npz", ".npy", ".mat", ".h5", ".hdf5", ".pt", ".pth")
_UNREAD = (".mgz", ".mgh", ".mnc", ".hdr", ".img", ".rec", ".nii.bz2", ".nii.xz", ".nii.zst", ".vti")
_DICOM_NAMES = re.compile(r"\.(dcm|dicom|dic|ima)$|^[^.]*$|\.\d+$", re.IGNORECASE)
"""Names under which DICOM files without the usual preamble come."""
_CERTAIN = re.compile(r"\.(dcm|dicom|dic)$", re.IGNORECASE)


class ProbeFile(Protocol):
    """Checks one volume."""

    def __call__(self, path: Path, *, check_voxels: bool, is_label: bool) -> Probe:
        """What the volume is like; raises ScanError where it cannot be used."""


class Source(NamedTuple):
    """A format of one file a scan. Both must be functions of a module, so that other processes can call them."""

    find: Callable[[Iterable[str]], list[str]]
    """The volumes among relative paths."""
    probe: ProbeFile
    """Checks one of them."""


NIFTI = Source(find_nifti, probe_nifti)
ITK = Source(find_itk, probe_itk)
SOURCES = (NIFTI, ITK)


class Found(NamedTuple):
    """A file, or a folder that is not walked."""

    path: str
    """Relative to the folder, with ``/``."""
    size: int
    """Bytes."""
    mtime: int
    """Nanoseconds."""
    refused: ScanError | None
    """Why it is not looked at."""


def walk(root: Path, skip: Path | None = None) -> Iterator[Found]:
    """The files below a folder, folder by folder, each folder in order of names.

    Hidden folders, and the ``._`` files of macOS, are skipped. Folders that are links are not followed; a link to a
    file must stay inside, and is refused where its target is met on the walk anyway.

    Args:
        root: the folder.
        skip: a folder that is none of it, wherever it lies.
    """
    root = Path(os.path.abspath(root))
    inside = os.path.join(os.path.realpath(root), "")
    aside = None if skip is None else os.path.realpath(skip)
    errors: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=errors.append):
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        for name in sorted(folders):
            if not name.startswith(".") and os.path.islink(os.path.join(folder, name)):
                problem, wanted = "The folder is a link, which is not followed.", "a folder, or links to files"
                yield Found(_spelled(prefix + name), 0, 0, _refused(problem, "a link", wanted))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (skip is None or os.path.realpath(os.path.join(folder, name)) != aside)
        )
        for name in sorted(names):
            if not name.startswith("._"):
                yield _look_at(os.path.join(folder, name), prefix + name, inside)
        while errors:
            yield _closed(errors.pop(), root)
    while errors:
        yield _closed(errors.pop(), root)


def kind_of(path: Path, name: str, sources: Iterable[Source] = SOURCES) -> tuple[str, ScanError | None]:
    """What a file is, and for a refused one why.

    Args:
        path: the file.
        name: its path relative to the folder.
        sources: the formats of one file a scan.

    Returns:
        ``DICOM`` (it may still turn out to be none), ``VOLUME``, ``REFUSED`` or ``OTHER``.
    """
    if any(source.find([name]) for source in sources):
        return VOLUME, None
    try:
        with path.open("rb") as file:
            begin = file.read(132)
    except OSError as error:
        return REFUSED, _refused("The file cannot be read.", error.strerror, "a file that you may read")
    base, lower = name.rsplit("/", 1)[-1], name.lower()
    if begin[128:] == b"DICM" or (_DICOM_NAMES.search(base) and _may_be_dicom(begin)):
        return DICOM, None
    if _CERTAIN.search(base):
        return REFUSED, _refused("The file is called DICOM, but is none.", "other content", "a DICOM file")
    if lower.endswith(_ARCHIVES) and begin:
        return REFUSED, ScanError(
            "The file is an archive, which is not unpacked.",
            got="a packed file",
            wanted="files as they are",
            fix="Unpack it into the folder and index again.",
        )
    if lower.endswith(_ARRAYS) or lower.endswith(_UNREAD):
        return REFUSED, ScanError(
            "The file is not in a scan format that medclr reads.",
            got="a bare array, without geometry" if lower.endswith(_ARRAYS) else "a format that is not read",
            wanted="DICOM, NIfTI, NRRD or MetaImage",
            fix="Convert it to NIfTI.",
        )
    return OTHER, None


def named(path: str) -> str:
    """A path of the folder as reasons hold it, until it is known what of it may be shown."""
    return f"\x1f{path}\x1f"


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _may_be_dicom(begin: bytes) -> bool:
    """Whether a file without preamble starts with group 2 or 8, in either byte order."""
    return len(begin) >= 16 and begin[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")


def _look_at(full: str, name: str, inside: str) -> Found:
    spelled = _spelled(name)
    if spelled != name:
        problem = "The file's name is no UTF-8."
        return Found(spelled, 0, 0, _refused(problem, "bytes that are no text", "a name in UTF-8"))
    try:
        if os.path.islink(full):
            real = os.path.realpath(full)
            if not real.startswith(inside):
                problem = "The file is a link that leaves the folder."
                return Found(name, 0, 0, _refused(problem, "a link", "a file in the folder"))
            target = real[len(inside) :].replace(os.sep, "/")
            if not any(part.startswith(".") for part in target.split("/")):
                return Found(
                    name, 0, 0, _refused("The scan is a duplicate.", f"duplicate of {named(target)}", "each file once")
                )
        entry = os.stat(full)
    except OSError as error:
        return Found(name, 0, 0, _refused("The file cannot be read.", error.strerror, "a file that you may read"))
    return Found(name, entry.st_size, entry.st_mtime_ns, None)


def _closed(error: OSError, root: Path) -> Found:
    name = os.path.relpath(error.filename, root).replace(os.sep, "/") if error.filename else "."
    return Found(
        _spelled(name), 0, 0, _refused("The folder cannot be read.", error.strerror, "a folder that you may read")
    )


def _spelled(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _refused(problem: str, got: object, wanted: str) -> ScanError:
    return ScanError(problem, got=got, wanted=wanted, fix="Copy the file, or leave it out.")
