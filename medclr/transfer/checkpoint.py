"""A fine-tuned network on disk, with what must be the same when it is used again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medclr.data import Preprocessing
from medclr.errors import ConfigError, WeightsError
from medclr.models import find_encoder

NETWORK = "network"
"""Key of a checkpoint: the network's state dict."""
SETTINGS = "settings"
"""Key of a checkpoint: the settings of :class:`Settings`."""


class Settings:
    """How scans were preprocessed and which encoder the network has: plain values that travel in a checkpoint.

    Has a ``state_dict``, so that MONAI's ``CheckpointSaver`` takes it beside the network:
    ``save_dict: {network: '@network_def', settings: '@settings'}``.

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


def load_network(path: str | Path, into: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """Load a checkpoint that the segmentation bundle wrote, wholly or not at all.

    Args:
        path: a file such as ``models/best.pt``; read with ``weights_only=True``.
        into: the network, of the class and the arguments that were trained.
        preprocessing: as in training; compared with the checkpoint's.

    Returns:
        ``into``.

    Raises:
        WeightsError: for a file that is not there, is no such checkpoint, or does not fit the network.
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
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state, settings = content[NETWORK], content[SETTINGS]
        if not isinstance(settings, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("no settings, or a network of other things than tensors")
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise WeightsError(
            "The file is no checkpoint of a segmentation run.",
            got=f"{path.name}: {type(error).__name__}",
            wanted=f"a file with {NETWORK} and {SETTINGS}, such as best.pt",
            fix="Name the file that training wrote. An encoder alone goes under pretrained.",
        ) from error
    Settings(preprocessing, into).load_state_dict(settings)
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat
