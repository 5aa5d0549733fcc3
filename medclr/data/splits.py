"""Splits, folds and nested label fractions, by patient.

Every function takes patients in the order of their first appearance and draws from the seed alone. The text of an id
plays no part, so giving patients new pseudonyms leaves a split as it is, and two sections never share a patient.
Rows with the same voxels (``content``) under two patients are refused, since they could end on both sides.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from medclr.data.datalist import Datalist, Row
from medclr.data.strata import Patients, apportion, chosen_columns, spread
from medclr.draws import stable_seed
from medclr.errors import ConfigError, DatalistError
from medclr.keys import LABEL, SECTIONS, TEST, TRAINING, VALIDATION


def split_patients(
    rows: Sequence[Row],
    *,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int,
    stratify: str | Sequence[str] | None = None,
) -> dict[str, list[Row]]:
    """Divide patients into training, validation and test.

    Args:
        rows: datalist rows; they keep their order within a section.
        fractions: of the patients, for training, validation and (optionally) test; they sum to 1. A section whose
            fraction is exactly 0 is left out.
        seed: any whole number.
        stratify: column or columns whose values should be spread evenly, what matters most first. A patient's value is
            the first that is not missing, and missing where all are; a label that is a mask counts as labelled; numbers
            with more than ``strata.MANY_VALUES`` values are binned by quantiles. Combinations of values with fewer
            patients than there are sections are merged, the last column first, and the log says so.

    Returns:
        rows by section name.

    Raises:
        DatalistError: unusable fractions, a section that would be empty, a column that no row has, or two patients with
            the same voxels.

    Example:
        >>> rows = [{"image": f"{n}.nii", "patient_id": str(n // 2)} for n in range(20)]
        >>> {name: len(part) for name, part in split_patients(rows, fractions=(0.8, 0.2), seed=0).items()}
        {'training': 16, 'validation': 4}
    """
    usable = len(fractions) in (2, 3) and min(fractions) >= 0 and fractions[0] > 0 and abs(sum(fractions) - 1) < 1e-6
    if not usable:
        raise DatalistError(
            "The fractions of a split are unusable.",
            got=list(fractions),
            wanted="two or three fractions that sum to 1: training (above 0), validation, test",
            fix="Set --fractions 0.7,0.15,0.15",
        )
    patients = Patients(rows, stratify)
    patients.refuse_shared_contents()
    patients.merge_rare(sum(fraction > 0 for fraction in fractions))
    counts = apportion(len(patients), fractions)
    for name, fraction, count in zip(SECTIONS, fractions, counts, strict=False):
        if fraction > 0 and count == 0:
            raise DatalistError(
                f"The fraction of {name} leaves the section empty.",
                got=f"{fraction} of {len(patients)} patient(s)",
                wanted="at least one patient in every section",
                fix="Raise the fraction, set it to 0 to leave the section out, or use folds.",
            )
    order = spread(patients.codes(), seed, "split")
    stops = [0, *accumulate(counts)]
    return {
        name: patients.rows_of(order[start:stop])
        for name, start, stop in zip(SECTIONS, stops, stops[1:], strict=False)
        if stop > start
    }


def k_folds(
    rows: Sequence[Row], k: int, seed: int, stratify: str | Sequence[str] | None = None
) -> list[tuple[list[Row], list[Row]]]:
    """Cross-validation by patient: ``k`` pairs of (training rows, validation rows); each row is validated once.

    Args:
        rows: datalist rows.
        k: number of folds, from 2 to the number of patients.
        seed: any whole number.
        stratify: as in :func:`split_patients`; combinations with fewer than ``k`` patients are merged.

    Raises:
        DatalistError: an impossible ``k``, a column that no row has, or two patients with the same voxels.
    """
    from sklearn.model_selection import KFold, StratifiedKFold  # takes a second, and only this function needs it

    patients = Patients(rows, stratify)
    patients.refuse_shared_contents()
    if not isinstance(k, int) or not 2 <= k <= len(patients):
        raise DatalistError(
            "The number of folds is impossible.",
            got=f"{k} folds of {len(patients)} patients",
            wanted="a whole number from 2 to the number of patients",
            fix="Ask for fewer folds.",
        )
    patients.merge_rare(k)
    state = stable_seed(seed, "folds") % 2**32
    splitter = (StratifiedKFold if stratify else KFold)(k, shuffle=True, random_state=state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the rest that merging leaves, which the log has told of
        return [
            (patients.rows_of(training), patients.rows_of(validation))
            for training, validation in splitter.split(np.zeros(len(patients)), patients.codes())
        ]


def nested_fractions(
    rows: Sequence[Row],
    fractions_or_counts: Sequence[int | float],
    seed: int,
    *,
    stratify: str | Sequence[str] | None = None,
) -> list[list[Row]]:
    """Subsets that nest: each is the start of one seeded order of patients, so 1 patient lies in 3, and 3 in 10.

    Args:
        rows: datalist rows.
        fractions_or_counts: whole numbers are numbers of patients; others are fractions of the patients, in (0, 1].
        seed: any whole number.
        stratify: as in :func:`split_patients`; every subset then has about the same mixture. A stratum of one is fine.

    Returns:
        one list of rows for each amount, in the order given.

    Raises:
        DatalistError: an amount of no patient or of more than there are, or a column that no row has.
    """
    patients = Patients(rows, stratify)
    counts = [_count(amount, len(patients)) for amount in fractions_or_counts]
    order = spread(patients.codes(), seed, "nested")
    return [patients.rows_of(order[:count]) for count in counts]


def split_datalist(
    datalist: Datalist,
    *,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int,
    stratify: str | Sequence[str] | None = None,
) -> Datalist:
    """Divide the training section with :func:`split_patients`; a section that is there already is never overwritten.

    Raises:
        DatalistError: as :func:`split_patients`, or a section that the split would make is there already.
    """
    made = split_patients(datalist.section(TRAINING), fractions=fractions, seed=seed, stratify=stratify)
    kept = {name: rows for name, rows in datalist.sections.items() if name != TRAINING and rows}
    clash = sorted(made.keys() & kept.keys())
    if clash:
        raise DatalistError(
            "The datalist is split already.",
            got=f"a section {' and '.join(clash)} with rows",
            wanted="rows under training alone, or fractions that leave the existing sections out",
            fix="Split the original datalist, or use --folds, or set the fraction of that section to 0.",
        )
    settings = {"fractions": list(fractions), "seed": seed, "stratify": stratify}
    return _like(datalist, {**made, **kept}, settings)


def fold_datalists(
    datalist: Datalist, k: int, seed: int, stratify: str | Sequence[str] | None = None
) -> list[Datalist]:
    """``k`` datalists whose training and validation sections are the folds of both together; test is left as it is.

    Raises:
        DatalistError: as :func:`k_folds`.
    """
    folds = k_folds(datalist.training + datalist.validation, k, seed, stratify)
    test = {TEST: datalist.test} if datalist.test else {}
    return [
        _like(
            datalist,
            {TRAINING: training, VALIDATION: validation, **test},
            {"fold": fold, "folds": k, "seed": seed, "stratify": stratify},
        )
        for fold, (training, validation) in enumerate(folds)
    ]


def labelled_datalists(
    datalist: Datalist,
    amounts: Sequence[int | float],
    seed: int,
    stratify: str | Sequence[str] | None = None,
) -> list[Datalist]:
    """Datalists that keep, of training, the labelled rows of so many patients; the subsets nest, the rest stays.

    Fractions count patients that have a label.

    Raises:
        DatalistError: as :func:`nested_fractions`, or no training row has a label.
    """
    rows = [row for row in datalist.section(TRAINING) if row.get(LABEL) is not None]
    if not rows:
        raise DatalistError(
            "No training row has a label.",
            got=f"{len(datalist.training)} rows without {LABEL!r}",
            wanted="at least one labelled patient",
            fix="Index the folder with --labels, or leave --labelled out.",
        )
    subsets = nested_fractions(rows, amounts, seed, stratify=stratify)
    return [
        _like(datalist, {**datalist.sections, TRAINING: subset}, {"labelled": amount, "labelled_seed": seed})
        for amount, subset in zip(amounts, subsets, strict=True)
    ]


def make_splits(
    datalist: Datalist,
    *,
    fractions: Sequence[float] | None = None,
    folds: int | None = None,
    labelled: Sequence[int | float] = (),
    seed: int,
    stratify: str | Sequence[str] | None = None,
) -> dict[str, Datalist]:
    """What ``medclr split`` writes: datalists by what is added to the name of the file, such as ``fold0.labelled3``.

    Without ``fractions`` and ``folds``, a datalist that is split already keeps its sections if ``labelled`` is given
    (and is not written again); any other is split 0.7, 0.15, 0.15.

    Args:
        datalist: whose training section is split; for folds, with the validation section.
        fractions: as in :func:`split_patients`.
        folds: as in :func:`k_folds`.
        labelled: as in :func:`labelled_datalists`.
        seed: any whole number.
        stratify: as in :func:`split_patients`. None is by label (the class, or labelled or not) and site, as far as
            patients differ in them; where they do not, the split is that of ``"none"``, which looks at no column.

    Raises:
        ConfigError: both fractions and folds.
        DatalistError: as :func:`split_datalist`, :func:`fold_datalists` and :func:`labelled_datalists`.
    """
    if folds is not None and fractions is not None:
        raise ConfigError(
            "A split is either by fractions or by folds.",
            got=f"fractions {list(fractions)} and {folds} folds",
            wanted="one of the two",
            fix="To fold what is not test: split off a test section first, then fold the result.",
        )
    made: dict[str, Datalist] = {}
    bases = {"": datalist}
    if folds is not None:
        columns = chosen_columns(stratify, datalist.training + datalist.validation)
        made = {f"fold{i}": part for i, part in enumerate(fold_datalists(datalist, folds, seed, columns))}
        bases = made
    elif fractions is not None or not labelled or not (datalist.validation or datalist.test):
        columns = chosen_columns(stratify, datalist.training)
        made = {"": split_datalist(datalist, fractions=fractions or (0.7, 0.15, 0.15), seed=seed, stratify=columns)}
        bases = made
    subsets: dict[str, Datalist] = {}
    for name, base in bases.items() if labelled else ():
        columns = chosen_columns(stratify, [row for row in base.training if row.get(LABEL) is not None])
        for amount, subset in zip(labelled, labelled_datalists(base, labelled, seed, columns), strict=True):
            subsets[f"{name}.labelled{amount}".lstrip(".")] = subset
    return {**made, **subsets}


def _like(datalist: Datalist, sections: dict[str, list[Row]], settings: dict[str, object]) -> Datalist:
    before = datalist.extra.get("split")
    split = {**(before if isinstance(before, dict) else {}), **settings}
    return Datalist(sections=sections, root=datalist.root, extra={**datalist.extra, "split": split})


def _count(amount: int | float, total: int) -> int:
    if isinstance(amount, bool):
        count = 0
    elif isinstance(amount, int):
        count = amount
    else:
        count = math.floor(total * amount + 0.5) if 0 < amount <= 1 else 0
    if not 1 <= count <= total:
        raise DatalistError(
            "An amount of patients is impossible.",
            got=f"{amount} of {total} patients",
            wanted=f"a whole number from 1 to {total}, or a fraction in (0, 1] that gives at least one patient",
            fix="Ask for another amount.",
        )
    return count
