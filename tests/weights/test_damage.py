"""Damaged files are refused, or hold what they held before: damage of many kinds, each with its seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import SegResNet
from torch import Tensor

from medclr.errors import MedclrError, WeightsError
from medclr.models import Encoder
from medclr.weights import Manifest, find_manifest, load_encoder, read_manifest, save_encoder

SEEDS = range(17)


def network(seed: int) -> SegResNet:
    torch.manual_seed(seed)
    return SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,))


def snapshot(net: SegResNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in Encoder(net).state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "encoder.safetensors"
    save_encoder(path, network(1), Manifest("SimCLR", steps=300, run={"command": ["python"], "wall_s": 3.5}))
    return path


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flip(content: bytearray, place: int, dice: random.Random) -> None:
    content[place] ^= 1 << dice.randrange(8)


def cut(content: bytearray, place: int, dice: random.Random) -> None:
    del content[place:]


def overwrite(content: bytearray, place: int, dice: random.Random) -> None:
    length = min(dice.choice((1, 8, 512, 4096)), len(content) - place)
    content[place : place + length] = dice.randbytes(length)


def zero(content: bytearray, place: int, dice: random.Random) -> None:
    length = min(dice.choice((1, 8, 512, 4096)), len(content) - place)
    content[place : place + length] = bytes(length)


def insert(content: bytearray, place: int, dice: random.Random) -> None:
    content[place:place] = dice.choice((dice.randbytes(dice.randrange(1, 40)), content[place : place + 8] or b"x"))


def delete(content: bytearray, place: int, dice: random.Random) -> None:
    del content[place : place + dice.choice((1, 4, 512))]


def exchange(content: bytearray, place: int, dice: random.Random) -> None:
    """Two blocks of equal length change places: the length and the sum of all bytes stay."""
    end = header_end(content)
    length = 256
    one, other = dice.randrange(end, len(content) - length), dice.randrange(end, len(content) - length)
    first, second = content[one : one + length], content[other : other + length]
    content[one : one + length] = second
    content[other : other + length] = first


Damage = Callable[[bytearray, int, random.Random], None]
DAMAGES = [flip, cut, overwrite, zero, insert, delete, exchange]


def damaged(content: bytes, damage: Damage, seed: int) -> bytes:
    """By turns in the header, which is short, and anywhere."""
    dice = random.Random(f"{damage.__name__} {seed}")
    changed = bytearray(content)
    damage(changed, dice.randrange(header_end(content) if seed % 2 else len(content)), dice)
    return bytes(changed)


def result_or_refusal(function: Callable[[], Any], seed: int) -> Any:
    try:
        return function()
    except MedclrError as error:
        return error
    except Exception as error:
        pytest.fail(f"seed {seed}: {error!r}")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_or_gives_what_the_whole_one_gives(
    damage: Damage, whole: Path, tmp_path: Path
) -> None:
    path, content = tmp_path / "encoder.safetensors", whole.read_bytes()
    target, manifest = network(1), read_manifest(whole)
    load_encoder(whole, target, quiet=True)
    wanted = snapshot(target)
    target = network(2)
    before = snapshot(target)
    refused = 0
    for seed in SEEDS:
        path.write_bytes(damaged(content, damage, seed))
        found = result_or_refusal(lambda: read_manifest(path), seed)
        assert isinstance(found, MedclrError) or found == manifest, f"seed {seed}: another manifest"
        loaded = result_or_refusal(lambda: load_encoder(path, target, quiet=True), seed)
        if isinstance(loaded, MedclrError):
            refused += 1
            assert equal(snapshot(target), before), f"seed {seed}: refused, and yet loaded"
        else:
            assert equal(snapshot(target), wanted), f"seed {seed}: other weights"
            assert found == manifest, f"seed {seed}: loaded, but without its manifest"
            target.load_state_dict(before, strict=False)
    assert refused >= len(SEEDS) // 2  # a zero that is overwritten with a zero is no damage


def test_no_flipped_bit_in_the_name_of_the_header_makes_a_plain_state_dict(whole: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "encoder.safetensors", whole.read_bytes()
    start = content.index(b'"__metadata__"')
    for bit in range(8 * start, 8 * (content.index(b"manifest") + len("manifest"))):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(WeightsError, match=r"is damaged|cannot be read"):
            find_manifest(path)


def test_a_flipped_bit_of_any_tensor_is_noticed(whole: Path, tmp_path: Path) -> None:
    """The lowest bits, which change no feature by more than the tolerance."""
    path, content, target = tmp_path / "encoder.safetensors", whole.read_bytes(), network(2)
    count = len(content) - header_end(content)
    for place in range(header_end(content), len(content), count // 50 // 4 * 4):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(WeightsError, match="is damaged"):
            load_encoder(path, target, quiet=True, same_features=False)
