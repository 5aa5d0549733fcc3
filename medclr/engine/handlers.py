"""What a run reports while it goes on: numbers and pictures in TensorBoard, progress, and a summary at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from medclr import distributed
from medclr.engine.collapse import projections_of
from medclr.engine.curves import Curves
from medclr.engine.metrics import EmbeddingMetric, alignment, dimension_std, effective_rank, uniformity
from medclr.engine.trainer import VIEWS, has_gradient
from medclr.errors import ConfigError
from medclr.geometry import View

logger = logging.getLogger(__name__)


class StepSchedule:
    """Move a learning-rate schedule once per optimizer step, also under gradient accumulation and a skipped step.

    Args:
        scheduler: any of torch's or MONAI's.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def attach(self, engine: Engine) -> None:
        """Follow the scheduler's own optimizer."""
        self.scheduler.optimizer.register_step_post_hook(self._follow)

    def _follow(self, optimizer: Optimizer, *_: Any) -> None:
        if has_gradient(optimizer):  # none where a guard had the step skipped, and then nothing was moved
            self.scheduler.step()


class ContrastLog:
    """Losses, learning rate, padding and the health of the projections, to TensorBoard and to ``engine.state.metrics``.

    Health is that of the batch's projections: effective rank, standard deviation per dimension, alignment, uniformity.
    They cost a singular value decomposition of (2B, D), so they are taken every ``interval`` steps.

    Args:
        curves: TensorBoard's files.
        optimizer: whose learning rate is logged.
        interval: steps between two measurements.
        pictures: patients whose two views are drawn.
        picture_interval: epochs between two pictures.

    Raises:
        ConfigError: for an interval below 1.
    """

    def __init__(
        self,
        curves: Curves,
        optimizer: Optimizer,
        *,
        interval: int = 10,
        pictures: int = 4,
        picture_interval: int = 10,
    ) -> None:
        if interval < 1 or picture_interval < 1:
            raise ConfigError(
                "A log interval is unusable.",
                got=f"{interval} steps, {picture_interval} epochs",
                wanted=">= 1",
                fix="For example interval: 10.",
            )
        self.curves, self.optimizer, self.interval = curves, optimizer, interval
        self.pictures, self.picture_interval = pictures, picture_interval

    def attach(self, engine: Engine) -> None:
        """Log on rank 0 alone."""
        if distributed.rank() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.log)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.draw)

    def log(self, engine: Engine) -> None:
        """One point of each curve."""
        output = engine.state.output
        projections = projections_of(output)
        values = {name: float(value) for name, value in output.items() if isinstance(value, Tensor) and value.ndim == 0}
        values["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        view = output[CommonKeys.IMAGE]
        if isinstance(view, View):
            values["padding"] = 1.0 - float(view.valid.float().mean())
        if projections is not None:
            z = projections.detach().float()
            values |= {
                "effective_rank": effective_rank(z.flatten(0, 1)),
                "dimension_std": dimension_std(z.flatten(0, 1)),
                "alignment": alignment(z[:, 0], z[:, 1]),
                "uniformity": uniformity(z[:, 0]),
            }
        engine.state.metrics.update({f"train_{name}": value for name, value in values.items()})
        for name, value in values.items():
            self.curves.add_scalar(f"train/{name}", value, engine.state.iteration)
        self.curves.flush()  # a guard may stop the run, and these are the curves that show why

    def draw(self, engine: Engine) -> None:
        """Both views of the first patients of the batch: middle slices, view 1 above view 2."""
        if (engine.state.epoch - 1) % self.picture_interval or self.pictures < 1:
            return
        # An epoch's end that is repeated after a stop has no step before it, and no output.
        views = engine.state.output.get(VIEWS) if isinstance(engine.state.output, Mapping) else None
        if views is None:
            return
        rows = [
            torch.cat([_middle_slices(view, place) for view in views], dim=1)
            for place in range(min(self.pictures, len(views[0].image)))
        ]
        for place, picture in enumerate(rows):
            # At its step, not its epoch: what is purged after a resumption is purged by one number for all.
            self.curves.add_image(f"views/patient_{place}", picture, engine.state.iteration)


def _middle_slices(view: View, place: int) -> Tensor:
    """The three middle slices of one view side by side, (1, H, W) in 0..1, first channel."""
    image = view.image[place, 0].detach().float().cpu()
    x, y, z = (edge // 2 for edge in image.shape)
    slices = [image[x].T, image[:, y].T, image[:, :, z].T]
    height = max(part.shape[0] for part in slices)
    canvas = torch.cat(
        [torch.nn.functional.pad(part.flip(0), (1, 1, 1, height - part.shape[0] + 1)) for part in slices], dim=1
    )
    low, high = image.min(), image.max()
    return ((canvas - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)[None]


class ValidationLog:
    """Write what an :class:`EmbeddingMetric` reported to TensorBoard and the log.

    Args:
        metric: the metric attached to the evaluator.
        curves: TensorBoard's files.
        scheduler: the learning-rate schedule, which knows the training step; None for a validation by itself.
    """

    def __init__(self, metric: EmbeddingMetric, curves: Curves, scheduler: LRScheduler | None = None) -> None:
        self.metric, self.curves, self.scheduler = metric, curves, scheduler

    def attach(self, engine: Engine) -> None:
        """After each validation, on rank 0."""
        if distributed.rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.log)

    def log(self, engine: Engine) -> None:
        """One line, and one point of each curve."""
        step = self.scheduler.last_epoch if self.scheduler is not None else 0
        report = self.metric.report
        engine.state.metrics.update(report)
        logger.info("held-out patients at step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in report.items()))
        for name, value in report.items():
            self.curves.add_scalar(f"validation/{name}", value, step)
        self.curves.flush()  # a validation by itself is followed by no event that would


class Progress:
    """A progress bar over the steps of a run, with the loss, and a summary of time at the end, on rank 0.

    Args:
        summary: gives further lines for the end, such as what was quarantined.
        title: what the bar says is being done.
    """

    def __init__(self, summary: Callable[[], str] | None = None, *, title: str = "training") -> None:
        self.summary, self.title = summary, title
        self.bar: tqdm[Any] | None = None
        self.waiting = self.working = 0.0
        self.mark = 0.0

    def attach(self, engine: Engine) -> None:
        """Follow every step."""
        if distributed.rank() == 0:
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.GET_BATCH_STARTED, self._wait)
            engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._work)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
            engine.add_event_handler(Events.COMPLETED, self.finish)
            engine.add_event_handler(Events.TERMINATE, lambda: self.close())
            engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def close(self) -> None:
        """Close the bar, which would otherwise be drawn once more after everything that is said at the end."""
        if self.bar is not None:
            self.bar.close()

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Close the bar of a run that fails; ignite leaves it to its listeners to raise the error."""
        self.close()
        raise error

    def start(self, engine: Engine) -> None:
        """Open the bar."""
        self.waiting = self.working = 0.0
        total = engine.state.max_epochs * engine.state.epoch_length
        self.bar = tqdm(total=total, initial=engine.state.iteration, unit="step", desc=self.title, dynamic_ncols=True)

    def _wait(self, engine: Engine) -> None:
        self.mark = time.perf_counter()

    def _work(self, engine: Engine) -> None:
        self.waiting += time.perf_counter() - self.mark
        self.mark = time.perf_counter()

    def advance(self, engine: Engine) -> None:
        """One step further."""
        self.working += time.perf_counter() - self.mark
        assert self.bar is not None
        loss = engine.state.output.get(CommonKeys.LOSS) if isinstance(engine.state.output, Mapping) else None
        if loss is not None and (engine.state.iteration % 10 == 0 or engine.state.iteration == 1):
            self.bar.set_postfix(epoch=engine.state.epoch, loss=f"{loss.item():.3f}")
        self.bar.update()

    def finish(self, engine: Engine) -> None:
        """Close the bar; log steps, seconds a step, and what the summary says."""
        assert self.bar is not None
        self.bar.close()
        steps = max(1, self.bar.n - (self.bar.initial or 0))
        logger.info(
            "%d steps, %.3f s a step (%.3f s of it waiting for data)",
            steps,
            (self.waiting + self.working) / steps,
            self.waiting / steps,
        )
        if self.summary is not None:
            for line in self.summary().splitlines():
                logger.info(line)
