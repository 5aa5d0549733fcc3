"""NT-Xent and MoCo's loss against the values of lightly's NTXentLoss that record_lightly.py wrote down."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from medclr.losses import NTXentLoss, info_nce
from tests.losses.record_lightly import VALUES, fingerprint, inputs

RECORDED = json.loads(VALUES.read_text())


def name_of(case: dict[str, Any]) -> str:
    return f"{'queue' if case['queue'] else 'batch'}-{case['temperature']}-seed {case['seed']}"


@pytest.mark.parametrize("case", RECORDED["cases"], ids=name_of)
def test_lightlys_loss_and_gradients_agree(case: dict[str, Any]) -> None:
    drawn = inputs(case["seed"])
    assert fingerprint(drawn) == pytest.approx(case["inputs"], rel=1e-12), "NumPy draws other numbers: record again"
    z_1, z_2, queued = drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2]
    if case["queue"]:
        number = torch.arange(len(z_1))
        others = torch.zeros(len(z_1), len(z_1) + len(queued), dtype=torch.bool)
        others[:, : len(z_1)] = number[:, None] != number
        candidates = torch.cat([normalize(z_2, dim=1), queued])
        loss = info_nce(normalize(z_1, dim=1), candidates, (number, others), case["temperature"])
    else:
        loss = NTXentLoss(case["temperature"])(z_1, z_2)
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-5)
    norms = [float(gradient.norm()) for gradient in torch.autograd.grad(loss, (z_1, z_2))]
    assert norms == pytest.approx(case["gradient_norms"], rel=1e-4)


def test_the_record_says_what_made_it() -> None:
    assert all(RECORDED[name] for name in ("lightly", "torch", "numpy"))
    assert {case["queue"] for case in RECORDED["cases"]} == {False, True}
