"""What `torchrun` starts in each of two ranks: a resumable training of which one rank dies once, by SIGKILL."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from medclr.data import Preprocessing, RandomCrop, ScanReader, read_datalist
from medclr.engine import ContrastiveTrainer, PrepareViews, ResumableRun, RunRecord
from medclr.pairs import PatientPairDataset, PatientSampler
from medclr.views import GaussianNoise, RandomSpatial, TwoViews
from tests.engine.test_trainer import method_of

EPOCHS = 4


def main(datalist: str, output: str, die_at: int) -> None:
    """Train; rank 1 dies before step ``die_at`` of the first attempt, if that is above 0."""
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(output)
    torch.manual_seed(0)
    method: Any = method_of()
    network = DistributedDataParallel(method)
    views = TwoViews(RandomSpatial((8, 8, 8), rotation=10.0), GaussianNoise(std=0.05))
    found = read_datalist(datalist)
    dataset = PatientPairDataset(
        found.training, crop=RandomCrop((8, 8, 8), read_size=views.read_size()), reader=ScanReader(Preprocessing())
    )
    sampler = PatientSampler(dataset, passes=4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    trainer = ContrastiveTrainer(
        device="cpu",
        max_epochs=EPOCHS,
        train_data_loader=DataLoader(dataset, batch_size=2, sampler=sampler, drop_last=True),
        network=network,
        optimizer=optimizer,
        loss_function=method.contrast,
        prepare_batch=PrepareViews(views),
    )
    steps: list[int] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: steps.append(engine.state.iteration))
    resumable = ResumableRun(
        trainer,
        {"method": method, "optimizer": optimizer},
        folder / "checkpoints",
        RunRecord(folder / "run.json", seed=0, datalist_digest=found.digest()),
        every_steps=3,
        every_minutes=0,
    )
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 and rank == 1 and die_at:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=die_at), lambda: os.kill(os.getpid(), signal.SIGKILL))
    resumable.prepare({"batch_size": 2})
    resumable.run()
    torch.save(
        {"weights": method.state_dict(), "steps": steps, "attempt": attempt, "random": torch.get_rng_state()},
        folder / f"rank_{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
