"""Whether a run and a checkpoint are of one run: their configurations, their scans, and their lengths."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from medclr import distributed
from medclr.engine.agreement import refuse_other_configurations
from medclr.engine.checkpoint import CheckpointFolder
from medclr.errors import ConfigError

logger = logging.getLogger(__name__)

MAY_CHANGE: Final = (
    *("imports", "initialize", "run", "finalize", "bundle_root", "datalist", "dataset_dir", "output_dir", "device"),
    *("num_workers", "cache_mb", "max_bad_scans", "log_interval", "val_interval", "val_metric", "save_interval"),
    *("resume", "resumable", "checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "on_collapse"),
    *("max_skipped", "data", "train::quarantine", "validate", "curves", "record"),
    *(f"train::dataloader::{name}" for name in ("num_workers", "persistent_workers", "pin_memory")),
    *(f"train::dataloader::{name}" for name in ("prefetch_factor", "timeout", "multiprocessing_context")),
    *("manifest", "settings", "checkpoint", "section", "results", "predictions", "class_names", "overlap"),
    *("last", "best", "allow_seen_patients", "record_patients"),
)
"""Keys of the bundles that decide where and how fast a run computes and what it reports, not what it computes. The
datalist is compared by its content."""
MAY_RISE: Final = ("max_epochs",)
WATCHERS: Final = (
    *("Advice", "CollapseGuard", "ContrastLog", "NonFiniteGuard", "Progress", "SaveEncoder"),
    *("ValidationHandler", "StatsHandler", "TensorBoardStatsHandler", "TensorBoardImageHandler", "CheckpointSaver"),
)
"""Handlers that look at a training and do not change it; others count as part of the configuration."""
ABSENT: Final = "(not there)"


def refuse_another_run(
    checkpoint: Mapping[str, Any], run: Mapping[str, Any], *, may_change: Sequence[str], force: bool
) -> bool:
    """Raise for a run that would go on with the checkpoint of another.

    Args:
        checkpoint: ``configuration``, ``datalist_digest``, ``epoch_length``, ``max_epochs`` and ``step`` of it.
        run: the same of the run, but for ``step``.
        may_change: see :func:`differences`.
        force: warn of what differs, and raise only where the run could not go on at all.

    Returns:
        Whether something differs.

    Raises:
        ConfigError: with all that differs.
    """
    lines = _lines(checkpoint, run, may_change)
    if lines and not force:
        raise _another_configuration(lines)
    if lines:
        logger.warning("the run goes on with another configuration:\n  %s", "\n  ".join(lines))
    if checkpoint["epoch_length"] != run["epoch_length"]:
        raise ConfigError(
            "The run cannot go on with epochs of another length.",
            got=f"{run['epoch_length']} batches an epoch",
            wanted=f"{checkpoint['epoch_length']}, as in the checkpoint",
            fix="Take the scans, the batch size and the number of ranks as they were, or set another output_dir.",
        )
    if checkpoint["step"] > run["max_epochs"] * run["epoch_length"]:
        raise ConfigError(
            "The run has gone further than it is asked to.",
            got=f"max_epochs {run['max_epochs']}, {run['epoch_length']} batches each",
            wanted=f"at least the {checkpoint['step']} steps that are done",
            fix="Raise max_epochs, or set another output_dir.",
        )
    return bool(lines)


def check_output(
    folder: str | Path,
    configuration: Mapping[str, Any],
    datalist_digest: str | None = None,
    *,
    resume: str = "auto",
    may_change: Sequence[str] = (),
) -> None:
    """Find out before any scan is read that a run could not be saved, or would go on with another run's checkpoint.

    For the second of a bundle's ``initialize``. Expressions that have no value yet are not compared; the run itself
    compares all (:class:`~medclr.engine.ResumableRun`).

    Args:
        folder: of the checkpoints.
        configuration: of the run.
        datalist_digest: of its datalist.
        resume: only ``auto`` compares.
        may_change: see :func:`differences`.

    Raises:
        ConfigError: the folder cannot be written to, or holds another run; or the ranks have not all the same.
    """
    refuse_other_configurations(configuration, datalist_digest)
    if distributed.rank() != 0:
        return
    checkpoints = CheckpointFolder(folder)
    checkpoints.refuse_unusable(0)
    about = checkpoints.newest_about() if resume == "auto" else None
    if about is None:
        return
    known = {
        name: value
        for name, value in configuration.items()
        if not (isinstance(value, str) and value.startswith(("$", "@")))
    }
    unknown = configuration.keys() - known.keys()
    before = {name: value for name, value in about["configuration"].items() if name not in unknown}
    lines = _lines(
        {**about, "configuration": before},
        {"configuration": known, "datalist_digest": datalist_digest},
        (*MAY_CHANGE, *may_change),
    )
    if lines:
        raise _another_configuration(lines)


def _lines(checkpoint: Mapping[str, Any], run: Mapping[str, Any], may_change: Sequence[str]) -> list[str]:
    lines = differences(checkpoint["configuration"], run["configuration"], may_change=may_change, may_rise=MAY_RISE)
    other = checkpoint["datalist_digest"] != run["datalist_digest"]
    return [*lines, "the datalist: other rows"] if other else lines


def _another_configuration(lines: Sequence[str]) -> ConfigError:
    shown = [*lines[:10], *([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])]
    return ConfigError(
        "The output folder holds a run with another configuration.",
        got="".join(f"\n            {line}" for line in shown),
        wanted="the configuration that its checkpoints were made with",
        fix="Set output_dir to a new folder; or take these settings back; or go on all the same with resume: force; or "
        "start anew with resume: never, which removes the checkpoints.",
    )


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, may_change: Sequence[str], may_rise: Sequence[str]
) -> list[str]:
    """What differs between two configurations, a line each.

    Args:
        before: nested plain values.
        now: the same.
        may_change: keys (``a::b``) that may differ, with all below them.
        may_rise: keys whose number may become larger.
    """
    old, new = dict(_flat(_without_watchers(before))), dict(_flat(_without_watchers(now)))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        was, has = old.get(key, ABSENT), new.get(key, ABSENT)
        if was == has or any(key == name or key.startswith(f"{name}::") for name in may_change):
            continue
        numbers = all(isinstance(value, int | float) for value in (was, has))
        if key in may_rise and numbers and has >= was:
            continue
        lines.append(f"{key}: {was} -> {has}" + (" (may only rise)" if key in may_rise else ""))
    return lines


def _without_watchers(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    train = configuration.get("train")
    handlers = train.get("handlers") if isinstance(train, Mapping) else None
    if not isinstance(train, Mapping) or not isinstance(handlers, list):
        return configuration
    kept = [
        entry
        for entry in handlers
        if not isinstance(entry, Mapping) or str(entry.get("_target_")).rsplit(".", 1)[-1] not in WATCHERS
    ]
    others = {name: value for name, value in train.items() if name != "handlers"}
    return {**configuration, "train": {**others, "handlers": kept} if kept else others}


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items: Iterator[tuple[Any, Any]]
    if isinstance(values, Mapping) and values:
        items = iter(values.items())
    elif isinstance(values, list) and any(isinstance(value, Mapping | list) for value in values):
        items = iter(enumerate(values))
    else:
        yield prefix.removesuffix("::"), values
        return
    for name, value in items:
        yield from _flat(value, f"{prefix}{name}::")
