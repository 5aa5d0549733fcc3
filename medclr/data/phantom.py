"""A synthetic cohort of patients with repeat scans, masks and tables, for the demo and the tests.

Each patient has one organ, which lies left or right of the spine and is told from the tissue around it by a rim and
layers, not by its intensity. Lesions in it grow with the patient's severity, which depends on age and genotype and
shows in a laboratory value. Repeat scans show the same anatomy in another pose, field of view, contrast and noise.
No number of it comes from a real patient.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from medclr import keys
from medclr.data.phantom_anatomy import draw_anatomy
from medclr.data.phantom_scan import SCANNERS, PhantomScan, draw_scan
from medclr.draws import shuffled, stable_seed
from medclr.errors import ConfigError

Cells = dict[str, int | float | str | None]

VOLUMES, PARTICIPANTS = "volumes.csv", "participants.csv"

_MODALITIES = ("mr", "ct")
_LEAST_VOXELS = 8
_FREQUENCIES = (0.2, 0.35, 0.5, 0.15, 0.3, 0.45)
_EFFECTS = (0.5, 0.0, 0.35, -0.6, 0.0, 0.4)
"""Frequency of the rarer allele, and its effect on severity; both repeat if there are more columns."""

_README = """This is a synthetic cohort: no image and no number in it comes from a real patient.

imagesTr/          scans ({modality}), one file each; scans of one patient show one anatomy
labelsTr/          masks on the same grids: 0 background, 1 organ, 2 lesion
{volumes}        one row a scan, with the columns of its patient
{participants}   one row a patient: severity 0 to 3, which depends on age and some of the snp_ columns (0, 1 or 2
                   copies of an allele) and raises crp (a laboratory value, mg/l); empty cells are missing values

Made by medclr.data.phantom.make_cohort(patients={patients}, seed={seed}). Index it with:
medclr index FOLDER --patients FOLDER/{volumes} --output datalist.json
"""


def make_cohort(
    folder: str | Path,
    *,
    patients: int = 40,
    scans_per_patient: int | Sequence[int] = (2, 3),
    modality: str = "mr",
    shape: Sequence[int] = (56, 56, 48),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    snps: int = 6,
    scanners: Sequence[str] = tuple(SCANNERS),
    progress: bool = False,
) -> Path:
    """Write a cohort in the folders of the Medical Segmentation Decathlon.

    The same arguments give the same bytes, with the same versions of NumPy and zlib. What a patient is like depends on
    ``seed``, ``snps`` and the patient's number, not on how many patients there are.

    Args:
        folder: a new or empty folder; it gets ``imagesTr``, ``labelsTr``, ``volumes.csv`` (columns ``volume, patient,
            study, days, modality, scanner`` and those of the patient), ``participants.csv`` (``patient, age, sex, crp,
            severity, snp_1, ...``) and ``README.txt``.
        patients: number of patients.
        scans_per_patient: a number, or the lowest and highest.
        modality: ``mr`` (arbitrary units, bias field, T1 or T2 by scanner) or ``ct`` (Hounsfield units).
        shape: voxels of the largest field of view; a scan has 80 to 100 % of them along each axis. The anatomy is
            scaled to it.
        spacing: millimetres along each axis; it may be anisotropic.
        seed: any whole number.
        snps: number of columns ``snp_1``, ``snp_2``, ...; severity depends on some of them.
        scanners: names of ``medclr.data.phantom_scan.SCANNERS`` that successive scans of a patient come from; a and b
            are T1-like, c and d T2-like (MR).
        progress: show a bar on stderr.

    Returns:
        the path of ``volumes.csv``, as ``medclr index FOLDER --patients`` takes it.

    Raises:
        ConfigError: an argument cannot work, or the folder cannot be written or is not empty.

    Example:
        >>> table = make_cohort("cohort", patients=4)  # doctest: +SKIP
        >>> index("cohort", patients=table).summary["patients"]  # doctest: +SKIP
        4
    """
    low, high = _limits(scans_per_patient)
    _refuse_number("patients", patients, 1)
    _check(modality, shape, spacing, seed, snps, scanners)
    root = Path(folder)
    tasks = [
        (patient, scan)
        for patient in range(patients)
        for scan in range(int(_random(seed, patient, "scans").integers(low, high + 1)))
    ]
    rows: list[Cells] = []
    people: dict[int, Cells] = {}
    try:
        _make_folders(root)
        shown = track(tasks, "Making scans", console=Console(stderr=True), disable=not progress)
        for patient, scan in shown:
            looks: dict[str, Any] = {"modality": modality, "shape": shape, "spacing": spacing, "scanners": scanners}
            made = phantom_scan(patient, scan, seed=seed, snps=snps, **looks)
            people[patient] = phantom_patient(patient, seed=seed, snps=snps)
            name = f"imagesTr/{made.columns['patient']}_{scan + 1}.nii.gz"
            _write(made.image, made.affine, root / name)
            _write(made.mask, made.affine, root / name.replace("imagesTr", "labelsTr"))
            rows.append({"volume": name, **made.columns})
        _write_table(list(people.values()), root / PARTICIPANTS)
        words = {"volumes": VOLUMES, "participants": PARTICIPANTS}
        text = _README.format(modality=modality.upper(), patients=patients, seed=seed, **words)
        (root / "README.txt").write_text(text, encoding="utf-8")
        _write_table(rows, root / VOLUMES)
    except OSError as error:
        raise _refused("folder", f"{root}: {error.strerror}", "a folder that you may write to", "folder") from error
    return root / VOLUMES


def phantom_patient(patient: int, *, seed: int = 0, snps: int = 6) -> Cells:
    """What the tables say of a patient.

    Args:
        patient: number, from 0.
        seed: of the cohort.
        snps: number of genotype columns.

    Returns:
        ``patient, age, sex, crp, severity, snp_1, ...``; None where a value is missing.

    Raises:
        ConfigError: an argument cannot work.
    """
    _refuse_number("patient", patient, 0)
    _check("mr", (56, 56, 48), (1.0, 1.0, 1.0), seed, snps)
    random = _random(seed, patient, "patient")
    age = float(np.clip(random.normal(60, 12), 25, 90))
    sex = "F" if random.random() < 0.5 else "M"
    rest, test = random.standard_normal(2)
    lost_age, lost_crp = random.random(2) < (0.03, 0.1)
    genes = _random(seed, patient, "genes")
    alleles, score, spread = [], 0.0, 0.0
    for place in range(snps):
        frequency, effect = _FREQUENCIES[place % len(_FREQUENCIES)], _EFFECTS[place % len(_EFFECTS)]
        copies = int(genes.binomial(2, frequency))
        score += effect * (copies - 2 * frequency)
        spread += effect**2 * 2 * frequency * (1 - frequency)
        alleles.append(None if genes.random() < 0.04 else copies)
    polygenic = score / math.sqrt(spread) if spread else 0.0
    liability = 0.5 * (age - 60) / 12 + 0.6 * polygenic + 0.6 * rest
    cells: Cells = {
        "patient": f"p{patient:04d}",
        keys.AGE: None if lost_age else round(age),
        keys.SEX: sex,
        "crp": None if lost_crp else round(math.exp(1.2 + 0.7 * liability + 0.5 * test), 1),
        "severity": sum(liability > bound for bound in (-0.3, 0.35, 0.95)),
    }
    return cells | {f"snp_{place + 1}": copies for place, copies in enumerate(alleles)}


def phantom_scan(
    patient: int,
    scan: int = 0,
    *,
    modality: str = "mr",
    shape: Sequence[int] = (56, 56, 48),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    snps: int = 6,
    scanners: Sequence[str] = tuple(SCANNERS),
) -> PhantomScan:
    """One scan of the cohort as arrays, as :func:`make_cohort` writes it.

    Args:
        patient, scan: numbers, from 0. Successive scans are made by different scanners.
        modality, shape, spacing, seed, snps, scanners: as for :func:`make_cohort`. The anatomy depends on none of the
            first three but for its size in millimetres.

    Returns:
        image, mask, affine, pose and columns.

    Raises:
        ConfigError: an argument cannot work.
    """
    _refuse_number("scan", scan, 0)
    _check(modality, shape, spacing, seed, snps, scanners)
    person = phantom_patient(patient, seed=seed, snps=snps)
    anatomy = draw_anatomy(_random(seed, patient, "anatomy"), int(person["severity"] or 0))
    order = shuffled(len(scanners), ("phantom", seed, patient, "scanners"))
    x, y, z = (int(edge) for edge in shape)
    a, b, c = (float(edge) for edge in spacing)
    made = draw_scan(
        anatomy,
        _random(seed, patient, "scan", scan, modality),
        scanner=scanners[order[scan % len(scanners)]],
        modality=modality,
        shape=(x, y, z),
        spacing=(a, b, c),
    )
    days = sum(int(_random(seed, patient, "days", later).integers(20, 400)) for later in range(scan))
    visit: Cells = {"patient": person["patient"], "study": scan + 1, keys.DAYS: days}
    return made._replace(columns=visit | made.columns | person)


def _random(seed: int, patient: int, *purpose: int | str) -> np.random.Generator:
    return np.random.default_rng(stable_seed("phantom", seed, patient, *purpose))


def _make_folders(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise _refused("folder", f"{root}, which is not empty", "a new or empty folder", "folder")
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir()


def _write(voxels: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64], path: Path) -> None:
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    # Without a time in the header of gzip, which would make every file another one.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_table(rows: Sequence[Cells], path: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def _check(
    modality: str,
    shape: Sequence[int],
    spacing: Sequence[float],
    seed: int,
    snps: int,
    scanners: Sequence[str] = tuple(SCANNERS),
) -> None:
    if modality not in _MODALITIES:
        raise _refused("modality", repr(modality), "mr or ct", "modality")
    if not _three(shape) or not all(_whole(edge) and edge >= _LEAST_VOXELS for edge in shape):
        raise _refused("shape", shape, f"three whole numbers of at least {_LEAST_VOXELS}", "shape")
    if not _three(spacing) or not all(_number(edge) and 0.05 <= edge <= 50 for edge in spacing):
        raise _refused("spacing", spacing, "three numbers from 0.05 to 50, millimetres", "spacing")
    if not _whole(seed):
        raise _refused("seed", repr(seed), "a whole number", "seed")
    _refuse_number("snps", snps, 0)
    if isinstance(scanners, str) or not scanners or not set(scanners) <= set(SCANNERS):
        raise _refused("scanners", scanners, f"names among {', '.join(SCANNERS)}", "scanners")


def _limits(scans: int | Sequence[int]) -> tuple[int, int]:
    """The lowest and the highest number of scans."""
    pair = (scans, scans) if isinstance(scans, int | np.integer) else scans
    usable = isinstance(pair, Sequence) and len(pair) == 2 and all(_whole(number) for number in pair)
    if not usable or not 1 <= pair[0] <= pair[1]:
        raise _refused("scans_per_patient", scans, "a number from 1, or the lowest and highest", "scans_per_patient")
    return int(pair[0]), int(pair[1])


def _refuse_number(name: str, value: int, least: int) -> None:
    if not _whole(value) or value < least:
        raise _refused(name, repr(value), f"a whole number from {least}", name)


def _three(value: object) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and len(value) == 3


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return _whole(value) or (isinstance(value, float | np.floating) and math.isfinite(value))


def _refused(what: str, got: object, wanted: str, name: str) -> ConfigError:
    return ConfigError(f"The phantom's {what} is unusable.", got=got, wanted=wanted, fix=f"Change {name}.")
