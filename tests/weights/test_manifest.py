from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from monai.networks.nets import SegResNet

from medclr.errors import ConfigError, WeightsError
from medclr.models import Encoder
from medclr.weights import Manifest, load_encoder, patient_digest, patient_digests, read_manifest, save_encoder
from medclr.weights.manifest import FORMAT_VERSION, INTENDED_USE, LEFT_OUT
from medclr.weights.patients import _warn_of_plain_ids

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def full() -> Manifest:
    return Manifest(
        "SimCLR",
        preprocessing={"orientation": "RAS", "spacing": (1.0, 1.0, 1.5)},
        crop_size=(32, 48, 32),
        spacing=(1.0, 1.0, 1.5),
        steps=300,
        epochs=12,
        datalist_digest="ab12",
        patients=200,
        scans=260,
        seed=7,
        settings={"batch_size": 32, "temperature": 0.1, "norm": "instance"},
        run={"command": ["python", "-m", "monai.bundle", "run"], "hardware": {"cores": 8}, "wall_s": 3.5},
    )


def test_a_manifest_survives_json() -> None:
    manifest = full()
    again = Manifest.from_json(manifest.to_json(indent=2))
    assert again == manifest
    assert again.crop_size == [32, 48, 32]
    assert set(again.versions) == {"python", "medclr", "monai", "torch", "numpy"}
    assert again.versions["torch"] == torch.__version__
    assert again.intended_use == INTENDED_USE == "Research use only, not a medical device."


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    settings=st.dictionaries(st.text(), json_values, max_size=5),
    preprocessing=st.dictionaries(st.text(), json_values),
    run=st.dictionaries(st.text(), json_values, max_size=5),
)
def test_any_settings_survive_json(
    settings: dict[str, object], preprocessing: dict[str, object], run: dict[str, object]
) -> None:
    manifest = Manifest("BYOL", settings=settings, preprocessing=preprocessing, run=run)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_unknown_fields_survive_reading_and_writing() -> None:
    content = {**json.loads(full().to_json()), "colour": ["blue"], "weather": {"rain": True}}
    manifest = Manifest.from_json(json.dumps(content))
    assert manifest.extra == {"colour": ["blue"], "weather": {"rain": True}}
    assert json.loads(manifest.to_json()) == content


def test_a_manifest_from_before_runs_were_recorded_has_none() -> None:
    content = json.loads(full().to_json())
    del content["run"]
    assert Manifest.from_json(json.dumps(content)).run == {}


def test_an_unknown_field_cannot_take_the_place_of_a_known_one() -> None:
    assert Manifest.from_json(Manifest("SimCLR", extra={"method": "BYOL"}).to_json()).method == "SimCLR"


@pytest.mark.parametrize(
    "value",
    [
        "/home/someone/scans",
        "scans/patient_007",
        "C:\\scans",
        "~scans",
        "patient_007.nii.gz",
        "datalist.json",
        "2024-05-31",
        "run of 20240531",
        Path("scans"),
        {"patient_id": "P-007", "image": "x"},
        [{"rows": {"patient_id": "P-007"}}],
        ["P-007"] * 100,
    ],
)
@pytest.mark.parametrize("name", ["settings", "run"])
def test_paths_dates_and_patients_do_not_reach_the_file(name: str, value: object) -> None:
    manifest = Manifest("SimCLR", **{name: {"key": value, "batch_size": 32}})
    text = json.dumps(json.loads(manifest.to_json())[name])
    assert LEFT_OUT in text
    assert not [secret for secret in ("someone", "scans", "007", "datalist.json", "0531", "05-31") if secret in text]
    assert json.loads(text)["batch_size"] == 32


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("monai.networks.nets.SegResNet", "monai.networks.nets.SegResNet"),
        ("$@network_def.contrast", "$@network_def.contrast"),
        ((32, 48, 32), [32, 48, 32]),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        (float("inf"), "inf"),
        (torch.device("cpu"), "(device)"),
        (torch.nn.ReLU(), "(ReLU)"),
        (True, True),
    ],
)
def test_other_settings_become_plain_values(value: object, expected: object) -> None:
    assert Manifest("SimCLR", settings={"key": value}).settings["key"] == expected


@pytest.mark.parametrize("change", [{"steps": -1}, {"patients": 1.5}, {"scans": True}, {"epochs": "3"}, {"method": ""}])
def test_impossible_counts_and_names_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Manifest(**{"method": "SimCLR", **change})


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{}", '{"format_version": "1"}', '{"format_version": 1}', "{", "[" * 10**5]
)
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(WeightsError, match="no manifest"):
        Manifest.from_json(text)


def test_a_manifest_of_a_newer_layout_is_refused() -> None:
    content = {**json.loads(full().to_json()), "format_version": FORMAT_VERSION + 1}
    with pytest.raises(WeightsError, match="newer medclr"):
        Manifest.from_json(json.dumps(content))


def test_digests_are_of_patients_and_not_of_rows() -> None:
    rows = [{"image": f"{n}.nii", "patient_id": f"pat-{n // 2:016}"} for n in range(20)]
    digests = patient_digests(rows)
    assert len(digests) == 10
    assert digests == sorted(patient_digest(row["patient_id"]) for row in rows[::2])
    assert digests == patient_digests(rows[::-1])
    expected = hashlib.sha256(b"medclr patient\npat-0000000000000003").hexdigest()[:16]
    assert patient_digest("pat-0000000000000003") == expected, "as it is written in files that exist"


def test_ids_that_are_no_pseudonyms_are_warned_of_once_and_without_them(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_plain_ids.cache_clear()
    patient_digests([{"patient_id": "pat-abcdefgh23456777"}])
    assert caplog.messages == []
    for _ in range(2):
        patient_digests([{"patient_id": "pat-abcdefgh23456777"}, {"patient_id": "40017"}])
    (message,) = caplog.messages
    assert "no" in message
    assert "record_patients" in message
    assert "40017" not in message


def many(count: int) -> list[str]:
    return patient_digests([{"patient_id": f"pat-{n:016}"} for n in range(count)])


@pytest.mark.parametrize("count", [0, 1, 65, 10_000])
def test_digests_of_any_number_of_patients_survive_and_are_out_of_the_way(count: int) -> None:
    digests = many(count)
    manifest = dataclasses.replace(full(), patient_digests=digests, validation_digests=digests[:3], extra={"x": [1]})
    for indent in (None, 2):
        text = manifest.to_json(indent=indent)
        assert Manifest.from_json(text) == manifest
        assert json.loads(text)["patient_digests"] == digests
    assert len(text) < 5000 + 21 * count
    assert [line[:20] for line in text.splitlines()[-3:]] == [
        '  "patient_digests":'[:20],
        '  "validation_digests'[:20],
        "}",
    ]
    assert len(text.splitlines()) < 120
    assert len(repr(manifest)) < 3000


def test_digests_are_sorted_and_each_is_there_once() -> None:
    assert Manifest("SimCLR", patient_digests=[*many(3), *many(5)][::-1]).patient_digests == many(5)


def test_a_manifest_of_before_patients_were_recorded_does_not_know_them() -> None:
    content = json.loads(full().to_json())
    del content["patient_digests"], content["validation_digests"]
    manifest = Manifest.from_json(json.dumps(content))
    assert manifest.patient_digests is manifest.validation_digests is None


@pytest.mark.parametrize("value", [["P-007"], "P-007", ["ab" * 8, 7], ["AB" * 8], ["ab" * 9], 3])
@pytest.mark.parametrize("name", ["patient_digests", "validation_digests"])
def test_ids_do_not_pass_as_digests_and_are_not_said(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        Manifest("SimCLR", **{name: value})
    assert "007" not in str(caught.value)


def test_ten_thousand_patients_fit_the_header_of_a_weights_file(tmp_path: Path) -> None:
    encoder = Encoder(SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), norm="instance"))
    sizes = []
    for digests in (None, many(10_000)):
        path = tmp_path / "encoder.safetensors"
        save_encoder(path, encoder, Manifest("SimCLR", patient_digests=digests))
        assert read_manifest(path).patient_digests == digests
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] < 30 * 10_000
    assert load_encoder(path, into=encoder, quiet=True).complete
