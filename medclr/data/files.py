"""JSON files: read with clear errors, written in one step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medclr.disk import replacing, try_writing
from medclr.errors import DatalistError


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        DatalistError: the file cannot be read, is no JSON, holds one key twice in an object, or is no object.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise unreadable(path, f"{error}", "a file that can be read", "Check the path of the datalist.") from error
    except (ValueError, RecursionError) as error:
        fix = "Repair the JSON at that place, or make a new one with `medclr index`."
        raise unreadable(path, f"{error}", "JSON text", fix) from error
    if not isinstance(content, dict):
        fix = 'Write {"training": [row, ...]}.'
        raise unreadable(path, f"{type(content).__name__} at the top", "an object with sections", fix)
    return content


def unreadable(path: Path, got: str, wanted: str, fix: str) -> DatalistError:
    """The error for a file that is no datalist."""
    return DatalistError("The datalist cannot be read.", got=f"{path}: {got}", wanted=wanted, fix=fix)


def dump_json(value: object, key: str) -> str:
    """JSON in ASCII, so that readers with any encoding take it.

    Raises:
        DatalistError: NaN, infinity, or an object that JSON has no form for, under the given ``key``.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DatalistError(
            "The datalist cannot be written as JSON.",
            got=f"{error}, under {key!r}",
            wanted="text, finite numbers, true, false, null, lists and objects",
            fix="Replace the value.",
        ) from error


def write_text(text: str, path: Path) -> None:
    """Write a file in one step: a reader sees the old content or the new, and so does whoever comes after a crash.

    Raises:
        DatalistError: the file cannot be written.
    """
    with writing(path), replacing(path) as file:
        file.write(text.encode())


def refuse_unwritable(path: Path) -> None:
    """Find out before long work that its result could not be written; makes the folder.

    Raises:
        DatalistError: the file cannot be written.
    """
    with writing(path):
        try_writing(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in the project's words that ``path`` cannot be written.

    Raises:
        DatalistError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DatalistError(
            "A file cannot be written.",
            got=f"{path}: {error}",
            wanted="a path in a folder that you may write to, with space left",
            fix="Give another output path.",
        ) from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return content
