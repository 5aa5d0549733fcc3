from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.networks.nets import SegResNet, UNet, resnet10
from torch import Tensor, nn

from medclr.data import Preprocessing
from medclr.errors import ConfigError, WeightsError
from medclr.models import Encoder, find_encoder
from medclr.transfer import FreezeEncoder, checked_roi, initialise, start_from_prior
from medclr.weights import Manifest, save_encoder

FIRST_PART = "convInit.", "down_layers."


def network_of(seed: int = 0, **settings: Any) -> SegResNet:
    torch.manual_seed(seed)
    return SegResNet(**{"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,), "norm": "instance", **settings})


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def encoder_names(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters() if name.startswith(FIRST_PART)}


# Initialising


def test_pretrained_weights_fill_the_encoder_and_nothing_else(tmp_path: Path) -> None:
    source, network = network_of(seed=0), network_of(seed=1)
    save_encoder(tmp_path / "encoder.safetensors", Encoder(source), Manifest("SimCLR"))
    before = snapshot(network)
    assert initialise(network, tmp_path / "encoder.safetensors") is network
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, (source.state_dict() if name.startswith(FIRST_PART) else before)[name]), name
    assert changed(network, before) <= encoder_names(network)
    assert changed(network, before)


def test_the_coverage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_encoder(tmp_path / "encoder.safetensors", Encoder(network_of()), Manifest("SimCLR"))
    capsys.readouterr()
    initialise(network_of(seed=1), tmp_path / "encoder.safetensors")
    assert "encoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pretrained_with", "warnings"),
    [
        (Preprocessing(), []),
        (None, []),
        (Preprocessing(spacing=(1, 1, 2)), ["spacing None here, [1.0, 1.0, 2.0] in pretraining"]),
        (Preprocessing(orientation="LPS", spacing=(1, 1, 1)), ["orientation RAS here, LPS", "spacing None here"]),
    ],
)
def test_another_preprocessing_than_in_pretraining_is_told_and_the_weights_are_loaded(
    pretrained_with: Preprocessing | None, warnings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, network = network_of(seed=0), network_of(seed=1)
    manifest = Manifest("SimCLR", preprocessing=None if pretrained_with is None else pretrained_with.describe())
    save_encoder(tmp_path / "encoder.safetensors", Encoder(source), manifest)
    with caplog.at_level(logging.WARNING):
        initialise(network, tmp_path / "encoder.safetensors", Preprocessing(["image", "label"]))
    told = [record.getMessage() for record in caplog.records if record.name == "medclr.transfer.finetune"]
    assert len(told) == len(warnings)
    assert all(warning in line for warning, line in zip(warnings, told, strict=True))
    assert torch.equal(network.convInit.conv.weight, source.convInit.conv.weight)


def test_weights_without_a_manifest_are_loaded_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, network = network_of(seed=0), network_of(seed=1)
    torch.save(Encoder(source).state_dict(), tmp_path / "encoder.pt")
    with caplog.at_level(logging.WARNING):
        initialise(network, tmp_path / "encoder.pt", Preprocessing())
    assert "preprocessed" not in caplog.text
    assert torch.equal(network.convInit.conv.weight, source.convInit.conv.weight)


def test_a_start_from_scratch_leaves_the_network_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    network = network_of()
    before = snapshot(network)
    with caplog.at_level(logging.INFO):
        assert initialise(network) is network
    assert not changed(network, before)
    assert "from scratch" in caplog.text


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_weights_that_are_not_there_are_refused_rather_than_left_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not there") as caught:
        initialise(network_of(), tmp_path / name)
    assert "null" in caught.value.fix


def test_an_empty_name_is_no_start_from_scratch() -> None:
    with pytest.raises(WeightsError, match="not there"):
        initialise(network_of(), "")


@pytest.mark.parametrize("settings", [{"init_filters": 16}, {"blocks_down": (1, 2)}, {"in_channels": 2}], ids=str)
def test_weights_that_do_not_fill_the_whole_encoder_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder.safetensors", Encoder(network_of()), Manifest("SimCLR"))
    network = network_of(seed=1, **settings)
    before = snapshot(network)
    with pytest.raises(WeightsError):
        initialise(network, tmp_path / "encoder.safetensors")
    assert not changed(network, before)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError):
        initialise(network_of(), tmp_path / "encoder.safetensors")


# Freezing


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(1, 1, 8, 8, 8, generator=generator),
        "label": torch.randint(0, 2, (1, 8, 8, 8), generator=generator),
    }


def trainer_of(network: nn.Module, *handlers: Any, batches: int = 5, **settings: Any) -> SupervisedTrainer:
    """MONAI's trainer with an optimizer that decays, so that a parameter without gradient must be skipped to stay."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return SupervisedTrainer(
        device="cpu",
        train_data_loader=[batch(seed) for seed in range(batches)],
        network=network,
        optimizer=torch.optim.AdamW(trained, lr=0.01, weight_decay=0.5),
        loss_function=nn.CrossEntropyLoss(),
        train_handlers=list(handlers),
        decollate=False,
        **{"max_epochs": 1, **settings},
    )


def watch(trainer: Engine, network: nn.Module) -> list[set[str]]:
    """Fills itself with the names of what each iteration changed."""
    moves: list[set[str]] = []
    before = [snapshot(network)]

    def look(engine: Engine) -> None:
        moves.append(changed(network, before.pop()))
        before.append(snapshot(network))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
    return moves


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 9])
def test_the_encoder_stays_for_exactly_so_many_steps_and_the_decoder_learns_from_the_first(steps: int) -> None:
    network = network_of()
    encoder, everything = encoder_names(network), {name for name, _ in network.named_parameters()}
    trainer = trainer_of(network, FreezeEncoder(network, steps))
    moves = watch(trainer, network)
    trainer.run()
    assert [not move & encoder for move in moves] == [place < steps for place in range(5)]
    assert all(everything - encoder == move - encoder for move in moves)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_steps_count_over_epochs() -> None:
    network = network_of()
    trainer = trainer_of(network, FreezeEncoder(network, 3), batches=2, max_epochs=3)
    moves = watch(trainer, network)
    trainer.run()
    assert [bool(move & encoder_names(network)) for move in moves] == [False, False, False, True, True, True]


@pytest.mark.parametrize(("done", "frozen"), [(1, 2), (2, 1), (3, 0), (4, 0)])
def test_a_resumed_run_freezes_what_is_left(done: int, frozen: int) -> None:
    network = network_of()
    trainer = trainer_of(network, FreezeEncoder(network, 3), batches=1, max_epochs=8)
    trainer.load_state_dict({"iteration": done, "max_epochs": 8, "epoch_length": 1})
    moves = watch(trainer, network)
    trainer.run()
    assert len(moves) == 8 - done
    assert [not move & encoder_names(network) for move in moves] == [place < frozen for place in range(8 - done)]


def test_a_frozen_encoder_keeps_no_gradient_of_before() -> None:
    network = network_of()
    network(batch(0)["image"]).sum().backward()
    trainer = trainer_of(network, FreezeEncoder(network, 9))
    seen: list[bool] = []
    encoder = list(find_encoder(network).parameters())
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: seen.append(any(parameter.grad is not None for parameter in encoder))
    )
    trainer.run()
    assert seen == [False] * 5


@pytest.mark.parametrize("skip_completed", [False, True])
def test_a_run_that_is_stopped_early_leaves_the_network_trainable(skip_completed: bool) -> None:
    network = network_of()
    trainer = trainer_of(network, FreezeEncoder(network, 9))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: trainer.terminate(skip_completed))
    states: list[bool] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: states.append(all(p.requires_grad for p in network.parameters()))
    )
    trainer.run()
    assert states == [False, False]
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_moment_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    network = network_of()
    with caplog.at_level(logging.INFO, "medclr"):
        trainer_of(network, FreezeEncoder(network, 2)).run()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("medclr")] == [
        "step 1: the encoder is frozen",
        "step 3: the encoder is trained",
    ]


def test_what_was_frozen_by_hand_stays_frozen() -> None:
    network = network_of()
    by_hand = network.convInit.conv.weight
    by_hand.requires_grad_(False)
    before = by_hand.clone()
    trainer_of(network, FreezeEncoder(network, 2)).run()
    assert not by_hand.requires_grad
    assert torch.equal(by_hand, before)


def test_an_encoder_that_is_frozen_by_hand_altogether_is_left_alone() -> None:
    network = network_of()
    for parameter in find_encoder(network).parameters():
        parameter.requires_grad_(False)
    before = snapshot(network)
    trainer_of(network, FreezeEncoder(network, 2)).run()
    assert changed(network, before)
    assert not changed(network, before) & encoder_names(network)
    assert not any(parameter.requires_grad for parameter in find_encoder(network).parameters())


def test_a_freeze_of_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="freeze"):
        FreezeEncoder(network_of(), -1)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_network_without_a_supported_encoder_cannot_be_frozen(steps: int) -> None:
    with pytest.raises(ConfigError):
        FreezeEncoder(UNet(3, 1, 2, channels=(4, 8), strides=(2,)), steps)


# The window


def four_levels() -> SegResNet:
    return SegResNet(init_filters=8)


@pytest.mark.parametrize("size", [(16, 16, 16), (32, 16, 24), [16, 40, 16], torch.Size([24, 16, 16])], ids=str)
def test_windows_that_the_network_can_take_are_given_back_as_a_tuple(size: Any) -> None:
    network = four_levels()
    window = checked_roi(size, network)
    assert type(window) is tuple
    assert window == tuple(size)
    assert network.eval()(torch.zeros(1, 1, *window)).shape[2:] == window


@pytest.mark.parametrize(
    ("size", "fix"),
    [
        ((20, 16, 16), [24, 16, 16]),
        ((16, 17, 16), [16, 24, 16]),
        ((16, 16, 1), [16, 16, 16]),
        ((8, 16, 16), [16, 16, 16]),
        ((33, 8, 40), [40, 16, 40]),
    ],
)
def test_windows_that_the_network_cannot_take_are_refused_with_one_that_it_can(size: Any, fix: list[int]) -> None:
    with pytest.raises(ConfigError, match="windows of this size") as caught:
        checked_roi(size, four_levels())
    assert str(fix) in caught.value.fix
    assert checked_roi(fix, four_levels()) == tuple(fix)
    assert "[8, 8, 8]" in caught.value.wanted


def test_the_strides_of_another_encoder_count() -> None:
    assert checked_roi((64, 64, 64), resnet10(n_input_channels=1)) == (64, 64, 64)
    with pytest.raises(ConfigError, match="windows of this size"):
        checked_roi((48, 64, 64), resnet10(n_input_channels=1, conv1_t_stride=2))


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 0), (16.5, 16, 16), 16], ids=str)
def test_what_is_no_size_is_refused_by_name(size: Any) -> None:
    with pytest.raises(ConfigError, match="roi_size"):
        checked_roi(size, four_levels())


def test_windows_for_an_unsupported_network_are_refused() -> None:
    with pytest.raises(ConfigError):
        checked_roi((16, 16, 16), UNet(3, 1, 2, channels=(4, 8), strides=(2,)))


@pytest.mark.parametrize(("precision", "refused"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_window_that_bf16_trains_wrongly_on_the_cpu_is_refused(precision: torch.dtype, refused: bool) -> None:
    autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    stride = find_encoder(network_of()).stride
    small = [2 * step for step in stride]
    large = [3 * step for step in stride]
    assert checked_roi(large, network_of(), "cpu", autocast) == tuple(large)
    assert checked_roi(small, network_of()) == tuple(small)
    if refused:
        with pytest.raises(ConfigError, match="bf16"):
            checked_roi(small, network_of(), "cpu", autocast)
    else:
        assert checked_roi(small, network_of(), "cpu", autocast) == tuple(small)


# The prior of the classes


def test_a_fresh_network_scores_classes_by_their_share_of_the_voxels() -> None:
    network = network_of(out_channels=3)
    before = snapshot(network)
    start_from_prior(network, [0.9, 0.08, 0.02])
    torch.testing.assert_close(network.conv_final[2].conv.bias.softmax(0), torch.tensor([0.9, 0.08, 0.02]))
    assert changed(network, before) == {"conv_final.2.conv.bias"}


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: network_of(out_channels=2), "2 channels"),
        (lambda: nn.Conv3d(1, 3, 1, bias=False), "bias False"),
        (lambda: nn.Linear(1, 3), "no convolution"),
    ],
)
def test_a_network_that_ends_otherwise_is_refused(make: Callable[[], nn.Module], got: str) -> None:
    with pytest.raises(ConfigError, match="last convolution") as caught:
        start_from_prior(make(), [0.9, 0.08, 0.02])
    assert got in str(caught.value)
