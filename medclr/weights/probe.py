"""Same input, same features: the proof that loaded weights are in the right places of the right network.

Names and shapes alone do not give it. Two layers of one shape may be swapped; instance norm without parameters, a
stride or an activation leaves no trace in a state dict. So the features of one made-up image are saved with the
weights, and whoever loads them computes the same again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from medclr import draws
from medclr.errors import WeightsError
from medclr.models import Encoder

TOLERANCE: Final = 1e-6
"""Largest difference of a channel's mean or root mean square, relative to the latter.

Both sides compute in double precision from the same weights, so that machines differ by far less, and misplaced weights
by far more.
"""
SEED: Final = 20240


def probe_image(size: Sequence[int], in_channels: int, seed: int = SEED) -> Tensor:
    """The image (1, C, X, Y, Z), float64: noise on a ramp that differs between the axes and the channels.

    It depends on the arguments alone, not on torch's random state or version.
    """
    shape = (in_channels, *size)
    count = in_channels * size[0] * size[1] * size[2]
    image = draws.uniform(draws.draw_key(seed, 0, 0, 0, 0), "probe", count).reshape(shape) - 0.5
    for axis, slope in enumerate((0.5, 1.0, 2.0)):
        ramp = torch.linspace(-1, 1, size[axis], dtype=torch.float64, device="cpu")
        image += slope * ramp.reshape([-1 if dim == axis else 1 for dim in range(3)])
    image *= torch.arange(1, in_channels + 1, dtype=torch.float64, device="cpu").reshape(-1, 1, 1, 1)
    return image.unsqueeze(0)


def take_probe(encoder: Encoder) -> dict[str, Any]:
    """What is saved: size and seed of the image, and mean and root mean square of every channel of every map."""
    # Two voxels of the coarsest map along each axis: the fewest that reach every weight of a 3x3x3 kernel.
    size = [2 * step for step in encoder.stride]
    return {"size": size, "seed": SEED, "features": [means.tolist() for means in _summary(encoder, size, SEED, {})]}


def check_probe(
    encoder: Encoder, probe: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> tuple[float, int]:
    """Compare what ``encoder`` computes, or would compute with ``weights``, with a saved probe.

    Args:
        encoder: left as it is.
        probe: what :func:`take_probe` returned.
        weights: take the place of the encoder's own, by name.

    Returns:
        The largest relative difference (inf where the maps have other channels), and the first map, counted from the
        finest, where the difference is above ``TOLERANCE`` (-1 if none).

    Raises:
        WeightsError: for a probe that cannot be read.
    """
    try:
        wanted = [torch.tensor(channels, dtype=torch.float64, device="cpu") for channels in probe["features"]]
        size = [int(voxels) for voxels in probe["size"]]
        seed = int(probe["seed"])
        if len(size) != 3 or not all(1 <= voxels <= 256 for voxels in size) or not wanted:
            raise ValueError(f"size {size}, {len(wanted)} maps")
        if any(channels.ndim != 2 or channels.shape[1] != 2 for channels in wanted):
            raise ValueError("features are not pairs")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            "The file's probe cannot be read.",
            got=f"{type(error).__name__}: {error}",
            wanted="size, seed and features",
            fix="Save the encoder again with medclr.save_encoder.",
        ) from error
    got = _summary(encoder, size, seed, weights or {})
    if [len(channels) for channels in got] != [len(channels) for channels in wanted]:
        return float("inf"), 0
    differences = [_difference(a, b) for a, b in zip(got, wanted, strict=True)]
    # "Not within" rather than "above", so that NaN counts as different.
    first = next((index for index, difference in enumerate(differences) if not difference <= TOLERANCE), -1)
    return (differences[first] if first >= 0 else max(differences)), first


def _difference(got: Tensor, wanted: Tensor) -> float:
    size = wanted[:, 1:]
    # A channel that is all but dead is held to a millionth of its map, or rounding would decide.
    floor = (1e-6 * size.max()).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((got - wanted).abs() / size.clamp_min(floor)).max())


def _summary(encoder: Encoder, size: Sequence[int], seed: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
    # A copy on the CPU in double precision: the encoder's mode, device and hooks stay as they are, nothing random is
    # drawn, and neither autocast nor TF32 blurs the comparison.
    twin = copy.deepcopy(encoder).to(device="cpu", dtype=torch.float64).eval()
    state = twin.state_dict()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for name, tensor in weights.items():
            state[name].copy_(tensor)
        maps = [x.squeeze(0).flatten(1) for x in twin.feature_maps(probe_image(size, encoder.in_channels, seed))]
        return [torch.stack([x.mean(dim=1), x.square().mean(dim=1).sqrt()], dim=1) for x in maps]
