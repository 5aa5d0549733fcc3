"""Normalisation layers by name, the same in every MONAI network.

MONAI's networks do not agree on ``norm``: SegResNet hands it to every block, ResNet to its first layer only (its blocks
stay on batch norm, whatever is asked for). :func:`with_norm` makes a network consistent, whichever it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias, TypeVar

import torch
from monai.networks.layers.utils import get_norm_layer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from medclr.errors import ConfigError

NormArgument: TypeAlias = tuple[str, dict[str, Any]]
Network = TypeVar("Network", bound=nn.Module)

GROUPS: Final = 8
NORMS: Final[dict[str, dict[str, Any]]] = {
    "instance": {"affine": True},
    "group": {"num_groups": GROUPS},
    "batch": {},
}
"""The norms that medclr knows, with the arguments that a bare name stands for."""

_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "instance": {"eps": 1e-5, "momentum": 0.1, "affine": False, "track_running_stats": False},
    "group": {"eps": 1e-5, "affine": True},
    "batch": {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True},
}


def norm_argument(norm: object, channels: int | None = None) -> NormArgument:
    """What to pass as ``norm`` to a MONAI network.

    ``"instance"`` means *affine* instance norm: with neither a bias in the convolutions nor one in the norm a network
    has no bias at all, and MONAI's ResNet cannot be built. ``"group"`` means 8 groups; over 8 channels that is instance
    norm. Both keep the views of a batch apart, which batch norm does not.

    Args:
        norm: ``"instance"``, ``"group"`` or ``"batch"``, or MONAI's pair of such a name and its arguments.
        channels: the smallest number of channels that is normalised (``init_filters`` of SegResNet), to be checked.

    Returns:
        MONAI's pair of name and arguments.

    Raises:
        ConfigError: for an unknown norm, or channels that the groups do not divide.

    Example:
        >>> norm_argument("group", channels=16)
        ('group', {'num_groups': 8})
    """
    name, arguments = (norm, None) if isinstance(norm, str) else _pair(norm)
    known = name.lower() if isinstance(name, str) else ""
    if known not in NORMS:
        raise ConfigError(
            "Unknown norm.",
            got=repr(norm),
            wanted=f"one of {', '.join(NORMS)}, or a pair such as [group, {{num_groups: 4}}]",
            fix="Set norm: instance.",
        )
    settings = dict(NORMS[known] if arguments is None else arguments)
    if known == "group":
        groups = settings.setdefault("num_groups", GROUPS)
        if not isinstance(groups, int) or groups < 1 or (channels is not None and channels % groups):
            raise ConfigError(
                "Group norm cannot split the channels into equal groups.",
                got=f"{channels if channels is not None else 'some'} channels, {groups} groups",
                wanted="a number of channels (SegResNet: init_filters) that the groups divide",
                fix="Use a multiple of the groups as init_filters, fewer groups (norm: [group, {num_groups: 4}]), "
                "or norm: instance.",
            )
    return known, settings


def describe_norm(layer: nn.Module) -> NormArgument | None:
    """The ``norm`` argument that makes ``layer``; None if it is none of the norms in ``NORMS``."""
    if isinstance(layer, nn.GroupNorm):
        return "group", {"num_groups": layer.num_groups, **_changed(layer, "group")}
    if isinstance(layer, _InstanceNorm):
        return "instance", _changed(layer, "instance")
    return ("batch", _changed(layer, "batch")) if isinstance(layer, _BatchNorm) else None


def norm_of(network: nn.Module) -> NormArgument | None:
    """The one norm that ``network`` uses everywhere; None if it has none.

    Raises:
        ConfigError: if it mixes several.
    """
    found: list[NormArgument] = []
    for layer in network.modules():
        norm = describe_norm(layer)
        if norm is not None and norm not in found:
            found.append(norm)
    if len(found) > 1:
        raise ConfigError(
            f"{type(network).__name__} mixes several norms.",
            got=" and ".join(map(str, found)),
            wanted="one norm throughout; MONAI's ResNet gives its own norm argument to its first layer only",
            fix="Say which: Encoder(network, norm='instance'), or medclr.models.with_norm(network, 'instance') for a "
            "network that weights are loaded into.",
        )
    return found[0] if found else None


def with_norm(network: Network, norm: object) -> Network:
    """Replace, in place, every norm layer of ``network`` that is not ``norm`` already. Call it before training.

    Args:
        network: any 3D network.
        norm: as for :func:`norm_argument`.

    Returns:
        The network itself.

    Raises:
        ConfigError: for an unknown norm, or channels that its groups do not divide.

    Example:
        >>> from monai.networks.nets import resnet10
        >>> network = with_norm(resnet10(n_input_channels=1), "instance")
    """
    wanted = norm_argument(norm)
    replacements: dict[str, nn.Module] = {}
    for name, layer in network.named_modules():
        present = describe_norm(layer)
        if present is None:
            continue
        channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
        new = get_norm_layer(norm_argument(norm, int(channels)), spatial_dims=3, channels=channels)
        if describe_norm(new) == present:
            continue
        like = next(layer.parameters(), next(network.parameters()))
        replacements[name] = new.to(device=like.device, dtype=like.dtype).train(layer.training)
    if "" in replacements:
        raise ConfigError(
            "A single norm layer cannot be replaced in place.",
            got=type(network).__name__,
            wanted="a network that contains norm layers",
            fix=f"Build the layer as {wanted}.",
        )
    for name, new in replacements.items():
        network.set_submodule(name, new)
    return network


def _pair(norm: object) -> tuple[object, Mapping[str, Any] | None]:
    if isinstance(norm, tuple | list) and len(norm) == 2 and isinstance(norm[1], Mapping):
        return norm[0], norm[1]
    return None, None


def _changed(layer: nn.Module, kind: str) -> dict[str, Any]:
    return {key: getattr(layer, key) for key, value in _DEFAULTS[kind].items() if getattr(layer, key) != value}


def synchronised(network: Network, device: Any) -> Network:
    """The network, in which batch norms take their statistics from the batch of all ranks; parameters stay the same.

    Args:
        network: perhaps with batch norms, such as those of the heads.
        device: where it runs.

    Raises:
        ConfigError: away from GPUs, for which torch has no such layer.
    """
    if torch.device(device).type != "cuda":
        raise ConfigError(
            "Batch norms cannot be synchronised here.",
            got=f"sync_norms: true on {device}",
            wanted="ranks on GPUs",
            fix="Set sync_norms: false, or head_norm: layer, which needs no batch.",
        )
    converted: Network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return converted
