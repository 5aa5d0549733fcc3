"""Files of one volume each, of a folder that is indexed: images, their labels, and whether each can be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from medclr.data.cells import Cells
from medclr.data.index_processes import deadline, in_processes, killed
from medclr.data.index_store import BAD, GOOD, Store, Update
from medclr.data.labels import LabelRule, refuse_other_grid
from medclr.data.nifti import Probe
from medclr.data.rows import is_file_name
from medclr.data.walk import VOLUME, Source, named
from medclr.errors import ConfigError, ScanError
from medclr.keys import LABEL


class ProbeTask(NamedTuple):
    """A file to check."""

    path: str
    is_label: bool


def volumes_of_folder(store: Store) -> list[str]:
    """Files of one volume each, in order."""
    return [path for (path,) in store.database.execute("SELECT path FROM files WHERE kind = 'volume' ORDER BY path")]


def probe_volumes(
    store: Store,
    root: Path,
    sources: tuple[Source, ...],
    tasks: Iterable[tuple[str, bool]],
    *,
    workers: int,
    check_voxels: bool,
    tell: Callable[[], object],
) -> None:
    """Check files that were not checked before.

    Args:
        store: takes what is found.
        root: the folder.
        sources: the formats.
        tasks: relative path, and whether the file is a label.
        workers: processes.
        check_voxels: as in :func:`medclr.data.nifti.probe_nifti`.
        tell: called once a file.
    """

    def changed() -> Iterator[ProbeTask]:
        for path, is_label in tasks:
            row = store.database.execute("SELECT asked FROM files WHERE path = ?", (path,)).fetchone()
            if row == (_asked(check_voxels, is_label),):
                tell()
            else:
                yield ProbeTask(path, is_label)

    task = partial(_probe_one, root, sources, check_voxels)
    lost = partial(_lost, check_voxels)
    chunk = 1 if check_voxels else 16
    for item, update in in_processes(task, changed(), workers=workers, lost=lost, chunk=chunk):
        store.update(item.path, update)
        tell()
    store.keep(now=True)


def probe_of(store: Store, path: str) -> Probe | ScanError:
    """What checking a file has found."""
    row = store.database.execute("SELECT data, problem, got, wanted FROM files WHERE path = ?", (path,)).fetchone()
    data, problem, got, wanted = row
    return refusal(problem, got, wanted) if problem is not None else Probe.from_json(data)


def match_label(store: Store, image: str, probe: Probe, label: str) -> bool:
    """Whether an image's label can be used; if not, the label is refused with the reason."""
    found = probe_of(store, label)
    try:
        if isinstance(found, ScanError):
            raise found
        refuse_other_grid(found, probe)
    except ScanError as error:
        store.refuse(label, refusal(error.problem, f"{error.got} (label of {named(image)})", str(error.wanted)))
        return False
    return True


def refuse_unused_labels(
    store: Store, labels: Iterable[str], used: set[str], claims: Mapping[str, Sequence[str]]
) -> None:
    """Every label that no image of the datalist has is refused, with the reason."""
    claimants: dict[str, list[str]] = {}
    for image, names in claims.items():
        for name in names:
            claimants.setdefault(name, []).append(image)
    for path in labels:
        if path not in used:
            store.refuse(path, _why_unused(claimants.get(path, []), claims))


def refuse_two_labels(cells: Mapping[str, Cells], claims: Mapping[str, Sequence[str]]) -> None:
    """Classes in a column and files of labels do not mix.

    Raises:
        ConfigError: both are there.
    """
    both = next((path for path in cells if LABEL in cells[path] and claims.get(path)), None)
    path = next((path for path in cells if is_file_name(cells[path].get(LABEL, ""))), None)
    if both is not None or path is not None:
        raise ConfigError(
            f"The column {LABEL!r} clashes with label files.",
            got=f"a class and a label file for {both}" if both else f"a file name for {path}",
            wanted="classes in the column, or label files, not both",
            fix="Rename the column; point to label files with --labels.",
        )


def claims_of(rule: LabelRule, images: Iterable[str]) -> dict[str, list[str]]:
    """The label files of each image that has any."""
    return {image: names for image in images if (names := rule.candidates(image))}


def refusal(problem: str, got: str, wanted: str) -> ScanError:
    """A reason against a file."""
    return ScanError(problem, got=got, wanted=wanted, fix="Repair the file, or leave it out.")


def _why_unused(images: Sequence[str], claims: Mapping[str, Sequence[str]]) -> ScanError:
    if not images:
        return refusal("The label belongs to no image.", "no indexed image of its name", "an image for every label")
    several = next((image for image in images if len(claims[image]) > 1), None)
    if several is not None:
        got = f"{len(claims[several])} files for {named(several)}"
        return refusal("The image has several labels.", got, "one label file an image")
    return refusal("The label's image is quarantined.", named(images[0]), "a usable image for every label")


def _asked(check_voxels: bool, is_label: bool) -> str:
    return f"{'voxels' if check_voxels else 'header'} of {'a label' if is_label else 'an image'}"


def _probe_one(root: Path, sources: tuple[Source, ...], check_voxels: bool, task: ProbeTask) -> Update:
    path = root / task.path
    asked = _asked(check_voxels, task.is_label)
    source = next(source for source in sources if source.find([task.path]))
    try:
        with deadline(path):
            probe = source.probe(path, check_voxels=check_voxels, is_label=task.is_label)
    except ScanError as error:
        return Update(VOLUME, BAD, asked, error)
    return Update(VOLUME, GOOD, asked, data=probe.to_json())


def _lost(check_voxels: bool, task: ProbeTask) -> Update:
    return Update(VOLUME, BAD, _asked(check_voxels, task.is_label), killed())
