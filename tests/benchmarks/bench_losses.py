"""The contrastive loss, forward and backward, against bare torch, MONAI's ContrastiveLoss and lightly's NTXentLoss.

python tests/benchmarks/bench_losses.py [--lightly FOLDER] [--rounds 9] [--threads 2]

FOLDER is what ``pip install --no-deps --target FOLDER lightly`` filled; MEDCLR_LIGHTLY may name it too. Contenders take
turns within a round, so that a busy machine slows all of them; it favours plain torch all the same, whose few large
steps wait less often for the second thread. Peak memory is that of a process of its own, above its inputs.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import monai
import torch
from monai.losses import ContrastiveLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from medclr.losses import NTXentLoss, info_nce

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "losses"))
from record_lightly import load

Loss = Callable[[Tensor, Tensor], Tensor]
WIDTH, TEMPERATURE = 128, 0.1
BATCHES = (256, 1024, 4096)
QUEUED, QUERIES = 65536, 256
LARGEST_FOR_MONAI = 256  # at 1,024 pairs it takes about 12 GB and 9 s


def bare(z_1: Tensor, z_2: Tensor) -> Tensor:
    """The shortest way to write NT-Xent."""
    z = normalize(torch.cat([z_1, z_2]), dim=1)
    number = torch.arange(len(z))
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return cross_entropy(logits, (number + len(z_1)) % len(z))


def ages(rows: int, columns: int) -> Tensor:
    """Weights (rows, columns) that are a Gaussian of the difference of two ages."""
    own, other = torch.linspace(20, 80, rows), torch.linspace(20, 80, columns)
    return torch.exp(-((own[:, None] - other) ** 2) / 50)


def soft(pairs: int) -> Loss:
    """NT-Xent whose positives are weighted; the table of weights is there before."""
    itself, weights = torch.arange(2 * pairs), ages(pairs, pairs).repeat(2, 2)

    def loss(z_1: Tensor, z_2: Tensor) -> Tensor:
        z = normalize(torch.cat([z_1, z_2]), dim=1)
        return info_nce(z, z, (weights, itself), TEMPERATURE)

    return loss


def queue(length: int) -> Tensor:
    """Keys of earlier batches, (length, WIDTH)."""
    return normalize(torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)


def queued(keys: Tensor) -> Loss:
    """MoCo's loss by info_nce."""
    number = torch.arange(QUERIES)
    ignored = torch.zeros(QUERIES, QUERIES + len(keys), dtype=torch.bool)
    ignored[:, :QUERIES] = number[:, None] != number

    def loss(z_1: Tensor, z_2: Tensor) -> Tensor:
        candidates = torch.cat([normalize(z_2.detach(), dim=1), keys])
        return info_nce(normalize(z_1, dim=1), candidates, (number, ignored), TEMPERATURE)

    return loss


def queued_soft(keys: Tensor) -> Loss:
    """The same, with any key a weighted positive."""
    weights = ages(QUERIES, QUERIES + len(keys))

    def loss(z_1: Tensor, z_2: Tensor) -> Tensor:
        candidates = torch.cat([normalize(z_2.detach(), dim=1), keys])
        return info_nce(normalize(z_1, dim=1), candidates, (weights, None), TEMPERATURE)

    return loss


def queued_bare(keys: Tensor) -> Loss:
    """Algorithm 1 of arXiv:1911.05722."""

    def loss(z_1: Tensor, z_2: Tensor) -> Tensor:
        q, k = normalize(z_1, dim=1), normalize(z_2.detach(), dim=1)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ keys.T], dim=1) / TEMPERATURE
        return cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))

    return loss


def contenders(pairs: int, lightly: str | None, length: int = QUEUED) -> dict[str, Loss]:
    """By name; ``pairs`` 0 is the case of the queue, of ``length`` keys."""
    if not pairs:
        keys = queue(length)
        named = {"medclr": queued(keys), "bare": queued_bare(keys), "medclr, soft weights": queued_soft(keys)}
        if lightly:
            named["lightly"] = load(lightly)[0](TEMPERATURE, memory_bank_size=(length, WIDTH))
        return named
    named = {"medclr": NTXentLoss(TEMPERATURE), "bare": bare, "medclr, soft weights": soft(pairs)}
    if pairs <= LARGEST_FOR_MONAI:
        named["MONAI"] = ContrastiveLoss(TEMPERATURE)
    if lightly:
        named["lightly"] = load(lightly)[0](TEMPERATURE)
    return named


def views(pairs: int) -> tuple[Tensor, Tensor]:
    """Two views of ``pairs`` samples, (pairs, WIDTH) each."""
    z_1, z_2 = torch.randn(2, pairs or QUERIES, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()
    return z_1.clone().requires_grad_(), z_2.clone().requires_grad_()


def seconds(losses: dict[str, Loss], pairs: int, rounds: int) -> dict[str, list[float]]:
    """Times of a forward and backward pass, without the first; of small batches more, except by who is slow there."""
    taken: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds * max(1, BATCHES[-1] // (pairs or BATCHES[-1])) + 1):
        for name, loss in losses.items():
            if number > rounds and sum(taken[name]) > 5:
                continue
            z_1, z_2 = views(pairs)
            start = time.perf_counter()
            loss(z_1, z_2).backward()
            taken[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in taken.items()}


def memory() -> float:
    """The most that this process held, in MB. ru_maxrss would begin at what the parent process held."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def print_peak(name: str, pairs: int, lightly: str | None) -> None:
    """Print the memory in MB that a pass adds to a process in which a small pass has loaded the libraries."""
    small = pairs and 8
    contenders(small, lightly, 8)[name](*views(small)).backward()
    loss, (z_1, z_2) = contenders(pairs, lightly)[name], views(pairs)
    Path("/proc/self/clear_refs").write_text("5")  # what the inputs took while they were made is not the loss's
    before = memory()
    loss(z_1, z_2).backward()
    print(memory() - before)


def peak(name: str, pairs: int, options: argparse.Namespace) -> float:
    """:func:`print_peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--pairs", str(pairs), "--threads", str(options.threads)]
    command += ["--lightly", options.lightly] if options.lightly else []
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print a line for each contender of each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lightly", default=os.environ.get("MEDCLR_LIGHTLY"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options.peak, options.pairs, options.lightly)
        return
    lightly = f"lightly {load(options.lightly)[1]}" if options.lightly else "lightly absent (--lightly FOLDER)"
    print(
        f"torch {torch.__version__}, MONAI {monai.__version__}, {lightly}, {options.threads} threads, "
        f"{platform.machine()}, load {os.getloadavg()[0]:.1f}"
    )
    heads = f"{'median ms':>10} {'ratio':>6} {'least ms':>9} {'ratio':>6} {'peak MB':>8} {'ratio':>6}"
    print(f"{'pairs':>12} {'':>20} {heads}")
    for pairs in (*BATCHES, 0):
        losses = contenders(pairs, options.lightly)
        taken = seconds(losses, pairs, options.rounds)
        figures = {
            name: (statistics.median(times) * 1e3, min(times) * 1e3, peak(name, pairs, options))
            for name, times in taken.items()
        }
        case = str(pairs) if pairs else f"queue {QUEUED}"
        for name, own in figures.items():
            ratios = [one / other for one, other in zip(own, figures["bare"], strict=True)]
            columns = f"{own[0]:10.2f} {ratios[0]:6.2f} {own[1]:9.2f} {ratios[1]:6.2f} {own[2]:8.1f} {ratios[2]:6.2f}"
            print(f"{case:>12} {name:>20} {columns}", flush=True)


if __name__ == "__main__":
    main()
