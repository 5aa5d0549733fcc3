"""The negative queue: embeddings of earlier batches that a query is contrasted with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medclr import keys
from medclr.distributed import gather
from medclr.errors import ConfigError

NO_SAMPLE: Final = -1
"""``sample`` of a queued key, and whatever number is not known: no query is of this sample."""

_WHOLE: Final = (keys.SAMPLE, keys.PATIENT, keys.SCAN, "view")
_META: Final = "meta_"


class NegativeQueue(nn.Module):
    """The last ``size`` keys, first in, first out, each with its metadata (MoCo, arXiv:1911.05722).

    What :meth:`stash` takes joins the queue in :meth:`after_step`, once an optimizer step and in training alone, so
    that a batch is contrasted with what was there before it. :meth:`before_step` discards what a skipped step has left.
    All ranks hold the same queue, in the same order.

    A sample's number says which pair of a batch a key is of, and the same number comes again in the next epoch, with
    another crop. It is therefore not kept: a queued key is of no query's sample, but of a patient.

    Args:
        size: K, keys that are kept.
        width: D of a key.
        names: metadata that is kept beside each key; ``sample``, ``patient``, ``scan`` and ``view`` as int64, -1 where
            there is none, all else as float64, NaN where there is none.

    Raises:
        ConfigError: for a size or width below 1.
    """

    filled: Tensor
    """() int64, how many keys there are."""
    pointer: Tensor
    """() int64, where the next one goes."""
    embeddings: Tensor
    """(K, D) float32, normalised; zero where there is none."""

    def __init__(self, size: int, width: int, names: Sequence[str] = (keys.SAMPLE, keys.PATIENT)) -> None:
        super().__init__()
        if not (isinstance(size, int) and isinstance(width, int) and size >= 1 and width >= 1):
            raise ConfigError(
                "The queue is unusable.",
                got=f"{size} keys of {width} numbers",
                wanted="whole numbers >= 1",
                fix="For example queue_size: 4096.",
            )
        self.size, self.names = size, tuple(names)
        self.register_buffer("embeddings", torch.zeros(size, width))
        for name in self.names:
            empty = NO_SAMPLE if name in _WHOLE else math.nan
            self.register_buffer(
                _META + name, torch.full((size,), empty, dtype=torch.int64 if name in _WHOLE else torch.float64)
            )
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._stashed: list[tuple[Tensor, dict[str, Tensor]]] = []

    def contents(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The keys that there are, (N, D), and their metadata, (N,) each; N is 0 in a new queue."""
        # Empty places are left out rather than masked: an affinity would make NaN of them. This waits for the device.
        there = slice(0, int(self.filled))
        return self.embeddings[there], {name: self.get_buffer(_META + name)[there] for name in self.names}

    @torch.no_grad()
    def stash(self, embeddings: Tensor, meta: Mapping[str, Tensor]) -> None:
        """Keep this rank's keys, and those of all others, for the end of the step; does nothing in evaluation.

        Args:
            embeddings: (B, D), normalised here.
            meta: ``names`` and perhaps more, (B,) each.

        Raises:
            ConfigError: if the keys of all ranks are more than the queue holds.
        """
        if not self.training:
            return
        embeddings = gather(normalize(embeddings.detach().float(), dim=1))
        if len(embeddings) > self.size:
            raise ConfigError(
                "The queue is smaller than a batch.",
                got=f"a queue of {self.size} keys, {len(embeddings)} keys in a batch of all ranks",
                wanted="a queue of several batches",
                fix="Raise queue_size, or lower batch_size.",
            )
        known = {name: gather(meta[name]) for name in self.names if name != keys.SAMPLE}
        self._stashed.append((embeddings, known))

    def before_step(self) -> None:
        """Discard what was stashed in a step that was skipped."""
        self._stashed = []

    @torch.no_grad()
    def after_step(self) -> None:
        """Let in what was stashed, in place of the oldest keys."""
        stashed, self._stashed = self._stashed, []
        for embeddings, meta in stashed:
            places = (self.pointer + torch.arange(len(embeddings), device=self.pointer.device)) % self.size
            self.embeddings[places] = embeddings.to(self.embeddings.dtype)
            for name, values in meta.items():
                buffer = self.get_buffer(_META + name)
                buffer[places] = values.to(buffer.dtype)
            self.pointer.copy_((self.pointer + len(embeddings)) % self.size)
            self.filled.copy_((self.filled + len(embeddings)).clamp(max=self.size))

    def buffer_names(self, prefix: str) -> list[str]:
        """Names of the buffers in a network that holds the queue as ``prefix``, for what DDP has to leave alone."""
        return [f"{prefix}.{name}" for name, _ in self.named_buffers()]
