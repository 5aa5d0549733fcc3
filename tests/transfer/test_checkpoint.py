from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.networks.nets import SegResNet, UNet, resnet10
from monai.transforms import NormalizeIntensity, ScaleIntensityRange
from torch import Tensor, nn

from medclr.data import Preprocessing
from medclr.errors import ConfigError, MedclrError, WeightsError
from medclr.transfer import SaveNetwork, Settings, load_network
from medclr.weights.digest import digest


def network_of(seed: int = 0, **settings: Any) -> SegResNet:
    torch.manual_seed(seed)
    return SegResNet(**{"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,), "out_channels": 3, **settings})


def preprocessing_of(**settings: Any) -> Preprocessing:
    return Preprocessing(**{"spacing": (1.0, 1.0, 2.0), **settings})


def content_of(network: nn.Module, preprocessing: Preprocessing | None = None) -> dict[str, Any]:
    settings = Settings(preprocessing or preprocessing_of(), network)
    return signed({"network": network.state_dict(), "settings": settings.state_dict()})


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the digest of what it holds."""
    about = {name: value for name, value in content.items() if name not in ("network", "digest")}
    return {**content, "digest": digest(content["network"], about)}


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


# Saving


def saver(path: Path, network: nn.Module, **settings: Any) -> SaveNetwork:
    return SaveNetwork(path, network, Settings(preprocessing_of(load=["image", "label"]), network), **settings)


def holds(path: Path, network: nn.Module) -> bool:
    """Whether a file gives the weights that a network has."""
    loaded = load_network(path, network_of(seed=99), preprocessing_of()).state_dict()
    return all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())


def test_a_trainer_that_comes_to_its_end_leaves_its_last_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, path = network_of(), tmp_path / "models" / "last.pt"
    trainer = Engine(lambda engine, batch: shift(network))
    saver(path, network).attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: path.exists() and pytest.fail("saved too early"))
    with caplog.at_level(logging.INFO):
        trainer.run([0, 1], max_epochs=2)
    assert holds(path, network)
    assert set(torch.load(path, weights_only=True)) == {"network", "settings", "digest"}
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
    assert "last.pt" in caplog.text
    assert str(tmp_path) not in caplog.text


def shift(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)


@pytest.mark.parametrize("stop", ["error", "signal"])
def test_a_run_that_is_stopped_leaves_the_file_of_the_run_before(stop: str, tmp_path: Path) -> None:
    network, path = network_of(), tmp_path / "last.pt"
    earlier = network_of(seed=3)
    saver(path, earlier).save(Engine(lambda engine, batch: None))

    def step(engine: Engine, batch: int) -> None:
        if batch == 1 and stop == "error":
            raise ZeroDivisionError
        if batch == 1:
            engine.terminate(skip_completed=True)

    trainer = Engine(step)
    saver(path, network).attach(trainer)
    if stop == "error":
        with pytest.raises(ZeroDivisionError):
            trainer.run([0, 1, 2], max_epochs=1)
    else:
        trainer.run([0, 1, 2], max_epochs=1)
    assert holds(path, earlier)


def evaluator_of(scores: list[float]) -> SupervisedEvaluator:
    """An evaluator whose evaluations give these scores, one after the other."""
    left = iter(scores)

    class Score:
        def attach(self, engine: Engine, name: str) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: engine.state.metrics.update({name: next(left)}))

    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=[0],
        network=nn.Identity(),
        iteration_update=lambda engine, batch: None,
        key_val_metric={"dice": Score()},  # type: ignore[dict-item]
    )


def saved_at(path: Path, scores: list[float], first: int = 1, best: tuple[float, int] | None = None) -> list[int]:
    """The epochs whose network ``path`` held once they were evaluated, of epochs from ``first`` on."""
    network, evaluator = network_of(seed=first), evaluator_of(scores)
    if best is not None:  # what a checkpoint of the run puts back
        evaluator.state.best_metric, evaluator.state.best_metric_epoch = best
    saver(path, network, best=True).attach(evaluator)
    epochs = []
    for epoch in range(first, first + len(scores)):
        shift(network)
        evaluator.run(global_epoch=epoch)
        if path.exists() and holds(path, network):
            epochs.append(epoch)
    return epochs


def test_the_network_with_the_best_metric_is_kept(tmp_path: Path) -> None:
    assert saved_at(tmp_path / "best.pt", [0.5, 0.7, 0.6, 0.7, 0.8, 0.1]) == [1, 2, 5]


def test_a_resumed_run_replaces_the_best_network_by_a_better_one_alone(tmp_path: Path) -> None:
    assert saved_at(tmp_path / "best.pt", [0.5, 0.7]) == [1, 2]
    assert saved_at(tmp_path / "best.pt", [0.6, 0.65], first=3, best=(0.7, 2)) == []
    assert saved_at(tmp_path / "best.pt", [0.6, 0.75], first=3, best=(0.7, 2)) == [4]


def test_an_evaluator_without_a_key_metric_saves_nothing(tmp_path: Path) -> None:
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=[0], network=nn.Identity(), iteration_update=lambda engine, batch: None
    )
    saver(tmp_path / "best.pt", network_of(), best=True).attach(evaluator)
    evaluator.run(global_epoch=1)
    assert list(tmp_path.iterdir()) == []


def test_what_the_record_says_when_it_is_saved_travels_along(tmp_path: Path) -> None:
    network, path, record = network_of(), tmp_path / "last.pt", {"wall_s": 1.5, "command": ("a", "b")}
    save = saver(path, network, record=lambda: record)
    record["wall_s"] = 2.25
    save.save(Engine(lambda engine, batch: None))
    assert torch.load(path, weights_only=True)["run"] == {"wall_s": 2.25, "command": ["a", "b"]}
    assert holds(path, network)


def test_the_first_rank_alone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclr.distributed.rank", lambda: 1)
    saver(tmp_path / "last.pt", network_of()).save(Engine(lambda engine, batch: None))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, path = network_of(), tmp_path / "last.pt"
    saver(path, network).save(Engine(lambda engine, batch: None))

    def half(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        saver(path, network_of(seed=5)).save(Engine(lambda engine, batch: None))
    monkeypatch.undo()
    assert holds(path, network)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_saving_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    network = network_of()
    before = snapshot(network)
    network.convInit.conv.weight.requires_grad_(False)
    saver(tmp_path / "last.pt", network).save(Engine(lambda engine, batch: None))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert [p.requires_grad for p in network.parameters()].count(False) == 1


# Loading


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
        {"network": {}, "digest": ""},
        {"settings": {}, "digest": ""},
        {"network": {}, "settings": {}},
        {"network": None, "settings": {}, "digest": ""},
        {"network": torch.zeros(3), "settings": {}, "digest": ""},
        {"network": {"convInit.conv.weight": "text"}, "settings": {}, "digest": ""},
        {"network": {}, "settings": None, "digest": ""},
        {"network": {}, "settings": [1, 2], "digest": ""},
        {"network": {}, "settings": {}, "digest": 7},
        {"network": {}, "settings": {}, "digest": torch.zeros(2)},
        {"network": {}, "settings": {"spacing": torch.zeros(2)}, "digest": ""},
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
    error = refused(saved(tmp_path, {**content_of(network_of()), "run": Foreign()}), network_of())
    assert isinstance(error, WeightsError)
    assert "UnpicklingError" in str(error.got)


def test_a_file_without_a_digest_is_refused(tmp_path: Path) -> None:
    content = content_of(network_of())
    del content["digest"]
    error = refused(saved(tmp_path, content), network_of(seed=1))
    assert isinstance(error, WeightsError)
    assert error.got == "best.pt: no digest"
    assert "train again" in error.fix


def test_more_than_a_run_writes_is_refused_even_with_its_digest(tmp_path: Path) -> None:
    content = signed({**content_of(network_of()), "optimizer": {}})
    error = refused(saved(tmp_path, content), network_of(seed=1))
    assert isinstance(error, WeightsError)
    assert "more than" in str(error.got)


@pytest.mark.parametrize("change", ["weight", "dtype", "name", "settings", "run", "digest"])
def test_content_that_has_changed_is_refused_as_damaged(change: str, tmp_path: Path) -> None:
    content = signed({**content_of(network_of()), "run": {"wall_s": 3.5}})
    state, name = content["network"], "convInit.conv.weight"
    if change == "weight":
        state[name][0, 0, 0, 0, 0] *= 1 + 1e-6
    elif change == "dtype":
        state[name] = state[name].double()
    elif change == "name":
        state["convInit.conv.weights"] = state.pop(name)
    elif change == "settings":
        content["settings"]["preprocessing"]["spacing"][2] = 2.5
    elif change == "run":
        content["run"]["wall_s"] = 3.25
    else:
        content["digest"] = content["digest"][::-1]
    error = refused(saved(tmp_path, content), network_of(seed=1))
    assert isinstance(error, WeightsError)
    assert error.problem == "The checkpoint is damaged."
    assert "best.pt" in str(error.got)
    assert str(tmp_path) not in str(error)
    assert "opy it again" in error.fix
    assert "train again" in error.fix


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
    error = refused(saved(tmp_path, signed(content)), network_of(seed=1))
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
