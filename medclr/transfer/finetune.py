"""From a pretrained encoder to a network that is fine-tuned."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from medclr.data import Preprocessing
from medclr.data.crops import checked_size
from medclr.errors import ConfigError, WeightsError
from medclr.models import find_encoder
from medclr.models.encoder import refuse_unsafe_bf16
from medclr.weights import find_manifest, load_encoder

logger = logging.getLogger(__name__)


def initialise(
    network: nn.Module, pretrained: str | Path | None = None, preprocessing: Preprocessing | None = None
) -> nn.Module:
    """Put pretrained weights into a network's encoder, all of it, and print the coverage; or leave it as it is.

    Args:
        network: a supported MONAI network, or what holds one.
        pretrained: a file that :func:`medclr.load_encoder` reads, or None for a start from scratch.
        preprocessing: of the scans; where it differs from that of pretraining, the log says so.

    Returns:
        The network itself.

    Raises:
        WeightsError: for a file that is not there, cannot be read, or does not fill the whole encoder.
    """
    if pretrained is None:
        logger.info("no pretrained weights: training starts from scratch")
        return network
    if not Path(pretrained).is_file():
        raise WeightsError(
            "The pretrained weights are not there.",
            got=str(pretrained),
            wanted="the file of an encoder, such as models/encoder.safetensors",
            fix="Correct pretrained, or set it to null for a start from scratch.",
        )
    load_encoder(pretrained, into=network)
    manifest = find_manifest(pretrained)
    if preprocessing is not None and manifest is not None:
        for difference in manifest.preprocessing_differences(preprocessing.describe()):
            logger.warning("the encoder knows scans that were preprocessed otherwise: %s", difference)
    return network


def start_from_prior(network: nn.Module, shares: Sequence[float]) -> nn.Module:
    """Let a fresh network score each class by its share of the voxels (the prior of arXiv:1708.02002, section 4.1).

    Otherwise the first steps teach the weights of the last layer, which sees non-negative features, that the classes
    above the background are rare: they all turn negative, and a class may never come back. With 8 filters that happened
    to one seed in three, with a Dice of 0 for a class.

    Args:
        network: whose last convolution gives the scores.
        shares: of the classes, the background first; each above 0.

    Returns:
        The network itself.

    Raises:
        ConfigError: the last convolution has another number of channels, or no bias.
    """
    last = next((layer for layer in reversed(list(network.modules())) if isinstance(layer, nn.Conv3d)), None)
    if last is None or last.out_channels != len(shares) or last.bias is None:
        raise ConfigError(
            "The network's last convolution does not give the scores of the classes.",
            got="no convolution" if last is None else f"{last.out_channels} channels, bias {last.bias is not None}",
            wanted=f"{len(shares)} channels, one a class, with a bias",
            fix="Set out_channels as in the network, or leave this step out for a network that ends otherwise.",
        )
    with torch.no_grad():
        last.bias.copy_(torch.tensor([math.log(share) for share in shares]))
    return network


class FreezeEncoder:
    """Keep the encoder as it is for the first steps, while the fresh decoder learns to read it.

    A fresh decoder sends large and arbitrary gradients into a pretrained encoder (arXiv:2202.10054). The optimizer must
    hold the encoder's parameters from the start: those that have no gradient are skipped by it, without decay. The
    running statistics of a batch norm are no parameters, and still follow the images.

    Args:
        network: a supported MONAI network, or what holds one.
        steps: iterations for which the encoder is frozen; 0 never freezes it.

    Raises:
        ConfigError: for a negative number of steps, or a network without a supported encoder.
    """

    def __init__(self, network: nn.Module, steps: int) -> None:
        if steps < 0:
            raise ConfigError("The freeze is unusable.", got=steps, wanted=">= 0 steps", fix="Set freeze_steps: 0.")
        self.steps = steps
        self.parameters = [p for p in find_encoder(network).parameters() if p.requires_grad]

    def attach(self, engine: Engine) -> None:
        """Decide before each iteration, by its number alone, so that a resumed run does the same."""
        if self.steps:
            engine.add_event_handler(Events.ITERATION_STARTED, self.decide)
            engine.add_event_handler(Events.COMPLETED, self.release)
            engine.add_event_handler(Events.TERMINATE, self.release)  # which may leave COMPLETED out

    def decide(self, engine: Engine) -> None:
        """Freeze or thaw the encoder for this iteration."""
        trainable = engine.state.iteration > self.steps
        if any(parameter.requires_grad != trainable for parameter in self.parameters):
            for parameter in self.parameters:
                parameter.requires_grad_(trainable)
                parameter.grad = None
            logger.info("step %d: the encoder is %s", engine.state.iteration, "trained" if trainable else "frozen")

    def release(self, engine: Engine) -> None:
        """Leave the network trainable, also where the run was shorter than the freeze."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)


def checked_roi(
    roi_size: Sequence[int],
    network: nn.Module,
    device: str | torch.device = "cpu",
    autocast: AbstractContextManager[Any] | None = None,
) -> tuple[int, int, int]:
    """The window as a tuple, if the network can take it.

    Args:
        roi_size: voxels (X, Y, Z).
        network: a supported MONAI network, or what holds one.
        device: where it will train.
        autocast: the context that it will train in; None where it only predicts.

    Raises:
        ConfigError: unless each edge is a multiple of the encoder's stride, and larger than it; or where gradients
            would be wrong (see :func:`medclr.models.encoder.refuse_unsafe_bf16`).
    """
    size = checked_size("roi_size", roi_size)
    stride = find_encoder(network).stride
    if any(edge % step or edge <= step for edge, step in zip(size, stride, strict=True)):
        fitting = [max(2, -(-edge // step)) * step for edge, step in zip(size, stride, strict=True)]
        raise ConfigError(
            "The network cannot take windows of this size.",
            got=f"roi_size {list(size)}",
            wanted=f"multiples of {list(stride)}, and larger than that",
            fix=f"For example roi_size: {fitting}.",
        )
    if autocast is not None:
        with autocast, torch.enable_grad():
            coarsest = [edge // step for edge, step in zip(size, stride, strict=True)]
            refuse_unsafe_bf16(torch.device(device), coarsest)
    x, y, z = size
    return x, y, z
