"""NT-Xent forward and backward against MONAI's ContrastiveLoss and a bare matrix product with cross-entropy.

python tests/benchmarks/bench_losses.py
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import monai
import torch
from monai.losses import ContrastiveLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from medclr.losses import NTXentLoss

WIDTH, TEMPERATURE, RUNS = 128, 0.1, 5
LARGEST_FOR_MONAI = 256  # at 1,024 pairs it takes about 12 GB and 9 s


def bare(z_1: Tensor, z_2: Tensor) -> Tensor:
    """The shortest way to write NT-Xent."""
    z = normalize(torch.cat([z_1, z_2]), dim=1)
    number = torch.arange(len(z))
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return cross_entropy(logits, (number + len(z_1)) % len(z))


def seconds(loss: Callable[[Tensor, Tensor], Tensor], pairs: int) -> float:
    """Median time of a forward and backward pass."""
    torch.manual_seed(0)
    z_1, z_2 = torch.randn(2, pairs, WIDTH).unbind()
    times = []
    for _ in range(RUNS + 1):
        first, second = z_1.clone().requires_grad_(), z_2.clone().requires_grad_()
        start = time.perf_counter()
        loss(first, second).backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Print one line a batch size."""
    print(
        f"torch {torch.__version__}, MONAI {monai.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    )
    print(f"{'pairs':>6} {'NT-Xent ms':>11} {'bare ms':>9} {'ratio':>6} {'MONAI ms':>9} {'ratio':>8}")
    for pairs in (256, 1024, 4096):
        own, plain = seconds(NTXentLoss(TEMPERATURE), pairs), seconds(bare, pairs)
        line = f"{pairs:6d} {own * 1e3:11.2f} {plain * 1e3:9.2f} {own / plain:6.2f}"
        if pairs <= LARGEST_FOR_MONAI:
            peer = seconds(ContrastiveLoss(TEMPERATURE), pairs)
            line += f" {peer * 1e3:9.1f} {own / peer:8.4f}"
        print(line)


if __name__ == "__main__":
    main()
