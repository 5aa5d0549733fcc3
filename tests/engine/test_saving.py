from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.networks.nets import SegResNet
from torch import nn

from medclr.engine import RunRecord, SaveEncoder
from medclr.errors import ConfigError, WeightsError
from medclr.models import Encoder
from medclr.weights import Manifest, encoder_state_dict, load_encoder, read_manifest

MANIFEST = Manifest("SimCLR", seed=7, crop_size=(8, 8, 8))


def network_of(seed: int = 0) -> SegResNet:
    torch.manual_seed(seed)
    return SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), norm="instance")


def encoder_of(seed: int = 0) -> Encoder:
    return Encoder(network_of(seed))


def engine_of(handler: Any, encoder: Encoder | None = None) -> Engine:
    """A training that moves one weight by 1 a step."""

    def step(engine: Engine, batch: int) -> None:
        if encoder is not None:
            next(encoder.parameters()).data.add_(1.0)

    engine = Engine(step)
    handler.attach(engine)
    return engine


def watch(engine: Engine, path: Path) -> list[int | None]:
    """Fills itself with the steps in the file after each epoch."""
    seen: list[int | None] = []
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: seen.append(read_manifest(path).steps if path.exists() else None)
    )
    return seen


def test_the_last_weights_are_saved_at_the_end_with_their_manifest(tmp_path: Path) -> None:
    path, encoder = tmp_path / "models" / "encoder.safetensors", encoder_of()
    start = next(encoder.parameters()).detach().clone()
    engine_of(SaveEncoder(path, encoder, MANIFEST), encoder).run([0, 1, 2], max_epochs=2)
    manifest = read_manifest(path)
    assert (manifest.steps, manifest.epochs) == (6, 2)
    assert (manifest.method, manifest.seed, manifest.crop_size) == ("SimCLR", 7, [8, 8, 8])
    state = encoder_state_dict(path)
    assert set(state) == set(encoder.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    torch.testing.assert_close(next(encoder.parameters()).detach(), start + 6)


def test_the_file_can_be_loaded_into_another_network(tmp_path: Path) -> None:
    path, encoder, target = tmp_path / "encoder.safetensors", encoder_of(), network_of(seed=1)
    engine_of(SaveEncoder(str(path), encoder, MANIFEST)).run([0], max_epochs=1)
    load_encoder(path, into=target, quiet=True)
    image = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(encoder(image), Encoder(target)(image))


def test_the_patients_of_the_record_travel_along(tmp_path: Path) -> None:
    path, mine, theirs = tmp_path / "encoder.safetensors", "a" * 16, "b" * 16
    record = RunRecord(None, patients={"training": [theirs], "validation": []})
    record.start({}, step=0)
    manifest = dataclasses.replace(MANIFEST, patient_digests=[mine])
    engine_of(SaveEncoder(path, encoder_of(), manifest, record=record)).run([0], max_epochs=1)
    assert read_manifest(path).patient_digests == [mine, theirs]
    assert read_manifest(path).validation_digests == []


@pytest.mark.parametrize(
    ("interval", "seen"),
    [(0, [None] * 5), (1, [2, 4, 6, 8, 10]), (2, [None, 4, 4, 8, 8]), (5, [None] * 4 + [10]), (9, [None] * 5)],
)
def test_it_saves_every_few_epochs_and_always_at_the_end(interval: int, seen: list[int | None], tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    engine = engine_of(SaveEncoder(path, encoder_of(), MANIFEST, interval=interval))
    steps = watch(engine, path)
    engine.run([0, 1], max_epochs=5)
    assert steps == seen
    assert read_manifest(path).steps == 10
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["encoder.safetensors"]


def test_a_resumed_run_counts_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    engine = engine_of(SaveEncoder(path, encoder_of(), MANIFEST))
    engine.load_state_dict({"epoch": 3, "epoch_length": 2, "max_epochs": 5})
    engine.run([0, 1])
    assert (read_manifest(path).steps, read_manifest(path).epochs) == (10, 5)


def test_a_run_that_is_stopped_within_an_epoch_saves_and_counts_whole_epochs(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    engine = engine_of(SaveEncoder(path, encoder_of(), MANIFEST))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: engine.terminate())
    engine.run([0, 1, 2], max_epochs=4)
    assert (read_manifest(path).steps, read_manifest(path).epochs) == (5, 1)


@pytest.mark.parametrize(("batches", "stop"), [(1, None), (2, None), (3, None), (4, None), (7, None), (2, 6), (3, 9)])
def test_accumulated_batches_are_one_step(batches: int, stop: int | None, tmp_path: Path) -> None:
    path, network = tmp_path / "encoder.safetensors", nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    taken: list[int] = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=[{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}] * 5,
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        accumulation_steps=batches,
        train_handlers=[SaveEncoder(path, encoder_of(), MANIFEST)],
    )
    if stop is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda: trainer.terminate())
    trainer.run()
    assert read_manifest(path).steps == len(taken)


def test_the_manifest_that_was_given_stays_as_it_was(tmp_path: Path) -> None:
    before = MANIFEST.to_json()
    engine_of(SaveEncoder(tmp_path / "encoder.safetensors", encoder_of(), MANIFEST)).run([0], max_epochs=1)
    assert MANIFEST.to_json() == before
    assert MANIFEST.steps is None


def test_weights_that_are_no_numbers_replace_nothing(tmp_path: Path) -> None:
    path, encoder = tmp_path / "encoder.safetensors", encoder_of()
    engine = engine_of(SaveEncoder(path, encoder, MANIFEST, interval=1))
    engine.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: next(encoder.parameters()).data.fill_(float("nan")))
    with pytest.raises(WeightsError):
        engine.run([0], max_epochs=2)
    assert read_manifest(path).steps == 1


def test_rank_0_alone_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclr.distributed.rank", lambda: 1)
    engine_of(SaveEncoder(tmp_path / "encoder.safetensors", encoder_of(), MANIFEST, interval=1)).run([0], max_epochs=2)
    assert list(tmp_path.iterdir()) == []


def test_a_negative_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="interval"):
        SaveEncoder(tmp_path / "encoder.safetensors", encoder_of(), MANIFEST, interval=-1)


@pytest.mark.parametrize("name", ["encoder.pt", "encoder", "encoder.safetensors.bak"])
def test_another_suffix_is_refused_before_the_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safetensors") as caught:
        SaveEncoder(tmp_path / name, encoder_of(), MANIFEST)
    assert caught.value.got == name
