"""What a folder holds, in numbers, and as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from medclr import keys
from medclr.data.index_store import Store

_SHOWN = 8


def summarise(store: Store) -> dict[str, Any]:
    """Counts and ranges of the scans, as described at :func:`medclr.data.index.index`."""
    database = store.database
    scans: dict[str, int] = dict(database.execute("SELECT patient, COUNT(*) FROM scans GROUP BY patient"))
    columns = {name: Counter[str]() for name in (keys.MODALITY, keys.SEQUENCE, keys.SCANNER)}
    dtypes, spacings = Counter[str](), Counter[str]()
    low: dict[str, list[float]] = {}
    high: dict[str, list[float]] = {}
    for cells, grid in database.execute("SELECT cells, grid FROM scans"):
        row = json.loads(cells)
        for name, counts in columns.items():
            if row.get(name) not in (None, ""):
                counts[str(row[name])] += 1
        spacing, shape, dtype = json.loads(grid)
        if dtype:
            dtypes[dtype] += 1
        spacings[" x ".join(f"{length:.2g}" for length in spacing)] += 1
        for what, values in (("spacing", spacing), ("shape", shape)):
            low[what] = [min(pair) for pair in zip(low.get(what, values), values, strict=True)]
            high[what] = [max(pair) for pair in zip(high.get(what, values), values, strict=True)]
    return {
        "patients": len(scans),
        "studies": store.number("SELECT COUNT(*) FROM (SELECT DISTINCT patient, study FROM scans WHERE study != '')"),
        "series": store.number("SELECT COUNT(*) FROM (SELECT DISTINCT patient, series FROM scans WHERE series != '')"),
        "scans": sum(scans.values()),
        "labelled": store.number("SELECT COUNT(label) FROM scans"),
        "scans_per_patient": dict(sorted(Counter(scans.values()).items())),
        "modalities": dict(columns[keys.MODALITY].most_common()),
        "sequences": dict(columns[keys.SEQUENCE].most_common()),
        "scanners": dict(columns[keys.SCANNER].most_common()),
        "spacings": dict(spacings.most_common()),
        "spacing_mm": [[round(length, 4) for length in lengths[key]] for lengths in (low, high) for key in ["spacing"]],
        "shape": [lengths["shape"] for lengths in (low, high)],
        "dtypes": dict(dtypes.most_common()),
    }


def summarise_files(store: Store) -> dict[str, Any]:
    """What became of the files."""
    reasons = """
        SELECT problem, COUNT(*) FROM (
            SELECT path, problem FROM refusals UNION ALL
            SELECT path, problem FROM files WHERE problem IS NOT NULL AND kind IN ('dicom', 'refused')
            AND path NOT IN (SELECT path FROM refusals) AND path NOT IN (SELECT path FROM left_out))
        GROUP BY problem ORDER BY COUNT(*) DESC, problem"""
    return {
        "quarantined": dict(store.database.execute(reasons).fetchall()),
        "dicom_files": store.number("SELECT COUNT(*) FROM files WHERE kind = 'dicom'"),
        "dicom_series": store.number("SELECT COUNT(DISTINCT series) FROM files WHERE kind = 'dicom'"),
        "volume_files": store.number("SELECT COUNT(*) FROM files WHERE kind = 'volume'"),
        "other_files": store.number("SELECT COUNT(*) FROM files WHERE kind = 'other'"),
        "left_out": store.number("SELECT COUNT(*) FROM left_out"),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Show a summary on stdout."""
    table = Table("what", "how many", title="Index")
    low, high = summary["spacing_mm"]
    smallest, largest = summary["shape"]
    texts = {
        "patients": summary["patients"],
        "studies": summary["studies"],
        "series": summary["series"],
        "scans": summary["scans"],
        "labelled scans": summary["labelled"],
        "scans a patient": _listed(summary["scans_per_patient"], "{} patient(s) with {}"),
        "modalities": _listed(summary["modalities"], "{1}: {0}"),
        "sequences": _listed(summary["sequences"], "{1}: {0}"),
        "scanners": _listed(summary["scanners"], "{1}: {0}"),
        "spacing (mm)": f"{_times(low)} to {_times(high)}",
        "  most common": _listed(summary["spacings"], "{1}: {0}"),
        "shape": f"{_times(smallest)} to {_times(largest)}",
        "voxel types": _listed(summary["dtypes"], "{1}: {0}"),
        "files of DICOM": f"{summary['dicom_files']} in {summary['dicom_series']} series",
        "files of one volume": summary["volume_files"],
        "other files": summary["other_files"],
        "quarantined": sum(summary["quarantined"].values()),
        **{f"  {problem}": count for problem, count in summary["quarantined"].items()},
        "left out by --images": summary["left_out"],
        "table rows without a scan": summary["unused_table_rows"],
        "scans without a table row": summary["without_table_row"],
        **{f"look at: {what}": count for what, count in summary["conflicts"].items()},
    }
    hidden = ("", 0, "0 in 0 series")
    always = ("patients", "scans", "labelled scans", "quarantined", "other files")
    for what, text in texts.items():
        if what in always or text not in hidden:
            table.add_row(what, str(text))
    Console().print(table)


def _listed(counts: dict[Any, int], form: str) -> str:
    shown = [form.format(count, key) for key, count in list(counts.items())[:_SHOWN]]
    return ", ".join(shown) + (f", and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")


def _times(values: Iterable[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
