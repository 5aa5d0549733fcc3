from __future__ import annotations

import pytest
import torch
from rich.console import Console

from medclr.weights.coverage import Coverage, Mismatch, compare, first_few


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def coverage() -> Coverage:
    required = tensors(conv__weight=(2, 1), conv__bias=(2,), layer__weight=(3, 2), layer__bias=(3,))
    found = tensors(conv__weight=(2, 1), conv__bias=(5,), layer__weight=(3, 2), layer__extra=(1,), decoder__weight=(9,))
    return compare(found, required, ("conv", "layer"), "weights.pt", "SegResNet")


def test_every_tensor_is_counted_once() -> None:
    result = coverage()
    assert result.matched == ("conv.weight", "layer.weight")
    assert result.missing == ("layer.bias",)
    assert result.mismatched == (Mismatch("conv.bias", "float (5,)", "float (2,)"),)
    assert result.unexpected == ("layer.extra",)
    assert result.ignored == ("decoder.weight",)
    assert result.required == 4
    assert result.fraction == 0.5
    assert not result.complete


def test_left_over_tensors_of_an_encoder_are_not_complete_and_those_of_a_decoder_are() -> None:
    required = tensors(conv__weight=(2,))
    assert compare(tensors(conv__weight=(2,), up__weight=(2,)), required, ("conv",), "", "").complete
    assert not compare(tensors(conv__weight=(2,), conv__more=(2,)), required, ("conv",), "", "").complete


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float16, True), (torch.float64, True), (torch.int8, False)])
def test_precision_may_differ_but_not_the_kind_of_number(dtype: torch.dtype, fits: bool) -> None:
    result = compare({"a.b": torch.zeros(2, dtype=dtype)}, tensors(a__b=(2,)), ("a",), "", "")
    assert result.complete is fits


def test_the_table_says_all_counts_and_the_first_names() -> None:
    result = coverage().with_check("not run: a test")
    text = str(result)
    for part in (
        "weights.pt into SegResNet",
        "50.0%",
        "layer.bias",
        "wanted float (2,)",
        "layer.extra",
        "not run: a test",
    ):
        assert part in text
    console = Console(width=120, record=True, quiet=True)
    console.print(result.table())
    rows = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if line.count("│") == 4
    }
    assert rows | {"features": ""} == {
        "matched": "2",
        "missing": "1",
        "mismatched": "1",
        "unexpected": "1",
        "ignored": "1",
        "features": "",
    }


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    result = compare(tensors(), {"a[bold].weight": torch.zeros(1)}, ("a",), "[red]file.pt", "Net")
    assert "a[bold].weight" in str(result)
    assert "[red]file.pt" in str(result)


def test_long_lists_are_cut() -> None:
    assert first_few(range(5)) == "0, 1, 2 and 2 more"
    assert first_few(range(2)) == "0, 1"
    assert first_few([]) == ""
