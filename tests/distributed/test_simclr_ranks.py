"""Two ranks train what one rank trains on the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.nets import SegResNet
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from medclr import distributed, keys
from medclr.draws import draw_key
from medclr.engine import ContrastiveTrainer, PrepareViews
from medclr.geometry import Crop
from medclr.methods import SimCLR
from medclr.models import Encoder, Projector
from medclr.views import GaussianNoise, RandomSpatial, TwoViews

SIZE = (8, 8, 8)
PATIENTS = (0, 1, 2, 3, 4, 0)  # the last sample is the first patient's, on another rank


def crops_of(view: int) -> Crop:
    batch = len(PATIENTS)
    return Crop(
        image=torch.rand(batch, 1, *SIZE, generator=torch.Generator().manual_seed(view)),
        affine=torch.eye(4).repeat(batch, 1, 1),
        inside=torch.tensor([[0, 0, 0], SIZE]).repeat(batch, 1, 1),
        channels=torch.ones(batch, 1, dtype=torch.bool),
        key=torch.stack([draw_key(0, 0, place, 0, view) for place in range(batch)]),
    )


def one_step() -> dict[str, Any]:
    """One SGD step on this rank's share of the batch."""
    ranks, rank = distributed.world_size(), distributed.rank()
    share = slice(rank * len(PATIENTS) // ranks, (rank + 1) * len(PATIENTS) // ranks)
    meta = {
        keys.SAMPLE: torch.arange(len(PATIENTS))[share],
        keys.PATIENT: torch.tensor(PATIENTS)[share],
    }
    crops = [Crop(*(value[share] for value in crops_of(view))) for view in (1, 2)]
    torch.manual_seed(0)
    encoder = Encoder(SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,)))
    method = SimCLR(encoder, Projector(encoder.out_features, out_features=8, norm="layer"))
    network = DistributedDataParallel(method) if ranks > 1 else method
    losses: list[Tensor] = []
    trainer = ContrastiveTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[{keys.CROP_1: crops[0], keys.CROP_2: crops[1], keys.META: meta}],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=method.contrast,
        prepare_batch=PrepareViews(
            TwoViews(RandomSpatial(SIZE, rotation=0.0, scale=(1.0, 1.0)), GaussianNoise(std=0.1))
        ),
    )
    trainer.run()
    losses.append(trainer.state.output["loss"])
    gradients = {
        name: parameter.grad.clone() for name, parameter in method.named_parameters() if parameter.grad is not None
    }
    return {"loss": losses[0], "gradients": gradients, "weights": dict(method.state_dict())}


@pytest.mark.slow
def test_two_ranks_give_the_loss_gradients_and_weights_of_one(run_ranks: Callable[..., list[Any]]) -> None:
    alone = one_step()
    ranks = run_ranks(one_step)
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, alone["loss"])
    for result in ranks:
        for part in ("gradients", "weights"):
            assert set(result[part]) == set(alone[part])
            flat = [torch.cat([side[part][name].flatten() for name in alone[part]]) for side in (result, alone)]
            assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 1e-5, part
