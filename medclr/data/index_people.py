"""Whose each scan is: one id for all scans of a patient, whatever their type; days count from the first study.

A scan may be known by itself (DICOM: PatientID and its issuer; BIDS: data set and subject) and by what the user says (a
pattern or a table). The user's word counts; it also counts for the scans of that PatientID or subject of which it says
nothing. An id of the user's, or a PatientID without issuer, is that of the one issuer that the folder has for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from typing import Final, NamedTuple

from medclr.data.index_store import Store
from medclr.data.privacy import parse_date

Person = tuple[str, str]
"""Id, and who issued it."""

BIRTHS: Final = "patients with several dates of birth"
SEXES: Final = "patients with several sexes (none is given in their rows)"
SPLIT: Final = "ids of headers that a table or pattern gives to several patients"
SHARED: Final = "identical volumes under several patients (one is kept)"


class People(NamedTuple):
    """What is known of all patients."""

    first: dict[str, str]
    """Date of the first study, by patient."""
    doubtful_sex: set[str]
    """Patients whose scans name several."""
    conflicts: dict[str, int]
    """How many, by what is wrong."""


def person(text: str, issuer: str = "") -> str:
    """A person as the store holds it."""
    return json.dumps([text, issuer])


def resolve(store: Store, pseudonym: Callable[[str, str], str]) -> dict[str, int]:
    """Give every scan of the store its patient.

    Args:
        store: scans with ``given`` and ``native``; takes ``patient``.
        pseudonym: of an id and its issuer.

    Returns:
        what does not fit together, and how often.
    """
    database = store.database
    pairs = database.execute("SELECT DISTINCT given, native FROM scans").fetchall()
    said: dict[Person, set[Person]] = {}
    issuers: dict[str, set[str]] = {}
    for given, native in pairs:
        if native:
            text, issuer = json.loads(native)
            if issuer and not issuer.startswith("bids:"):
                issuers.setdefault(text, set()).add(issuer)
            if given:
                said.setdefault((text, issuer), set()).add(tuple(json.loads(given)))
    for given, native in pairs:
        who: Person = tuple(json.loads(given or native))
        if not given and len(said.get(who, ())) == 1:
            who = next(iter(said[who]))
        known = issuers.get(who[0], set())
        if not who[1] and len(known) == 1:
            who = (who[0], next(iter(known)))
        database.execute(
            "UPDATE scans SET patient = ? WHERE given IS ? AND native IS ?", (pseudonym(*who), given, native)
        )
    split = sum(len(people) > 1 for people in said.values())
    return {SPLIT: split} if split else {}


def people_of(store: Store) -> People:
    """First studies and contradictions, once the patients of all scans are known."""
    database = store.database
    first = dict(database.execute("SELECT patient, MIN(date) FROM scans WHERE date != '' GROUP BY patient"))
    several = "SELECT patient FROM scans WHERE {0} != '' GROUP BY patient HAVING COUNT(DISTINCT {0}) > 1"
    births = len(database.execute(several.format("birth")).fetchall())
    sexes = {patient for (patient,) in database.execute(several.format("sex"))}
    conflicts = {what: count for what, count in ((BIRTHS, births), (SEXES, len(sexes))) if count}
    return People(first, sexes, conflicts)


def days_between(first: str, later: str) -> int | None:
    """Days from one date (YYYY-MM-DD) to another; None where one is none."""
    try:
        return (date.fromisoformat(later) - date.fromisoformat(first)).days
    except ValueError:
        return None


def plain_date(text: str) -> str:
    """YYYY-MM-DD of a date as headers and tables write it; else nothing."""
    found = parse_date(text)
    return "" if found is None else found.isoformat()
