"""A small run that can be killed anywhere, for the tests of what survives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from ignite.metrics import Average
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.optimizers import WarmupCosineSchedule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from medclr.draws import shuffled, stable_seed
from medclr.engine import ContrastiveTrainer, ResumableRun, RunRecord, StepSchedule
from tests.engine.test_trainer import RandomPairs, method_of, prepare

PATIENTS, BATCH, EPOCHS = 10, 2, 3
STEPS = PATIENTS // BATCH * EPOCHS


class Killed(BaseException):
    """What a test raises where the process would die."""


class Noise(Dataset[dict[str, Tensor]]):
    """Items that depend on (place, epoch, turn)."""

    def __len__(self) -> int:
        return PATIENTS

    def __getitem__(self, index: tuple[int, int, int]) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(stable_seed(*index))
        image = torch.rand(1, 4, generator=random)
        return {"image": image, "label": image.sum(dim=1)}


class Order(DistributedSampler[Any]):
    """A sampler like medclr's."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, num_replicas=1, rank=0)
        self.first = 0

    def start_at(self, items: int) -> None:
        self.first = items

    def __iter__(self) -> Iterator[Any]:
        order = [(int(place), self.epoch, turn) for turn, place in enumerate(shuffled(PATIENTS, ("order", self.epoch)))]
        first, self.first = self.first, 0
        yield from order[first:]


class PairOrder(Order):
    """The same, of plain places."""

    def __iter__(self) -> Iterator[Any]:
        for place, _, _ in super().__iter__():
            yield place


class Run:
    """A trainer with dropout, a schedule, an evaluator that draws random numbers, and all that makes it resumable."""

    def __init__(
        self,
        folder: Path,
        *,
        contrastive: bool | Callable[[], Any] = False,
        epochs: int = EPOCHS,
        rate: float = 0.01,
        accumulation: int = 1,
        configuration: dict[str, Any] | None = None,
        digest: str = "rows",
        evaluate: bool = True,
        seed: int = 3,
        schedule: Callable[[Any, int], Any] | None = None,
        **settings: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.network: nn.Module
        if contrastive:
            self.network = dropped(contrastive() if callable(contrastive) else method_of())
        else:
            self.network = nn.Sequential(
                nn.Flatten(), nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1)
            )
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate)
        make = schedule if schedule is not None else lambda optimizer, total: WarmupCosineSchedule(optimizer, 3, total)
        self.scheduler = make(self.optimizer, epochs * PATIENTS // BATCH)
        common: dict[str, Any] = {
            "device": "cpu",
            "max_epochs": epochs,
            "network": self.network,
            "optimizer": self.optimizer,
            "train_handlers": [StepSchedule(self.scheduler)],
            "accumulation_steps": accumulation,
        }
        if contrastive:
            pairs = Pairs()
            self.trainer: Any = ContrastiveTrainer(
                train_data_loader=DataLoader(pairs, batch_size=BATCH, sampler=PairOrder(pairs)),
                loss_function=self.network.contrast,  # type: ignore[arg-type]
                prepare_batch=prepare(),
                **common,
            )
        else:
            noise = Noise()
            self.trainer = SupervisedTrainer(
                train_data_loader=DataLoader(noise, batch_size=BATCH, sampler=Order(noise)),
                loss_function=nn.MSELoss(),
                decollate=False,
                **common,
            )
        self.evaluator = SupervisedEvaluator(
            device="cpu",
            val_data_loader=[{"image": torch.ones(2, 1, 4), "label": torch.ones(2, 1)}] * 3,
            network=self.network,
            epoch_length=3,
            inferer=lambda inputs, network: torch.rand(()),
            key_val_metric={"noise": Average(output_transform=lambda output: output["pred"])},
            decollate=False,
        )
        if evaluate:
            self.trainer.add_event_handler(
                Events.EPOCH_COMPLETED, lambda engine: self.evaluator.run(engine.state.epoch)
            )
        self.losses: list[tuple[int, float]] = []
        self.trainer.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda engine: self.losses.append((engine.state.iteration, float(engine.state.output["loss"].detach()))),
        )
        self.record = RunRecord(folder / "run.json", seed=seed, datalist_digest=digest)
        self.resumable = ResumableRun(
            self.trainer,
            {"network": self.network, "optimizer": self.optimizer, "scheduler": self.scheduler},
            folder / "checkpoints",
            self.record,
            evaluators=[self.evaluator],
            **{"every_steps": 2, "every_minutes": 0, **settings},
        )
        self.configuration = {"rate": rate, "max_epochs": epochs, **(configuration or {})}

    def go(self) -> Run:
        """Prepare and run."""
        self.resumable.prepare(self.configuration)
        self.resumable.run()
        return self

    def killed(self, event: Any, at: int) -> Run:
        """Prepare and run, until the process would have died at an event for the ``at``-th time."""
        seen = 0

        def die(engine: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise Killed

        if event == Events.COMPLETED:
            self.trainer.add_event_handler(event, die)  # before the last checkpoint
        self.resumable.prepare(self.configuration)
        if event != Events.COMPLETED:
            self.trainer.add_event_handler(event, die)
        try:
            self.resumable.run()
        except Killed:
            return self
        raise AssertionError(f"{event} did not happen {at} times")

    def final(self) -> dict[str, Any]:
        """What two equal runs agree on, bit for bit."""
        return {
            "network": {name: value.clone() for name, value in self.network.state_dict().items()},
            "moments": [
                {name: torch.as_tensor(value).clone() for name, value in state.items()}
                for state in self.optimizer.state_dict()["state"].values()
            ],
            "rate": self.scheduler.get_last_lr(),
            "best": [float(self.evaluator.state.best_metric), self.evaluator.state.best_metric_epoch],
            "random": torch.rand(3),
            "iteration": self.trainer.state.iteration,
        }


def same(left: Any, right: Any) -> bool:
    """Bit for bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


class Pairs(RandomPairs):
    """As many patients as the other run has."""

    def __len__(self) -> int:
        return PATIENTS


def dropped(method: Any) -> Any:
    """The method with dropout behind its projector's layers."""
    projector = method.projector
    projector.layers = nn.Sequential(*projector.layers, nn.Dropout(0.3))
    return method
