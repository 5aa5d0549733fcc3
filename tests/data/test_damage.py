"""Damaged datalists are refused, or give the rows that stand in them: damage of many kinds, each with its seed."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medclr.data.datalist import read_datalist
from medclr.errors import DatalistError

SEEDS = range(25)
SECTIONS = ("training", "validation", "test")
CONTENT: dict[str, Any] = {
    "name": "mine",
    "labels": {"0": "background", "1": "liver"},
    "dataset_dir": "scans",
    "training": [
        {"image": ["a.nii.gz", None], "patient_id": "P1", "label": "labels/a.nii.gz", "days": 3, "age": 61.5},
        {"image": ["b.nii.gz", "c.nii.gz"], "patient_id": 7, "label": "labels/b.nii.gz", "study_id": 12, "site": "X"},
    ],
    "validation": [{"image": [None, "sub/d.nii.gz"], "patient_id": "P3", "label": 1, "site": None}],
    "test": [{"image": ["sub/e.nii.gz", "f.nii.gz"], "patient_id": "P4", "label": "benign", "flag": True}],
}
FILES = [f"{name}.nii.gz" for name in ("a", "b", "c", "f", "sub/d", "sub/e", "labels/a", "labels/b")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datalist")
    for name in FILES:
        file = folder / "scans" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / "list.json").write_text(json.dumps(CONTENT, indent=1))
    return folder


# Damage to the bytes


def flip(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def cut(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


def chunk(content: bytearray, dice: random.Random) -> slice:
    start = dice.randrange(len(content))
    return slice(start, start + dice.choice((1, 2, 20, 100)))


def delete(content: bytearray, dice: random.Random) -> None:
    del content[chunk(content, dice)]


def repeat(content: bytearray, dice: random.Random) -> None:
    place = chunk(content, dice)
    content[place.start : place.start] = content[place]


def exchange(content: bytearray, dice: random.Random) -> None:
    one, other = chunk(content, dice), chunk(content, dice)
    first, second = content[one], content[other]
    content[one] = second
    content[other] = first


def overwrite(content: bytearray, dice: random.Random) -> None:
    place = chunk(content, dice)
    content[place] = dice.choice((dice.randbytes(3), bytes(3), b"9", b'"', b",", b"}", b"\\u0000"))


def lines(content: bytearray, dice: random.Random) -> None:
    """Whole lines are lost, doubled or moved, as a merge of two versions does."""
    text = content.split(b"\n")
    line = text.pop(dice.randrange(len(text)))
    for _ in range(dice.randrange(3)):
        text.insert(dice.randrange(len(text)), line)
    content[:] = b"\n".join(text)


# Damage to what stands in the file


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or number in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def remove(content: Any, dice: random.Random) -> None:
    container, key = dice.choice(list(places(content)))
    del container[key]


VALUES = [
    None,
    0,
    -1,
    7,
    1.5,
    7.0,
    -0.0,
    10**300,
    True,
    float("nan"),
    float("inf"),
    "",
    " ",
    "7",
    " P1 ",
    "P3",
    "liver",
]
VALUES += [[], {}, [None], [[]], {"a": 1}, ["a.nii.gz"], ["a.nii.gz", "a.nii.gz"], "\0", "\ud800", "\x1cP1", "NESTED"]
PATHS = [
    "../a.nii.gz",
    "sub/../f.nii.gz",
    "./f.nii.gz",
    "/etc/passwd",
    "/f.nii.gz",
    "//f.nii.gz",
    "{folder}/scans/f.nii.gz",
]
PATHS += [
    "f\n.nii.gz",
    "\x1b[2Jf.nii.gz",
    "f\0.nii.gz",
    "\ud800.nii.gz",
    "x/" * 3000 + "f.nii.gz",
    "x" * 300 + ".nii.gz",
]
PATHS += [
    "a.nii.gz/f.nii.gz",
    "~/f.nii.gz",
    "F.NII.GZ",
    "f.nii.gz ",
    "scans",
    "sub",
    "labels/a.nii.gz",
    "C:\\f.nii.gz",
    "..",
]


def replace(content: Any, dice: random.Random) -> None:
    container, key = dice.choice(list(places(content)))
    container[key] = dice.choice(VALUES)


def other_path(content: Any, dice: random.Random) -> None:
    text = [(container, key) for container, key in places(content) if isinstance(container[key], str)]
    container, key = dice.choice(text)
    container[key] = dice.choice(PATHS)


def rename(content: Any, dice: random.Random) -> None:
    container, key = dice.choice([place for place in places(content) if isinstance(place[0], dict)])
    names = ("image", "patient_id", "label", "days", "training", "test", "dataset_dir", "", "\ud800", "x" * 5000)
    container[dice.choice(names)] = container.pop(key)


def swap(content: Any, dice: random.Random) -> None:
    """Two sections, or any two values of one container."""
    container, key = dice.choice([place for place in places(content) if len(place[0]) > 1])
    other = dice.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]


def copy_row(content: Any, dice: random.Random) -> None:
    """A row once more, as it is or with another file of the same patient, in its own or another section."""
    row = copy.deepcopy(dice.choice(content[dice.choice(SECTIONS)]))
    if dice.random() < 0.5:
        row["image"] = ["labels/a.nii.gz", None]
    content[dice.choice(SECTIONS)].append(row)


BYTES: list[Callable[[bytearray, random.Random], None]] = [flip, cut, delete, repeat, exchange, overwrite, lines]
VALUES_OR_KEYS: list[Callable[[Any, random.Random], None]] = [remove, replace, other_path, rename, swap, copy_row]


def damaged(damage: Callable[[Any, random.Random], None], seed: int, folder: Path) -> bytes:
    dice = random.Random(f"{damage.__name__} {seed}")
    if damage in BYTES:
        changed = bytearray((folder / "list.json").read_bytes())
        damage(changed, dice)
        return bytes(changed)
    content = copy.deepcopy(CONTENT)
    for _ in range(dice.choice((1, 1, 2))):
        damage(content, dice)
    depth = dice.choice((3, 900, 975, 100_000))  # about as deep as Python's json can read, and deeper
    text = json.dumps(content).replace("{folder}", str(folder))
    return text.replace('"NESTED"', "[" * depth + "]" * depth).encode()


def meaning(text: bytes, folder: Path) -> str:
    """The rows of a datalist that was accepted, found in another way: ids as text, files with all links resolved."""
    content = json.loads(text)
    root = os.path.join(folder, content.get("dataset_dir") or "")
    result: dict[str, list[dict[str, Any]]] = {}
    for section in SECTIONS:
        for row in content.get(section, []):
            images = row["image"]
            known: dict[str, Any] = {
                "image": [image and os.path.realpath(os.path.join(root, image)) for image in images]
                if isinstance(images, list)
                else os.path.realpath(os.path.join(root, images))
            }
            if str(row.get("label")).endswith(".nii.gz"):
                known["label"] = os.path.realpath(os.path.join(root, row["label"]))
            ids = {name: str(row[name]).strip() for name in ("patient_id", "study_id", "series_id") if row.get(name)}
            result.setdefault(section, []).append({**row, **ids, **known})
    return json.dumps(result, sort_keys=True)


def digest_or_refusal(path: Path, seed: int) -> str | DatalistError:
    try:
        return read_datalist(path).digest()
    except DatalistError as error:
        return error
    except Exception as error:
        pytest.fail(f"seed {seed}: {error!r}")


@pytest.mark.parametrize("damage", [*BYTES, *VALUES_OR_KEYS])
def test_a_damaged_datalist_is_refused_or_gives_the_rows_that_stand_in_it(
    damage: Callable[[Any, random.Random], None], folder: Path
) -> None:
    whole, path = folder / "list.json", folder / "damaged.json"
    digest, rows = read_datalist(whole).digest(), meaning(whole.read_bytes(), folder)
    refused = 0
    for seed in SEEDS:
        text = damaged(damage, seed, folder)
        path.write_bytes(text)
        found = digest_or_refusal(path, seed)
        if isinstance(found, DatalistError):
            refused += 1
            assert re.search(r"\n  got: +\S(.|\n)*\n  wanted: +\S.*\n  fix: +\S", str(found)), f"seed {seed}: {found}"
            assert len(str(found)) < 3000, f"seed {seed}: {found}"
        else:
            assert (found == digest) == (meaning(text, folder) == rows), f"seed {seed}: {text!r}"
    assert refused


def test_what_means_the_same_has_the_same_digest(folder: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["training"][0]["image"][0] = "./sub/../a.nii.gz"
    content["training"][0]["label"] = str(folder / "scans" / "labels" / "a.nii.gz")
    content["training"][1]["patient_id"] = " 7 "
    text = json.dumps(dict(reversed(content.items())), indent=5)
    (folder / "same.json").write_text(text)
    assert meaning(text.encode(), folder) == meaning((folder / "list.json").read_bytes(), folder)
    assert read_datalist(folder / "same.json").digest() == read_datalist(folder / "list.json").digest()
