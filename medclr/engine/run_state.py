"""All that a run is between two steps: taken into a checkpoint, and put back from one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.optim.lr_scheduler import LRScheduler

from medclr import distributed
from medclr.engine.checkpoint import Checkpoint, CheckpointFolder
from medclr.engine.random_state import RandomState
from medclr.errors import MedclrError

logger = logging.getLogger(__name__)

_HORIZON: Final = ("t_total", "warmup_steps", "T_max", "total_iters", "total_steps")
"""What learning-rate schedules keep of the length of a run, which the configuration decides and no checkpoint."""


class RunState:
    """What a checkpoint holds of a run, beside the random generators.

    Args:
        trainer: MONAI's or medclr's.
        items: name to object with ``state_dict`` and ``load_state_dict``.
        evaluators: whose best metric is part of the run.
    """

    def __init__(self, trainer: Any, items: Mapping[str, Any], evaluators: Sequence[Any]) -> None:
        self.trainer, self.items, self.evaluators = trainer, dict(items), list(evaluators)

    def take(self) -> dict[str, Any]:
        """Tensors and plain values; the tensors are those of the run, not copies."""
        scaler = getattr(self.trainer, "scaler", None)
        return {
            "items": {name: item.state_dict() for name, item in self.items.items()},
            "trainer": dict(self.trainer.state_dict()),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "best": [
                [float(evaluator.state.best_metric), int(evaluator.state.best_metric_epoch)]
                for evaluator in self.evaluators
            ],
        }

    def put_back(self, checkpoint: Checkpoint) -> None:
        """Let the run be as it was, but for its length, which the configuration decides.

        Raises:
            MedclrError: the checkpoint is of other objects.
        """
        content, trainer = checkpoint.state, self.trainer
        try:
            if set(content["items"]) != set(self.items):
                raise KeyError(f"it holds {', '.join(content['items'])} instead of {', '.join(self.items)}")
            for name, item in self.items.items():
                _load(item, content["items"][name])
            trainer.load_state_dict({**content["trainer"], "max_epochs": trainer.state.max_epochs})
            for evaluator, (metric, epoch) in zip(self.evaluators, content["best"], strict=False):
                evaluator.state.best_metric, evaluator.state.best_metric_epoch = metric, epoch
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise MedclrError(
                "The checkpoint does not fit the run.",
                got=f"{checkpoint.name}: {' '.join(str(error).split())[:300]}",
                wanted="the network, optimizer and schedule that it was written with",
                fix="Take the changed settings back, or start anew in another output_dir.",
            ) from error

    def put_back_scaler(self, checkpoint: Checkpoint) -> None:
        """MONAI makes its gradient scaler when the run starts; so this comes after."""
        scaler = getattr(self.trainer, "scaler", None)
        if scaler is not None and checkpoint.state["scaler"]:
            scaler.load_state_dict(checkpoint.state["scaler"])

    def leave_out(self, batches: int) -> None:
        """Let the sampler leave out the batches of the epoch that are done; a warning where it cannot."""
        loader = self.trainer.data_loader
        sampler: Any = getattr(loader, "sampler", None)
        if batches and hasattr(sampler, "start_at"):
            sampler.start_at(batches * loader.batch_size)
        elif batches:
            logger.warning(
                "the run goes on in the middle of an epoch, but its sampler (%s) cannot: some scans occur twice in "
                "this epoch. Use a sampler of medclr's, which has start_at.",
                type(sampler).__name__,
            )

    def bytes(self) -> int:
        """About what a checkpoint takes: Adam keeps two numbers beside each weight, from the first step on."""
        return 3 * sum(_bytes(item.state_dict()) for item in self.items.values())


def newest_on_all_ranks(folder: CheckpointFolder, device: torch.device | str = "cpu") -> Checkpoint | None:
    """The newest checkpoint that rank 0 finds whole, read on every rank; None if there is none at all.

    Raises:
        MedclrError: all are damaged, or a rank cannot read it.
    """
    found: Checkpoint | None = None
    with together(device):
        if distributed.rank() == 0:
            found = folder.newest()
    name = distributed.text_of_rank_0(found.name if found is not None else "", device)
    with together(device):
        return folder.read(name) if name and found is None else found


def of_this_rank(states: Sequence[RandomState]) -> RandomState | None:
    """The random state of this rank; None, with a warning, if there are more or fewer ranks now."""
    ranks = distributed.world_size()
    if len(states) == ranks:
        return states[distributed.rank()]
    logger.warning(
        "the checkpoint is of %d ranks, and there are %d now: dropout and the like draw other numbers than they "
        "would have",
        len(states),
        ranks,
    )
    return None


@contextmanager
def together(device: torch.device | str = "cpu") -> Iterator[None]:
    """A block that fails on all ranks where it fails on one, so that none waits for another for ever.

    Args:
        device: where collectives work: the CPU for gloo, a GPU for NCCL.

    Raises:
        MedclrError: on the ranks that did not fail themselves.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = distributed.any_rank([error is not None], device)[0]
    if error is not None:
        raise error
    if failed:
        raise MedclrError(
            "Another rank has failed.", got="an error there", wanted="all ranks to go on", fix="See its message."
        )


def _load(item: Any, state: Any) -> None:
    horizon = {name: getattr(item, name) for name in _HORIZON if isinstance(item, LRScheduler) and hasattr(item, name)}
    item.load_state_dict(state)
    for name, value in horizon.items():
        setattr(item, name, value)


def _bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(_bytes(value) for value in state.values())
    return sum(_bytes(value) for value in state) if isinstance(state, list | tuple) else 0
