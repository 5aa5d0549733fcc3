from __future__ import annotations

import random
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch

from medclr.engine import random_state


def draws() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),  # noqa: NPY002
        int(np.random.randint(1000)),  # noqa: NPY002
        torch.rand(3).tolist(),
        torch.randn(1).item(),
    ]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_all_generators_go_on_from_where_they_were_also_through_a_file(before: int) -> None:
    for _ in range(before):
        draws()  # a second normal number may be waiting in Python's and NumPy's generators
    file = BytesIO()
    torch.save(random_state.take(), file)
    expected = [draws() for _ in range(3)]
    file.seek(0)
    random_state.put_back(torch.load(file, weights_only=True))
    assert [draws() for _ in range(3)] == expected
