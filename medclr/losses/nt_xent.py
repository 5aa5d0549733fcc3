"""NT-Xent, InfoNCE's simplest call, with a shorter way for a batch whose similarities fit the cache."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from medclr.errors import ConfigError
from medclr.losses.info_nce import LOG2_E, check_temperature, info_nce, refuse_second_derivative

LARGEST_TABLE: Final = 2**21
"""Similarities that are held at once, 8 MB in fp32; of larger batches they are taken in blocks."""
LEAST_TEMPERATURE: Final = 0.02
"""exp(1 / 0.02) is 5e21: sums and their inverses stay far inside fp32, and need no largest logit taken out."""


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy of SimCLR (arXiv:2002.05709).

    The loss of :func:`~medclr.losses.info_nce` whose queries are the keys, each ignoring itself, computed in the same
    way: in fp32, with the gradient in the forward pass, differentiable once.

    Args:
        temperature: > 0.

    Raises:
        ConfigError: for a temperature that is not > 0.

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
        both = torch.cat([z_1, z_2])
        if len(both) ** 2 <= LARGEST_TABLE and self.temperature >= LEAST_TEMPERATURE:
            loss: Tensor = _WholeTable.apply(both, self.temperature)  # type: ignore[no-untyped-call]
            return loss
        z = normalize(both.float(), dim=1)
        itself = torch.arange(len(z), device=z.device)
        return info_nce(z, z, (itself.roll(len(z_1)), itself), self.temperature)


class _WholeTable(torch.autograd.Function):
    """NT-Xent of both views (2N, D) that follow each other.

    Similarities are symmetric, and so are the exponentials where no row's largest is taken out. The gradient by row i
    is then one product with a symmetric table, e_ij / Z_i + e_ij / Z_j, instead of one for i as the query and one for
    i as the key. It goes through the normalisation here as well, in fewer steps than autograd's.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor, temperature: float) -> Tensor:
        with torch.autocast(both.device.type, enabled=False):
            loss, gradient = _loss_and_gradient(both.detach().float(), temperature, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.dtype = both.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (grad * gradient).to(ctx.dtype), None


def _loss_and_gradient(both: Tensor, temperature: float, needed: bool) -> tuple[Tensor, Tensor | None]:
    count, pairs = len(both), len(both) // 2
    length = torch.linalg.vector_norm(both, dim=1, keepdim=True).clamp_min_(1e-12)  # torch's normalize does the same
    unit = both / length
    attraction = 2 * (unit[:pairs] * unit[pairs:]).sum() / temperature
    table = torch.mm(unit * (LOG2_E / temperature), unit.T).exp2_().fill_diagonal_(0.0)
    candidates = table.sum(dim=1, keepdim=True)
    loss = (candidates.log().sum() - attraction) / count
    if not needed:
        return loss, None
    inverse = candidates.reciprocal_()
    table.mul_(inverse + inverse.T)
    for offset in (pairs, -pairs):  # where the partners are, each as the other's key and as its query
        table.diagonal(offset).sub_(2.0)
    by_unit = torch.mm(table, unit)
    along = (by_unit * unit).sum(dim=1, keepdim=True)
    return loss, by_unit.addcmul_(unit, along, value=-1.0).div_(length * (count * temperature))
