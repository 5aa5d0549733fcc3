"""What compare_methods.py found, as tables: means over seeds, intervals over patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclr.engine.metrics import bootstrap_interval

Result = dict[str, Any]
BASELINES = ("fingerprint", "quantisation step of the file", "untrained")


def tables(results: Sequence[Result]) -> str:
    """Markdown: the encoders, the probes, and what pairs of one patient gain over pairs of one scan."""
    names = list(dict.fromkeys(result["name"] for result in results))
    names = [*(name for name in BASELINES if name in names), *(name for name in names if name not in BASELINES)]
    found = {name: [result for result in results if result["name"] == name] for name in names}
    print_ = _by_patient(found["fingerprint"], "recall")
    lines = ["| encoder, pairs | seeds | pair recall | minus fingerprint | recall, altered | minus fingerprint |"]
    lines[0] += " effective rank | alignment | uniformity |"
    lines += ["|---" * 9 + "|"]
    print_altered = _by_patient(found["fingerprint"], "recall_altered")
    for name in names:
        own = found[name]
        recall, altered = (_by_patient(own, key) for key in ("recall", "recall_altered"))
        cells = [name, str(len(own)), _interval(recall), _interval(recall - print_)]
        cells += [_interval(altered), _interval(altered - print_altered)]
        cells += [_mean(own, key) for key in ("effective_rank", "alignment", "uniformity")]
        if name == "fingerprint":
            cells[3] = cells[5] = ""
        lines.append(f"| {' | '.join(cells)} |")
    chance = found["fingerprint"][0]["pair_recall_chance"]
    lines += [f"\n{len(print_)} held-out patients with two scans or more; chance {chance:.3f}.\n"]
    return "\n".join([*lines, *_probes(found), *_rules(found)]) + "\n"


def _probes(found: dict[str, list[Result]]) -> list[str]:
    columns = list(dict.fromkeys(name for own in found.values() for result in own for name in result["probes"]))
    lines = [f"| encoder, pairs | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, own in found.items():
        if own[0]["probes"]:
            values = [[result["probes"][column] for result in own] for column in columns]
            lines.append(f"| {name} | {' | '.join(f'{np.mean(value):.2f}' for value in values)} |")
    return [*lines, ""]


def _rules(found: dict[str, list[Result]]) -> list[str]:
    lines = ["| method | SamePatient minus SameScan, recall | the same, altered |", "|---|---|---|"]
    for name in found:
        other = name.replace("SamePatient", "SameScan")
        if other == name or other not in found:
            continue
        seeds = {result["seed"] for result in found[name]} & {result["seed"] for result in found[other]}
        if not seeds:
            continue
        pairs = [[result for result in found[part] if result["seed"] in seeds] for part in (name, other)]
        cells = [
            _interval(_by_patient(pairs[0], key) - _by_patient(pairs[1], key)) for key in ("recall", "recall_altered")
        ]
        lines.append(f"| {name.replace(', SamePatient', '')} | {' | '.join(cells)} |")
    return lines


def _by_patient(own: Sequence[Result], key: str) -> NDArray[np.float64]:
    """Mean over seeds of each patient's recall."""
    return np.mean([result[key] for result in own], axis=0)


def _interval(values: NDArray[np.float64]) -> str:
    low, high = bootstrap_interval(values)
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def _mean(own: Sequence[Result], key: str) -> str:
    values = [result[key] for result in own if key in result]
    return f"{np.mean(values):.3g}" if values else ""
