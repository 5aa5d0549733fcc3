from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from medclr.engine import autocast, default_precision
from medclr.errors import ConfigError


def product() -> torch.Tensor:
    return torch.full((2, 2), 1.01) @ torch.full((2, 2), 1.01)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_each_precision_computes_in_its_format_on_the_cpu_without_a_warning(
    device: Any, precision: Any, dtype: torch.dtype
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context = autocast(device, precision)
        for _ in range(2):  # a context is entered again and again
            with context:
                assert product().dtype == dtype
            assert product().dtype == torch.float32


def test_fp32_changes_nothing() -> None:
    with autocast("cpu", "fp32"):
        inside = product()
        assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(inside, product())


@pytest.mark.parametrize("precision", ["int8", "FP16", "", None, 16])
def test_an_unknown_precision_is_refused_with_those_that_are_known(precision: Any) -> None:
    with pytest.raises(ConfigError, match="precision") as caught:
        autocast("cpu", precision)
    assert caught.value.got == precision
    assert caught.value.wanted == "fp32, bf16, fp16"


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_cuda_computes_in_bf16_from_ampere_on(
    device: Any, capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert default_precision(device) == precision
    assert asked == [device]


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16"), (False, "fp32")])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_cpu_computes_in_bf16_where_it_multiplies_it(
    device: Any, supported: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert default_precision(device) == precision


def test_the_default_of_this_machine_is_one_that_works() -> None:
    with autocast("cpu", default_precision("cpu")):
        assert bool(product().isfinite().all())
