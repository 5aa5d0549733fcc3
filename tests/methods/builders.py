"""Small methods and views, for the tests of methods, caching and ranks."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import SegResNet
from torch import Tensor

from medclr import keys
from medclr.geometry import View
from medclr.methods import BYOL, MoCo, SimCLR
from medclr.models import Encoder, Projector, norm_argument

METHODS = ("SimCLR", "MoCo v2", "MoCo v3", "BYOL")
WIDTH = 8


def tiny_encoder(dropout: float | None = None) -> Encoder:
    network = SegResNet(
        init_filters=8, blocks_down=(1, 1), blocks_up=(1,), norm=norm_argument("instance"), dropout_prob=dropout
    )
    return Encoder(network)


def method_of(
    kind: str,
    *,
    seed: int = 0,
    dropout: float | None = None,
    norm: str = "layer",
    queue_size: int = 10,
    **settings: Any,
) -> Any:
    """A method of a kind, always of the same weights."""
    torch.manual_seed(seed)
    encoder = tiny_encoder(dropout)
    projector = Projector(encoder.out_features, out_features=WIDTH, norm=norm)
    if kind == "SimCLR":
        return SimCLR(encoder, projector, **settings)
    if kind == "MoCo v2":
        return MoCo(encoder, projector, queue_size=queue_size, **settings)
    predictor = Projector(WIDTH, 16, WIDTH, norm=norm)
    if kind == "MoCo v3":
        return MoCo(encoder, projector, predictor, queue_size=0, **settings)
    assert kind == "BYOL"
    return BYOL(encoder, projector, predictor, **settings)


def view_of(image: Tensor) -> View:
    batch = len(image)
    return View(
        image=image,
        affine=torch.eye(4).repeat(batch, 1, 1),
        valid=torch.ones(batch, 1, *image.shape[2:], dtype=torch.bool),
        channels=torch.ones(batch, 1, dtype=torch.bool),
        key=torch.zeros(batch, 5, dtype=torch.int64),
    )


def views_of(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[View, View]:
    images = torch.rand(2, count, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return view_of(images[0]), view_of(images[1])


def meta_of(patients: list[int]) -> dict[str, Tensor]:
    return {keys.SAMPLE: torch.arange(len(patients)), keys.PATIENT: torch.tensor(patients)}
