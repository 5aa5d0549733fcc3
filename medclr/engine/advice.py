"""Advice: what a user would want to know of a run that works, but not as well as it could."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from medclr import distributed
from medclr.engine.collapse import projections_of
from medclr.geometry import View
from medclr.models import find_encoder

logger = logging.getLogger(__name__)

FEW_CANDIDATES = 30
"""Candidates of a query (the other embeddings of all ranks) below which the loss learns little."""
MUCH_PADDING = 0.5
MUCH_WAITING = 0.5
MOST_PATIENTS = 0.5


class Advice:
    """Warn, once each, of a batch with few negatives, of patients without a pair, padding, slow reading and batch norm.

    What can be known at the start is said then; padding and the time spent waiting are judged over the first epoch, of
    which the first steps, slow on any machine, do not count.

    Args:
        dataset: the :class:`~medclr.pairs.PatientPairDataset`, to ask how many patients give a pair; None does not ask.
        warm_up: steps whose time does not count.
    """

    def __init__(self, dataset: Any = None, *, warm_up: int = 2) -> None:
        self.dataset, self.warm_up = dataset, warm_up
        self.padding: list[Tensor] = []
        self.waiting = self.working = self.mark = 0.0

    def attach(self, engine: Engine) -> None:
        """Judge at the start, after the first step, and after the first epoch, on rank 0."""
        if distributed.rank() != 0:
            return
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._wait)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._work)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step)
        engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), self.epoch)

    def start(self, engine: Engine) -> None:
        """What the settings alone show."""
        encoder = find_encoder(engine.network)
        if any(isinstance(layer, _BatchNorm) for layer in encoder.modules()):
            logger.warning(
                "the encoder's batch norm lets the samples of a batch see each other: the task can be solved without "
                "anatomy, and other batch sizes give other features. Set norm: group."
            )
        if self.dataset is not None:
            paired, patients = self.dataset.paired_patients(), self.dataset.usable_patients()
            if patients and paired < MOST_PATIENTS * patients:
                rule = type(self.dataset.rule).__name__
                logger.warning(
                    f"{patients - paired} of {patients} patients have no second scan for {rule}: their pairs are two "
                    "crops of one scan. Add scans, or treat all alike: --pair_rule::_target_ medclr.pairs.SameScan."
                )

    def step(self, engine: Engine) -> None:
        """What a step shows."""
        if engine.state.iteration > self.warm_up:
            self.working += time.perf_counter() - self.mark
        output = engine.state.output
        view = output[CommonKeys.IMAGE]
        if engine.state.epoch == 1 and isinstance(view, View):
            self.padding.append(1.0 - view.valid.float().mean())  # read once, at the end of the epoch
        projections = projections_of(output)
        if engine.state.iteration == 1 and projections is not None:
            candidates = projections.shape[0] * projections.shape[1] * distributed.world_size() - 1
            if candidates < FEW_CANDIDATES:
                logger.warning(
                    f"each embedding is contrasted with {candidates} others, which is few. "
                    "Raise batch_size, or use more ranks."
                )

    def epoch(self, engine: Engine) -> None:
        """What the first epoch shows."""
        padding = float(torch.stack(self.padding).mean()) if self.padding else 0.0
        if padding > MUCH_PADDING:
            logger.warning(f"{padding:.0%} of the voxels that the encoder sees lie outside the scans. Lower roi_size.")
        if self.waiting > MUCH_WAITING * (self.waiting + self.working) > 0:
            share = self.waiting / (self.waiting + self.working)
            logger.warning(f"{share:.0%} of the time goes into waiting for data. Raise num_workers, or cache_mb.")

    def _wait(self, engine: Engine) -> None:
        self.mark = time.perf_counter()

    def _work(self, engine: Engine) -> None:
        now = time.perf_counter()
        if engine.state.iteration >= self.warm_up:
            self.waiting += now - self.mark
        self.mark = now
