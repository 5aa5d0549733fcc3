"""The run manifest: how a run was started, with what, on what, and how long it took."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from medclr import distributed
from medclr.disk import replacing
from medclr.weights.manifest import LEFT_OUT, Manifest, package_versions
from medclr.weights.patients import joined

logger = logging.getLogger(__name__)

PATHS: Final = ("datalist", "pretrained", "predictions", "results", "checkpoint", "output")
RUNNING: Final = "running"
"""Outcome of an attempt that goes on, or that was killed and could not say so."""
PATIENTS: Final = "patients"
"""Key of an attempt in a checkpoint: digests of the patients that the run knows by then."""


class RunRecord:
    """What is known about a run, in ``run.json`` of the output folder, and in the manifest of the weights.

    A run may take several attempts: each that goes on with a checkpoint adds its command, versions, hardware and time.

    Args:
        path: the file, rewritten when an attempt starts and ends; None writes none.
        seed: the run's seed.
        datalist_digest: of the datalist that is trained on.
        bundle_root: folder of the bundle, to ask git for its commit.
        patients: digests of the patients that the run knows, by what they are to it, such as ``training``; None keeps
            none. They go into checkpoints and weights, not into ``run.json``, and a run that goes on adds to those of
            its checkpoint, which may be of another datalist (``resume: force``).

    Example:
        >>> record = RunRecord(None, seed=0)
        >>> record.start({"learning_rate": 0.001}, step=0)
        >>> sorted(record.describe())[:3]
        ['attempts', 'command', 'configuration']
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        seed: int | None = None,
        datalist_digest: str | None = None,
        bundle_root: str | os.PathLike[str] | None = None,
        patients: Mapping[str, Sequence[str] | None] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.seed, self.datalist_digest, self.bundle_root = seed, datalist_digest, bundle_root
        self.patients = None if patients is None else {use: joined(digests) for use, digests in patients.items()}
        self.configuration: dict[str, Any] = {}
        self.attempts: list[dict[str, Any]] = []
        self._start = time.monotonic()

    def start(self, configuration: Mapping[str, Any], *, step: int, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin an attempt.

        Args:
            configuration: of this attempt, as plain values.
            step: where it begins.
            earlier: attempts before this one, of the checkpoint that it goes on with.
        """
        self._start = time.monotonic()
        self.configuration = json.loads(json.dumps(configuration, default=str))
        commits = {"medclr": commit_of(Path(__file__).parents[1])}
        if self.bundle_root is not None:
            commits["bundle"] = commit_of(Path(self.bundle_root))
        attempt = {
            "command": list(sys.orig_argv),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions(),
            "git": commits,
            "hardware": hardware(),
            "from_step": step,
        }
        self._add_patients(earlier)
        self.attempts = [*map(_without_patients, self._known(earlier)), attempt]
        for before in self.attempts[:-1]:
            if before["outcome"] == RUNNING:
                before["outcome"] = "killed"
        self._update(step, RUNNING)
        self.write()

    def _known(self, earlier: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The attempts of the checkpoint, or of the file, if that is of the same run and knows how they ended."""
        try:
            written = json.loads(self.path.read_bytes())["attempts"] if self.path is not None and earlier else []
            same = [entry["started"] for entry in written[: len(earlier)]] == [entry["started"] for entry in earlier]
            if not same or not all(isinstance(entry["wall_s"], float) for entry in written):
                return earlier
            # One that was killed has not written how far it came; its last checkpoint has.
            both = zip(written, earlier, strict=False)
            ended = [entry if entry["outcome"] != RUNNING else saved for entry, saved in both]
            return [*ended, *written[len(earlier) :]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # for reading by people, and perhaps edited
            return earlier

    def _add_patients(self, earlier: Sequence[Mapping[str, Any]]) -> None:
        if self.patients is not None:
            for attempt in earlier:
                for use, digests in (attempt.get(PATIENTS) or {}).items():
                    self.patients[use] = joined(self.patients.get(use), digests)

    def seen_patients(self) -> dict[str, list[str] | None] | None:
        """Digests of the patients that the run knows, those of earlier attempts among them; None if none are kept."""
        return None if self.patients is None else dict(self.patients)

    def end(self, step: int, outcome: str) -> None:
        """End the attempt: ``completed``, ``stopped by SIGTERM``, or the kind of error."""
        self._update(step, outcome)
        self.write()

    def so_far(self, step: int, outcome: str = RUNNING) -> list[dict[str, Any]]:
        """All attempts, this one up to now, for a checkpoint: the last one with the run's patients."""
        self._update(step, outcome)
        attempts = [dict(attempt) for attempt in self.attempts]
        if self.patients is not None:
            attempts[-1][PATIENTS] = self.patients
        return attempts

    def describe(self) -> dict[str, Any]:
        """The run, as plain values; the last attempt's command, versions and hardware stand for the run."""
        last = self.attempts[-1] if self.attempts else {}
        return {
            "seed": self.seed,
            "datalist_digest": self.datalist_digest,
            "command": last.get("command"),
            "versions": last.get("versions"),
            "git": last.get("git"),
            "hardware": last.get("hardware"),
            "wall_s": round(sum(attempt["wall_s"] for attempt in self.attempts), 1),
            "configuration": self.configuration,
            "attempts": self.attempts,
        }

    def for_weights(self) -> dict[str, Any]:
        """What goes with weights, which travel: command, commits, hardware and time, without paths and dates."""
        if self.attempts:
            self._update(self.attempts[-1]["to_step"], self.attempts[-1]["outcome"])
        about = self.describe()
        values = {name: about[name] for name in ("command", "git", "hardware", "wall_s")}
        values["command"] = _without_paths(values["command"] or [])
        return dict(Manifest("any", run={**values, "attempts": len(self.attempts)}).run)

    def settings(self) -> dict[str, Any]:
        """The configuration as it goes with weights: without what names files and folders."""
        return {name: LEFT_OUT if _names_a_path(name) else value for name, value in self.configuration.items()}

    def write(self) -> None:
        """Write the file, on rank 0. A disk that fails does not end a run here: it is no part of its result."""
        if self.path is None or distributed.rank() != 0:
            return
        try:
            with replacing(self.path) as file:
                file.write((json.dumps(self.describe(), indent=1) + "\n").encode())
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error.strerror or error)

    def _update(self, step: int, outcome: str) -> None:
        wall = round(time.monotonic() - self._start, 1)
        self.attempts[-1] |= {"to_step": step, "outcome": outcome, "wall_s": wall}


def _without_patients(attempt: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attempt.items() if name != PATIENTS}


def _names_a_path(setting: str) -> bool:
    return setting.rsplit("::", 1)[-1] in PATHS or setting.endswith(("_dir", "_file", "_root", "path", "folder"))


def _without_paths(command: Sequence[str]) -> list[str]:
    """A command line without what it says of files and folders, whose names may be anybody's."""
    kept: list[str] = []
    for before, word in zip(["", *command], command, strict=False):
        name, equals, _ = word.lstrip("-").partition("=")
        if before.startswith("-") and "=" not in before and _names_a_path(before.lstrip("-")):
            kept.append(LEFT_OUT)
        else:
            kept.append(f"--{name}={LEFT_OUT}" if equals and _names_a_path(name) else word)
    return kept


def commit_of(folder: Path) -> str | None:
    """The git commit of a folder's checkout, with ``-dirty`` where files differ from it; None outside of git."""
    try:
        tracked = _git(folder, "ls-files", "--error-unmatch", ".")  # a package installed inside another's checkout
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """What computes: processor, cores, memory, accelerator, ranks. No name of the machine."""
    about: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        about["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        about["accelerator"] = torch.cuda.get_device_name()
    return {**about, "ranks": distributed.world_size()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
