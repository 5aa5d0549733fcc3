from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.handlers import CheckpointSaver
from monai.networks.nets import SegResNet, UNet, resnet10
from monai.transforms import NormalizeIntensity, ScaleIntensityRange
from torch import Tensor, nn

from medclr.data import Preprocessing
from medclr.errors import ConfigError, MedclrError, WeightsError
from medclr.transfer import Settings, load_network


def network_of(seed: int = 0, **settings: Any) -> SegResNet:
    torch.manual_seed(seed)
    return SegResNet(**{"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,), "out_channels": 3, **settings})


def preprocessing_of(**settings: Any) -> Preprocessing:
    return Preprocessing(**{"spacing": (1.0, 1.0, 2.0), **settings})


def content_of(network: nn.Module, preprocessing: Preprocessing | None = None) -> dict[str, Any]:
    settings = Settings(preprocessing or preprocessing_of(), network)
    return {"network": network.state_dict(), "settings": settings.state_dict()}


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "best.pt")
    return folder / "best.pt"


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def refused(path: Path, into: nn.Module, preprocessing: Preprocessing | None = None) -> MedclrError:
    """The error of a load that must fail and must leave the network as it was."""
    before = snapshot(into)
    with pytest.raises(MedclrError) as caught:
        load_network(path, into, preprocessing or preprocessing_of())
    assert all(torch.equal(tensor, before[name]) for name, tensor in into.state_dict().items())
    return caught.value


# Settings


def test_settings_are_plain_values_that_survive_json_and_a_checkpoint(tmp_path: Path) -> None:
    settings = Settings(preprocessing_of(), network_of()).state_dict()
    assert json.loads(json.dumps(settings)) == settings
    assert torch.load(saved(tmp_path, settings), weights_only=True) == settings
    assert settings["preprocessing"]["spacing"] == [1.0, 1.0, 2.0]
    assert settings["encoder"]["network"]["init_filters"] == 8


def test_equal_settings_are_accepted_whatever_is_loaded_and_however_the_weights_differ() -> None:
    trained = Settings(preprocessing_of(load=["image", "label"]), network_of(seed=0))
    Settings(preprocessing_of(), network_of(seed=1)).load_state_dict(trained.state_dict())


@pytest.mark.parametrize(
    ("preprocessing", "network", "name"),
    [
        ({"spacing": None}, {}, "preprocessing.spacing"),
        ({"spacing": (1.0, 1.0, 2.5)}, {}, "preprocessing.spacing"),
        ({"orientation": "LPS"}, {}, "preprocessing.orientation"),
        ({"intensity": ScaleIntensityRange(-1000, 400, 0, 1, clip=True)}, {}, "preprocessing.intensity"),
        ({"intensity": NormalizeIntensity()}, {}, "preprocessing.intensity"),
        ({}, {"init_filters": 16}, "encoder.network.init_filters"),
        ({}, {"in_channels": 2}, "encoder.network.in_channels"),
        ({}, {"norm": "instance"}, "norm"),
        ({}, {"blocks_down": (1, 2)}, "encoder.network.blocks_down"),
    ],
)
def test_settings_that_differ_are_refused_by_name_in_either_direction(
    preprocessing: dict[str, Any], network: dict[str, Any], name: str
) -> None:
    usual = Settings(preprocessing_of(), network_of())
    other = Settings(preprocessing_of(**preprocessing), network_of(**network))
    for ours, theirs in ((usual, other), (other, usual)):
        with pytest.raises(ConfigError, match="other settings") as caught:
            ours.load_state_dict(theirs.state_dict())
        assert name in str(caught.value.got)
        assert name in caught.value.wanted


def test_the_error_says_both_values() -> None:
    ours = Settings(preprocessing_of(spacing=(3, 3, 3)), network_of())
    with pytest.raises(ConfigError) as caught:
        ours.load_state_dict(Settings(preprocessing_of(), network_of()).state_dict())
    assert caught.value.got == "preprocessing.spacing [3.0, 3.0, 3.0]"
    assert caught.value.wanted == "preprocessing.spacing [1.0, 1.0, 2.0], as in training"
    assert "spacing" in caught.value.fix


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: settings["preprocessing"].pop("spacing"),
        lambda settings: settings["preprocessing"].update(windowed=True),
        lambda settings: settings.pop("encoder"),
        lambda settings: settings.update(encoder=None),
    ],
)
def test_a_setting_that_only_one_side_knows_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    settings = Settings(preprocessing_of(), network_of())
    theirs = json.loads(json.dumps(settings.state_dict()))
    change(theirs)
    with pytest.raises(ConfigError, match="other settings"):
        settings.load_state_dict(theirs)


def test_settings_of_an_unsupported_network_are_refused() -> None:
    with pytest.raises(ConfigError):
        Settings(preprocessing_of(), UNet(3, 1, 2, channels=(4, 8), strides=(2,)))


# Loading


def test_a_checkpoint_that_monai_writes_is_loaded_whole(tmp_path: Path) -> None:
    trained, settings = network_of(seed=0), Settings(preprocessing_of(load=["image", "label"]), network_of())
    engine = Engine(lambda engine, batch: None)
    CheckpointSaver(
        str(tmp_path), {"network": trained, "settings": settings}, save_final=True, final_filename="last.pt"
    ).attach(engine)
    engine.run([0], max_epochs=1)
    fresh = network_of(seed=1)
    assert load_network(tmp_path / "last.pt", fresh, preprocessing_of()) is fresh
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_a_path_may_be_text(tmp_path: Path) -> None:
    trained, fresh = network_of(seed=0), network_of(seed=1)
    load_network(str(saved(tmp_path, content_of(trained))), fresh, preprocessing_of())
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize("name", ["missing.pt", "."])
def test_a_file_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    error = refused(tmp_path / name, network_of())
    assert isinstance(error, WeightsError)
    assert "not there" in error.problem


class Foreign:
    """What weights_only refuses to unpickle."""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no checkpoint",
        pickle.dumps({"network": Foreign(), "settings": {}}, protocol=2),
        {},
        [],
        nn.Linear(1, 1).state_dict(),
        {"network": {}},
        {"settings": {}},
        {"network": None, "settings": {}},
        {"network": torch.zeros(3), "settings": {}},
        {"network": {"convInit.conv.weight": "text"}, "settings": {}},
        {"network": {}, "settings": None},
        {"network": {}, "settings": [1, 2]},
    ],
    ids=lambda content: str(content)[:30],
)
def test_what_is_no_checkpoint_is_refused_with_the_name_of_the_file_alone(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    error = refused(path, network_of())
    assert isinstance(error, WeightsError)
    assert "no checkpoint of a segmentation run" in error.problem
    assert "best.pt" in str(error)
    assert str(tmp_path) not in str(error)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    error = refused(saved(tmp_path, {**content_of(network_of()), "more": Foreign()}), network_of())
    assert isinstance(error, WeightsError)


def test_other_preprocessing_than_in_training_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, content_of(network_of(seed=0)))
    error = refused(path, network_of(seed=1), preprocessing_of(orientation="LPS"))
    assert isinstance(error, ConfigError)
    assert "orientation LPS" in str(error.got)


def test_another_encoder_is_a_setting_rather_than_a_list_of_tensors(tmp_path: Path) -> None:
    error = refused(saved(tmp_path, content_of(network_of())), network_of(init_filters=16))
    assert isinstance(error, ConfigError)
    assert "init_filters 16" in str(error.got)


def cut(content: dict[str, Any]) -> None:
    content["network"].pop("conv_final.2.conv.bias")


def grow(content: dict[str, Any]) -> None:
    content["network"]["conv_final.9.weight"] = torch.zeros(1)


@pytest.mark.parametrize(("change", "name"), [(cut, "conv_final.2.conv.bias"), (grow, "conv_final.9.weight")])
def test_a_tensor_too_few_or_too_many_is_refused(
    change: Callable[[Mapping[str, Any]], None], name: str, tmp_path: Path
) -> None:
    content = content_of(network_of(seed=0))
    change(content)
    error = refused(saved(tmp_path, content), network_of(seed=1))
    assert isinstance(error, WeightsError)
    assert "does not fit" in error.problem
    assert "1 tensors" in str(error.got)
    assert name in str(error.got)


def test_another_number_of_classes_is_refused_with_both_shapes(tmp_path: Path) -> None:
    error = refused(saved(tmp_path, content_of(network_of(out_channels=3))), network_of(out_channels=2))
    assert isinstance(error, WeightsError)
    assert "2 tensors" in str(error.got)
    assert "[3, 8, 1, 1, 1] into [2, 8, 1, 1, 1]" in str(error.got)
    assert "out_channels" in error.fix


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    error = refused(saved(tmp_path, content_of(resnet10(n_input_channels=1))), network_of())
    assert isinstance(error, ConfigError)
    assert "ResNet" in str(error)
