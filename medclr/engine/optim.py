"""Parameter groups, what is decayed and what is not; and LARS, which neither torch nor MONAI has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from medclr.errors import ConfigError


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights decay, norms and biases do not.

    The usual exemption of contrastive pretraining (arXiv:2002.05709, appendix B.9; arXiv:2104.02057): every parameter
    of fewer than two dimensions is exempt. Parameters that need no gradient are left out.

    Args:
        network: whose parameters.
        weight_decay: >= 0, of the weights.

    Raises:
        ConfigError: for another ``weight_decay``, which torch checks for a whole optimizer, not for a group.

    Example:
        >>> optimizer = torch.optim.AdamW(decay_groups(method, 1e-2), lr=1e-3)  # doctest: +SKIP
    """
    if not 0 <= weight_decay < math.inf:
        raise ConfigError(
            "The weight decay is unusable.", got=weight_decay, wanted="a number >= 0", fix="Set weight_decay: 0.0001."
        )
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


class LARS(Optimizer):
    r"""SGD with momentum whose step follows the norm of each weight, for very large batches (arXiv:1708.03888).

    .. math:: u = g + \beta w, \qquad v \leftarrow \mu v + \eta \, \frac{\|w\|}{\|u\|} \, u, \qquad
              w \leftarrow w - \lambda v,

    the ratio being left out where a norm is 0. Norms and biases, all of fewer than two dimensions, are neither adapted
    nor decayed, as SimCLR (arXiv:2002.05709, appendix B.9), BYOL (arXiv:2006.07733) and MoCo v3 (arXiv:2104.02057) use
    it. The learning rate stands outside the momentum, so that a schedule acts at once.

    Args:
        params: parameters, or groups such as those of :func:`decay_groups`.
        lr: lambda; its scale differs from that of other optimizers. BYOL: 0.2 x batch size / 256.
        momentum: mu, 0 to below 1.
        weight_decay: beta, of the weights.
        trust: eta, which turns the ratio of norms into a step.

    Raises:
        ConfigError: for a setting out of range.

    Example:
        >>> optimizer = LARS(decay_groups(method, 1e-6), lr=0.2)  # doctest: +SKIP
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        if not (0 <= lr < math.inf and 0 <= momentum < 1 and 0 <= weight_decay < math.inf and 0 < trust < math.inf):
            raise ConfigError(
                "The optimizer LARS is unusable.",
                got=", ".join(f"{name} {value}" for name, value in settings.items()),
                wanted="lr and weight_decay >= 0, momentum from 0 to below 1, trust > 0",
                fix="For example lr: 0.2, momentum: 0.9, trust: 0.001.",
            )
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; what ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if parameter.ndim >= 2:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            length, steepness = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            usable = (length > 0) & (steepness > 0)
            gradient = gradient * torch.where(usable, group["trust"] * length / steepness, 1.0)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])
