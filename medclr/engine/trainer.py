"""MONAI's trainer with a loss that returns a dictionary, precision on any device, and a hook after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import nn
from torch.optim import Optimizer

from medclr import keys
from medclr.engine.agreement import refuse_other_batches
from medclr.engine.caching import GradientCache
from medclr.engine.precision import Precision, autocast
from medclr.engine.prepare import PrepareViews
from medclr.errors import ConfigError
from medclr.geometry import View

VIEWS = "views"
"""Key of the engine's output: all views of the batch."""


def place_in_step(engine: Any) -> tuple[bool, bool]:
    """Whether this batch is the first and the last of its optimizer step, as MONAI's ``SupervisedTrainer`` counts.

    Args:
        engine: a trainer; ``accumulation_steps`` are the batches of a step, and an epoch's last step may have fewer.
    """
    batches, epoch_length = getattr(engine, "accumulation_steps", 1), engine.state.epoch_length
    within = engine.state.iteration - 1
    if epoch_length is not None:
        within %= epoch_length
    return within % batches == 0, (within + 1) % batches == 0 or within + 1 == epoch_length


def optimizer_step(engine: Any, iteration: int) -> int:
    """Number of the optimizer step, from 1 on, that an iteration is part of.

    Args:
        engine: a trainer, as in :func:`place_in_step`.
        iteration: from 1 on.
    """
    batches, epoch_length = getattr(engine, "accumulation_steps", 1), engine.state.epoch_length
    if epoch_length is None:
        return -(-iteration // batches)
    epochs, within = divmod(iteration, epoch_length)
    return epochs * -(-epoch_length // batches) + -(-within // batches)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_gradient(optimizer: Optimizer) -> bool:
    """Whether a step of the optimizer would move anything: it leaves parameters without a gradient as they are."""
    return any(parameter.grad is not None for parameter in parameters_of(optimizer))


def refuse_one_patient(method: Any, dataset: Any) -> None:
    """Raise where a method that tells patients apart has one patient to learn from.

    Args:
        method: one that weighs pairs by patient has an ``affinity``.
        dataset: a :class:`~medclr.pairs.PatientPairDataset`; others are not asked.

    Raises:
        ConfigError: for one usable patient.
    """
    affinity, count = getattr(method, "affinity", None), getattr(dataset, "usable_patients", None)
    if affinity is None or affinity.same_patient == "negative" or not callable(count) or count() != 1:
        return
    raise ConfigError(
        "There is one patient, who has no negatives.",
        got=f"one usable patient for {type(method).__name__}",
        wanted="two patients or more in the training section",
        fix="Add patients, or take a method without negatives: byol.yaml.",
    )


class ContrastiveTrainer(SupervisedTrainer):
    """A ``SupervisedTrainer`` for methods: the network is a method, perhaps inside DDP, the loss its ``contrast``.

    ``engine.state.output`` holds ``image`` (the first view), ``views`` (all of them), ``label`` (the metadata),
    ``pred`` (the embeddings), ``loss`` (unscaled) and whatever else ``contrast`` returned. All four iteration events
    fire. After each optimizer step, and only then, the method's ``after_step`` is called with steps done / total. Where
    no parameter has a gradient once ``BACKWARD_COMPLETED`` was fired, the step is left out, and nothing moves. A
    method's ``before_step``, if it has one, is called when a step begins, also after one that was left out.

    Args:
        device: where to train.
        max_epochs: epochs to train.
        train_data_loader: batches of a :class:`~medclr.pairs.PatientPairDataset`.
        network: the method, or DDP around it.
        optimizer: the optimizer of its parameters.
        loss_function: the method's ``contrast``.
        prepare_batch: batch to (view_1, meta, (view_2,), {}); a :class:`~medclr.engine.PrepareViews`.
        precision: ``fp32``, or autocast to ``bf16`` (no scaler) or ``fp16`` (with a scaler), on any device.
        clip_norm: largest norm of the whole gradient, or None.
        chunk_size: samples that are encoded at a time, so that a batch of any size fits into memory: the gradient is
            that of the whole batch (:class:`~medclr.engine.caching.GradientCache`). None encodes all at once.
        kwargs: passed on to ``SupervisedTrainer``: ``epoch_length``, ``train_handlers``, ``accumulation_steps``, ...
            Accumulation enlarges the step, not the set of negatives.

    Raises:
        ConfigError: for an unknown precision, a ``clip_norm`` that is not > 0, a network that is no method, or a
            ``chunk_size`` below 1 or with a norm that sees a whole batch.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: Callable[..., Mapping[str, torch.Tensor]],
        prepare_batch: PrepareViews,
        *,
        precision: Precision = "fp32",
        clip_norm: float | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        autocast(device, precision)  # fails here if unknown
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(
                "The gradient cannot be clipped to this norm.",
                got=clip_norm,
                wanted="a number > 0 or null",
                fix="For example clip_norm: 1.0.",
            )
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            prepare_batch=prepare_batch,
            amp=False,
            decollate=False,
            optim_set_to_none=True,
            **kwargs,
        )
        self.method: Any = getattr(network, "module", network)
        if not callable(getattr(self.method, "after_step", None)):
            raise ConfigError(
                "The network is no contrastive method.",
                got=type(self.method).__name__,
                wanted="a module with forward, contrast and after_step",
                fix="Take one of medclr.methods, or add the three to yours.",
            )
        self.cache = None if chunk_size is None else GradientCache(network, chunk_size)
        if self.state.epoch_length == 0:
            raise ConfigError(
                "An epoch holds no batch.",
                got=f"a data loader of {len(train_data_loader)} batches"
                if isinstance(train_data_loader, Sized)
                else "epoch_length 0",
                wanted="at least one",
                fix="Lower batch_size, or raise passes, so that patients x passes >= batch_size x ranks.",
            )
        self.precision, self.clip_norm, self._compared = precision, clip_norm, False
        self.grad_scaler = torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")

    def _iteration(self, engine: ContrastiveTrainer, batchdata: Any) -> dict[str, Any]:
        view_1, meta, others, kwargs = engine.prepare_batch(
            batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        views = (view_1, *others)
        if not self._compared:  # once: a collective a step would cost time
            refuse_other_batches(len(view_1.image))
            refuse_one_patient(self.method, getattr(self.data_loader, "dataset", None))
            self._compared = True
        output: dict[str, Any] = {CommonKeys.IMAGE: view_1, CommonKeys.LABEL: meta, VIEWS: views}
        engine.state.output = output
        first, last = place_in_step(engine)
        engine.network.train()
        if first:
            engine.optimizer.zero_grad(set_to_none=True)
            self._begin()

        precise = partial(autocast, engine.state.device, self.precision)
        cache = self.cache if self.cache is not None and self.cache.divides(views) else None
        with precise():
            if cache is None:
                output[CommonKeys.PRED] = self._encode(*views, **kwargs)
            else:
                output[CommonKeys.PRED] = cache.embed(self._encode, views, kwargs)
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            results = engine.loss_function(output[CommonKeys.PRED], meta)
        loss = results[keys.LOSS]
        output.update(results)
        output[CommonKeys.LOSS] = loss.detach()
        engine.fire_event(IterationEvents.LOSS_COMPLETED)

        self.grad_scaler.scale(loss / self.accumulation_steps).backward()
        if cache is not None:  # so far the gradient has come to the embeddings only
            cache.backward(precise)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if last:
            self._step()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def _encode(self, view_1: View, *others: View, **kwargs: Any) -> Any:
        return self.inferer(view_1, self.network, *others, **kwargs)

    def _begin(self) -> None:
        before_step = getattr(self.method, "before_step", None)
        if callable(before_step):
            before_step((self.state.iteration - 1) / self._batches())

    def _step(self) -> None:
        if not has_gradient(self.optimizer):  # a guard has taken it away: nothing moves
            return
        if self.clip_norm is not None:
            self.grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        before = self.grad_scaler.get_scale()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        # The scaler skips a step whose gradients overflowed, and then lowers its scale: a method must not move then.
        if self.grad_scaler.get_scale() >= before:
            self.method.after_step(self.state.iteration / self._batches())

    def _batches(self) -> int:
        """Of the whole run."""
        return self.state.max_epochs * self.state.epoch_length

    def state_dict(self) -> dict[str, Any]:
        """Ignite's state, and the precision scaler's."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        rest = dict(state_dict)
        scaler = rest.pop("grad_scaler", None)
        if scaler:
            self.grad_scaler.load_state_dict(scaler)
        super().load_state_dict(rest)
