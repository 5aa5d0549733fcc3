"""Coverage: which parameters of a target's encoder a weights file fills."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

SHOWN = 3
"""How many names a row of the table shows."""


class Mismatch(NamedTuple):
    """A tensor that has the right name and the wrong shape or kind."""

    name: str
    got: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.name}: {self.got}, wanted {self.wanted}"


@dataclass(frozen=True)
class Coverage:
    """What loading did, or would have done. Names are those of the encoder, without the prefix of a wrapper.

    ``str(coverage)`` is the table as text.
    """

    source: str
    """Name of the file."""
    target: str
    """Class of the network loaded into."""
    matched: tuple[str, ...]
    """Parameters and buffers of the target's encoder that the file fills."""
    missing: tuple[str, ...]
    """Those that it does not have."""
    mismatched: tuple[Mismatch, ...]
    """Those that it has in another shape or kind."""
    unexpected: tuple[str, ...]
    """Tensors of the file that belong to an encoder, but not to this one."""
    ignored: tuple[str, ...]
    """Tensors of the file that belong to something else, such as a decoder."""
    checked: str = "not run: the weights were refused before"
    """Outcome of the comparison of features, or why there was none."""

    @property
    def required(self) -> int:
        """How many parameters and buffers the target's encoder has."""
        return len(self.matched) + len(self.missing) + len(self.mismatched)

    @property
    def fraction(self) -> float:
        """Matched / required, in [0, 1]."""
        return len(self.matched) / self.required

    @property
    def complete(self) -> bool:
        """Whether the file fills all of the target's encoder and has nothing of another encoder left over."""
        return not (self.missing or self.mismatched or self.unexpected)

    def with_check(self, checked: str) -> Coverage:
        """The same with the outcome of the comparison of features."""
        return replace(self, checked=checked)

    def table(self) -> Table:
        """A summary as a rich table."""
        table = Table(title=Text(f"{self.source} into {self.target}: {self.fraction:.1%} of the encoder"))
        table.add_column("tensors")
        table.add_column("count", justify="right")
        table.add_column("first")
        rows: list[tuple[str, Collection[object]]] = [
            ("matched", self.matched),
            ("missing", self.missing),
            ("mismatched", self.mismatched),
            ("unexpected", self.unexpected),
            ("ignored", self.ignored),
        ]
        for name, entries in rows:
            table.add_row(name, str(len(entries)), Text(first_few(entries) if name != "matched" else ""))
        table.add_row("features", "", Text(self.checked))
        return table

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def compare(
    found: Mapping[str, Tensor], required: Mapping[str, Tensor], prefixes: Collection[str], source: str, target: str
) -> Coverage:
    """Compare a file's tensors with the parameters and buffers of a target's encoder, by name, shape and kind.

    Args:
        found: the file's tensors.
        required: the encoder's state dict.
        prefixes: names of the modules that make up an encoder of this architecture.
        source: what to call the file.
        target: what to call the network.
    """
    matched, missing, mismatched = [], [], []
    for name, tensor in required.items():
        if name not in found:
            missing.append(name)
        elif (got := _kind(found[name])) != (wanted := _kind(tensor)):
            mismatched.append(Mismatch(name, got, wanted))
        else:
            matched.append(name)
    rest = [name for name in found if name not in required]
    unexpected = [name for name in rest if name.split(".")[0] in prefixes]
    ignored = [name for name in rest if name.split(".")[0] not in prefixes]
    return Coverage(
        source, target, tuple(matched), tuple(missing), tuple(mismatched), tuple(unexpected), tuple(ignored)
    )


def first_few(entries: Collection[object]) -> str:
    """The first entries as text, and how many more there are."""
    shown = [str(entry) for entry in list(entries)[:SHOWN]]
    more = len(entries) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _kind(tensor: Tensor) -> str:
    number = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{number} {tuple(tensor.shape)}"
