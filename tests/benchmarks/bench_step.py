"""A step of SimCLR (views, both views through the encoder, projector, loss, backward) against the encoder alone.

python tests/benchmarks/bench_step.py [--device cuda]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from bench_views import random_crop
from monai.networks.nets import SegResNet

from medclr import draws, keys
from medclr.engine import autocast, default_precision
from medclr.methods import SimCLR
from medclr.models import Encoder, norm_argument
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

CASES = ((32, (32, 48, 32)), (8, (64, 64, 64)))
"""Patients a step, voxels of a view."""


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a run, without the first."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def measure(count: int, size: tuple[int, int, int], repeats: int, device: torch.device) -> None:
    """Print one case."""
    spatial = RandomSpatial(size, rotation=15.0, scale=(0.85, 1.15))
    intensity = [HistogramShift(probability=0.3), Gamma(probability=0.8), ContrastBrightness(probability=0.8)]
    intensity += [GaussianBlur(probability=0.4), GaussianNoise(probability=0.8), Requantise(probability=0.5)]
    views = TwoViews(spatial, *intensity, CutOut(probability=0.3))
    keys_of = [torch.stack([draws.draw_key(0, 0, place, 0, view) for place in range(count)]) for view in (1, 2)]
    crops = [random_crop(count, spatial.read_size(), device)._replace(key=drawn) for drawn in keys_of]
    encoder = Encoder(SegResNet(init_filters=8, norm=norm_argument("group"))).to(device)
    method = SimCLR(encoder).to(device)
    precision = default_precision(device)
    meta = {name: torch.arange(count, device=device) for name in (keys.SAMPLE, keys.PATIENT)}
    images = torch.cat([view.image for view in views(*crops)])

    def step() -> None:
        view_1, view_2 = views(*crops)
        with autocast(device, precision):
            loss = method.contrast(method(view_1, view_2), meta)[keys.LOSS]
        loss.backward()

    def alone() -> None:
        with autocast(device, precision):
            features = encoder(images)
        features.float().sum().backward()

    whole, bare = seconds(step, repeats, device), seconds(alone, repeats, device)
    drawn = seconds(lambda: views(*crops), repeats, device)
    print(
        f"{count:4d} patients, {size}, {precision}: step {whole:.3f} s, encoder alone {bare:.3f} s, "
        f"ratio {whole / bare:.2f}; views {drawn:.3f} s"
    )


def main() -> None:
    """Measure, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeats", default=5, type=int)
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, SegResNet of 8 filters")
    for count, size in CASES:
        measure(count, size, arguments.repeats, arguments.device)


if __name__ == "__main__":
    main()
