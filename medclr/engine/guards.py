"""The guard against losses and gradients that are no numbers, and what guards remember of a run."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import get_total_norm

from medclr import distributed, keys
from medclr.disk import replacing
from medclr.engine.trainer import optimizer_step, parameters_of, place_in_step
from medclr.errors import ConfigError, MedclrError

logger = logging.getLogger(__name__)


def remember(engine: Engine, **initial: Any) -> None:
    """Keep values in ``engine.state`` that travel with the engine's state dict; a run from step 0 on starts afresh.

    Args:
        engine: the trainer.
        initial: name to value; plain numbers, and lists and dictionaries of them.
    """

    for name, value in initial.items():
        if name not in engine.state_dict_user_keys:
            engine.state_dict_user_keys.append(name)
            setattr(engine.state, name, copy(value))

    def start_afresh(engine: Engine) -> None:
        if engine.state.iteration == 0:  # and not resumed from what a state dict has put here since
            for name, value in initial.items():
                setattr(engine.state, name, copy(value))

    engine.add_event_handler(Events.STARTED, start_afresh)


class NonFiniteGuard:
    """Skip an optimizer step whose loss or gradient is NaN or infinite, and stop a run in which that happens often.

    Weights, the optimizer's state, learning-rate schedule, momentum copies and running statistics stay as they were
    before the step. Under accumulation one bad batch spoils its whole step. A gradient scaler skips steps whose
    gradients are infinite by itself, and often; where one is enabled, only a loss counts. All ranks decide alike.

    Which steps were skipped is kept in ``engine.state.skipped_steps``, and travels with the engine's state dict. The
    guard works for :class:`~medclr.engine.ContrastiveTrainer` and MONAI's ``SupervisedTrainer``. On a GPU it waits once
    a step for the gradient, which costs little beside a 3D convolution; with several ranks, for all of them.

    Args:
        max_skipped: steps that may be skipped among the last ``window``; 0 stops at the first.
        window: optimizer steps that are looked back on.
        path: JSON file of the last skipped steps, at most ``window``, with the numbers of their scans in the datalist,
            and of how many of these steps each scan was part, most first. None keeps no file.

    Raises:
        ConfigError: for a negative ``max_skipped``, or a window below 1.
    """

    def __init__(self, *, max_skipped: int = 5, window: int = 100, path: str | Path | None = None) -> None:
        if max_skipped < 0 or window < 1:
            raise ConfigError(
                "The guard against losses that are no number is unusable.",
                got=f"max_skipped {max_skipped}, window {window}",
                wanted="max_skipped >= 0, window >= 1",
                fix="For example max_skipped: 5, window: 100.",
            )
        self.max_skipped, self.window = max_skipped, window
        self.path = None if path is None else Path(path)
        self._batches: list[tuple[Tensor, Any]] = []  # the loss and scans of each batch of the step
        self._before: list[tuple[Tensor, Tensor]] = []  # running statistics, and what they were

    def attach(self, engine: Engine) -> None:
        """Look at each loss, and at the gradient before it is used."""
        remember(engine, skipped_steps=[])
        engine.add_event_handler(Events.ITERATION_STARTED, self.begin)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.note)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.check)

    def begin(self, engine: Engine) -> None:
        """Keep the running statistics of norms, which a forward pass moves."""
        if place_in_step(engine)[0]:
            self._batches = []
            self._before = [(buffer, buffer.clone()) for buffer in _running_statistics(engine.network)]

    def note(self, engine: Engine) -> None:
        """Keep the loss, and which scans it is of."""
        loss = engine.state.output[CommonKeys.LOSS].detach().as_subclass(Tensor)  # which may be a MetaTensor
        self._batches.append((loss.float().mean(), _scans(engine.state.batch)))

    def check(self, engine: Engine) -> None:
        """Take the gradient away where it must not be used.

        Raises:
            MedclrError: too many steps were skipped.
        """
        if not self._batches or not place_in_step(engine)[1]:
            return
        losses = torch.stack([loss for loss, _ in self._batches])
        gradients = [p.grad for p in parameters_of(engine.optimizer) if p.grad is not None]
        scaled = any(
            scaler is not None and scaler.is_enabled()
            for scaler in (getattr(engine, name, None) for name in ("grad_scaler", "scaler"))
        )
        usable = losses.isfinite().all()
        if gradients and not scaled:
            usable = usable & get_total_norm(gradients).isfinite().to(usable.device)
        if not distributed.any_rank([not bool(usable)], engine.state.device)[0]:
            return
        if scaled:  # it wants to see gradients, and skips the step by itself if one of them is no number
            for gradient in gradients[:1]:
                gradient.fill_(math.nan)
        else:
            for parameter in parameters_of(engine.optimizer):
                parameter.grad = None
        for buffer, value in self._before:
            buffer.copy_(value)
        self._record(engine, losses)

    def _record(self, engine: Engine, losses: Tensor) -> None:
        with torch.no_grad():
            everywhere = distributed.gather(losses.to(engine.state.device)).tolist()
        bad = [loss for loss in everywhere if not math.isfinite(loss)]
        # Where a loss is no number its batch is to blame; where the gradient alone is, any batch of the step may be.
        suspects = [
            scan
            for loss, (_, scans) in zip(losses.tolist(), self._batches, strict=True)
            if not bad or not math.isfinite(loss)
            for scan in _numbers(scans)
        ]
        skipped = {
            "step": engine.state.iteration,
            "loss": bad[0] if bad else everywhere[-1],
            "scans": _of_all_ranks(suspects, engine.state.device),
        }
        engine.state.skipped_steps = [*engine.state.skipped_steps, skipped][-self.window :]
        now = optimizer_step(engine, engine.state.iteration)
        steps = [optimizer_step(engine, entry["step"]) for entry in engine.state.skipped_steps]
        lately = sum(now - self.window < step <= now for step in steps)
        written = self._write(engine.state.skipped_steps)
        history = f"{lately} of the last {self.window} steps were skipped"
        if lately > self.max_skipped:
            raise MedclrError(
                f"The {'loss' if bad else 'gradient'} is no number too often.",
                got=f"a loss of {skipped['loss']:g} at step {engine.state.iteration}; {history}",
                wanted=f"at most {self.max_skipped} (max_skipped); the weights are still those before the step",
                fix="Lower learning_rate, raise warmup, or set precision: fp32"
                + (f"; and look at the scans that {self.path} names." if written else "."),
            )
        if distributed.rank() == 0:
            logger.warning(
                "step %d is skipped: a loss of %g%s; %s, and more than %d stop the run%s",
                engine.state.iteration,
                skipped["loss"],
                "" if bad else " with a gradient that is no number",
                history,
                self.max_skipped,
                f"; its scans stand in {self.path}" if written else "",
            )

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the file names these steps."""
        if self.path is None:
            return False
        if distributed.rank() != 0:
            return True
        counts = Counter(scan for entry in entries for scan in entry["scans"])
        content = {
            # JSON knows neither NaN nor infinity.
            "steps": [{**entry, "loss": _json(entry["loss"])} for entry in entries],
            "scans": [{"scan": scan, "steps": count} for scan, count in counts.most_common()],
        }
        try:
            with replacing(self.path) as file:
                file.write(json.dumps(content, allow_nan=False, indent=1).encode())
        except OSError as error:
            logger.warning("the scans of skipped steps cannot be written to %s: %s", self.path, error.strerror or error)
            return False
        return True


def _running_statistics(network: nn.Module) -> list[Tensor]:
    return [buffer for layer in network.modules() if isinstance(layer, _NormBase) for buffer in layer.buffers(False)]


def _scans(batch: Any) -> Any:
    """The numbers of a batch's scans, as pretraining or segmentation gives them; None elsewhere."""
    meta = batch.get(keys.META, batch) if isinstance(batch, Mapping) else None
    return meta.get(keys.SCAN) if isinstance(meta, Mapping) else None


def _numbers(scans: Any) -> list[int]:
    return torch.as_tensor(scans).flatten().long().tolist() if scans is not None else []


def _of_all_ranks(scans: list[int], device: torch.device | str) -> list[int]:
    """Each number once, in order."""
    counts = distributed.gather(torch.tensor([len(scans)], device=device))
    row = torch.full((max(1, int(counts.max())),), -1, dtype=torch.int64, device=device)  # all ranks gather one shape
    row[: len(scans)] = torch.tensor(scans, dtype=torch.int64, device=device)
    return sorted({scan for scan in distributed.gather(row).tolist() if scan >= 0})


def _json(loss: float) -> float | str:
    return loss if math.isfinite(loss) else str(loss)
