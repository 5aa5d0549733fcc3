"""Milliseconds a view: each transform, the recipe, and MONAI's transforms in a Compose, one sample at a time.

    python tests/benchmarks/bench_views.py [--device cpu] [--repeats 7] [--threads 1]

Views are drawn at full probability, so that nothing is skipped. MONAI runs without tracking of metadata, its faster
way. The figure is the best of the repeats: processor time for one thread on a CPU, so that a busy machine disturbs
little, else time on the clock.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable

import monai
import torch
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandAffine,
    RandCoarseDropout,
    RandFlip,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensityFixedMean,
    RandShiftIntensity,
)

from medclr import draws
from medclr.geometry import Crop
from medclr.views import (
    ContrastBrightness,
    CutOut,
    Gamma,
    GaussianBlur,
    GaussianNoise,
    HistogramShift,
    RandomSpatial,
    Requantise,
    TwoViews,
)

CASES = ((64, (32, 48, 32), (58, 77, 58)), (8, (64, 64, 64), (102, 106, 102)))
"""Views in a batch, voxels of a view, voxels of its crop."""


def milliseconds(work: Callable[[], object], views: int, repeats: int, device: torch.device) -> float:
    """The shortest of some runs, a view."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    taken = []
    for _ in range(repeats + 1):
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - began)
    return 1000 * min(taken[1:]) / views


def random_crop(count: int, shape: tuple[int, int, int], device: torch.device) -> Crop:
    """Noise inside a scan that fills the crop, with voxels of 1 mm."""
    return Crop(
        torch.rand(count, 1, *shape, device=device),
        torch.eye(4, device=device).repeat(count, 1, 1),
        torch.tensor([[0, 0, 0], list(shape)]).repeat(count, 1, 1),
        torch.ones(count, 1, dtype=torch.bool, device=device),
        torch.stack([draws.draw_key(0, 0, place, 0, 1) for place in range(count)]),
    )


def monai_recipe(size: tuple[int, int, int], device: torch.device) -> Compose:
    """The nearest to the recipe that MONAI's transforms give."""
    angle = math.radians(15)
    affine = RandAffine(
        prob=1.0,
        rotate_range=(angle,) * 3,
        scale_range=(0.1,) * 3,
        spatial_size=size,
        padding_mode="zeros",
        device=device,
    )
    return Compose(
        [
            affine,
            *(RandFlip(prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandGaussianNoise(prob=1.0, std=0.1),
            RandGaussianSmooth(prob=1.0, sigma_x=(0.5, 1.5), sigma_y=(0.5, 1.5), sigma_z=(0.5, 1.5)),
            RandAdjustContrast(prob=1.0, gamma=(0.7, 1.5)),
            RandScaleIntensityFixedMean(prob=1.0, factors=0.25, fixed_mean=True, preserve_range=False),
            RandShiftIntensity(prob=1.0, offsets=0.1),
            RandCoarseDropout(prob=1.0, holes=1, spatial_size=[max(n // 4, 1) for n in size], fill_value=0.0),
        ]
    )


def main() -> None:
    """Measure, and print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument("--threads", default=1, type=int)
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    torch.set_num_threads(arguments.threads)
    set_track_meta(False)
    print(f"python {platform.python_version()}, torch {torch.__version__}, monai {monai.__version__}")
    print(f"device {device}, {torch.get_num_threads()} threads, best of {repeats}")
    with torch.no_grad():
        for count, size, shape in CASES:
            measure(count, size, shape, repeats, device)


def measure(
    count: int, size: tuple[int, int, int], shape: tuple[int, int, int], repeats: int, device: torch.device
) -> None:
    """Print one case."""
    spatial = RandomSpatial(size, flip=(True, True, True))
    intensity = [GaussianNoise(), GaussianBlur(), Gamma(), ContrastBrightness(), CutOut()]
    crop = random_crop(count, shape, device)
    print(f"\n{count} views of {size} from crops of {shape}: ms a view")

    params = spatial.make_params(crop.key, "views/0")
    print(f"  {'RandomSpatial':20s} {milliseconds(lambda: spatial.apply(crop, params), count, repeats, device):8.3f}")
    view = spatial.apply(crop, params)
    for transform in (*intensity, CutOut(fill="noise"), Requantise(), HistogramShift()):
        drawn = transform.make_params(crop.key, "views/1")
        label = type(transform).__name__ + (" (noise)" if getattr(transform, "fill", 0) == "noise" else "")
        taken = milliseconds(lambda: transform.apply(view, drawn), count, repeats, device)  # noqa: B023
        print(f"  {label:20s} {taken:8.3f}")

    recipe = TwoViews(spatial, *intensity)
    ours = milliseconds(lambda: recipe.view(crop), count, repeats, device)
    compose = monai_recipe(size, device)
    theirs = milliseconds(lambda: [compose(image) for image in crop.image], count, repeats, device)
    print(
        f"  {'recipe, TwoViews':20s} {ours:8.3f}\n  {'recipe, Compose':20s} {theirs:8.3f}\n  ratio {theirs / ours:.1f}"
    )


if __name__ == "__main__":
    main()
