"""The momentum copy: a network that follows another's weights slowly, BYOL's target and MoCo's key encoder."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from medclr.errors import ConfigError


class MomentumCopy(nn.Module):
    r"""A copy of a network without gradients, which moves towards it once an optimizer step.

    .. math:: \xi \leftarrow m \, \xi + (1 - m) \, \theta, \qquad
              m = 1 - (1 - m_0) \, \frac{\cos(\pi \, \mathrm{progress}) + 1}{2},

    for the copy :math:`\xi` of the weights :math:`\theta`: BYOL's schedule (arXiv:2006.07733, section 3.3), and that of
    MoCo v3 (arXiv:2104.02057); a constant m is MoCo's (arXiv:1911.05722). Running statistics are copied as they are.

    The copy is in the state dict, the network that it follows is not a part of it. Dropout and norms work as in that
    network: in training while it trains.

    Args:
        network: what is copied and followed.
        momentum: m at the beginning, 0 to 1; 1 never moves.
        cosine: let m grow to 1 over the run; else it is constant.

    Raises:
        ConfigError: for a momentum outside 0 to 1.
    """

    def __init__(self, network: nn.Module, momentum: float = 0.996, *, cosine: bool = True) -> None:
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
            raise ConfigError(
                "The momentum is unusable.",
                got=momentum,
                wanted="a number from 0 to 1",
                fix="For example momentum: 0.99; the nearer to 1, the slower the copy follows.",
            )
        self.momentum, self.cosine = float(momentum), cosine
        # In a tuple, so that it is no child: its weights are trained, saved and counted where they belong.
        self._followed = (network,)
        self.copy = deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """What the copy makes of the inputs, without a gradient."""
        return self.copy(*inputs)

    def momentum_at(self, progress: float) -> float:
        """m, when ``progress`` (steps done / total) of the run is done."""
        if not self.cosine:
            return self.momentum
        return 1.0 - (1.0 - self.momentum) * (math.cos(math.pi * progress) + 1.0) / 2.0

    def before_step(self, progress: float) -> None:
        """At the beginning of a run, start from the network as it is by now: weights may have been loaded into it."""
        if progress == 0:
            self.copy.load_state_dict(self._followed[0].state_dict())

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move once, after an optimizer step.

        Args:
            progress: steps done / total, this one included.
        """
        (network,) = self._followed
        get_ema_multi_avg_fn(self.momentum_at(progress))(list(self.copy.parameters()), list(network.parameters()), None)
        for mine, its in zip(self.copy.buffers(), network.buffers(), strict=True):
            mine.copy_(its)
