"""A fine-tuned network on disk, with what must be the same when it is used again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from medclr import distributed
from medclr.data import Preprocessing
from medclr.disk import replacing, save_state
from medclr.errors import ConfigError, WeightsError
from medclr.models import find_encoder
from medclr.weights.digest import digest

logger = logging.getLogger(__name__)

NETWORK: Final = "network"
"""Key of a checkpoint: the network's state dict."""
SETTINGS: Final = "settings"
"""Key of a checkpoint: the settings of :class:`Settings`."""
RUN: Final = "run"
"""Key of a checkpoint, where :class:`SaveNetwork` was given a record: how the network was trained."""
PATIENTS: Final = "patients"
"""Key of a checkpoint, where :class:`SaveNetwork` was told: digests of the patients that the network knows."""
DIGEST: Final = "digest"
"""Key of a checkpoint: the digest of all the rest."""


class Settings:
    """How scans were preprocessed and which encoder the network has: plain values that travel in a checkpoint.

    Args:
        preprocessing: how scans are loaded and normalised; which files it loads does not count.
        network: a supported MONAI network.
    """

    def __init__(self, preprocessing: Preprocessing, network: nn.Module) -> None:
        values = {"preprocessing": preprocessing.describe(), "encoder": find_encoder(network).architecture}
        self.values: dict[str, Any] = json.loads(json.dumps(values))

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return dict(self.values)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse other settings than these.

        Raises:
            ConfigError: naming the first setting that differs.
        """
        ours, theirs = _flat(self.values), _flat(state_dict)
        for name in [*theirs, *ours]:
            if ours.get(name) != theirs.get(name):
                raise ConfigError(
                    "The checkpoint was trained under other settings.",
                    got=f"{name} {ours.get(name)}",
                    wanted=f"{name} {theirs.get(name)}, as in training",
                    fix=f"Give the same {name.rsplit('.', 1)[-1]} as in training.",
                )


class SaveNetwork:
    """Save a network, with what must be the same when it is used again, on rank 0.

    Like MONAI's ``CheckpointSaver``, with two differences: a crash leaves the old file or the new one, and the file
    holds a digest, since ``torch.load`` takes most files in which a bit has flipped, and gives other numbers.

    Args:
        path: the file, such as ``models/last.pt``; its folder is made.
        network: whose weights.
        settings: of the network and its scans.
        best: save where an evaluator finds the best metric so far, rather than at the end of training.
        record: called at each save, for plain values about the run that go into the file; None if there are none.
        patients: called likewise, for digests of the patients that the network knows, by what they were to it
            (:func:`medclr.transfer.seen_patients`); None, or a call that gives None, keeps none.

    Example:
        >>> SaveNetwork("models/last.pt", network, settings).attach(trainer)  # doctest: +SKIP
        >>> SaveNetwork("models/best.pt", network, settings, best=True).attach(evaluator)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | Path,
        network: nn.Module,
        settings: Settings,
        best: bool = False,
        *,
        record: Callable[[], Mapping[str, Any]] | None = None,
        patients: Callable[[], Mapping[str, Any] | None] | None = None,
    ) -> None:
        self.path, self.network, self.settings, self.best, self.record = Path(path), network, settings, best, record
        self.patients = patients

    def attach(self, engine: Engine) -> None:
        """Follow the trainer to its end; or, for ``best``, one of MONAI's evaluators.

        A run that an error or a signal stops does not come to its end. The evaluator must have a key metric, which
        MONAI has compared with the best one before this looks.
        """
        if self.best:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_if_best)
        else:
            engine.add_event_handler(Events.COMPLETED, self.save)

    def save_if_best(self, engine: Engine) -> None:
        """Write the file if the evaluation that ends is the best so far; a disk that fails ends no training."""
        if engine.state.best_metric_epoch == engine.state.epoch:
            try:
                self.save(engine)
            except OSError as error:
                logger.warning(
                    "%s cannot be written: %s; the one before stays, and the training goes on",
                    self.path.name,
                    error.strerror or error,
                )

    def save(self, engine: Engine) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written; the one before is as it was.
        """
        if distributed.rank() != 0:
            return
        state = {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()}
        about: dict[str, Any] = {SETTINGS: self.settings.state_dict()}
        if self.record is not None:
            about[RUN] = json.loads(json.dumps(self.record()))  # plain values, or the file could not be read back
        patients = self.patients() if self.patients is not None else None
        if patients is not None:
            about[PATIENTS] = json.loads(json.dumps(patients))
        with replacing(self.path) as file:
            save_state({NETWORK: state, **about, DIGEST: digest(state, about)}, file)
        logger.info("%s is written", self.path.name)


def load_network(path: str | Path, into: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """Load a checkpoint that :class:`SaveNetwork` wrote, wholly or not at all.

    Args:
        path: a file such as ``models/best.pt``; read with ``weights_only=True``.
        into: the network, of the class and the arguments that were trained.
        preprocessing: as in training; compared with the checkpoint's.

    Returns:
        ``into``.

    Raises:
        WeightsError: for a file that is not there, is no such checkpoint, is damaged, or does not fit the network.
        ConfigError: for other settings than in training.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            "The checkpoint is not there.",
            got=str(path),
            wanted="a file that training wrote: best.pt (of validation) or last.pt",
            fix="Set output_dir to that of training, or checkpoint to the file; without validation there is last.pt.",
        )
    content = _read(path)
    state = content[NETWORK]
    Settings(preprocessing, into).load_state_dict(content[SETTINGS])
    own = into.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + [
        f"{name} {list(state[name].shape)} into {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        raise WeightsError(
            "The checkpoint does not fit the network.",
            got=f"{len(wrong)} tensors that differ, the first: {wrong[0]}",
            wanted="the same network as in training",
            fix="Give the same out_channels and network as in training.",
        )
    into.load_state_dict(state)
    return into


def is_network(path: Path) -> bool:
    """Whether a file looks like one of :class:`SaveNetwork`, whole or not; an encoder's file does not."""
    if path.suffix not in (".pt", ".pth"):
        return False
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises many kinds; what reads it in earnest says what is wrong
        return False
    return isinstance(content, Mapping) and NETWORK in content and SETTINGS in content


def patients_of_network(path: str | Path) -> dict[str, Any] | None:
    """Digests of the patients that a checkpoint's network knows, as it was saved with them; None if it says nothing.

    Raises:
        WeightsError: for a file that is no such checkpoint, or is damaged.
    """
    patients = _read(Path(path)).get(PATIENTS)
    return dict(patients) if patients is not None else None


def _read(path: Path) -> dict[str, Any]:
    """The content of a file that is as it was written."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        reason = _foreign(content)
        if reason is None:
            about = {name: value for name, value in content.items() if name not in (NETWORK, DIGEST)}
            whole = content[DIGEST] == digest(content[NETWORK], about)
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise _refusal(path, type(error).__name__) from error
    if reason is not None:
        raise _refusal(path, reason)
    if not whole:
        raise WeightsError(
            "The checkpoint is damaged.",
            got=f"{path.name}, whose content has another digest than it was written with",
            wanted="the file as training wrote it",
            fix="Copy it again from where it was whole, or train again. A disk or a transfer has changed it.",
        )
    return dict(content)


def _foreign(content: Any) -> str | None:
    """What shows that :class:`SaveNetwork` did not write this; None if nothing does."""
    if not isinstance(content, Mapping):
        return "not a dictionary"
    missing = [name for name in (NETWORK, SETTINGS, DIGEST) if name not in content]
    if missing or not content.keys() <= {NETWORK, SETTINGS, RUN, PATIENTS, DIGEST}:
        return f"no {', no '.join(missing)}" if missing else "more than a segmentation run writes"
    state = content[NETWORK]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        return "a network of other things than tensors"
    plain = isinstance(content[SETTINGS], Mapping) and isinstance(content[DIGEST], str)
    plain = plain and isinstance(content.get(PATIENTS, {}), Mapping)
    return None if plain else "settings or a digest of another kind"


def _refusal(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        "The file is no checkpoint of a segmentation run, or it is damaged.",
        got=f"{path.name}: {reason}",
        wanted=f"a file with {NETWORK}, {SETTINGS} and {DIGEST}, as training wrote it, such as best.pt",
        fix="Name the file that training wrote. If it is that one, copy it again from where it was whole, or train "
        "again. An encoder alone goes under pretrained.",
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat
