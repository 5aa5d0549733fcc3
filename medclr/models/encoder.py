"""The encoder: the part of a MONAI network that contrastive pretraining trains and hands on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from medclr.errors import ConfigError
from medclr.models.architectures import ARCHITECTURES, WRAPPERS, describe, find
from medclr.models.norms import norm_of, with_norm

POOLS: Final = ("avg", "avgmax")
_SPACE = (2, 3, 4)


class Encoder(nn.Module):
    """The encoder of a MONAI network, giving one vector an image.

    It holds the network's own encoder modules under their own names, and nothing else: its ``state_dict`` matches the
    network's key for key, and no parameter goes unused. The modules are shared with ``network``, not copied.

    A vector is the mean over space of the coarsest feature map. For SegResNet that map is the residual stream, with
    neither norm nor activation behind it; it is pooled as it is, because that is what the decoder reads (its first
    layer is a 1x1x1 convolution of this stream), and because a norm put behind it would be a parameter that the
    segmentation network does not have. Its scale is therefore free: put a projector or a standardisation behind it.
    For ResNet the map is that of ``layer4``, as for its own classifier. The mean is taken in fp32, also under autocast.

    Args:
        network: ``SegResNet`` or ``ResNet`` (``resnet10``, ``resnet18``, ``resnet50``, ...) of ``monai.networks.nets``
            with ``spatial_dims=3``, or a network that holds one as its ``encoder``, such as ``FlexibleUNet``.
        norm: replaces every norm layer of the network that is another (see :func:`~medclr.models.norms.with_norm`);
            None keeps them. Needed for ResNet, whose own ``norm`` argument reaches its first layer only.
        pool: ``"avg"``, or ``"avgmax"`` for mean and maximum side by side.

    Raises:
        ConfigError: for an unsupported network, an unknown norm or pool, or a network that mixes norms.

    Example:
        >>> from monai.networks.nets import SegResNet
        >>> encoder = Encoder(SegResNet(init_filters=8), norm="instance")
        >>> encoder(torch.zeros(2, 1, 32, 32, 32)).shape
        torch.Size([2, 64])
    """

    target: str
    """Name of the network in ``ARCHITECTURES``."""
    in_channels: int
    """C of the images."""
    out_features: int
    """F of the vectors."""
    channels: tuple[int, ...]
    """Channels of the feature maps, fine to coarse."""
    stride: tuple[int, int, int]
    """Voxels of the image to one voxel of the coarsest feature map, along each axis."""
    architecture: dict[str, Any]
    """What build_encoder needs, as JSON values: ``network`` (``_target_`` and arguments), ``norm``, ``pool``."""

    def __init__(self, network: nn.Module, *, norm: object = None, pool: str = "avg") -> None:
        super().__init__()
        if pool not in POOLS:
            raise ConfigError("Unknown pooling.", got=repr(pool), wanted=f"one of {', '.join(POOLS)}", fix="Drop pool.")
        _, inner, target, entry = find(network)
        if norm is not None:
            with_norm(inner, norm)
        for name, child in entry.children(inner).items():
            self.add_module(name, child)
        present = norm_of(self)
        self.target, self.pool = target, pool
        self.architecture = {
            "network": describe(inner, target, entry),
            "norm": None if present is None else list(present),
            "pool": pool,
        }
        self.in_channels = self.get_submodule(entry.first_convolution).in_channels  # type: ignore[assignment]
        self.channels, self.stride = entry.channels(inner), entry.stride(inner)
        self.out_features = self.channels[-1] * (2 if pool == "avgmax" else 1)
        self._norm = None if present is None else present[0]
        # Not self.train(), which would reach into the modules of a network that is in use.
        self.training = inner.training

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, C, X, Y, Z) to vectors (B, F).

        Raises:
            ConfigError: if the image has another shape than this encoder reads.
        """
        coarsest = self.feature_maps(image)[-1]
        pooled = coarsest.mean(dim=_SPACE, dtype=torch.float32)
        if self.pool == "avgmax":
            pooled = torch.cat([pooled, coarsest.amax(dim=_SPACE).float()], dim=1)
        return pooled.to(image.dtype)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """Images (B, C, X, Y, Z) to feature maps (B, ``channels[i]``, X', Y', Z'), fine to coarse.

        SegResNet: one map a level, the first at full resolution. ResNet: after the first activation, then after each of
        ``layer1`` to ``layer4``, as in FlexibleUNet.

        Raises:
            ConfigError: if the image has another shape than this encoder reads.
        """
        if image.ndim != 5 or image.shape[1] != self.in_channels:
            raise ConfigError(
                "The image does not fit the encoder.",
                got=f"shape {tuple(image.shape)}",
                wanted=f"(B, {self.in_channels}, X, Y, Z)",
                fix="Set in_channels to the number of sequences of a row of the datalist.",
            )
        coarsest = [-(-size // step) for size, step in zip(image.shape[2:], self.stride, strict=True)]
        alone = self._norm == "instance" or (self._norm == "batch" and self.training and len(image) == 1)
        if alone and max(coarsest) < 2:
            raise ConfigError(
                f"The image is too small for this encoder: {self._norm} norm has a single voxel to work on.",
                got=f"{tuple(image.shape[2:])} voxels, {self.stride} of them to one of the coarsest map",
                wanted=f"more than {min(self.stride)} voxels along some axis",
                fix="Enlarge roi_size, or use an encoder with fewer levels.",
            )
        refuse_unsafe_bf16(image.device, coarsest)
        return ARCHITECTURES[self.target].maps(self, image)


def refuse_unsafe_bf16(device: torch.device, coarsest: Sequence[int]) -> None:
    """Raise :class:`ConfigError` where gradients of a bf16 convolution would be garbage.

    On the CPU, torch 2.13's bf16 ``conv3d`` of a map with 2 voxels along its first axis reads memory that nothing has
    written, in about half of all backward passes; 3 voxels or more are right. Found by filling freed memory with NaN.

    Args:
        device: where the convolution runs.
        coarsest: voxels of the coarsest map along each axis; with fewer than 3, it or the one before has 2.
    """
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if device.type == "cpu" and bf16 and torch.is_grad_enabled() and coarsest[0] < 3:
        raise ConfigError(
            "bf16 would give wrong gradients here: a map has 2 voxels along its first axis.",
            got=f"a coarsest map of {tuple(coarsest)} voxels, in bf16 on the CPU",
            wanted="3 voxels or more along the first axis, or another precision",
            fix="Set precision: fp32, or enlarge roi_size.",
        )


def build_encoder(architecture: Mapping[str, Any]) -> Encoder:
    """A new encoder, randomly initialised, from what ``Encoder.architecture`` says (also after a trip through JSON).

    Only the networks in ``ARCHITECTURES`` are ever built, whatever a file names.

    Args:
        architecture: ``network`` (``_target_`` and constructor arguments), ``norm``, ``pool``.

    Raises:
        ConfigError: for an unsupported network, or arguments that it does not take.
    """
    settings = architecture.get("network")
    target = settings.get("_target_") if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(target, str) or target not in ARCHITECTURES:
        raise ConfigError(
            "This architecture is not one that medclr builds.",
            got=repr(target),
            wanted=f"network: {{_target_: one of {', '.join(ARCHITECTURES)}, ...}}",
            fix="Use Encoder.architecture, or the architecture of a manifest, unchanged.",
        )
    network_class = ARCHITECTURES[target].classes[0]
    arguments = {name: value for name, value in settings.items() if name != "_target_"}
    unknown = sorted(set(arguments) - set(inspect.signature(network_class).parameters))
    try:
        if unknown:
            raise TypeError(f"unknown arguments {', '.join(map(repr, unknown))}")
        network = network_class(**arguments)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"{target} cannot be built with these arguments.",
            got=f"{arguments}: {error}",
            wanted="arguments that the installed MONAI takes",
            fix="Use Encoder.architecture, or the architecture of a manifest, unchanged, with the MONAI it names.",
        ) from error
    return Encoder(network, norm=architecture.get("norm"), pool=architecture.get("pool", "avg"))


def find_encoder(network: nn.Module) -> Encoder:
    """The encoder of ``network``, sharing its parameters.

    Args:
        network: an :class:`Encoder`, a supported MONAI network, or anything that holds one of them as ``encoder``
            (FlexibleUNet, a method, a classifier), also inside DDP or torch.compile.

    Raises:
        ConfigError: if there is none.
    """
    inner: object = network
    while isinstance(inner, nn.Module):
        if isinstance(inner, Encoder):
            return inner
        inner = next((child for name, child in inner.named_children() if name in WRAPPERS), None)
    return Encoder(network)
