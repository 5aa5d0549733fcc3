from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.networks.nets import SegResNet

from medclr.data import Preprocessing
from medclr.data.datalist import Datalist, Row
from medclr.errors import DatalistError, WeightsError
from medclr.models import Encoder
from medclr.transfer import SaveNetwork, Settings, check_unseen, load_network, seen_patients
from medclr.weights import Manifest, patient_digests, save_encoder


def rows(*patients: int) -> list[Row]:
    return [
        {"image": f"/x/{n}_{scan}.nii", "patient_id": f"pat-{n:016}"} for n in patients for scan in range(1 + n % 2)
    ]


def datalist(training: Iterable[int] = (), validation: Iterable[int] = (), test: Iterable[int] = ()) -> Datalist:
    sections = {"training": rows(*training), "validation": rows(*validation), "test": rows(*test)}
    return Datalist({name: part for name, part in sections.items() if part}, Path("/x"))


def network_of() -> SegResNet:
    return SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), norm="instance")


def encoder_file(folder: Path, training: Iterable[int] | None, validation: Iterable[int] | None = ()) -> Path:
    digests = [None if part is None else patient_digests(rows(*part)) for part in (training, validation)]
    path = folder / "encoder.safetensors"
    save_encoder(
        path, Encoder(network_of()), Manifest("SimCLR", patient_digests=digests[0], validation_digests=digests[1])
    )
    return path


def network_file(folder: Path, seen: Any) -> Path:
    network = network_of()
    save = SaveNetwork(folder / "best.pt", network, Settings(Preprocessing(), network), patients=lambda: seen)
    save.save(Engine(lambda engine, batch: None))
    return folder / "best.pt"


SPLIT = datalist(range(10), range(10, 13), range(13, 18))


def test_one_split_for_pretraining_and_all_that_follows_passes_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_file(tmp_path, range(10), range(10, 13))
    few = datalist(range(3), range(10, 13), range(13, 18))
    with caplog.at_level(logging.INFO):
        assert check_unseen(encoder, few) == {"test": 0, "validation": 0}
        network = network_file(tmp_path, seen_patients(few, encoder))
        caplog.clear()
        for section in ("test", "validation", "training"):
            check_unseen(network, few, section)
    assert caplog.messages == []


def test_test_patients_of_pretraining_are_refused_with_their_number_alone(tmp_path: Path) -> None:
    encoder = encoder_file(tmp_path, range(10))
    with pytest.raises(DatalistError, match="have been seen") as caught:
        check_unseen(encoder, datalist([0, 1], [2], [8, 9, 20, 21]))
    assert caught.value.got == "2 of 4 patients, whom encoder.safetensors was pretrained on"
    assert "allow_seen_patients: true" in caught.value.fix
    assert "pat-" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_rows_alone_are_test_rows(tmp_path: Path) -> None:
    encoder = encoder_file(tmp_path, range(10))
    assert check_unseen(encoder, rows(10, 11)) == {"test": 0}
    with pytest.raises(DatalistError, match="have been seen"):
        check_unseen(encoder, rows(10, 9))


def test_where_it_is_allowed_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_file(tmp_path, range(10))
    assert check_unseen(encoder, datalist(test=[8, 9, 20]), allow=True) == {"test": 2}
    assert caplog.messages == ["2 of 3 patients of test were seen: encoder.safetensors was pretrained on them"]


def test_validation_patients_are_a_warning_and_training_patients_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_file(tmp_path, range(10))
    given = datalist(range(5), [5, 6, 20], [21])
    assert check_unseen(encoder, given) == {"test": 0, "validation": 2}
    assert caplog.messages == ["2 of 3 patients of validation were seen: encoder.safetensors was pretrained on them"]
    assert check_unseen(encoder, given, "training") == {}


def test_test_patients_that_pretraining_looked_at_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_unseen(encoder_file(tmp_path, range(10), [10, 11]), datalist([0], [12], [11, 13]))
    (message,) = caplog.messages
    assert "1 of 2 patients of test were looked at" in message


@pytest.mark.parametrize(("patient", "verb"), [(0, "fine-tuned"), (4, "pretrained")])
def test_a_network_knows_whom_it_and_its_encoder_were_trained_on(tmp_path: Path, patient: int, verb: str) -> None:
    encoder = encoder_file(tmp_path, [4, 5], [6])
    network = network_file(tmp_path, seen_patients(datalist([0, 1], [2]), encoder))
    assert check_unseen(network, rows(3)) == {"test": 0}
    with pytest.raises(DatalistError, match="have been seen") as caught:
        check_unseen(network, datalist([7], test=[3, patient]))
    assert f"1 of 2 patients, whom best.pt was {verb} on" in str(caught.value)


def test_what_a_training_knows(tmp_path: Path) -> None:
    encoder = encoder_file(tmp_path, [4, 5], [6])
    seen = seen_patients(datalist([1, 0], [2], [3]), encoder)
    assert seen == {
        "training": patient_digests(rows(0, 1)),
        "validation": patient_digests(rows(2, 6)),
        "pretraining": patient_digests(rows(4, 5)),
    }
    assert seen_patients(datalist([0], [2], [3]), validation=False) == {
        "training": patient_digests(rows(0)),
        "validation": [],
        "pretraining": [],
    }


def plain_state_dict(folder: Path) -> Path:
    torch.save(network_of().state_dict(), folder / "foreign.pt")
    return folder / "foreign.pt"


@pytest.mark.parametrize(
    "make",
    [
        plain_state_dict,
        lambda folder: encoder_file(folder, None, None),
        lambda folder: network_file(folder, None),
        lambda folder: network_file(folder, seen_patients(datalist([1]), encoder_file(folder, None, None))),
    ],
    ids=["foreign", "old encoder", "old network", "network from an old encoder"],
)
def test_weights_that_do_not_say_are_a_warning(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make(tmp_path)
    assert check_unseen(path, datalist([0], test=[2])) == {"test": 0}
    (message,) = caplog.messages
    assert "cannot be known" in message
    assert path.name in message


def test_a_network_that_says_in_part_is_refused_for_what_it_says(tmp_path: Path) -> None:
    network = network_file(tmp_path, seen_patients(datalist([1]), encoder_file(tmp_path, None, None)))
    with pytest.raises(DatalistError, match="have been seen"):
        check_unseen(network, rows(1))


def test_a_start_from_scratch_knows_nobody(caplog: pytest.LogCaptureFixture) -> None:
    assert check_unseen(None, SPLIT) == {"test": 0, "validation": 0}
    assert caplog.messages == []


def test_without_a_section_to_look_at_no_file_is_read(tmp_path: Path) -> None:
    assert check_unseen(tmp_path / "nowhere.safetensors", datalist([0])) == {}


@pytest.mark.parametrize("name", ["nowhere.safetensors", "nowhere.pt"])
def test_weights_that_are_not_there_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not there"):
        check_unseen(tmp_path / name, SPLIT)


def test_nobody_in_common_may_be_another_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_file(tmp_path, range(10), [10])
    with caplog.at_level(logging.INFO):
        check_unseen(encoder, datalist(range(20, 23), test=range(30, 32)))
    (message,) = caplog.messages
    assert "none of the 5 patients of the datalist is among the 11" in message
    assert "another key" in message


def test_a_network_file_with_its_patients_is_loaded_and_protected_like_the_rest(tmp_path: Path) -> None:
    path = network_file(tmp_path, seen_patients(SPLIT))
    load_network(path, network_of(), Preprocessing())
    content = torch.load(path, weights_only=True)
    content["patients"]["training"] = []
    torch.save(content, path)
    with pytest.raises(WeightsError, match="damaged"):
        load_network(path, network_of(), Preprocessing())
    with pytest.raises(WeightsError, match="damaged"):
        check_unseen(path, SPLIT)
