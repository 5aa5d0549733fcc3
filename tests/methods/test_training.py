"""The methods with a momentum copy in the trainer: against a plain loop, under accumulation, skipped, and resumed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from medclr import keys
from medclr.engine import ContrastiveTrainer, SaveEncoder
from medclr.geometry import View
from medclr.weights import Manifest, load_encoder
from tests.engine.runs import STEPS, Run, same
from tests.engine.test_trainer import loader, prepare
from tests.methods.builders import method_of

WITH_COPY = ("MoCo v2", "MoCo v3", "BYOL")
EPOCHS, BATCHES = 2, 3


def trainer_of(method: Any, **settings: Any) -> ContrastiveTrainer:
    return ContrastiveTrainer(
        device="cpu",
        max_epochs=EPOCHS,
        train_data_loader=loader(),
        network=method,
        optimizer=torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1),
        loss_function=method.contrast,
        prepare_batch=prepare(),
        **settings,
    )


def batches() -> Iterator[tuple[View, View, Tensor]]:
    for _ in range(EPOCHS):
        for batch in loader():
            view_1, meta, (view_2,), _ = prepare()(batch, "cpu")
            yield view_1, view_2, meta[keys.PATIENT]


def copies_of(method: Any) -> list[Any]:
    names = ("key_encoder", "key_projector", "target_encoder", "target_projector")
    return [getattr(method, name) for name in names if hasattr(method, name)]


class Plain:
    """The three methods as their papers write them down, one after the other, without a class for anything."""

    def __init__(self, method: Any) -> None:
        self.online = copy.deepcopy(method)
        self.slow = copy.deepcopy(method)
        self.queue: list[tuple[int, Tensor]] = []

    def heads(self, network: Any, view: View) -> Tensor:
        return network.projector(network.encoder(view.image))

    def moco_v2(self, x_1: View, x_2: View, patients: Tensor) -> Tensor:
        q = normalize(self.heads(self.online, x_1), dim=1)
        with torch.no_grad():
            k = normalize(self.heads(self.slow, x_2), dim=1)
        losses = []
        for row, patient in enumerate(patients.tolist()):
            negatives = [key for owner, key in self.queue if owner != patient]
            logits = torch.stack([q[row] @ k[row], *(q[row] @ key for key in negatives)]) / 0.2
            losses.append(-logits.log_softmax(dim=0)[0])
        self.queue = [*self.queue, *zip(patients.tolist(), k, strict=True)][-10:]
        return torch.stack(losses).mean()

    def moco_v3(self, x_1: View, x_2: View, patients: Tensor) -> Tensor:
        q_1, q_2 = (normalize(self.online.predictor(self.heads(self.online, x)), dim=1) for x in (x_1, x_2))
        with torch.no_grad():
            k_1, k_2 = (normalize(self.heads(self.slow, x), dim=1) for x in (x_1, x_2))
        label = torch.arange(len(q_1))
        return (cross_entropy(q_1 @ k_2.T / 0.2, label) + cross_entropy(q_2 @ k_1.T / 0.2, label)) / 2

    def byol(self, x_1: View, x_2: View, patients: Tensor) -> Tensor:
        p_1, p_2 = (normalize(self.online.predictor(self.heads(self.online, x)), dim=1) for x in (x_1, x_2))
        with torch.no_grad():
            z_1, z_2 = (normalize(self.heads(self.slow, x), dim=1) for x in (x_1, x_2))
        return ((2 - 2 * (p_1 * z_2).sum(dim=1)) + (2 - 2 * (p_2 * z_1).sum(dim=1))).mean() / 2

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        for slow, online in zip(self.slow.parameters(), self.online.parameters(), strict=True):
            slow.copy_(momentum * slow + (1 - momentum) * online)


@pytest.mark.parametrize(("kind", "base"), [("MoCo v2", 0.999), ("MoCo v3", 0.99), ("BYOL", 0.996)])
def test_training_equals_a_plain_loop(kind: str, base: float) -> None:
    method = method_of(kind)
    plain, losses = Plain(method), []
    trainer = trainer_of(method)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output["loss"])))
    trainer.run()
    contrast = {"MoCo v2": plain.moco_v2, "MoCo v3": plain.moco_v3, "BYOL": plain.byol}[kind]
    parameters = [p for p in plain.online.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    expected = []
    for number, batch in enumerate(batches(), start=1):
        optimizer.zero_grad()
        loss = contrast(*batch)
        loss.backward()
        optimizer.step()
        cosine = 1 - (1 - base) * (math.cos(math.pi * number / (EPOCHS * BATCHES)) + 1) / 2
        plain.follow(base if kind == "MoCo v2" else cosine)
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    for name in names:
        torch.testing.assert_close(
            method.get_parameter(name), plain.online.get_parameter(name), rtol=1e-3, atol=1e-5, msg=name
        )
    for module, slow in zip(copies_of(method), (plain.slow.encoder, plain.slow.projector), strict=True):
        for mine, its in zip(module.copy.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
    if kind == "MoCo v2":
        found, meta = method.queue.contents()
        order = (int(method.queue.pointer) + torch.arange(10)) % 10
        assert meta[keys.PATIENT][order].tolist() == [patient for patient, _ in plain.queue]
        torch.testing.assert_close(found[order], torch.stack([key for _, key in plain.queue]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", WITH_COPY)
@pytest.mark.parametrize(("accumulation", "steps"), [(1, 6), (2, 4)])
def test_the_copy_moves_once_an_optimizer_step_as_the_formula_says(kind: str, accumulation: int, steps: int) -> None:
    method = method_of(kind, momentum=0.9)
    weight = method.encoder.convInit.conv.weight
    seen: list[tuple[float, Any]] = []
    expected = weight.detach().double().numpy().copy()
    trainer = trainer_of(method, accumulation_steps=accumulation)
    moved = method.after_step

    def note(progress: float) -> None:
        seen.append((progress, weight.detach().double().numpy().copy()))
        moved(progress)

    method.after_step = note
    trainer.run()
    assert len(seen) == steps
    for progress, online in seen:
        momentum = 0.9 if kind == "MoCo v2" else 1 - 0.1 * (np.cos(np.pi * progress) + 1) / 2
        expected = momentum * expected + (1 - momentum) * online
    found = copies_of(method)[0].copy.convInit.conv.weight.double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def spoil(trainer: ContrastiveTrainer, *iterations: int) -> None:
    def forget(engine: ContrastiveTrainer) -> None:
        if engine.state.iteration in iterations:
            for parameter in engine.network.parameters():
                parameter.grad = None

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, forget)


@pytest.mark.parametrize(("accumulation", "skipped", "expected"), [(1, (2,), [0, 8]), (2, (2,), [8])])
def test_the_keys_of_a_skipped_step_never_join_the_queue(
    accumulation: int, skipped: tuple[int, ...], expected: list[int]
) -> None:
    method = method_of("MoCo v2", queue_size=20)
    trainer = trainer_of(method, accumulation_steps=accumulation)
    spoil(trainer, *skipped)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda engine: engine.terminate())
    trainer.run()
    found = method.queue.contents()[1][keys.PATIENT].tolist()
    assert found == [patient for first in expected for patient in range(first, first + 4)]


def test_a_queue_reads_what_was_there_before_the_step_under_accumulation_too() -> None:
    method = method_of("MoCo v2", queue_size=20)
    trainer, plateaus = trainer_of(method, accumulation_steps=2), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: plateaus.append(e.state.output["plateau"].exp()))
    trainer.run()
    assert [round(float(value)) - 1 for value in plateaus] == [0, 0, 8, 12, 12, 20]


@pytest.mark.parametrize("kind", WITH_COPY)
def test_weights_loaded_after_the_method_was_made_reach_its_copy(kind: str) -> None:
    method = method_of(kind)
    with torch.no_grad():
        method.encoder.convInit.conv.weight.fill_(0.25)
    trainer = trainer_of(method)
    seen: list[Tensor] = []
    trainer.add_event_handler(
        IterationEvents.FORWARD_COMPLETED,
        lambda engine: seen.append(copies_of(method)[0].copy.convInit.conv.weight.clone()),
    )
    trainer.run()
    assert bool((seen[0] == 0.25).all())


@pytest.mark.parametrize("kind", WITH_COPY)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    def build() -> Any:
        return method_of(kind, queue_size=7, momentum=0.5)

    whole = Run(tmp_path / "whole", contrastive=build).go().final()
    if kind == "MoCo v2":
        assert int(whole["network"]["queue.filled"]) == 7
    for place, (event, at) in enumerate([(Events.ITERATION_STARTED, 2), (Events.ITERATION_COMPLETED, STEPS - 2)]):
        folder = tmp_path / str(place)
        Run(folder, contrastive=build).killed(event, at)
        assert same(Run(folder, contrastive=build).go().final(), whole), f"killed at {event} number {at}"


@pytest.mark.parametrize("kind", WITH_COPY)
def test_the_encoder_that_is_trained_is_the_one_that_is_saved(tmp_path: Path, kind: str) -> None:
    method = method_of(kind)
    trainer = trainer_of(method)
    SaveEncoder(tmp_path / "encoder.safetensors", method.encoder, Manifest(kind)).attach(trainer)
    trainer.run()
    other = method_of(kind, seed=5)
    load_encoder(tmp_path / "encoder.safetensors", into=other)
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(other.encoder.state_dict()[name], value), name


@pytest.mark.parametrize("kind", WITH_COPY)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_precision_trains(kind: str, precision: Any) -> None:
    method, losses = method_of(kind), []
    trainer = trainer_of(method, precision=precision)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output["loss"])))
    trainer.run()
    assert np.isfinite(losses).all()
    assert all(p.dtype == torch.float32 for p in method.parameters())
