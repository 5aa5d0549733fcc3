"""Every package that medclr pulls in is free to use, change and pass on: a permissive licence, or MPL-2.0."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

ALLOWED = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "MIT", "MIT-CMU",
    "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
}  # fmt: skip
ALLOWED_EXCEPTIONS = {"LLVM-exception"}

# What the trove classifiers of the licences above are called. "BSD License" leaves open which; all are permissive.
CLASSIFIERS = {
    "Apache Software License", "BSD License", "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication",
    "Historical Permission Notice and Disclaimer (HPND)", "ISC License (ISCL)", "MIT License",
    "Mozilla Public License 2.0 (MPL 2.0)", "Python Software Foundation License", "The Unlicense (Unlicense)",
    "Zero-Clause BSD (0BSD)", "zlib/libpng License",
}  # fmt: skip
# These say that a licence is approved by somebody, not which it is.
SILENT_CLASSIFIERS = {"OSI Approved", "DFSG approved"}

# Ways in which packages spell a licence in the free-text field.
SPELLINGS = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "isc license": "ISC",
    "mit license": "MIT",
}

# NVIDIA's own libraries come with the CUDA builds of torch alone, under NVIDIA's terms. A CPU build has none of them,
# and medclr neither names nor ships them: whoever chooses a CUDA build has them from torch.
PROPRIETARY = re.compile(r"(nvidia|cuda)-[a-z0-9-]+")

# Packages whose metadata name no licence: name -> (licence, where it was read). None at present.
READ_ELSEWHERE: dict[str, tuple[str, str]] = {}


def is_allowed(expression: str) -> bool:
    """Whether an SPDX expression leaves a way to use the package under the allowed licences alone."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression)

    def alternatives() -> bool:
        verdict = together()
        while tokens and tokens[0].upper() == "OR":
            tokens.pop(0)
            verdict = together() or verdict
        return verdict

    def together() -> bool:
        verdict = one()
        while tokens and tokens[0].upper() == "AND":
            tokens.pop(0)
            verdict = one() and verdict
        return verdict

    def one() -> bool:
        if not tokens:
            return False
        token = tokens.pop(0)
        if token == "(":
            verdict = alternatives()
            return bool(tokens) and tokens.pop(0) == ")" and verdict
        verdict = token in ALLOWED
        if tokens and tokens[0].upper() == "WITH":
            tokens.pop(0)
            verdict = bool(tokens) and tokens.pop(0) in ALLOWED_EXCEPTIONS and verdict
        return verdict

    verdict = alternatives()
    return verdict and not tokens


def licence_problem(package: Distribution) -> str | None:
    """Why a package may not be used, or None. All that its metadata say of its licence has to be allowed."""
    name = canonicalize_name(package.metadata["Name"])
    if PROPRIETARY.fullmatch(name):
        return None
    if name in READ_ELSEWHERE:
        licence = READ_ELSEWHERE[name][0]
        return None if is_allowed(licence) else f"{name}: {licence}"
    expression = package.metadata["License-Expression"]
    if expression:
        return None if is_allowed(expression) else f"{name}: {expression}"
    classifiers = {
        text.split("::")[-1].strip()
        for text in package.metadata.get_all("Classifier") or []
        if text.startswith("License ::")
    } - SILENT_CLASSIFIERS
    if classifiers - CLASSIFIERS:
        return f"{name}: {', '.join(sorted(classifiers - CLASSIFIERS))}"
    text = (package.metadata["License"] or "").strip()
    if not text or "\n" in text:
        # A whole licence pasted into the field is not parsed; the classifier then has to say which it is.
        return None if classifiers else f"{name}: its metadata name no licence"
    return None if is_allowed(SPELLINGS.get(text.lower(), text)) else f"{name}: {text}"


def pulled_in(name: str, extras: Iterable[str] = ()) -> dict[str, Distribution]:
    """An installed package and all that its requirements bring, with the given extras, on this machine."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    while waiting:
        key = name, extra = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        found[canonicalize_name(name)] = package = distribution(name)
        for requirement in map(Requirement, package.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return found


@pytest.fixture(scope="module")
def packages() -> dict[str, Distribution]:
    return pulled_in("medclr", ("dev",))


def test_every_package_has_a_permissive_licence(packages: dict[str, Distribution]) -> None:
    problems = [problem for package in packages.values() if (problem := licence_problem(package))]
    assert problems == []


def test_the_walk_reaches_what_is_required_indirectly(packages: dict[str, Distribution]) -> None:
    assert {"torch", "sympy", "mpmath", "monai", "scikit-learn", "scipy", "mypy", "librt"} <= packages.keys()
    assert len(packages) > 50


def test_every_package_is_pinned(packages: dict[str, Distribution]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"(#.*)|[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line) for line in lines), "only exact pins"
    left_out = {name for name in packages if name in ("medclr", "torch", "triton") or PROPRIETARY.fullmatch(name)}
    assert packages.keys() - pins - left_out == set(), "run `make constraints`"
    assert pins & left_out == set()


class Fake(Distribution):
    """A package that is nothing but its metadata."""

    def __init__(self, *fields: str) -> None:
        self.text = "\n".join(["Metadata-Version: 2.4", "Name: fake", "Version: 1.0", *fields]) + "\n\n"

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:
        raise FileNotFoundError(path)


@pytest.mark.parametrize(
    "fields",
    [
        ["License-Expression: GPL-3.0-or-later"],
        ["License-Expression: MIT AND LGPL-2.1-only"],
        ["License-Expression: Apache-2.0 WITH Commons-Clause"],
        ["Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"],
        ["Classifier: License :: OSI Approved :: MIT License", "Classifier: License :: Other/Proprietary License"],
        ["License: GPL", "Classifier: License :: OSI Approved :: MIT License"],
        ["License: MIT AND AGPL-3.0"],
        ["License: GNU General Public License", "        and all of its text"],
        ["Classifier: License :: OSI Approved"],
        ["License: see the website"],
        [],
    ],
)
def test_a_package_that_is_not_free_enough_is_refused(fields: list[str]) -> None:
    assert "fake: " in (licence_problem(Fake(*fields)) or "")


@pytest.mark.parametrize(
    "fields",
    [
        ["License-Expression: MIT"],
        ["License-Expression: GPL-2.0-only OR (MIT AND Apache-2.0 WITH LLVM-exception)"],
        ["License: Apache 2.0"],
        ["License: MPL-2.0 AND MIT", "Classifier: License :: DFSG approved"],
        ["Classifier: License :: OSI Approved :: BSD License"],
        ["License: Copyright", "        and all of its text", "Classifier: License :: OSI Approved :: MIT License"],
    ],
)
def test_a_package_that_is_free_is_let_through(fields: list[str]) -> None:
    assert licence_problem(Fake(*fields)) is None


@pytest.mark.parametrize("expression", ["", "(MIT", "MIT)", "MIT AND", "OR MIT", "MIT Apache-2.0", "Apache-2.0 WITH"])
def test_an_expression_that_does_not_parse_allows_nothing(expression: str) -> None:
    assert not is_allowed(expression)


def test_nvidias_libraries_are_the_only_ones_exempt() -> None:
    exempt = Fake("License: NVIDIA Proprietary Software")
    exempt.text = exempt.text.replace("Name: fake", "Name: nvidia-cublas-cu13")
    assert licence_problem(exempt) is None
    assert licence_problem(Fake("License: NVIDIA Proprietary Software")) is not None


def test_a_silent_package_counts_by_what_was_read_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READ_ELSEWHERE, "fake", ("MIT", "the file LICENSE of its source"))
    assert licence_problem(Fake()) is None
    monkeypatch.setitem(READ_ELSEWHERE, "fake", ("GPL-3.0-only", "the file LICENSE of its source"))
    assert licence_problem(Fake()) == "fake: GPL-3.0-only"


def test_a_package_that_is_missing_is_an_error() -> None:
    with pytest.raises(PackageNotFoundError):
        pulled_in("a-package-that-nobody-has-installed")
