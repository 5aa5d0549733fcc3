"""Whether a run and a checkpoint are of one run: their configurations, their scans, and their lengths."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from medclr.errors import ConfigError

logger = logging.getLogger(__name__)

MAY_CHANGE: Final = (
    *("imports", "initialize", "run", "finalize", "bundle_root", "datalist", "dataset_dir", "output_dir", "device"),
    *("num_workers", "cache_mb", "max_bad_scans", "log_interval", "val_interval", "val_metric", "save_interval"),
    *("resume", "resumable", "checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "on_collapse"),
    *("max_skipped", "data", "train::handlers", "train::quarantine", "train::dataloader::num_workers"),
    *("train::dataloader::persistent_workers", "train::dataloader::pin_memory", "validate", "curves", "record"),
    *("manifest", "settings", "checkpoint", "section", "results", "predictions", "class_names", "overlap"),
    *("last", "best"),
)
"""Keys of the bundles that decide where and how fast a run computes and what it reports, not what it computes. The
datalist is compared by its content."""
MAY_RISE: Final = ("max_epochs",)
ABSENT: Final = "(not there)"


def refuse_another_run(
    checkpoint: Mapping[str, Any], run: Mapping[str, Any], *, may_change: Sequence[str], force: bool
) -> None:
    """Raise for a run that would go on with the checkpoint of another.

    Args:
        checkpoint: ``configuration``, ``datalist_digest``, ``epoch_length``, ``max_epochs`` and ``step`` of it.
        run: the same of the run, but for ``step``.
        may_change: see :func:`differences`.
        force: warn of what differs, and raise only where epochs have another length.

    Raises:
        ConfigError: with all that differs.
    """
    lines = differences(checkpoint["configuration"], run["configuration"], may_change=may_change, may_rise=MAY_RISE)
    if checkpoint["datalist_digest"] != run["datalist_digest"]:
        lines.append("the datalist: other rows")
    if checkpoint["step"] > run["max_epochs"] * checkpoint["epoch_length"]:
        lines.append(f"max_epochs: {run['max_epochs']}, and step {checkpoint['step']} is beyond that")
    if lines and not force:
        shown = [*lines[:10], *([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])]
        raise ConfigError(
            "The output folder holds a run with another configuration.",
            got="".join(f"\n            {line}" for line in shown),
            wanted="the configuration that its checkpoints were made with",
            fix="Set output_dir to a new folder; or take these settings back; or go on all the same with resume: "
            "force; or start anew with resume: never, which removes the checkpoints.",
        )
    if lines:
        logger.warning("the run goes on with another configuration:\n  %s", "\n  ".join(lines))
    if checkpoint["epoch_length"] != run["epoch_length"]:
        raise ConfigError(
            "The run cannot go on with epochs of another length.",
            got=f"{run['epoch_length']} batches an epoch",
            wanted=f"{checkpoint['epoch_length']}, as in the checkpoint",
            fix="Take the scans, the batch size and the number of ranks as they were, or set another output_dir.",
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
    old, new = dict(_flat(before)), dict(_flat(now))
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
