from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from medclr.weights.digest import DIGEST, TENSORS_DIGEST, damaged_part, digest, seal

KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def of(*values: Tensor) -> str:
    return digest({str(number): value for number, value in enumerate(values)}, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)])
def test_tensors_of_any_kind_and_shape_have_a_digest_that_follows_their_values(
    kind: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.ones(shape).to(kind)
    assert of(tensor) == of(tensor.clone())
    assert len(of(tensor)) == 64
    if tensor.numel():
        other = tensor.clone()
        other.view(-1)[-1] = 0
        assert of(other) != of(tensor)


def test_kinds_shapes_names_and_values_count() -> None:
    tensor = torch.arange(6.0)
    digests = [
        digest({}, None),
        digest({}, {}),
        digest({"a": tensor}, None),
        digest({"a": tensor}, {"a": 1}),
        digest({"b": tensor}, None),
        digest({"a": tensor.reshape(2, 3)}, None),
        digest({"a": tensor.reshape(3, 2)}, None),
        digest({"a": tensor.view(torch.int32)}, None),
        digest({"a": tensor.view(torch.uint8)}, None),
        digest({"a": tensor[:3], "b": tensor[3:]}, None),
        digest({"a": tensor[:4], "b": tensor[4:]}, None),
        digest({"a": -tensor}, None),
        digest({"a": torch.zeros(0)}, None),
        digest({"a": torch.zeros(0, 3)}, None),
        digest({"a": torch.tensor(0.0)}, None),
        digest({"a": torch.tensor(-0.0)}, None),
        digest({}, {"a": 1.0}),
        digest({}, {"a": 1}),
        digest({}, {"a": True}),
        digest({}, {"a": "1"}),
        digest({}, {"a": [1]}),
    ]
    assert len(set(digests)) == len(digests)


def test_order_strides_and_gradients_do_not_count() -> None:
    tensor = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    strided = torch.empty(5, 4, 3).permute(2, 1, 0).copy_(tensor)
    assert not strided.is_contiguous()
    first = digest({"a": tensor, "b": torch.ones(1)}, {"x": 1, "y": [1.5, None]})
    assert digest({"b": torch.ones(1), "a": strided.requires_grad_()}, {"y": (1.5, None), "x": 1}) == first


def test_the_digest_stays_what_it_is() -> None:
    """Files that were written before must stay readable."""
    tensors = {"b": torch.arange(3.0), "a": torch.tensor([1, 0], dtype=torch.bool)}
    assert digest(tensors, {"steps": 3, "name": "ä"}) == (
        "c9b17687bcbd9b51f69db0581e5b1ea1153af97d65b9d63cccba5a3fa8080cba"
    )


def test_a_seal_tells_a_changed_header_from_changed_tensors() -> None:
    tensors = {"a": torch.arange(3.0)}
    sealed = json.loads(json.dumps(seal({"steps": 3, "rates": (0.1, 1e-300)}, tensors)))
    assert damaged_part(sealed, tensors) is None
    assert damaged_part(sealed, None) is None
    assert damaged_part(sealed, {"a": torch.arange(3.0) + 1}) == "tensors"
    assert damaged_part(sealed, {}) == "tensors"
    for change in ({"steps": 4}, {"new": 1}, {TENSORS_DIGEST: "0" * 64}, {DIGEST: "0" * 64}, {DIGEST: None}):
        assert damaged_part({**sealed, **change}, tensors) == "header"
        assert damaged_part({**sealed, **change}, None) == "header"
