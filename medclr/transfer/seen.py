"""Whom weights have seen: nobody is tested on patients that a network was pretrained or fine-tuned on unawares.

Weights carry digests of their patients (:mod:`medclr.weights.patients`), and a patient is known again by the text of
``patient_id``. ``medclr index`` makes those texts with a key that stays with the user: scans that were indexed with
another key, elsewhere or before the key was lost, have other ids, and then the check finds nobody, whoever they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medclr import distributed
from medclr.data.datalist import Datalist, Row
from medclr.errors import DatalistError, WeightsError
from medclr.keys import PATIENT_ID, SECTIONS, TEST, TRAINING, VALIDATION
from medclr.transfer.checkpoint import is_network, patients_of_network
from medclr.weights import find_manifest, patient_digest, patient_digests
from medclr.weights.patients import checked_digests, joined

logger = logging.getLogger(__name__)

PRETRAINING = "pretraining"
"""What patients are to a network whose encoder was pretrained on them."""


@dataclass(frozen=True)
class _Known:
    """The digests that a file holds; None is unknown."""

    training: Sequence[str] | None
    """Of those it was trained on itself: pretrained for an encoder, fine-tuned for a network."""
    validation: Sequence[str] | None
    pretraining: Sequence[str] | None
    """Of those that a network's encoder was pretrained on; empty from scratch, and for an encoder itself."""
    verb: str


def seen_patients(
    datalist: Datalist, pretrained: str | Path | None = None, *, validation: bool = True
) -> dict[str, list[str] | None]:
    """Digests of the patients that a training on a datalist knows, for the weights that come of it.

    Args:
        datalist: whose training section is trained on, all of it, whatever a quarantine leaves out.
        pretrained: the encoder that it starts from; None for a start from scratch.
        validation: whether the validation section is looked at.

    Returns:
        Lists under ``training``, ``validation`` and ``pretraining``; the last is None if ``pretrained`` says nothing.

    Raises:
        WeightsError: ``pretrained`` is not there or cannot be read.

    Example:
        In a bundle: ``$medclr.transfer.seen_patients(@data, @pretrained, validation=@val_interval > 0)``
    """
    encoder = _Known([], [], [], "") if pretrained is None else _read(pretrained)
    return {
        TRAINING: patient_digests(datalist.training),
        VALIDATION: joined(patient_digests(datalist.validation) if validation else [], encoder.validation),
        PRETRAINING: None if encoder.training is None else joined(encoder.training, encoder.pretraining),
    }


def check_unseen(
    weights: str | Path | None,
    datalist: Datalist | Sequence[Row],
    section: str | Sequence[str] = (TEST, VALIDATION),
    *,
    allow: bool = False,
) -> dict[str, int]:
    """Refuse to test on patients that weights were pretrained or fine-tuned on.

    For a bundle's ``initialize``, before scans are read. Patients of a training section may have been seen. Those of a
    validation section are a warning, as are test patients whom a training looked at without being trained on them, and
    a file that does not say whom it knows: another's weights, or an older file. Ids are compared as they are: scans
    that ``medclr index`` read with another key have other ids, and cannot be told from new patients.

    Args:
        weights: an encoder with its manifest, or a checkpoint of :class:`~medclr.transfer.SaveNetwork`; None, a start
            from scratch, knows nobody.
        datalist: the datalist, or rows to test on.
        section: which of its sections are looked at; one that is not there is left out.
        allow: a warning rather than an error: ``allow_seen_patients: true`` in a bundle.

    Returns:
        How many patients of each section were trained on, by section; 0 also where it is not known.

    Raises:
        DatalistError: test patients were; it says how many, not who.
        WeightsError: the file is not there or cannot be read.

    Example:
        In a bundle: ``$medclr.transfer.check_unseen(@pretrained, @data, allow=@allow_seen_patients)``
    """
    wanted = [section] if isinstance(section, str) else list(section)
    sections = datalist.sections if isinstance(datalist, Datalist) else {TEST: list(datalist)}
    people = {name: {patient_digest(row[PATIENT_ID]) for row in sections.get(name, [])} for name in wanted}
    people = {name: digests for name, digests in people.items() if digests and name != TRAINING}
    counts = dict.fromkeys(people, 0)
    if weights is None or not people:
        return counts
    file, known = Path(weights).name, _read(weights)
    for name, digests in people.items():
        for verb, seen in ((known.verb, known.training), ("pretrained", known.pretraining)):
            both = len(digests & set(seen or ()))
            counts[name] = max(counts[name], both)
            if both and name == TEST and not allow:
                raise _refusal(both, len(digests), file, verb)
            if both:
                _warn("%d of %d patients of %s were seen: %s was %s on them", both, len(digests), name, file, verb)
        both = len(digests & set(known.validation or ()))
        if both and name == TEST:
            text = "%d of %d patients of %s were looked at while %s was trained, though it was not trained on them"
            _warn(text, both, len(digests), name, file)
    if known.training is None or known.pretraining is None:
        whom = known.verb if known.training is None else "pretrained"
        _warn("%s does not say whom it was %s on: whether it has seen the patients cannot be known", file, whom)
    elif not any(counts.values()) and isinstance(datalist, Datalist):
        _say_if_strangers(datalist, known, file)
    return counts


def _say_if_strangers(datalist: Datalist, known: _Known, file: str) -> None:
    """Nobody in common is what new patients look like, and what another key looks like."""
    everybody = {patient_digest(row[PATIENT_ID]) for name in SECTIONS for row in datalist.sections.get(name, [])}
    theirs = set(joined(known.training, known.validation, known.pretraining) or ())
    if theirs and not everybody & theirs and distributed.rank() == 0:
        logger.info(
            "none of the %d patients of the datalist is among the %d that %s knows. Ids that were made with another "
            "key cannot be compared",
            len(everybody),
            len(theirs),
            file,
        )


def _read(weights: str | Path) -> _Known:
    path = Path(weights)
    if not path.is_file():
        raise WeightsError(
            "The weights are not there.",
            got=str(weights),
            wanted="a file such as encoder.safetensors, or best.pt or last.pt of a segmentation run",
            fix="Correct the path; for a start from scratch, leave pretrained out.",
        )
    if is_network(path):
        about: Mapping[str, Any] = patients_of_network(path) or {}
        lists = {use: checked_digests(use, about.get(use)) for use in (TRAINING, VALIDATION, PRETRAINING)}
        return _Known(lists[TRAINING], lists[VALIDATION], lists[PRETRAINING], "fine-tuned")
    manifest = find_manifest(path)
    if manifest is None:
        return _Known(None, None, [], "pretrained")
    return _Known(manifest.patient_digests, manifest.validation_digests, [], "pretrained")


def _refusal(seen: int, patients: int, file: str, verb: str) -> DatalistError:
    return DatalistError(
        "Patients of the test section have been seen.",
        got=f"{seen} of {patients} patients, whom {file} was {verb} on",
        wanted="test patients that the weights have never seen, or the result says nothing about new ones",
        fix="Use one datalist of `medclr split` for pretraining and for all that follows, or take these patients out "
        "of the test section. To go on all the same, and say so with the result: allow_seen_patients: true",
    )


def _warn(text: str, *values: object) -> None:
    if distributed.rank() == 0:
        logger.warning(text, *values)
