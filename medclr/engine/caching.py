"""The gradient cache: a contrastive step on a batch of any size in the memory of a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from medclr.errors import ConfigError
from medclr.geometry import View

Forward = Callable[..., Mapping[str, Tensor]]


class GradientCache:
    """Encodes a batch in chunks, twice: for the embeddings, and for the gradient of the weights (arXiv:2101.06983).

    The loss compares all samples of a batch, but each embedding depends on its own sample alone. So :meth:`embed`
    encodes chunk by chunk and keeps no graph; the loss and its gradient with respect to the embeddings are computed
    from all of them; and :meth:`backward` encodes each chunk again, with the random numbers of the first time, and
    hands its share of that gradient on. This is the gradient of the whole batch, for one forward pass more.

    A momentum copy sees the chunks as the network does. DDP adds up the gradients of all ranks with the last chunk.

    Args:
        network: a method, or DDP around it.
        chunk_size: samples in a chunk, >= 1.

    Raises:
        ConfigError: for another size, or a norm that makes an embedding depend on the other samples of its chunk, or
            that counts a sample twice in its running statistics.
    """

    def __init__(self, network: nn.Module, chunk_size: int) -> None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ConfigError(
                "The chunk size is unusable.",
                got=chunk_size,
                wanted="a whole number >= 1, or null to encode the batch as a whole",
                fix="Set chunk_size to the largest batch that fits into memory.",
            )
        refuse_norms(network)
        self.network, self.chunk_size = network, chunk_size
        self._forward: Forward | None = None
        self._chunks: list[tuple[slice, Any, _Random]] = []
        self._embeddings: dict[str, Tensor] = {}

    def divides(self, views: Sequence[View]) -> bool:
        """Whether a batch has more than one chunk; the usual step is quicker for the others."""
        return len(views[0].image) > self.chunk_size

    def embed(self, forward: Forward, views: Sequence[View], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The embeddings of a batch, (B, ...) each, as leaves that collect the gradient of a loss.

        Args:
            forward: calls the network.
            views: what it is called with.
            inputs: further arguments; tensors with a row for each sample are divided as well.
        """
        count = len(views[0].image)
        self._forward, self._chunks = forward, []
        parts = []
        for first in range(0, count, self.chunk_size):
            rows = slice(first, first + self.chunk_size)
            chunk = _rows((tuple(views), dict(inputs)), rows, count)
            self._chunks.append((rows, chunk, _Random(views[0].image)))
            with torch.no_grad():
                parts.append(forward(*chunk[0], **chunk[1]))
        self._embeddings = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for embeddings in self._embeddings.values():
            embeddings.requires_grad_(embeddings.is_floating_point())
        return self._embeddings

    def backward(self, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Add the gradient of the weights to theirs, when the loss has been propagated back to the embeddings.

        Args:
            context: what the forward pass runs in, such as autocast; entered anew for each chunk.
        """
        assert self._forward is not None
        gradients = {name: value.grad for name, value in self._embeddings.items() if value.grad is not None}
        chunks, self._chunks = self._chunks, []
        if not chunks:
            return
        afterwards = _Random(chunks[0][1][0][0].image)
        for number, (rows, (views, inputs), random) in enumerate(chunks, start=1):
            random.put_back()
            with self._synchronised(number == len(chunks)):
                with context():
                    embeddings = self._forward(*views, **inputs)
                reached = [name for name in gradients if embeddings[name].requires_grad]
                torch.autograd.backward(
                    [embeddings[name] for name in reached], [gradients[name][rows] for name in reached]
                )
        afterwards.put_back()
        self._forward, self._embeddings = None, {}

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        waiting: AbstractContextManager[Any] = self.network.no_sync()
        return waiting


def refuse_norms(network: nn.Module) -> None:
    """Raise :class:`ConfigError` for norms under which a chunk is not encoded as it is within its batch."""
    inexact = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, _BatchNorm) or getattr(layer, "track_running_stats", False)
    ]
    if inexact:
        raise ConfigError(
            "Gradient caching would not be exact: a norm compares the samples of a chunk.",
            got=f"chunk_size, and {len(inexact)} such layers, {inexact[0]} the first",
            wanted="norms that keep samples apart, in the encoder, the projector and the predictor",
            fix="Set norm: group, and the projector's and the predictor's norm: layer; or set chunk_size: null.",
        )


class _Random:
    """The state of torch's generators, on the CPU and on the device of a tensor."""

    def __init__(self, on: Tensor) -> None:
        self.kind, self.cpu = on.device.type, torch.get_rng_state()
        self.devices, self.states = get_device_states(on)

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.kind)


def _rows(value: Any, rows: slice, count: int) -> Any:
    """The rows of all tensors that have one for each sample, in tuples, lists and dictionaries of any depth."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {name: _rows(entry, rows, count) for name, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rows(entry, rows, count) for entry in value))
    if isinstance(value, list | tuple):
        return type(value)(_rows(entry, rows, count) for entry in value)
    return value
