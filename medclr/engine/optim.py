"""Parameter groups: what is decayed and what is not."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

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
