"""The files of a folder, and a check of each in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.progress import track

from medclr.data.nifti import Probe, find_nifti, probe_nifti
from medclr.errors import ScanError


class ProbeFile(Protocol):
    """Checks one volume."""

    def __call__(self, path: Path, *, check_voxels: bool, is_label: bool) -> Probe:
        """What the volume is like; raises ScanError where it cannot be used."""


class Source(NamedTuple):
    """A format of scans. Both must be functions of a module, so that other processes can call them."""

    find: Callable[[Iterable[str]], list[str]]
    """The volumes among relative paths."""
    probe: ProbeFile
    """Checks one of them."""


NIFTI = Source(find_nifti, probe_nifti)


class Walk(NamedTuple):
    """What lies in a folder; paths are relative to it, with ``/``, in sorted order."""

    volumes: list[str]
    rejected: dict[str, ScanError]
    """Volumes and folders that are not read, with the reason."""
    others: int
    """Number of files that are no volumes."""


def walk(root: Path, source: Source = NIFTI) -> Walk:
    """Find the volumes below a folder. Hidden folders are skipped; links to files must stay inside."""
    rejected: dict[str, ScanError] = {}
    files: list[str] = []

    def relative(path: str) -> str:
        return os.path.relpath(path, root).replace(os.sep, "/")

    def report(error: OSError) -> None:
        name = relative(error.filename) if error.filename else "."
        rejected[name] = _refused("The folder cannot be read.", error.strerror, "a folder that you may read")

    for folder, folders, names in os.walk(root, onerror=report):
        for name in folders:
            if os.path.islink(os.path.join(folder, name)) and not name.startswith("."):
                problem, wanted = "The folder is a link, which is not followed.", "a folder, or links to files"
                rejected[relative(os.path.join(folder, name))] = _refused(problem, "a link", wanted)
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = "" if os.path.samefile(folder, root) else relative(folder) + "/"
        files += [prefix + name for name in names]
    volumes = sorted(source.find(files))
    usable = list(_once_inside(root, volumes, rejected))
    return Walk(usable, rejected, len(files) - len(volumes))


def probe_all(
    root: Path,
    tasks: Sequence[tuple[str, bool]],
    *,
    source: Source = NIFTI,
    check_voxels: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Probe | ScanError]:
    """Check files in several processes.

    Args:
        root: the folder.
        tasks: relative path, and whether the file is a label.
        source: the format.
        check_voxels: as in :func:`medclr.data.nifti.probe_nifti`.
        workers: number of processes; by default one for each core that this process may use; 1 stays in this process.
        progress: show a bar on stderr.

    Returns:
        the probe, or the reason against, by path, in the order of ``tasks``.

    Raises:
        ScanError: a process was killed, as happens when memory runs out.
    """
    check = partial(_probe_one, root, source, check_voxels)
    workers = min(workers or available_cores(), max(len(tasks), 1))

    def shown(found: Iterable[Probe | ScanError]) -> Iterator[Probe | ScanError]:
        console = Console(stderr=True)
        yield from track(found, "Checking scans", total=len(tasks), console=console, disable=not progress)

    paths = [path for path, _ in tasks]
    if workers == 1:
        return dict(zip(paths, shown(map(check, tasks)), strict=True))
    try:
        with ProcessPoolExecutor(workers) as pool:
            found = pool.map(check, tasks, chunksize=max(1, min(32, len(tasks) // (4 * workers))))
            return dict(zip(paths, shown(found), strict=True))
    except BrokenProcessPool as error:
        raise ScanError(
            "A process that checked scans was killed.",
            got=str(error),
            wanted="enough memory for each of the processes",
            fix=f"Use fewer than {workers} processes: --workers 1",
        ) from error


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _probe_one(root: Path, source: Source, check_voxels: bool, task: tuple[str, bool]) -> Probe | ScanError:
    path, is_label = task
    try:
        return source.probe(root / path, check_voxels=check_voxels, is_label=is_label)
    except ScanError as error:
        return error


def _once_inside(root: Path, volumes: Iterable[str], rejected: dict[str, ScanError]) -> Iterator[str]:
    real_root = os.path.realpath(root)
    known: dict[str, str] = {}
    for path in volumes:
        full = os.path.join(root, path)
        # Links to folders are not followed, so only the file itself can be a link.
        real = os.path.realpath(full) if os.path.islink(full) else os.path.join(real_root, *path.split("/"))
        first = known.setdefault(real, path)
        if not real.startswith(os.path.join(real_root, "")):
            rejected[path] = _refused("The file is a link that leaves the folder.", "a link", "a file in the folder")
        elif first != path:
            rejected[path] = _refused("The scan is a duplicate.", f"a link to the file of {first}", "each file once")
        else:
            yield path


def _refused(problem: str, got: object, wanted: str) -> ScanError:
    return ScanError(problem, got=got, wanted=wanted, fix="Copy the file, or leave it out.")
