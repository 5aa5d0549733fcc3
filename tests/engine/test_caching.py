from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from medclr import keys
from medclr.engine import ContrastiveTrainer, NonFiniteGuard
from medclr.engine.caching import GradientCache
from medclr.errors import ConfigError
from medclr.geometry import View
from medclr.methods import SimCLR
from medclr.models import Encoder
from tests.methods.builders import METHODS, meta_of, method_of, views_of

COUNT, CHUNK = 7, 3
PATIENTS = [0, 1, 2, 3, 4, 0, 5]

Batch = tuple[tuple[View, View], dict[str, Tensor]]


def batch_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    return views_of(COUNT, seed, dtype), meta_of(PATIENTS)


def prepare(batch: Batch, *_: Any, **__: Any) -> tuple[View, dict[str, Tensor], tuple[View], dict[str, Any]]:
    (view_1, view_2), meta = batch
    return view_1, meta, (view_2,), {}


def ready(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A method in the middle of its training: its copy is another network, its queue holds keys."""
    method = method_of(kind, **settings).to(dtype).train()
    random = torch.Generator().manual_seed(9)
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter.add_(noise.to(parameter) * 0.05 * parameter.abs().mean())
        elif name.endswith("weight"):
            parameter.data.mul_(1.5)
    if kind == "MoCo v2":
        numbers = torch.arange(6, 12)
        entries = {keys.PATIENT: numbers, "view": numbers * 0 + 1}
        method.queue.stash(torch.randn(6, 8, generator=random), entries)
        method.queue.after_step()
    return method


def trainer_of(method: Any, batches: list[Batch], chunk_size: int | None = None, **settings: Any) -> ContrastiveTrainer:
    trained = [p for p in method.parameters() if p.requires_grad]
    defaults: dict[str, Any] = {
        "device": "cpu",
        "max_epochs": 1,
        "train_data_loader": batches,
        "network": method,
        "optimizer": torch.optim.SGD(trained, lr=0.0),
        "loss_function": method.contrast,
        "prepare_batch": prepare,
        "chunk_size": chunk_size,
    }
    return ContrastiveTrainer(**{**defaults, **settings})


def gradient_of(method: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad])


def gradient_after(method: Any, batches: list[Batch], chunk_size: int | None = None, **settings: Any) -> Tensor:
    """Of the last step of a run of its own."""
    trained = copy.deepcopy(method)
    trainer = trainer_of(trained, batches, chunk_size, **settings)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=settings.get("precision") == "fp16")
    trainer.run()
    return gradient_of(trained)


def whole_graph(method: Any, batch: Batch, chunk: int) -> Tensor:
    """The gradient of a plain step that draws its dropout chunk by chunk, and keeps the graphs of all chunks."""
    (view_1, view_2), meta = batch
    trained = copy.deepcopy(method)
    torch.manual_seed(4)
    parts = []
    for first in range(0, COUNT, chunk):
        rows = slice(first, first + chunk)
        parts.append(trained(*(View(*(value[rows] for value in view)) for view in (view_1, view_2))))
    trained.contrast({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, meta)[keys.LOSS].backward()
    return gradient_of(trained)


def apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def cached(method: Any, batch: Batch, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    (view_1, view_2), meta = batch
    trained = copy.deepcopy(method)
    cache = GradientCache(trained, chunk)
    torch.manual_seed(4)
    embeddings = cache.embed(trained, (view_1, view_2), {})
    trained.contrast(embeddings, meta)[keys.LOSS].backward()
    cache.backward()
    return gradient_of(trained), embeddings


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("kind", METHODS)
def test_the_gradient_is_that_of_the_plain_step(kind: str, dropout: float | None, dtype: Any, error: float) -> None:
    method, batch = ready(kind, dtype, dropout=dropout), batch_of(dtype=dtype)
    found, _ = cached(method, batch, CHUNK)
    assert found.norm() > 1e-3
    assert apart(found, whole_graph(method, batch, CHUNK)) < error
    if dropout is None:
        assert apart(found, whole_graph(method, batch, COUNT)) < error
    else:  # this test would see other numbers drawn
        assert apart(found, whole_graph(method, batch, COUNT)) > 1e-3


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}, {"clip_norm": 1e-3}])
def test_the_trainer_gives_the_gradient_of_its_plain_step(kind: str, settings: dict[str, Any]) -> None:
    method = ready(kind)
    plain = gradient_after(method, [batch_of()], **settings)
    for chunk in (1, 3, 6):
        assert apart(gradient_after(method, [batch_of()], chunk, **settings), plain) < (5e-2 if settings else 1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_micro_batches_are_accumulated_as_without_a_cache(kind: str) -> None:
    method, batches = ready(kind), [batch_of(1), batch_of(2)]
    plain = gradient_after(method, batches, accumulation_steps=2)
    assert apart(gradient_after(method, batches, CHUNK, accumulation_steps=2), plain) < 1e-5
    assert apart(gradient_after(method, batches[1:], CHUNK), plain) > 1e-2, "both count"


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_with_a_cache_is_the_run_without(kind: str) -> None:
    ends = []
    for chunk in (None, CHUNK):
        method = method_of(kind, queue_size=10)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
        trainer_of(method, [batch_of(seed) for seed in range(3)], chunk, optimizer=optimizer, max_epochs=2).run()
        ends.append(method.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-5, equal_nan=True, msg=name)


def test_all_events_fire_in_their_order_and_the_output_holds_all_embeddings() -> None:
    method = ready("SimCLR")
    trainer, seen = trainer_of(method, [batch_of()], CHUNK), []

    def note(name: str) -> Callable[[ContrastiveTrainer], None]:
        def look(engine: ContrastiveTrainer) -> None:
            seen.append((name, gradient_of(method).norm() > 0 if name == "BACKWARD_COMPLETED" else None))
            assert engine.state.output["pred"][keys.PROJECTIONS].shape == (COUNT, 2, 8)

        return look

    for event in (
        IterationEvents.FORWARD_COMPLETED,
        IterationEvents.LOSS_COMPLETED,
        IterationEvents.BACKWARD_COMPLETED,
        IterationEvents.MODEL_COMPLETED,
    ):
        trainer.add_event_handler(event, note(event.name))
    trainer.run()
    assert [name for name, _ in seen] == [
        "FORWARD_COMPLETED",
        "LOSS_COMPLETED",
        "BACKWARD_COMPLETED",
        "MODEL_COMPLETED",
    ]
    assert seen[2][1], "the weights have their gradient by then"
    assert set(trainer.state.output) >= {"image", "views", "label", "pred", "loss", "plateau"}


class Sizes:
    """How many samples each forward pass of an encoder had, and whether it kept a graph."""

    def __init__(self, encoder: nn.Module) -> None:
        self.seen: list[tuple[int, bool]] = []
        encoder.register_forward_hook(lambda module, inputs, output: self.note(inputs[0], output))

    def note(self, images: Tensor, output: Tensor) -> None:
        self.seen.append((len(images) // 2, output.requires_grad))


def test_no_more_than_a_chunk_is_encoded_at_a_time() -> None:
    method = ready("BYOL")
    online, target = Sizes(method.encoder), Sizes(method.target_encoder)
    trainer_of(method, [batch_of()], CHUNK).run()
    assert online.seen == [(3, False), (3, False), (1, False), (3, True), (3, True), (1, True)]
    assert target.seen == [(size, False) for size in (3, 3, 1, 3, 3, 1)], "the momentum copy sees each chunk as well"


def test_a_batch_of_one_chunk_is_encoded_once() -> None:
    method = ready("SimCLR")
    sizes = Sizes(method.encoder)
    trainer_of(method, [batch_of()], COUNT).run()
    assert sizes.seen == [(COUNT, True)]


def test_random_numbers_go_on_after_the_step_as_if_each_had_been_drawn_once() -> None:
    method = ready("SimCLR", dropout=0.3)
    trainer = trainer_of(method, [batch_of()], CHUNK)
    drawn: list[Tensor] = []
    trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, lambda: drawn.append(torch.rand(2)))
    torch.manual_seed(4)
    trainer.run()
    found = torch.cat([*drawn, torch.rand(3)])
    torch.manual_seed(4)
    for first in range(0, COUNT, CHUNK):
        method(*(View(*(value[first : first + CHUNK] for value in view)) for view in batch_of()[0]))
    assert torch.equal(found, torch.cat([torch.rand(2), torch.rand(3)]))


def test_further_inputs_are_divided_where_they_have_a_row_a_sample() -> None:
    class Taking(SimCLR):
        def forward(self, view_1: View, view_2: View, *, ages: Tensor, names: dict[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
            taken.append((ages.tolist(), names["list"][0].tolist(), names["factor"]))
            return super().forward(view_1, view_2)

    taken: list[Any] = []
    method = Taking(method_of("SimCLR").encoder, method_of("SimCLR").projector)
    inputs = {"ages": torch.arange(COUNT), "names": {"list": [torch.arange(COUNT) * 10], "factor": 2}}
    trainer_of(method, [batch_of()], CHUNK, prepare_batch=lambda batch, *_, **__: (*prepare(batch)[:3], inputs)).run()
    expected = [(part, [10 * n for n in part], 2) for part in ([0, 1, 2], [3, 4, 5], [6])]
    assert taken == expected * 2


def test_a_step_that_a_guard_skips_moves_nothing() -> None:
    method = ready("MoCo v2")
    batch = batch_of()
    batch[0][0].image[2] = torch.nan
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    trainer = trainer_of(method, [batch], CHUNK, optimizer=optimizer)
    NonFiniteGuard().attach(trainer)
    method.before_step(0.0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    trainer.run()
    assert trainer.state.skipped_steps
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bf16_trains_with_a_cache() -> None:
    method = ready("SimCLR")
    batch = (views_of(COUNT), meta_of(PATIENTS))
    images = torch.rand(2, COUNT, 1, 12, 12, 12, generator=torch.Generator().manual_seed(1))
    batch = (tuple(view._replace(image=image) for view, image in zip(batch[0], images, strict=True)), batch[1])
    plain = gradient_after(method, [batch], precision="bf16")
    found = gradient_after(method, [batch], CHUNK, precision="bf16")
    assert apart(found, plain) < 5e-2
    assert found.norm() > 1e-3


def batch_normed() -> Any:
    return SimCLR(Encoder(SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,)), norm="batch"))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (batch_normed, "encoder."),
        (lambda: method_of("SimCLR", norm="batch"), "projector."),
        (lambda: method_of("BYOL", norm="batch"), "projector."),
    ],
)
def test_batch_norm_with_a_cache_is_refused_at_construction(build: Callable[[], Any], name: str) -> None:
    with pytest.raises(ConfigError, match="would not be exact") as refused:
        trainer_of(build(), [batch_of()], CHUNK)
    assert name in refused.value.got
    assert "norm: group" in refused.value.fix
    assert "norm: layer" in refused.value.fix
    trainer_of(build(), [batch_of()])  # without a cache it is fine


def test_running_statistics_of_any_norm_are_refused_as_they_would_move_twice() -> None:
    method = method_of("SimCLR")
    method.encoder.add_module("more", nn.InstanceNorm3d(8, track_running_stats=True))
    with pytest.raises(ConfigError, match="would not be exact"):
        GradientCache(method, CHUNK)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True])
def test_an_unusable_chunk_size_is_refused(chunk_size: Any) -> None:
    with pytest.raises(ConfigError, match="chunk size"):
        trainer_of(method_of("SimCLR"), [batch_of()], chunk_size)


def test_nothing_is_kept_of_a_batch_after_its_step() -> None:
    trainer = trainer_of(ready("SimCLR"), [batch_of()], CHUNK)
    sizes: list[int] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: sizes.append(len(e.cache._chunks) + len(e.cache._embeddings))
    )
    trainer.run()
    assert sizes == [0]
