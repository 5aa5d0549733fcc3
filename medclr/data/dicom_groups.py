"""Which slices of a series belong together: one orientation and size, then whatever tells its volumes apart.

Positions decide. Slices that form one even stack are one volume, even where a tag of a few of them differs; slices that
share a position are parted by the tags that the standard has for this, and stay unparted where no tag does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medclr.data.dicom_frames import (
    ACQUISITION,
    B_VALUE,
    ECHO,
    ECHO_TIME,
    GRADIENT,
    IMAGE_TYPE,
    STACK,
    TEMPORAL,
    TRIGGER,
    Frame,
    Key,
)  # fmt: skip
from medclr.data.dicom_header import DicomHeader

ALIGNED: Final = 1e-3
"""How far two direction cosines may differ within a volume."""
EVEN: Final = 0.04
"""How far a slice may lie from its place, as a share of the distance of slices."""
ROUNDING_MM: Final = 0.01
"""How far it may lie in any case, since positions are written with few digits."""
LEAST_SLICES: Final = 3

FIRM: Final = (IMAGE_TYPE, STACK, ECHO, ECHO_TIME, TEMPORAL, B_VALUE)
"""Tags whose values part a series wherever they differ."""
_SHOWN: Final = {ECHO, ECHO_TIME, TEMPORAL, B_VALUE, ACQUISITION, TRIGGER, "temporal offset", "inversion time"}


class Slice(NamedTuple):
    """One frame of one file."""

    header: DicomHeader
    frame: Frame
    place: int | None
    """Number of the frame in a multi-frame file, from 0; else None."""

    @property
    def position(self) -> NDArray[np.float64]:
        """(3,) in patient coordinates."""
        return np.asarray(self.frame.position, dtype=np.float64)

    @property
    def normal(self) -> NDArray[np.float64]:
        """(3,) unit vector across the slice."""
        axes = np.asarray(self.frame.orientation, dtype=np.float64).reshape(2, 3)
        normal = np.cross(axes[0], axes[1])
        return normal / np.linalg.norm(normal)


class Group(NamedTuple):
    """Slices that should be one volume."""

    slices: list[Slice]
    """Sorted along the normal."""
    told_by: dict[str, Key]
    """What tells it from the other volumes of its series."""


def along(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """(N,) places of slices along the normal of the first, in millimetres."""
    return np.array([item.position for item in slices]) @ slices[0].normal


def group_slices(slices: Sequence[Slice]) -> list[Group]:
    """Part the slices of one series into volumes."""
    groups = []
    for cluster in _clusters(slices):
        for part, told_by in _part_firmly(cluster):
            groups += _part_repeats(part, told_by)
    return [Group([part.slices[k] for k in np.argsort(along(part.slices), kind="stable")], part.told_by)
            for part in groups]  # fmt: skip


def is_even(places: NDArray[np.float64]) -> bool:
    """Whether sorted places are at equal distances, none twice."""
    if len(places) < 2:
        return False
    gap = (places[-1] - places[0]) / (len(places) - 1)
    wanted = places[0] + gap * np.arange(len(places))
    return bool(gap > 1e-3 and np.abs(places - wanted).max() <= max(ROUNDING_MM, EVEN * gap) and gap > 2 * ROUNDING_MM)


def repeats(places: NDArray[np.float64]) -> bool:
    """Whether two slices lie at one place; sorted or not."""
    ordered = np.sort(places)
    gaps = np.diff(ordered)
    return bool(len(gaps) and (gaps < _nearest(ordered)).any())


def _nearest(ordered: NDArray[np.float64]) -> float:
    """Below this distance two slices are at one place: a quarter of the usual one."""
    gaps = np.diff(ordered)
    apart = gaps[gaps > ROUNDING_MM]
    return max(ROUNDING_MM, 0.25 * float(np.median(apart)) if len(apart) else ROUNDING_MM)


def _clusters(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices of one size, spacing, orientation and frame of reference."""
    clusters: dict[Hashable, list[list[Slice]]] = defaultdict(list)
    for item in slices:
        header = item.header
        key = (header.rows, header.columns, header.identity.get("FrameOfReferenceUID", ""))
        for cluster in clusters[key]:
            if _close(cluster[0].frame, item.frame):
                cluster.append(item)
                break
        else:
            clusters[key].append([item])
    return [cluster for group in clusters.values() for cluster in group]


def _close(one: Frame, other: Frame) -> bool:
    turned = np.abs(np.subtract(one.orientation or (), other.orientation or ())).max()
    sized = np.abs(np.subtract(one.spacing or (), other.spacing or ())).max() / max(one.spacing or (1.0,))
    return bool(turned <= ALIGNED and sized <= 1e-3)


def _part_firmly(cluster: list[Slice]) -> list[tuple[list[Slice], dict[str, Key]]]:
    done: list[tuple[list[Slice], dict[str, Key]]] = [(cluster, {})]
    for name in FIRM:
        parted = []
        for part, told_by in done:
            split = _by_key(part, name)
            if len(split) < 2 or (is_even(np.sort(along(part))) and not _are_stacks(name, list(split.values()))):
                parted.append((part, told_by))
            else:
                parted += _told(name, split, told_by)
        done = parted
    return done


def _are_stacks(name: str, parts: Sequence[list[Slice]]) -> bool:
    """Whether parts of one even stack are volumes of their own all the same, as two kinds of image above each other."""
    if name not in (IMAGE_TYPE, STACK):
        return False
    return all(len(items) >= LEAST_SLICES and is_even(np.sort(along(items))) for items in parts)


def _told(
    name: str, split: Mapping[Key, list[Slice]], told_by: Mapping[str, Key]
) -> list[tuple[list[Slice], dict[str, Key]]]:
    """Parts with what tells them; a text or a time of day, which may be private, is told by its place alone."""
    shown = name in _SHOWN
    return [
        (items, {**told_by, name: value if shown and value != "" else float(k)})
        for k, (value, items) in enumerate(split.items())
    ]


def _by_key(part: Iterable[Slice], name: str) -> dict[Key, list[Slice]]:
    split: dict[Key, list[Slice]] = {}
    for item in part:
        value = item.frame.keys.get(name, "")
        if isinstance(value, float) and name == ECHO_TIME:  # written with more or fewer digits, or with jitter
            value = next((known for known in split if isinstance(known, float) and abs(known - value)
                          <= max(0.02, 0.01 * abs(value))), value)  # fmt: skip
        split.setdefault(value, []).append(item)
    return split


def _part_repeats(part: list[Slice], told_by: dict[str, Key]) -> list[Group]:
    """Part slices that share positions by the first tag that leaves no position twice."""
    if not repeats(along(part)):
        return [Group(part, told_by)]
    names = [GRADIENT, "gradient kind", ACQUISITION]
    others = {name for item in part for name in item.frame.keys if name not in FIRM and name not in names}
    names += sorted(others, key=lambda name: (not name.startswith("dimension"), name))
    for name in names:
        split = _by_key(part, name)
        if len(split) > 1 and _is_whole(list(split.values())):
            return [Group(*told) for told in _told(name, split, told_by)]
    for name, rule in (("file", _by_file), ("image", _by_number)):
        parts = rule(part)
        if len(parts) > 1 and _is_whole(parts):
            return [Group(items, {**told_by, name: float(k)}) for k, items in enumerate(parts)]
    # One tag may part some of them and another the rest, as gradients and repetitions do.
    for name in names:
        split = _by_key(part, name)
        if len(split) > 1 and min(map(len, split.values())) >= LEAST_SLICES:
            return [group for told in _told(name, split, told_by) for group in _part_repeats(*told)]
    return [Group(part, told_by)]


def _is_whole(parts: Sequence[list[Slice]]) -> bool:
    """Whether each part has every position once, and most parts have all the positions that there are."""
    if any(repeats(along(items)) for items in parts):
        return False
    counts = Counter(map(len, parts))
    usual, number = max(counts.items(), key=lambda entry: entry[0] * entry[1])
    return usual >= LEAST_SLICES and 2 * usual * number > sum(map(len, parts))


def _by_file(part: Sequence[Slice]) -> list[list[Slice]]:
    files: dict[str, list[Slice]] = {}
    for item in part:
        files.setdefault(item.header.path, []).append(item)
    return list(files.values())


def _by_number(part: Sequence[Slice]) -> list[list[Slice]]:
    """Volumes by instance numbers, which count either positions or repetitions first.

    Slices that do not fit the count are left alone, so that no volume holds slices of two times.
    """
    places = along(part)
    order = np.argsort(places, kind="stable")
    level = np.zeros(len(part), dtype=int)
    level[order[1:]] = np.cumsum(np.diff(places[order]) >= _nearest(places[order]))
    numbers = np.array([item.frame.number for item in part])
    positions = int(level.max()) + 1
    copies = int(np.bincount(level).max())
    best, score = np.full(len(part), -1), 0
    for start in sorted({int(numbers.min()), 1}):
        counted = numbers - start
        for volume, code in (
            (counted // positions, counted % positions),
            (counted % copies, counted // copies),
        ):
            fitting = _fitting(volume, code, level)
            whole = Counter(volume[fitting].tolist())
            complete = sum(count for count in whole.values() if count == positions)
            if complete > score:
                best, score = np.where(fitting, volume, -1), complete
    if 2 * score <= len(part):
        return []
    volumes = [[part[int(k)] for k in np.flatnonzero(best == volume)] for volume in np.unique(best[best >= 0])]
    return volumes + [[part[int(k)]] for k in np.flatnonzero(best < 0)]


def _fitting(volume: NDArray[np.int64], code: NDArray[np.int64], level: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which slices have the level that most slices of their code have, each level once a volume."""
    votes: dict[int, Counter[int]] = defaultdict(Counter)
    for one, other in zip(code.tolist(), level.tolist(), strict=True):
        votes[one][other] += 1
    usual = {one: counted.most_common(1)[0][0] for one, counted in votes.items()}
    pairs = list(zip(volume.tolist(), level.tolist(), strict=True))
    counts = Counter(pairs)
    fits = [usual[one] == other for one, other in zip(code.tolist(), level.tolist(), strict=True)]
    return np.array([fit and counts[pair] == 1 for fit, pair in zip(fits, pairs, strict=True)]) & (volume >= 0)
