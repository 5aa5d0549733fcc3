"""What scanners, protocols and reconstructions do to the values of voxels, one voxel at a time.

Images are expected as preprocessing leaves them: scaled to about [0, 1], or to a standard deviation of about 1.
Strengths that are in "units of the image" refer to that. Everywhere, a number is a fixed strength, a pair a uniform
range from which each sample draws its own, and ``probability`` the share of samples that change at all. A strength
that does nothing leaves a sample as it is, bit for bit. Voxels outside the scan and absent channels stay 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medclr import draws
from medclr.errors import ConfigError
from medclr.geometry import View
from medclr.views.present import change_active, each, mean, value_range
from medclr.views.ranges import (
    Params,
    Strength,
    draw_active,
    draw_field_seeds,
    draw_log_range,
    draw_range,
    read_count,
    read_positive_range,
    read_probability,
    read_range,
)


class GaussianNoise:
    """Add white Gaussian noise, as thermal noise of a scanner (at high signal, also that of MR magnitude images).

    Args:
        std: standard deviation in units of the image.
        probability: share of samples that change.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, *, std: Strength = (0.0, 0.1), probability: float = 1.0) -> None:
        self.std = read_range(self, "std", std, minimum=0.0)
        self.probability = read_probability(self, probability)

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw ``std`` (B, 1) and the seeds of the noise fields for each key (B, 5)."""
        purpose = f"{place}/GaussianNoise"
        std = draw_range(keys, f"{purpose}/std", self.std)
        active = draw_active(keys, purpose, self.probability) & (std[:, 0] != 0)
        return {"active": active, "std": std, "field": draw_field_seeds(keys, purpose)}

    def apply(self, view: View, params: Params) -> View:
        """The noisy views; noise fields differ between CPU and GPU, as torch's streams do."""
        return change_active(view, params, _add_noise)


def _add_noise(view: View, params: Params) -> Tensor:
    return view.image.addcmul(noise_fields(view, params["field"]), each(params["std"]))


def noise_fields(view: View, seeds: Tensor) -> Tensor:
    """Standard normal noise of the image's shape, each sample from a generator of its own seed (B, 1)."""
    noise = torch.empty_like(view.image)
    for field, source in zip(noise, draws.torch_generators(seeds, "noise", noise.device), strict=True):
        field.normal_(generator=source)
    return noise


class Gamma:
    """Bend the grey scale by a power between each channel's smallest and largest value, which both stay.

    Models non-linear display curves, differing contrast windows and, loosely, differing sequence weightings. Values
    below 1 brighten the middle tones, values above 1 darken them.

    Args:
        gamma: the exponent; its logarithm is drawn uniformly. 1 changes nothing.
        probability: share of samples that change.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, *, gamma: Strength = (0.7, 1.5), probability: float = 1.0) -> None:
        self.gamma = read_positive_range(self, "gamma", gamma)
        self.probability = read_probability(self, probability)

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw ``gamma`` (B, 1) for each key (B, 5)."""
        purpose = f"{place}/Gamma"
        gamma = draw_log_range(keys, f"{purpose}/gamma", self.gamma)
        return {"active": draw_active(keys, purpose, self.probability) & (gamma[:, 0] != 1), "gamma": gamma}

    def apply(self, view: View, params: Params) -> View:
        """The views with a bent grey scale."""
        return change_active(view, params, _bend)


def _bend(view: View, params: Params) -> Tensor:
    low, way = value_range(view)
    # Outside the scan, the power of a negative number may be NaN; what is returned there is not used.
    return view.image.sub(low).div_(way).pow_(each(params["gamma"])).mul_(way).add_(low)


class ContrastBrightness:
    """Stretch each channel about its own mean, then shift it: what window, gain and offset settings do.

    Args:
        contrast: factor on the distance from the mean over the voxels inside the scan. 1 changes nothing.
        brightness: shift in units of the image. 0 changes nothing.
        probability: share of samples that change.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self, *, contrast: Strength = (0.75, 1.25), brightness: Strength = (-0.1, 0.1), probability: float = 1.0
    ) -> None:
        self.contrast = read_range(self, "contrast", contrast, minimum=0.0)
        self.brightness = read_range(self, "brightness", brightness)
        self.probability = read_probability(self, probability)

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw ``contrast`` and ``brightness``, each (B, 1), for each key (B, 5)."""
        purpose = f"{place}/ContrastBrightness"
        contrast = draw_range(keys, f"{purpose}/contrast", self.contrast)
        brightness = draw_range(keys, f"{purpose}/brightness", self.brightness)
        changes = ((contrast != 1) | (brightness != 0))[:, 0]
        active = draw_active(keys, purpose, self.probability) & changes
        return {"active": active, "contrast": contrast, "brightness": brightness}

    def apply(self, view: View, params: Params) -> View:
        """The views, stretched and shifted."""
        return change_active(view, params, _stretch)


def _stretch(view: View, params: Params) -> Tensor:
    contrast = each(params["contrast"])
    shift = mean(view) * (1 - contrast) + each(params["brightness"])
    return shift.addcmul(view.image, contrast)


class Requantise:
    """Round each channel to a few evenly spaced values between its smallest and largest one.

    Models storage with fewer bits. It also overwrites the step and the phase at which a scanner quantised its images,
    which is a fingerprint by which two scans of one patient can be matched without any anatomy.

    Args:
        levels: how many values a channel keeps; the logarithm is drawn uniformly, whole numbers result.
        probability: share of samples that change.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, *, levels: Strength = (16, 256), probability: float = 1.0) -> None:
        self.levels = read_range(self, "levels", levels, minimum=2)
        self.probability = read_probability(self, probability)

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw ``levels`` and ``phase`` (share of a step), each (B, 1), for each key (B, 5)."""
        purpose = f"{place}/Requantise"
        levels = draw_log_range(keys, f"{purpose}/levels", self.levels).round()
        phase = draw_range(keys, f"{purpose}/phase", (-0.5, 0.5))
        return {"active": draw_active(keys, purpose, self.probability), "levels": levels, "phase": phase}

    def apply(self, view: View, params: Params) -> View:
        """The views in few values. They leave a channel's range by at most half a step."""
        return change_active(view, params, _requantise)


def _requantise(view: View, params: Params) -> Tensor:
    low, way = value_range(view)
    step, phase = way / (each(params["levels"]) - 1), each(params["phase"])
    start = low + phase * step
    return view.image.sub(start).div_(step).round_().mul_(step).add_(start)


class HistogramShift:
    """Send the grey scale of each channel through a random rising curve that keeps its smallest and largest value.

    Models the differing grey scales of MR protocols and vendors, more freely than a gamma. The curve is linear between
    evenly spaced control points whose distances in value are drawn. All channels of a sample share one curve.

    Args:
        control_points: how many points the curve has, ends included; at least 3.
        strength: a pair or number in [0, 1): how far the slope between two points may be from 1 either way, before the
            whole is scaled to keep the range. 0 changes nothing.
        probability: share of samples that change.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, *, control_points: int = 6, strength: Strength = (0.0, 0.5), probability: float = 1.0) -> None:
        self.control_points = read_count(self, "control_points", control_points, minimum=3)
        self.strength = read_range(self, "strength", strength, minimum=0.0, maximum=1.0)
        if self.strength[1] == 1:
            raise ConfigError(
                "HistogramShift would not keep the order of values.",
                got=f"strength={strength}",
                wanted="less than 1, so that every slope stays above 0",
                fix="Choose a smaller strength, such as (0, 0.5).",
            )
        self.probability = read_probability(self, probability)

    def make_params(self, keys: Tensor, place: str) -> Params:
        """Draw the ``curve`` (B, control_points), rising from 0 to 1, for each key (B, 5)."""
        purpose = f"{place}/HistogramShift"
        strength = draw_range(keys, f"{purpose}/strength", self.strength).double()
        slopes = 1 + strength * (2 * draws.uniform(keys, f"{purpose}/slopes", self.control_points - 1) - 1)
        rising = torch.cat([torch.zeros_like(strength), slopes.cumsum(dim=1)], dim=1)
        active = draw_active(keys, purpose, self.probability) & (strength[:, 0] != 0)
        return {"active": active, "curve": (rising / rising[:, -1:]).float()}

    def apply(self, view: View, params: Params) -> View:
        """The views with their grey scales sent through the curves."""
        return change_active(view, params, _shift_histogram)


def _shift_histogram(view: View, params: Params) -> Tensor:
    steps = params["curve"].diff(dim=1)
    low, way = value_range(view)
    along = view.image.sub(low).mul_(steps.shape[1] / way)
    # A sum of ramps, one a piece: looking each voxel's piece up in a table takes several times as long.
    shifted = torch.zeros_like(along)
    for piece in range(steps.shape[1]):
        shifted.addcmul_((along - piece).clamp_(0, 1), each(steps[:, piece]))
    return shifted.mul_(way).add_(low)
