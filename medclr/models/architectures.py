"""The MONAI networks that medclr takes an encoder from: one entry of ``ARCHITECTURES`` each.

An entry says which children of the network are its encoder, how an image runs through them, and which constructor
arguments make the same encoder again. Only what is listed here is ever built from a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from monai.networks.layers.factories import Act
from monai.networks.nets import ResNet, SegResNet, SegResNetVAE
from monai.networks.nets.resnet import ResNetBlock, ResNetEncoder, ResNetFeatures
from torch import Tensor, nn

from medclr.errors import ConfigError
from medclr.models.norms import norm_of

WRAPPERS = ("module", "_orig_mod", "encoder")
"""Children that hold the network proper: of DDP, of torch.compile, and of FlexibleUNet, a method or a classifier."""


@dataclass(frozen=True)
class Architecture:
    """What medclr must know of a MONAI network to use its encoder."""

    classes: tuple[type[nn.Module], ...]
    """The class that a manifest names, then others with the same encoder. Subclasses do not count: they may differ."""
    prefixes: tuple[str, ...]
    """Names of the children that hold the encoder's parameters and buffers."""
    children: Callable[[Any], dict[str, nn.Module]]
    """All children that the encoder runs, in the order in which it does; also those without parameters."""
    maps: Callable[[Any, Tensor], list[Tensor]]
    """(object with these children, image) -> feature maps, fine to coarse."""
    arguments: Callable[[Any], dict[str, Any]]
    """Constructor arguments of the same encoder."""
    first_convolution: str
    """Name of the layer that reads the image."""
    channels: Callable[[Any], tuple[int, ...]]
    """Channels of the feature maps, fine to coarse."""
    stride: Callable[[Any], tuple[int, int, int]]
    """Voxels of the image to one of the coarsest map, along each axis."""


def find(network: nn.Module) -> tuple[str, nn.Module, str, Architecture]:
    """Where the network proper sits in ``network``: prefix of its parameter names, network, target name, entry.

    Raises:
        ConfigError: if there is no supported network.
    """
    prefix, inner = "", network
    while True:
        for target, entry in ARCHITECTURES.items():
            if type(inner) in entry.classes:
                return prefix, inner, target, entry
        name = next((name for name in WRAPPERS if isinstance(getattr(inner, name, None), nn.Module)), None)
        if name is None:
            raise ConfigError(
                "This network's encoder is not known to medclr.",
                got=type(network).__name__,
                wanted=f"one of {', '.join(ARCHITECTURES)}, or a network that holds one as its encoder (FlexibleUNet)",
                fix="Use a supported network, or add an entry to ARCHITECTURES in medclr/models/architectures.py.",
            )
        prefix, inner = f"{prefix}{name}.", getattr(inner, name)


def encoder_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Names, in ``network``, of the children that make up its encoder's parameters and buffers.

    Raises:
        ConfigError: if the network is not supported.

    Example:
        >>> from monai.networks.nets import SegResNet
        >>> encoder_prefixes(SegResNet())
        ('convInit', 'down_layers')
    """
    prefix, _, _, entry = find(network)
    return tuple(f"{prefix}{name}" for name in entry.prefixes)


def describe(network: nn.Module, target: str, entry: Architecture) -> dict[str, Any]:
    """``_target_`` and constructor arguments of a network with the same encoder, as plain JSON values.

    Raises:
        ConfigError: if the network is not three-dimensional, or built with an argument that cannot be written down.
    """
    first = network.get_submodule(entry.first_convolution)
    if not isinstance(first, nn.Conv3d):
        raise ConfigError(
            "medclr's encoders are three-dimensional.",
            got=f"{type(network).__name__} whose first layer is {type(first).__name__}",
            wanted="spatial_dims=3",
            fix="Build the network with spatial_dims=3 (some of MONAI's default to 2).",
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps({"_target_": target, **entry.arguments(network)}))
    except TypeError as error:
        raise ConfigError(
            f"The constructor arguments of {target} cannot be written to a manifest.",
            got=str(error),
            wanted="arguments that are names, numbers, and lists of them",
            fix="Give activations by MONAI's names: act: relu, or act: [leakyrelu, {negative_slope: 0.01}].",
        ) from error
    return plain


def _segresnet_children(network: Any) -> dict[str, nn.Module]:
    dropout = network.dropout if network.dropout_prob is not None else nn.Identity()
    return {"convInit": network.convInit, "dropout": dropout, "down_layers": network.down_layers}


def _segresnet_maps(encoder: Any, image: Tensor) -> list[Tensor]:
    maps, x = [], encoder.dropout(encoder.convInit(image))
    for down in encoder.down_layers:
        x = down(x)
        maps.append(x)
    return maps


def _segresnet_arguments(network: Any) -> dict[str, Any]:
    return {
        "spatial_dims": 3,
        "init_filters": network.init_filters,
        "in_channels": network.in_channels,
        "dropout_prob": network.dropout_prob,
        "act": network.act,
        # From the layers, since with_norm may have replaced what the network was built with.
        "norm": norm_of(network.down_layers),
        "blocks_down": network.blocks_down,
        "blocks_up": (1,) * (len(network.blocks_down) - 1),
    }


def _segresnet_stride(network: Any) -> tuple[int, int, int]:
    stride = 2 ** (len(network.blocks_down) - 1)
    return stride, stride, stride


def _resnet_children(network: Any) -> dict[str, nn.Module]:
    names = ("conv1", "bn1", "act", "maxpool", "layer1", "layer2", "layer3", "layer4")
    children: dict[str, nn.Module] = {name: getattr(network, name) for name in names}
    return {**children, "maxpool": nn.Identity()} if network.no_max_pool else children


def _resnet_maps(encoder: Any, image: Tensor) -> list[Tensor]:
    maps = [encoder.act(encoder.bn1(encoder.conv1(image)))]
    x = encoder.maxpool(maps[0])
    for layer in _resnet_layers(encoder):
        x = layer(x)
        maps.append(x)
    return maps


def _resnet_layers(network: Any) -> tuple[Any, ...]:
    return network.layer1, network.layer2, network.layer3, network.layer4


def _resnet_arguments(network: Any) -> dict[str, Any]:
    layers = _resnet_layers(network)
    shortcuts = [layer[0].downsample for layer in layers if layer[0].downsample is not None]
    act = next((name.lower() for name in Act.names if Act[name] is type(network.act)), type(network.act))
    return {
        "block": "basic" if isinstance(layers[0][0], ResNetBlock) else "bottleneck",
        "layers": [len(layer) for layer in layers],
        "block_inplanes": [layer[0].conv1.out_channels for layer in layers],
        "spatial_dims": 3,
        "n_input_channels": network.conv1.in_channels,
        "conv1_t_size": network.conv1.kernel_size,
        "conv1_t_stride": network.conv1.stride,
        "no_max_pool": network.no_max_pool,
        "shortcut_type": "A" if all(isinstance(shortcut, partial) for shortcut in shortcuts) else "B",
        "bias_downsample": network.bias_downsample,
        # torch lists an activation's settings in __constants__.
        "act": (act, {name: getattr(network.act, name) for name in getattr(network.act, "__constants__", ())}),
    }


def _resnet_channels(network: Any) -> tuple[int, ...]:
    planes = [layer[0].conv1.out_channels * layer[0].expansion for layer in _resnet_layers(network)]
    return (network.conv1.out_channels, *planes)


def _resnet_stride(network: Any) -> tuple[int, int, int]:
    x, y, z = (step * (8 if network.no_max_pool else 16) for step in network.conv1.stride)
    return x, y, z


ARCHITECTURES: dict[str, Architecture] = {
    "monai.networks.nets.SegResNet": Architecture(
        classes=(SegResNet, SegResNetVAE),
        prefixes=("convInit", "down_layers"),
        children=_segresnet_children,
        maps=_segresnet_maps,
        arguments=_segresnet_arguments,
        first_convolution="convInit.conv",
        channels=lambda network: tuple(network.init_filters * 2**level for level in range(len(network.blocks_down))),
        stride=_segresnet_stride,
    ),
    "monai.networks.nets.ResNet": Architecture(
        classes=(ResNet, ResNetFeatures, ResNetEncoder),
        prefixes=("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"),
        children=_resnet_children,
        maps=_resnet_maps,
        arguments=_resnet_arguments,
        first_convolution="conv1",
        channels=_resnet_channels,
        stride=_resnet_stride,
    ),
}
"""The supported networks, by the name that a bundle or a manifest calls them."""
