"""InfoNCE over weighted pairs, the one contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medclr.errors import ConfigError

Table = tuple[Tensor, Tensor | None]
Pairs = Table | Callable[[slice], Table]
LOG2_E = math.log2(math.e)
BLOCK_ELEMENTS = 2**21
"""Similarities held at a time: 8 MB in fp32. On a CPU, blocks that leave the cache cost more than the arithmetic."""


def info_nce(queries: Tensor, keys: Tensor, pairs: Pairs, temperature: float = 0.1) -> Tensor:
    r"""Contrastive cross-entropy of each query over its keys, with soft positives and ignored pairs.

    .. math:: \ell_i = -\sum_{j \in P_i} w_{ij} \log
              \frac{\exp(q_i \cdot k_j / \tau)}{\sum_{j \notin I_i} \exp(q_i \cdot k_j / \tau)},
              \qquad \sum_j w_{ij} = 1,

    averaged over the queries that have a positive. InfoNCE: arXiv:1807.03748; with one positive a query it is NT-Xent
    (arXiv:2002.05709) and MoCo's loss (arXiv:1911.05722), with several the outer supervised loss of arXiv:2004.11362,
    with a kernel's weights the y-aware loss of arXiv:2106.08808.

    Computed in fp32 whatever the input and autocast, by log-sum-exp, in blocks of queries; the gradient is computed in
    the forward pass, so that memory does not grow with B x K. Differentiable once. A side that needs no gradient, as
    a queue of keys, costs no time for it.

    Args:
        queries: (B, D), normalised by the caller.
        keys: (K, D), normalised by the caller.
        pairs: positives and ignored, or a callable that gives both for a slice of query rows. Positives are weights
            >= 0 (B, K), whose scale within a row does not matter; or, cheaper, the column of each query's only
            positive, int64 (B,). Ignored are bool (B, K); or the column of each query's only ignored key, int64 (B,);
            or None. A pair that is positive and ignored is ignored.
        temperature: > 0.

    Returns:
        The loss, a scalar; 0 if no query has a positive.

    Raises:
        ConfigError: for a temperature that is not > 0, or shapes or types that do not fit; and in a backward pass
            that is to be differentiated again.
    """
    check_temperature(temperature)
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ConfigError(
            "Queries and keys do not fit.",
            got=f"{tuple(queries.shape)} and {tuple(keys.shape)}",
            wanted="(B, D) and (K, D)",
            fix="Flatten embeddings to one row each, of one width.",
        )
    if not callable(pairs):
        _check_table(pairs, len(queries), len(keys))
    other = None if keys is queries else keys  # one tensor on both sides has one gradient, summed on the way
    loss: Tensor = _InfoNCE.apply(queries, other, pairs, float(temperature))  # type: ignore[no-untyped-call]
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor | None, pairs: Pairs, temperature: float) -> Tensor:
        of_q, of_k = ctx.needs_input_grad[:2]
        with torch.autocast(queries.device.type, enabled=False):
            fp32 = queries.detach().float()
            gradient_q = torch.zeros_like(fp32) if of_q else None
            gradient_k = torch.zeros_like(keys, dtype=torch.float32) if keys is not None and of_k else None
            loss = _loss_and_gradients(
                fp32, fp32 if keys is None else keys.detach().float(), pairs, temperature,
                gradient_q, gradient_q if keys is None else gradient_k,
            )  # fmt: skip
        ctx.save_for_backward(gradient_q, gradient_k)
        ctx.dtypes = queries.dtype, None if keys is None else keys.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_second_derivative()
        of_q, of_k = (
            None if gradient is None else (grad * gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_q, of_k, None, None


def _loss_and_gradients(
    queries: Tensor,
    keys: Tensor,
    pairs: Pairs,
    temperature: float,
    gradient_q: Tensor | None,
    gradient_k: Tensor | None,
) -> Tensor:
    """The loss; gradients are written where there is a tensor of zeros for them, the same one if queries are keys."""
    total, counted = queries.new_zeros(()), queries.new_zeros(())
    # Logits to the base of 2: torch's exp takes fifty times as long where it underflows, as at a low temperature, its
    # exp2 does not. It is the queries that are scaled, which are few, rather than the similarities.
    scaled = queries * (LOG2_E / temperature)
    block = max(1, min(len(queries), BLOCK_ELEMENTS // max(1, len(keys))))
    held = queries.new_empty(block, len(keys))  # every block's: fresh pages would cost as much as the exponential
    for start in range(0, len(queries) if len(keys) else 0, block):
        rows = slice(start, start + block)
        own = queries[rows]
        positives, ignored = _rows_of(pairs, rows, len(own), len(keys))
        logits = torch.mm(scaled[rows], keys.T, out=held[: len(own)])
        pull = _Column(positives, ignored) if positives.ndim == 1 else _Weights(positives, ignored)
        attraction = pull.attraction(logits)
        if ignored is not None:
            _leave_out(logits, ignored)
        # A row without candidates has -inf as its largest logit, and must not bring NaN along.
        largest = logits.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
        candidates = logits.sub_(largest).exp2_().sum(dim=1, keepdim=True)
        total += torch.where(pull.has, candidates.log2().add_(largest).sub_(attraction), 0.0).sum()
        counted += pull.has.sum()
        if gradient_q is None and gradient_k is None:
            continue
        push = logits.mul_(torch.where(pull.has, 1.0 / candidates, 0.0))
        pull.subtract_from(push)
        if gradient_q is not None:
            gradient_q[rows].addmm_(push, keys)
        if gradient_k is not None:
            gradient_k.addmm_(push.T, own)
    scale = 1.0 / counted.clamp_min(1.0)
    for gradient in (gradient_q, None if gradient_k is gradient_q else gradient_k):
        if gradient is not None:
            gradient.mul_(scale / temperature)
    return total * (scale / LOG2_E)


class _Column:
    """The positives of a block of R queries, one each: ``has`` (R, 1) tells where it is not ignored as well."""

    def __init__(self, positives: Tensor, ignored: Tensor | None) -> None:
        self.column = positives[:, None]
        if ignored is None:
            self.has = torch.ones_like(self.column, dtype=torch.bool)
        elif ignored.ndim == 1:
            self.has = self.column != ignored[:, None]
        else:
            self.has = ~ignored.gather(1, self.column)

    def attraction(self, logits: Tensor) -> Tensor:
        """The logit of each positive, (R, 1)."""
        return logits.gather(1, self.column)

    def subtract_from(self, push: Tensor) -> None:
        """Turn the candidates' shares (R, K) into the gradient of the loss by the logits, in place."""
        push.scatter_(1, self.column, push.gather(1, self.column) - self.has.float())


class _Weights:
    """The same, with any number of positives, weighted."""

    def __init__(self, positives: Tensor, ignored: Tensor | None) -> None:
        self.weights = positives.float()
        if ignored is not None and ignored.ndim == 1:
            self.weights = self.weights.scatter(1, ignored[:, None], 0.0)
        elif ignored is not None:
            self.weights = self.weights.masked_fill(ignored, 0.0)
        mass = self.weights.sum(dim=1, keepdim=True)
        self.has = mass > 0
        self.scale = 1.0 / mass.clamp_min(torch.finfo(torch.float32).tiny)

    def attraction(self, logits: Tensor) -> Tensor:
        """The weighted mean of the positives' logits, (R, 1)."""
        return torch.linalg.vecdot(self.weights, logits)[:, None] * self.scale

    def subtract_from(self, push: Tensor) -> None:
        """Turn the candidates' shares (R, K) into the gradient of the loss by the logits, in place."""
        push.addcmul_(self.weights, self.scale, value=-1.0)


def _leave_out(logits: Tensor, ignored: Tensor) -> None:
    if ignored.ndim == 1:
        logits.scatter_(1, ignored[:, None], -torch.inf)
    else:
        logits.masked_fill_(ignored, -torch.inf)


def _rows_of(pairs: Pairs, rows: slice, count: int, keys: int) -> Table:
    if callable(pairs):
        table = pairs(rows)
        _check_table(table, count, keys, " of this block")
        return table
    positives, ignored = pairs
    return positives[rows], None if ignored is None else ignored[rows]


def _check_table(table: Table, rows: int, keys: int, where: str = "") -> None:
    positives, ignored = table
    fits = positives.shape == (rows, keys) or (positives.shape == (rows,) and positives.dtype == torch.int64)
    if fits and ignored is not None:
        whole, column = ignored.dtype == torch.bool, ignored.dtype == torch.int64
        fits = (whole and ignored.shape == (rows, keys)) or (column and ignored.shape == (rows,))
    if not fits:
        got = "None" if ignored is None else f"{tuple(ignored.shape)} of {ignored.dtype}"
        raise ConfigError(
            "The table of pairs does not fit the embeddings.",
            got=f"positives {tuple(positives.shape)} of {positives.dtype}, ignored {got}",
            wanted=f"({rows}, {keys}){where}, weights and bool; or ({rows},) columns of int64; or nothing ignored",
            fix="Give a row for each query and a column for each key.",
        )


def check_temperature(temperature: float) -> None:
    """Raise :class:`ConfigError` unless ``temperature`` is a finite number > 0."""
    if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise ConfigError(
            "The temperature is unusable.", got=temperature, wanted="a number > 0", fix="For example temperature: 0.1."
        )


def refuse_second_derivative() -> None:
    """Raise :class:`ConfigError` in a backward pass with ``create_graph=True``: the result would silently be 0."""
    if torch.is_grad_enabled():
        raise ConfigError(
            "InfoNCE can be differentiated once.",
            got="a backward pass with create_graph=True",
            wanted="one without",
            fix="Leave create_graph out, or build the gradient penalty on another loss.",
        )
