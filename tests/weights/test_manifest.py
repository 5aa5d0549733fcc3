from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medclr.errors import ConfigError, WeightsError
from medclr.weights import Manifest
from medclr.weights.manifest import FORMAT_VERSION, INTENDED_USE, LEFT_OUT

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
