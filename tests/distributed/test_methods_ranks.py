"""Two ranks train what one rank trains on the joined batch: all methods, with and without gradient caching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from medclr import distributed, keys
from medclr.engine import ContrastiveTrainer
from medclr.geometry import View
from tests.methods.builders import METHODS, method_of, views_of

PATIENTS = (0, 1, 2, 3, 4, 0, 5, 6)  # one patient on both ranks
STEPS = 3
CASES = [(kind, chunk, batches) for kind in METHODS for chunk, batches in ((None, 1), (3, 1), (None, 2), (3, 2))]


def part_of(step: int, share: slice) -> tuple[tuple[View, ...], dict[str, Tensor]]:
    views = tuple(View(*(value[share] for value in view)) for view in views_of(len(PATIENTS), step))
    # Patients come in another order each step, so that a queue holds the queries' own.
    numbers = (torch.tensor(PATIENTS) + 3 * step) % 9
    return views, {keys.SAMPLE: torch.arange(len(PATIENTS))[share], keys.PATIENT: numbers[share]}


def prepare(batch: Any, *_: Any, **__: Any) -> Any:
    (view_1, view_2), meta = batch
    return view_1, meta, (view_2,), {}


def train(kind: str, chunk: int | None, accumulation: int) -> dict[str, Any]:
    """A few SGD steps on this rank's share of each batch."""
    ranks, rank = distributed.world_size(), distributed.rank()
    share = slice(rank * len(PATIENTS) // ranks, (rank + 1) * len(PATIENTS) // ranks)
    settings: dict[str, Any] = {} if kind == "SimCLR" else {"momentum": 0.5}
    method = method_of(kind, queue_size=13, **settings)
    network = DistributedDataParallel(method) if ranks > 1 else method
    losses: list[Tensor] = []
    exchanged: list[bool] = []
    method.encoder.register_forward_hook(
        lambda *_: (
            exchanged.append(getattr(network, "require_backward_grad_sync", True)) if torch.is_grad_enabled() else None
        )
    )
    trainer = ContrastiveTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[part_of(step, share) for step in range(STEPS)],
        network=network,
        optimizer=torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1),
        loss_function=lambda *inputs: losses.append((result := method.contrast(*inputs))["loss"].detach()) or result,
        prepare_batch=prepare,
        chunk_size=chunk,
        accumulation_steps=accumulation,
    )
    trainer.run()
    gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "state": dict(method.state_dict()),
        "exchanged": exchanged,
    }


def train_all() -> list[dict[str, Any]]:
    return [train(*case) for case in CASES]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten().nan_to_num(-7.0) for name in sorted(tensors)])


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return float((flat(left) - flat(right)).norm() / flat(right).norm())


@pytest.mark.slow
def test_two_ranks_give_the_loss_gradients_copy_and_queue_of_one(run_ranks: Callable[..., list[Any]]) -> None:
    alone = {case[::2]: train(case[0], None, case[2]) for case in CASES if case[1] is None}
    ranks = run_ranks(train_all, timeout=280)
    for number, (kind, chunk, accumulation) in enumerate(CASES):
        expected, case = alone[kind, accumulation], f"{kind}, chunk {chunk}, {accumulation} batches a step"
        results = [rank[number] for rank in ranks]
        mean = torch.stack([result["losses"] for result in results]).mean(dim=0)
        torch.testing.assert_close(mean, expected["losses"], rtol=1e-4, atol=1e-5, msg=case)
        for result in results:
            assert apart(result["gradients"], expected["gradients"]) < 1e-4, case
            assert apart(result["state"], expected["state"]) < 1e-5, case
            # Of two chunks a rank, gradients travel with the last.
            assert result["exchanged"] == ([True] if chunk is None else [False, True]) * STEPS, case
        # All ranks hold one queue and one copy, bit for bit.
        first, second = (result["state"] for result in results)
        assert all(torch.equal(first[name].nan_to_num(-7.0), second[name].nan_to_num(-7.0)) for name in first), case
        if kind == "MoCo v2":
            for name in ("meta_patient", "pointer", "filled"):
                assert torch.equal(first[f"queue.{name}"], expected["state"][f"queue.{name}"]), case
            assert int(first["queue.filled"]) == 13


def queue_beside_ddp() -> dict[str, Any]:
    """What DDP makes of a queue and of a buffer of the encoder, different on each rank, when it starts and runs."""
    rank = distributed.rank()
    method = method_of("MoCo v2", queue_size=4)
    method.encoder.register_buffer("statistic", torch.zeros(1))
    method.queue.embeddings.fill_(rank)
    network = DistributedDataParallel(method, broadcast_buffers=True)
    started = method.queue.embeddings.clone()
    method.encoder.statistic.fill_(rank)
    method.queue.meta_patient.fill_(rank)
    network(*views_of(2))
    return {
        "started": started,
        "queue": method.queue.embeddings.clone(),
        "patients": method.queue.meta_patient.clone(),
        "statistic": method.encoder.statistic.clone(),
    }


@pytest.mark.slow
def test_ddp_leaves_the_queue_alone_and_nothing_else(run_ranks: Callable[..., list[Any]]) -> None:
    for rank, result in enumerate(run_ranks(queue_beside_ddp)):
        for name in ("started", "queue", "patients"):
            assert bool((result[name] == rank).all()), name
        assert float(result["statistic"]) == 0.0, "a buffer that DDP sends from the first rank"
