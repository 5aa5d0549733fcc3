"""Gradient caching: the memory of a large batch against that of one chunk, and its time against the plain step's.

python tests/benchmarks/bench_caching.py [--device cuda] [--pairs 512] [--chunk 32] [--size 48]

Memory is the largest that a step takes above the views themselves: on a GPU what torch has allocated, on a CPU what the
process holds (Linux alone), roughly, since what was freed before may be held still. The plain step is measured at the
largest batch that fits, halving from --pairs on; give --plain where memory is not what ends it.
"""

from __future__ import annotations

import argparse
import platform
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from bench_step import seconds
from monai.networks.nets import SegResNet

from medclr import keys
from medclr.engine import autocast
from medclr.engine.caching import GradientCache
from medclr.geometry import View
from medclr.methods import SimCLR
from medclr.models import Encoder, Projector, norm_argument

PAGE = 4096


def views_of(count: int, size: int, device: torch.device) -> tuple[View, View]:
    """Two views of random voxels."""
    return tuple(
        View(
            image=torch.rand(count, 1, size, size, size, device=device),
            affine=torch.eye(4, device=device).repeat(count, 1, 1),
            valid=torch.ones(count, 1, 1, 1, 1, dtype=torch.bool, device=device),
            channels=torch.ones(count, 1, dtype=torch.bool, device=device),
            key=torch.zeros(count, 5, dtype=torch.int64),
        )
        for _ in range(2)
    )  # type: ignore[return-value]


def method_on(device: torch.device) -> SimCLR:
    """SimCLR with norms that keep samples apart."""
    torch.manual_seed(0)
    encoder = Encoder(SegResNet(init_filters=8, norm=norm_argument("group")))
    return SimCLR(encoder, Projector(encoder.out_features, norm="layer")).to(device)


def step_of(method: SimCLR, views: tuple[View, View], chunk: int | None, precision: str) -> Callable[[], None]:
    """A forward and backward pass over all views; in chunks unless ``chunk`` is None."""
    device, count = views[0].image.device, len(views[0].image)
    meta = {name: torch.arange(count, device=device) for name in (keys.SAMPLE, keys.PATIENT)}
    cache = None if chunk is None else GradientCache(method, chunk)

    def context() -> torch.autocast:
        return autocast(device, precision)  # type: ignore[arg-type]

    def step() -> None:
        method.zero_grad(set_to_none=True)
        with context():
            embeddings = method(*views) if cache is None else cache.embed(method, views, {})
            loss = method.contrast(embeddings, meta)[keys.LOSS]
        loss.backward()
        if cache is not None:
            cache.backward(context)

    return step


class Peak:
    """The most memory that is held while something is done, above what was held before, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def of(self, work: Callable[[], None]) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        before, done = resident(), threading.Event()
        self.bytes = before
        watcher = threading.Thread(target=self._watch, args=(done,))
        watcher.start()
        work()
        done.set()
        watcher.join()
        return self.bytes - before

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(0.002):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def largest_plain(method: SimCLR, size: int, first: int, precision: str, device: torch.device) -> int:
    """The largest batch, halving from ``first`` on, whose plain step fits into the GPU's memory."""
    count = first
    while count > 1:
        try:
            step_of(method, views_of(count, size, device), None, precision)()
        except torch.OutOfMemoryError:
            method.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            count //= 2
        else:
            break
    return count


def main() -> None:
    """Measure, and print a line for memory and one for time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--pairs", default=None, type=int, help="pairs of the cached batch; 512 on a GPU, 16 on a CPU")
    parser.add_argument("--chunk", default=None, type=int, help="pairs of a chunk; 32 on a GPU, 4 on a CPU")
    parser.add_argument("--size", default=None, type=int, help="edge of a view, voxels; 48 on a GPU, 24 on a CPU")
    parser.add_argument("--plain", default=None, type=int, help="pairs of the plain step")
    parser.add_argument("--precision", default=None, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", default=3, type=int)
    arguments = parser.parse_args()
    device, on_gpu = arguments.device, arguments.device.type == "cuda"
    pairs, chunk, size = (
        given if given is not None else default
        for given, default in zip(
            (arguments.pairs, arguments.chunk, arguments.size), (512, 32, 48) if on_gpu else (16, 4, 24), strict=True
        )
    )
    precision = arguments.precision or ("bf16" if on_gpu else "fp32")
    name = torch.cuda.get_device_name() if on_gpu else platform.machine()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, SegResNet of 8 filters, {precision}")
    method = method_on(device)

    chunk_views, batch_views = views_of(chunk, size, device), views_of(pairs, size, device)
    one, whole = step_of(method, chunk_views, None, precision), step_of(method, batch_views, chunk, precision)
    for work in (one, whole):  # libraries choose their algorithms, and the gradient has its place, before it counts
        work()
    memory = [Peak(device).of(work) for work in (one, whole)]
    print(
        f"memory above the views: {pairs} pairs of {size}^3 in chunks of {chunk} {memory[1] / 2**20:.0f} MiB, "
        f"one chunk {memory[0] / 2**20:.0f} MiB, ratio {memory[1] / max(1, memory[0]):.2f}"
    )
    plain_pairs = arguments.plain or (largest_plain(method, size, pairs, precision, device) if on_gpu else pairs)
    plain_views = views_of(plain_pairs, size, device)
    works = (whole, pairs), (step_of(method, plain_views, None, precision), plain_pairs)
    # In turns, so that a busy machine slows both.
    rounds = [[seconds(work, 1, device) / count for work, count in works] for _ in range(arguments.repeats)]
    cached, plain = (min(taken) for taken in zip(*rounds, strict=True))
    print(
        f"time a pair: cached {1e3 * cached:.2f} ms, plain at {plain_pairs} pairs {1e3 * plain:.2f} ms, "
        f"ratio {cached / plain:.2f}"
    )


if __name__ == "__main__":
    main()
