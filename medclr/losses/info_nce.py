"""InfoNCE over weighted pairs, and NT-Xent as its simplest call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medclr.errors import ConfigError

Pairs = tuple[Tensor, Tensor] | Callable[[slice], tuple[Tensor, Tensor]]
BLOCK_ELEMENTS = 2**22
"""Similarities held at a time: 16 MB in fp32, a few times that with what is derived from them."""


def info_nce(queries: Tensor, keys: Tensor, pairs: Pairs, temperature: float = 0.1) -> Tensor:
    r"""Contrastive cross-entropy of each query over its keys, with soft positives and ignored pairs.

    .. math:: \ell_i = -\sum_{j \in P_i} w_{ij} \log
              \frac{\exp(q_i \cdot k_j / \tau)}{\sum_{j \notin I_i} \exp(q_i \cdot k_j / \tau)},
              \qquad \sum_j w_{ij} = 1,

    averaged over the queries that have a positive. InfoNCE: arXiv:1807.03748; with one positive a query it is NT-Xent
    (arXiv:2002.05709) and MoCo's loss (arXiv:1911.05722), with several the outer supervised loss of arXiv:2004.11362,
    with a kernel's weights the y-aware loss of arXiv:2106.08808.

    Computed in fp32 whatever the input and autocast, by log-sum-exp, in blocks of queries; the gradient is computed in
    the forward pass, so that memory does not grow with B x K. Differentiable once.

    Args:
        queries: (B, D), normalised by the caller.
        keys: (K, D), normalised by the caller.
        pairs: positives (B, K), weights >= 0 whose scale within a row does not matter, and ignored (B, K), bool; or a
            callable that gives both for a slice of query rows. A pair that is positive and ignored is ignored.
        temperature: > 0.

    Returns:
        The loss, a scalar; 0 if no query has a positive.

    Raises:
        ConfigError: for a temperature that is not > 0, or shapes that do not fit; and in a backward pass that is to be
            differentiated again.
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
        positives, ignored = pairs
        if positives.shape != ignored.shape or positives.shape != (len(queries), len(keys)):
            raise ConfigError(
                "The table of pairs does not fit the embeddings.",
                got=f"positives {tuple(positives.shape)}, ignored {tuple(ignored.shape)}",
                wanted=f"({len(queries)}, {len(keys)})",
                fix="Give a row for each query and a column for each key.",
            )
    loss: Tensor = _InfoNCE.apply(queries, keys, pairs, float(temperature))  # type: ignore[no-untyped-call]
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, pairs: Pairs, temperature: float) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            loss, gradient_q, gradient_k = _loss_and_gradients(
                queries.detach().float(), keys.detach().float(), pairs, temperature,
                any(ctx.needs_input_grad[:2]),
            )  # fmt: skip
        ctx.save_for_backward(gradient_q, gradient_k)
        ctx.dtypes = queries.dtype, keys.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # a second derivative would silently be 0
            raise ConfigError(
                "InfoNCE can be differentiated once.",
                got="a backward pass with create_graph=True",
                wanted="one without",
                fix="Leave create_graph out, or build the gradient penalty on another loss.",
            )
        gradient_q, gradient_k = ctx.saved_tensors
        return (grad * gradient_q).to(ctx.dtypes[0]), (grad * gradient_k).to(ctx.dtypes[1]), None, None


def _loss_and_gradients(
    queries: Tensor, keys: Tensor, pairs: Pairs, temperature: float, needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    table = pairs if callable(pairs) else lambda rows: (pairs[0][rows], pairs[1][rows])
    gradient_q, gradient_k = torch.zeros_like(queries), torch.zeros_like(keys)
    total, counted = queries.new_zeros(()), queries.new_zeros(())
    block = max(1, BLOCK_ELEMENTS // max(1, len(keys)))
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        positives, ignored = table(rows)
        if not positives.shape == ignored.shape == (len(queries[rows]), len(keys)):
            raise ConfigError(
                "A block of pairs does not fit the embeddings.",
                got=f"positives {tuple(positives.shape)}, ignored {tuple(ignored.shape)}",
                wanted=f"({len(queries[rows])}, {len(keys)})",
                fix="Give a row for each query of the slice and a column for each key.",
            )
        weights = positives.float().masked_fill(ignored, 0.0)
        mass = weights.sum(dim=1, keepdim=True)
        has = mass > 0
        weights = weights / mass.clamp_min(torch.finfo(torch.float32).tiny)
        logits = (queries[rows] @ keys.T).mul_(1.0 / temperature)
        attraction = (weights * logits).sum(dim=1, keepdim=True)
        logits.masked_fill_(ignored, -torch.inf)
        # A row with a positive has at least one finite logit; the others are left out, and must not bring NaN along.
        evidence = torch.where(has, torch.logsumexp(logits, dim=1, keepdim=True), torch.zeros_like(mass))
        total += torch.where(has, evidence - attraction, 0.0).sum()
        counted += has.sum()
        if needed:
            share = logits.sub_(evidence).exp_().sub_(weights).masked_fill_(~has, 0.0)
            gradient_q[rows] = share @ keys
            gradient_k += share.T @ queries[rows]
    scale = 1.0 / counted.clamp_min(1.0)
    return total * scale, gradient_q.mul_(scale / temperature), gradient_k.mul_(scale / temperature)


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy of SimCLR (arXiv:2002.05709).

    Args:
        temperature: > 0.

    Example:
        >>> loss = NTXentLoss(0.1)(torch.randn(32, 128), torch.randn(32, 128))
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, z_1: Tensor, z_2: Tensor) -> Tensor:
        """Loss of N pairs: ``z_1`` and ``z_2`` are (N, D), row i of one and of the other a positive pair."""
        if z_1.shape != z_2.shape or z_1.ndim != 2 or not len(z_1):
            raise ConfigError(
                "The two views do not match.",
                got=f"{tuple(z_1.shape)} and {tuple(z_2.shape)}",
                wanted="two tensors of one shape (N, D), N >= 1",
                fix="Give row i of both to one sample.",
            )
        z = normalize(torch.cat([z_1, z_2]).float(), dim=1)
        number = torch.arange(len(z), device=z.device)
        partner = (number + len(z_1)) % len(z)

        def pairs(rows: slice) -> tuple[Tensor, Tensor]:
            return partner[rows, None] == number, number[rows, None] == number

        return info_nce(z, z, pairs, self.temperature)


def check_temperature(temperature: float) -> None:
    """Raise :class:`ConfigError` unless ``temperature`` is a finite number > 0."""
    if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise ConfigError(
            "The temperature is unusable.", got=temperature, wanted="a number > 0", fix="For example temperature: 0.1."
        )
