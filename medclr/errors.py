"""medclr's errors say what was got, what was wanted, and how to fix it, and they say it last.

MONAI wraps whatever a bundle's configuration raises in its own ``RuntimeError``, so the line that helps ends up in the
middle of a long traceback. :func:`show_errors_last` puts it back at the end.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from types import TracebackType


class MedclrError(Exception):
    """Base of all errors that medclr raises on purpose.

    Args:
        problem: one sentence.
        got: the offending value, shortened by the caller where it could be long.
        wanted: what would have been right.
        fix: what the user can do now.

    Example:
        >>> print(MedclrError("The temperature is bad.", got=0, wanted="a number > 0", fix="Set temperature: 0.1."))
        The temperature is bad.
          got:    0
          wanted: a number > 0
          fix:    Set temperature: 0.1.
    """

    def __init__(self, problem: str, *, got: object, wanted: object, fix: str) -> None:
        self.problem, self.got, self.wanted, self.fix = problem, got, wanted, fix
        super().__init__(problem)

    def __str__(self) -> str:
        return f"{self.problem}\n  got:    {self.got}\n  wanted: {self.wanted}\n  fix:    {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and data loader workers pickle what they raise.
        return _rebuild, (type(self), self.problem, str(self.got), str(self.wanted), self.fix)


class ConfigError(MedclrError):
    """A setting of a bundle or an argument of a class cannot work."""


class DatalistError(MedclrError):
    """A datalist, or a row of one, is wrong."""


class ScanError(MedclrError):
    """One scan cannot be used. A run quarantines the scan with this reason and goes on."""


class WeightsError(MedclrError):
    """Weights do not fit, or cannot be trusted."""


def _rebuild(kind: type[MedclrError], problem: str, got: str, wanted: str, fix: str) -> MedclrError:
    return kind(problem, got=got, wanted=wanted, fix=fix)


def find_cause(error: BaseException | None) -> MedclrError | None:
    """The first :class:`MedclrError` in the chain of causes of ``error``, outermost first."""
    return next((link for link in causes(error) if isinstance(link, MedclrError)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of, outermost first; each once, also where the chain is a ring."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def show_errors_last() -> None:
    """Make an uncaught error end with medclr's own lines, also where MONAI wrapped it. Safe to call repeatedly."""
    if not isinstance(sys.excepthook, _ErrorsLast):
        sys.excepthook = _ErrorsLast(sys.excepthook)


class _ErrorsLast:
    def __init__(self, previous: object) -> None:
        self.previous = previous

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if callable(self.previous):
            self.previous(kind, error, trace)
        cause = find_cause(error) or _from_bundle(error, trace)
        if cause is not None:
            print(f"\n{type(cause).__name__}: {cause}", file=sys.stderr)


def _from_bundle(error: BaseException, trace: TracebackType | None) -> MedclrError | None:
    """What a bundle's configuration raised that is not medclr's: the innermost cause, in our form; else None."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    if not isinstance(error, Exception) or not any("monai/bundle/" in file.replace("\\", "/") for file in files):
        return None
    cause: BaseException = error
    seen: set[int] = set()
    while id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__ or cause
    return ConfigError(
        "The configuration cannot be run.",
        got=f"{type(cause).__name__}: {' '.join(str(cause).split())[:300] or 'no reason given'}",
        wanted="settings that MONAI can build and run",
        fix="The traceback above names the item of the configuration; look at it, and at what the command line sets.",
    )
