"""The regression of one embedding on another, without negatives: BYOL's loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from medclr.errors import ConfigError


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    r"""Squared distance of normalised predictions from normalised targets, BYOL's loss (arXiv:2006.07733, eq. 2).

    .. math:: \frac{1}{B} \sum_i \Bigl\| \frac{p_i}{\|p_i\|} - \frac{z_i}{\|z_i\|} \Bigr\|^2
              = \frac{1}{B} \sum_i \bigl( 2 - 2 \cos(p_i, z_i) \bigr)

    Computed in fp32 whatever the input and autocast. The targets are detached: no gradient reaches them. BYOL adds
    the loss of the views the other way round, which is a second call.

    Args:
        predictions: (B, D), of the online network; of any length.
        targets: (B, D), of the target network; row i is what row i of the predictions is to meet.

    Returns:
        The loss, a scalar between 0 and 4. A row of zeros counts as 2.

    Raises:
        ConfigError: for shapes that do not fit, or no row at all.
    """
    if predictions.shape != targets.shape or predictions.ndim != 2 or not predictions.numel():
        raise ConfigError(
            "Predictions and targets do not match.",
            got=f"{tuple(predictions.shape)} and {tuple(targets.shape)}",
            wanted="two tensors of one shape (B, D), B >= 1 and D >= 1",
            fix="Give row i of both to one sample.",
        )
    with torch.autocast(predictions.device.type, enabled=False):
        cosines = normalize(predictions.float(), dim=1) * normalize(targets.detach().float(), dim=1)
        return 2 - 2 * cosines.sum(dim=1).mean()
