"""All that a run is between two steps: taken into a checkpoint, and put back from one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from medclr import distributed
from medclr.disk import claimed, remove_parts
from medclr.engine.checkpoint import Checkpoint, CheckpointFolder
from medclr.engine.random_state import RandomState
from medclr.errors import ConfigError, MedclrError

logger = logging.getLogger(__name__)


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
                {
                    "key": evaluator.state.key_metric_name,
                    "metric": float(evaluator.state.best_metric),
                    "epoch": int(evaluator.state.best_metric_epoch),
                }
                for evaluator in self.evaluators
            ],
        }

    def put_back(self, checkpoint: Checkpoint, *, changed: bool) -> None:
        """Let the run be as it was, but for its length and other settings, which the configuration decides.

        Args:
            checkpoint: to go on with.
            changed: whether the configuration, or the length of the run, is another than the checkpoint's: the
                optimizer then keeps its own learning rate, decay and the like, and takes over its moments alone, and a
                schedule is its own, moved forward by as many steps as are done.

        Raises:
            MedclrError: the checkpoint is of other objects.
        """
        content, trainer = checkpoint.state, self.trainer
        try:
            if set(content["items"]) != set(self.items):
                raise KeyError(f"it holds {', '.join(content['items'])} instead of {', '.join(self.items)}")
            schedules = {name: item for name, item in self.items.items() if isinstance(item, LRScheduler)}
            for name, item in self.items.items():
                if changed and isinstance(item, Optimizer):
                    _load_moments(item, content["items"][name])
                elif name not in schedules:
                    item.load_state_dict(content["items"][name])
            for name, schedule in schedules.items():  # after their optimizers, whose learning rates they set
                if changed and not isinstance(schedule, ReduceLROnPlateau):
                    _move_forward(schedule, content["items"][name]["last_epoch"])
                else:
                    schedule.load_state_dict(content["items"][name])
            # What a guard remembers may be new since the checkpoint was written.
            remembered = {name: getattr(trainer.state, name) for name in trainer.state_dict_user_keys}
            length = {"max_epochs": trainer.state.max_epochs}
            trainer.load_state_dict({**remembered, **content["trainer"], **length})
            for evaluator, best in zip(self.evaluators, content["best"], strict=False):
                if best["key"] == evaluator.state.key_metric_name:
                    evaluator.state.best_metric, evaluator.state.best_metric_epoch = best["metric"], best["epoch"]
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


@contextmanager
def alone(folder: CheckpointFolder, device: torch.device | str = "cpu", *, clear: bool = False) -> Iterator[None]:
    """Hold a run's folder against other processes, and remove what killed ones have left in it.

    Args:
        folder: of the checkpoints, inside the run's.
        device: where collectives work.
        clear: remove the checkpoints as well.

    Raises:
        ConfigError: another process holds it.
    """
    with ExitStack() as stack:
        with together(device):
            if distributed.rank() == 0:
                try:
                    stack.enter_context(claimed(folder.path / ".lock"))
                except FileExistsError as error:
                    raise ConfigError(
                        "Another process runs in this output folder.",
                        got=f"{error.strerror}, in {folder.path}",
                        wanted="one run a folder",
                        fix="Set another output_dir, or wait for it, or end it.",
                    ) from error
                folder.clean()
                remove_parts(folder.path.parent)
                if clear:
                    folder.clear()
        yield


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
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    failed = distributed.any_rank([error is not None], device)[0]
    if error is not None:
        raise error
    if failed:
        raise MedclrError(
            "Another rank has failed.", got="an error there", wanted="all ranks to go on", fix="See its message."
        )


def _load_moments(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _move_forward(schedule: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has not been stepped
        for _ in range(steps):
            schedule.step()


def _bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(_bytes(value) for value in state.values())
    return sum(_bytes(value) for value in state) if isinstance(state, list | tuple) else 0
