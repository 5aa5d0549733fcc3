"""Files of networks that a disk or a transfer has changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.networks.nets import SegResNet
from torch import Tensor

from medclr.data import Preprocessing
from medclr.errors import MedclrError
from medclr.transfer import SaveNetwork, Settings, load_network

MUTATIONS = 100


def network_of(seed: int) -> SegResNet:
    torch.manual_seed(seed)
    return SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,))


def flip_a_bit(content: bytearray, draw: random.Random) -> None:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def truncate(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def block(content: bytearray, draw: random.Random) -> slice:
    start = draw.randrange(len(content))
    return slice(start, min(start + draw.choice((1, 16, 512, 4096)), len(content)))


def zero(content: bytearray, draw: random.Random) -> None:
    place = block(content, draw)
    content[place] = bytes(place.stop - place.start)


def overwrite(content: bytearray, draw: random.Random) -> None:
    place = block(content, draw)
    content[place] = draw.randbytes(place.stop - place.start)


def insert(content: bytearray, draw: random.Random) -> None:
    place = block(content, draw)
    content[place.start : place.start] = draw.randbytes(place.stop - place.start)


def delete(content: bytearray, draw: random.Random) -> None:
    del content[block(content, draw)]


KINDS: list[Callable[[bytearray, random.Random], None]] = [flip_a_bit, truncate, zero, overwrite, insert, delete]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, network = tmp_path_factory.mktemp("whole") / "best.pt", network_of(0)
    SaveNetwork(path, network, Settings(Preprocessing(), network)).save(Engine(lambda engine, batch: None))
    return path


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def torch_takes_other_tensors(path: Path, original: dict[str, Tensor]) -> bool:
    try:
        return not same(torch.load(path, weights_only=True)["network"], original)
    except Exception:
        return False


def test_a_damaged_file_gives_the_original_network_or_an_error(whole: Path, tmp_path: Path) -> None:
    original = network_of(0).state_dict()
    content, path = whole.read_bytes(), tmp_path / "best.pt"
    into = network_of(1)
    fresh = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    refused = silent = 0
    for seed in range(MUTATIONS):
        mutated = bytearray(content)
        KINDS[seed % len(KINDS)](mutated, random.Random(seed))
        path.write_bytes(mutated)
        silent += torch_takes_other_tensors(path, original)
        try:
            load_network(path, into, Preprocessing())
        except MedclrError:
            refused += 1
            assert same(into.state_dict(), fresh), f"mutation {seed} has changed the network"
        else:
            assert same(into.state_dict(), original), f"mutation {seed} gives other weights"
            into.load_state_dict(fresh)
    assert refused > 0.8 * MUTATIONS
    assert silent > 0.2 * MUTATIONS, "torch notices the damage itself, so this test proves nothing"


@pytest.mark.parametrize("seed", range(5))
def test_a_bit_of_a_weight_that_has_flipped_is_noticed(seed: int, whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    weight = network_of(0).state_dict()["convInit.conv.weight"].numpy().tobytes()
    draw = random.Random(seed)
    content[content.index(weight) + draw.randrange(len(weight))] ^= 1 << draw.randrange(8)
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    assert torch_takes_other_tensors(path, network_of(0).state_dict())
    with pytest.raises(MedclrError, match="damaged"):
        load_network(path, network_of(1), Preprocessing())
