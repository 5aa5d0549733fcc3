from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.networks.nets import SegResNet
from torch.utils.data import DataLoader, Dataset

from medclr import keys
from medclr.affinity import Affinity
from medclr.draws import draw_key
from medclr.engine import ContrastiveTrainer, PrepareViews
from medclr.engine.trainer import VIEWS, optimizer_step, place_in_step, refuse_one_patient
from medclr.errors import ConfigError
from medclr.geometry import Crop, View
from medclr.methods import SimCLR
from medclr.models import Encoder, Projector, norm_argument
from medclr.views import GaussianNoise, RandomSpatial, TwoViews
from tests.methods.builders import method_of as method_named

SIZE = (8, 8, 8)


class RandomPairs(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> dict[str, Any]:
        image = torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(place))
        crops = [
            Crop(image, torch.eye(4), torch.tensor([[0, 0, 0], SIZE]), torch.ones(1, dtype=torch.bool), key)
            for key in (draw_key(0, 0, place, 0, 1), draw_key(0, 0, place, 0, 2))
        ]
        meta = {keys.SAMPLE: place, keys.PATIENT: place, keys.SCAN: (place, place)}
        return {
            keys.CROP_1: crops[0],
            keys.CROP_2: crops[1],
            keys.META: {name: torch.tensor(value) for name, value in meta.items()},
        }


class Counting(SimCLR):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress: list[float] = []

    def after_step(self, progress: float) -> None:
        self.progress.append(progress)


def prepare() -> PrepareViews:
    return PrepareViews(TwoViews(RandomSpatial(SIZE, rotation=0.0, scale=(1.0, 1.0)), GaussianNoise(std=0.05)))


def loader() -> DataLoader[Any]:
    return DataLoader(RandomPairs(), batch_size=4)


def method_of(seed: int = 0) -> Counting:
    torch.manual_seed(seed)
    encoder = Encoder(SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), norm=norm_argument("instance")))
    return Counting(encoder, Projector(encoder.out_features, out_features=8, norm="layer"))


def trainer_of(method: SimCLR, **settings: Any) -> ContrastiveTrainer:
    defaults: dict[str, Any] = {"device": "cpu", "max_epochs": 2, "train_data_loader": loader()}
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(method.parameters(), lr=0.1)
    return ContrastiveTrainer(
        **{**defaults, **settings},
        network=method,
        optimizer=optimizer,
        loss_function=method.contrast,
        prepare_batch=prepare(),
    )


def batches(epochs: int) -> Iterator[Any]:
    for _ in range(epochs):
        yield from loader()


def test_it_is_a_supervised_trainer_so_that_monai_accepts_it() -> None:
    assert isinstance(trainer_of(method_of()), SupervisedTrainer)


def test_training_equals_a_plain_loop_bit_for_bit() -> None:
    trained, plain = method_of(), method_of()
    trainer_of(trained).run()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in batches(epochs=2):
        view_1, meta, (view_2,), _ = prepare()(batch, "cpu")
        optimizer.zero_grad()
        plain.contrast(plain(view_1, view_2), meta)[keys.LOSS].backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_all_four_iteration_events_fire_at_each_step() -> None:
    trainer = trainer_of(method_of(), max_epochs=1)
    fired: list[str] = []
    for event in IterationEvents:
        if event.name in ("FORWARD_COMPLETED", "LOSS_COMPLETED", "BACKWARD_COMPLETED", "MODEL_COMPLETED"):
            trainer.add_event_handler(event, lambda engine, name=event.name: fired.append(name))
    trainer.run()
    assert fired == ["FORWARD_COMPLETED", "LOSS_COMPLETED", "BACKWARD_COMPLETED", "MODEL_COMPLETED"] * 3


def test_the_output_holds_views_meta_embeddings_and_the_unscaled_loss() -> None:
    trainer = trainer_of(method_of(), max_epochs=1, accumulation_steps=3)
    seen: list[dict[str, Any]] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(dict(engine.state.output)))
    trainer.run()
    output = seen[0]
    assert isinstance(output["image"], View)
    assert len(output[VIEWS]) == 2
    assert set(output["label"]) == {keys.SAMPLE, keys.PATIENT, keys.SCAN}
    expected = trainer.method.contrast(output["pred"], output["label"])[keys.LOSS]
    torch.testing.assert_close(output["loss"], expected.detach())
    assert not output["loss"].requires_grad


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 6), (2, 4), (3, 2)])
def test_after_step_follows_the_optimizer_not_the_batches(accumulation: int, steps: int) -> None:
    method = method_of()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    taken: list[int] = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    trainer_of(method, accumulation_steps=accumulation, optimizer=optimizer).run()
    assert len(taken) == len(method.progress) == steps
    assert method.progress[-1] == 1.0
    assert method.progress == sorted(method.progress)


def test_accumulated_gradients_are_the_mean_of_the_micro_batches() -> None:
    accumulated, plain = method_of(), method_of()
    trainer_of(accumulated, max_epochs=1, accumulation_steps=3).run()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    losses = []
    for batch in batches(epochs=1):
        view_1, meta, (view_2,), _ = prepare()(batch, "cpu")
        losses.append(plain.contrast(plain(view_1, view_2), meta)[keys.LOSS])
    torch.stack(losses).mean().backward()
    optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, accumulated.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_on_the_cpu(precision: Any) -> None:
    method = method_of()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    losses: list[float] = []
    trainer = trainer_of(method, precision=precision)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"]))
    )
    trainer.run()
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in method.parameters())


def test_a_step_that_overflows_in_fp16_is_skipped_and_moves_nothing() -> None:
    method = method_of()
    trainer = trainer_of(method, precision="fp16", max_epochs=1)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    trainer.run()
    assert method.progress == []
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert trainer.grad_scaler.get_scale() < 2.0**127


def test_the_scaler_travels_in_the_state() -> None:
    trainer = trainer_of(method_of(), precision="fp16", max_epochs=1)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    trainer.run()
    other = trainer_of(method_of(), precision="fp16", max_epochs=1)
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.get_scale() == 4096.0
    assert other.state.iteration == trainer.state.iteration == 3


def test_the_gradient_is_clipped_as_a_whole() -> None:
    method = method_of()
    trainer = trainer_of(method, max_epochs=1, clip_norm=1e-3)
    norms: list[float] = []
    trainer.add_event_handler(
        IterationEvents.MODEL_COMPLETED,
        lambda engine: norms.append(
            float(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]).norm())
        ),
    )
    trainer.run()
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


def test_an_iteration_update_of_the_users_replaces_the_step() -> None:
    seen: list[Any] = []
    trainer_of(method_of(), max_epochs=1, iteration_update=lambda engine, batch: seen.append(batch)).run()
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"precision": "int8"}, "precision"), ({"clip_norm": 0.0}, "norm"), ({"epoch_length": 0}, "no batch")],
)
def test_unusable_settings_are_refused_at_construction(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        trainer_of(method_of(), **settings)


def test_a_batch_larger_than_the_cohort_is_refused_rather_than_skipped() -> None:
    with pytest.raises(ConfigError, match="no batch"):
        trainer_of(method_of(), train_data_loader=DataLoader(RandomPairs(), batch_size=64, drop_last=True))


def test_a_network_that_is_no_method_is_refused() -> None:
    network = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="method"):
        ContrastiveTrainer(
            "cpu", 1, loader(), network, torch.optim.SGD(network.parameters(), 0.1), lambda *_: {}, prepare()
        )


def spoil(trainer: ContrastiveTrainer, *steps: int) -> None:
    """Take the gradients away, as a guard does."""

    def forget(engine: ContrastiveTrainer) -> None:
        if engine.state.iteration in steps:
            for parameter in engine.network.parameters():
                parameter.grad = None

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, forget)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_without_any_gradient_moves_nothing(precision: Any, clip_norm: float | None) -> None:
    method = method_of()
    trainer = trainer_of(method, precision=precision, clip_norm=clip_norm, max_epochs=1)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=precision == "fp16")
    spoil(trainer, 2)
    seen: list[tuple[dict[str, torch.Tensor], float]] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: seen.append(
            ({name: value.clone() for name, value in method.state_dict().items()}, trainer.grad_scaler.get_scale())
        ),
    )
    trainer.run()
    assert method.progress == pytest.approx([1 / 3, 3 / 3])
    assert seen[0][1] == seen[1][1]
    same = [[torch.equal(one[name], other[name]) for name in one] for (one, _), (other, _) in itertools.pairwise(seen)]
    assert all(same[0])
    assert not all(same[1])


@pytest.mark.parametrize(("epoch_length", "batches", "wanted"), [(5, 2, "12 12 3 12 12 3"), (3, 1, "333333")])
def test_the_place_of_a_batch_in_its_step_is_as_monai_counts(epoch_length: int, batches: int, wanted: str) -> None:
    trainer = trainer_of(method_of(), accumulation_steps=batches)
    trainer.state.epoch_length = epoch_length
    kinds = {(True, False): "1", (False, True): "2", (True, True): "3"}
    found, steps = "", []
    for iteration in range(1, len(wanted.replace(" ", "")) + 1):
        trainer.state.iteration = iteration
        found += kinds[place_in_step(trainer)]
        steps.append(optimizer_step(trainer, iteration))
    assert found == wanted.replace(" ", "")
    assert steps == ([1, 1, 2, 2, 3, 4, 4, 5, 5, 6] if batches == 2 else [1, 2, 3, 4, 5, 6])


def test_without_an_epochs_length_steps_are_counted_through() -> None:
    trainer = trainer_of(method_of(), accumulation_steps=2)
    trainer.state.epoch_length, places = None, []
    for iteration in range(1, 6):
        trainer.state.iteration = iteration
        places.append((*place_in_step(trainer), optimizer_step(trainer, iteration)))
    assert places == [(True, False, 1), (False, True, 1), (True, False, 2), (False, True, 2), (True, False, 3)]


class Told(Counting):
    """Notes when it is told that a step begins, and when that one was done."""

    def before_step(self, progress: float) -> None:
        self.progress.append(-progress)


@pytest.mark.parametrize(
    ("accumulation", "expected"),
    [(1, "-0 1 -1 -2 3 -3 4 -4 5 -5 6"), (2, "-0 -2 3 -3 5 -5 6")],
)
def test_a_method_is_told_when_a_step_begins_also_after_one_that_was_left_out(accumulation: int, expected: str) -> None:
    method = method_of()
    method.__class__ = Told
    trainer = trainer_of(method, accumulation_steps=accumulation)
    spoil(trainer, 2)
    trainer.run()
    assert method.progress == pytest.approx([int(part) / 6 for part in expected.split()])


COHORTS = [("SimCLR", 1, True), ("SimCLR", 2, False), ("BYOL", 1, False)]


@pytest.mark.parametrize(("kind", "patients", "refused"), COHORTS)
def test_a_cohort_of_one_patient_is_refused_where_patients_are_told_apart(
    kind: str, patients: int, refused: bool
) -> None:
    dataset = SimpleNamespace(usable_patients=lambda: patients)
    if refused:
        with pytest.raises(ConfigError, match="one usable patient for SimCLR"):
            refuse_one_patient(method_named(kind), dataset)
    else:
        refuse_one_patient(method_named(kind), dataset)
    refuse_one_patient(method_named("SimCLR", affinity=Affinity(same_patient="negative")), dataset)
    refuse_one_patient(method_named("SimCLR"), None)
