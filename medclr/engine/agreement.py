"""What all ranks must have in common, since a rank that differs would wait for ever or train something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from medclr import distributed
from medclr.draws import stable_seed
from medclr.errors import ConfigError


def refuse_other_configurations(configuration: Mapping[str, Any], datalist_digest: str | None = None) -> None:
    """Raise on all ranks where the configuration or the datalist of one differs from that of the first.

    Args:
        configuration: of this rank's run, by top-level key.
        datalist_digest: of this rank's datalist.

    Raises:
        ConfigError: naming the keys; values may be paths, and stay where they are.
    """
    if not distributed.is_distributed():
        return
    content = {**configuration, "the rows of the datalist": datalist_digest}
    names = sorted(content)
    _refuse({"the keys": stable_seed(*names)}, "settings", shown=False)
    _refuse({name: stable_seed(_text(content[name])) for name in names}, "settings", shown=False)


def refuse_other_batches(samples: int) -> None:
    """Raise on all ranks where their batches differ in size: embeddings could not be gathered.

    Args:
        samples: in this rank's batch.

    Raises:
        ConfigError: with the sizes.
    """
    _refuse({"batch_size": samples}, "batches", shown=True)


def _refuse(values: Mapping[str, int], what: str, *, shown: bool) -> None:
    if not distributed.is_distributed():
        return
    device = distributed.collective_device()
    own = torch.tensor([list(values.values())], dtype=torch.int64, device=device)
    table = distributed.gather(own)
    differs = (table != table[0]).any(dim=0).tolist()
    names = [name for name, other in zip(values, differs, strict=True) if other]
    if not names:
        return
    ranks = [str(rank) for rank, row in enumerate(table) if bool((row != table[0]).any())]
    got = f"{', '.join(names[:10])} of rank {', '.join(ranks)} other than of rank 0"
    if shown:
        columns = zip(values, table.T.tolist(), strict=True)
        got = "; ".join(f"{name} {', '.join(map(str, column))}" for name, column in columns)
    raise ConfigError(
        f"The ranks disagree in their {what}.",
        got=got,
        wanted="the same on every rank",
        fix="Start all ranks with one command, one version of the files and one datalist, and with drop_last.",
    )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
