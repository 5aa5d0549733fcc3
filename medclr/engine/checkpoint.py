"""Checkpoints of a run: a folder in which each is whole or passed over, and the newest few are kept.

A checkpoint is two files of one name: ``.pt`` with tensors and plain values, read with ``weights_only=True``, and
``.json``, which says what it is and holds the digest of both. ``torch.load`` has no check of its own: it takes most
files with a flipped bit, and gives other numbers. The ``.json`` is written last, so a checkpoint is there once it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medclr.disk import remove_parts, replacing, save_state, try_writing
from medclr.errors import ConfigError, MedclrError

logger = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"(\d{6,})_step_(\d+)")


class DamagedCheckpoint(MedclrError):
    """A checkpoint cannot be read whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read whole.

    Args:
        name: of its files, without suffix.
        about: what was written beside the state: plain values, ``step`` among them.
        state: tensors and plain values.
    """

    name: str
    about: dict[str, Any]
    state: dict[str, Any]


class CheckpointFolder:
    """Writes checkpoints into a folder, and finds the newest that is whole.

    Args:
        path: the folder; made when it is needed.
        keep: how many checkpoints to keep.

    Raises:
        ConfigError: for fewer than one.

    Example:
        >>> folder = CheckpointFolder("models/checkpoints", keep=2)
        >>> folder.write({"network": network.state_dict()}, {"step": 300})  # doctest: +SKIP
        >>> folder.newest().state["network"]  # doctest: +SKIP
    """

    def __init__(self, path: str | Path, *, keep: int = 2) -> None:
        if not isinstance(keep, int) or keep < 1:
            raise ConfigError(
                "The number of checkpoints to keep is unusable.",
                got=keep,
                wanted="a whole number >= 1; with 2, a damaged one leaves the one before",
                fix="Set keep_checkpoints: 2.",
            )
        self.path, self.keep = Path(path), keep
        self._damaged: set[str] = set()

    def names(self) -> list[str]:
        """Names of all checkpoints, whole or not, the newest first."""
        found = {file.stem for file in self.path.glob("*_step_*.json")}
        return sorted((name for name in found if _NAME.fullmatch(name)), key=_number, reverse=True)

    def write(self, state: Mapping[str, Any], about: Mapping[str, Any]) -> str:
        """Write one checkpoint, then remove those that are too many.

        Args:
            state: tensors and plain values, in dictionaries and lists.
            about: plain values; ``step`` is needed.

        Returns:
            The checkpoint's name.

        Raises:
            OSError: it cannot be written; those before are as they were.
        """
        number = max((_number(name) for name in self.names()), default=0) + 1
        name = f"{number:06d}_step_{about['step']}"
        with replacing(self._file(name, ".pt")) as file:
            digest = save_state(state, file)
        content = {**about, "format": FORMAT, "state_sha256": digest}
        text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
        with replacing(self._file(name, ".json")) as file:
            file.write(text.encode())
        self._remove_old()
        return name

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none at all. A damaged one is passed over, and said.

        Raises:
            MedclrError: there are checkpoints, and all are damaged.
        """
        names = self.names()
        for name in names:
            try:
                return self.read(name)
            except DamagedCheckpoint as error:
                self._damaged.add(name)
                older = names[names.index(name) + 1 :]
                logger.warning("%s%s", error, f"\n  so the one before is tried: {older[0]}" if older else "")
        if names:
            raise MedclrError(
                "No checkpoint of the run can be read.",
                got=f"{len(names)} damaged checkpoint(s) in {self.path}",
                wanted="at least one that is whole",
                fix="Bring one back from a backup, or set resume: never to start anew, which removes them.",
            )
        return None

    def read(self, name: str) -> Checkpoint:
        """Read one checkpoint.

        Raises:
            DamagedCheckpoint: it is not whole.
            MedclrError: it was written by a newer medclr.
            OSError: the disk does not answer, which says nothing about the checkpoint.
        """
        about = self.about(name)
        try:
            with self._file(name, ".pt").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != about["state_sha256"]:
                    raise ValueError("its state has another digest than it was written with")
            state = torch.load(self._file(name, ".pt"), map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise _damaged(name, "its state is missing") from error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # torch raises many kinds, for what is no plain value
            raise _damaged(name, str(error)) from error
        return Checkpoint(name, about, state)

    def about(self, name: str) -> dict[str, Any]:
        """What was written beside a checkpoint's state.

        Raises:
            As :meth:`read`.
        """
        try:
            about: dict[str, Any] = json.loads(self._file(name, ".json").read_bytes())
            if about.pop("sha256") != _digest(about):
                raise ValueError("its description has another digest than it was written with")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(name, str(error)) from error
        if about["format"] > FORMAT:
            raise MedclrError(
                "The checkpoints were written by a newer medclr.",
                got=f"{name} of format {about['format']}",
                wanted=f"at most {FORMAT}",
                fix="Update medclr, or set another output_dir.",
            )
        return about

    def newest_about(self) -> dict[str, Any] | None:
        """What was written beside the newest state whose description is whole; None if there is none."""
        for name in self.names():
            try:
                return self.about(name)
            except DamagedCheckpoint:
                continue
        return None

    def clean(self) -> None:
        """Remove what a killed process had begun to write."""
        remove_parts(self.path)
        whole = set(self.names())
        for state in self.path.glob("*_step_*.pt"):
            if state.stem not in whole and _NAME.fullmatch(state.stem):
                state.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all checkpoints."""
        for name in self.names():
            self._remove(name)
        self.clean()

    def refuse_unusable(self, expected_bytes: int) -> None:
        """Find out before long work that checkpoints could not be written.

        Args:
            expected_bytes: about what one takes.

        Raises:
            ConfigError: the folder cannot be written to, or has no room for two.
        """
        try:
            try_writing(self.path / "writable")
        except OSError as error:
            raise ConfigError(
                "The output folder cannot be written to.",
                got=f"{self.path}: {error.strerror or error}",
                wanted="a folder that you may write to, with space left",
                fix="Set output_dir to another folder, or free some space.",
            ) from error
        free = shutil.disk_usage(self.path).free
        count = 1 if self.names() else 2  # a new one is whole before an old one goes
        if free < count * expected_bytes:
            raise ConfigError(
                "The output folder has no room for checkpoints.",
                got=f"{free / 2**20:.0f} MB free in {self.path}",
                wanted=f"{count * expected_bytes / 2**20:.0f} MB: about {expected_bytes / 2**20:.0f} MB a checkpoint",
                fix="Free some space, or set output_dir to another disk.",
            )

    def _remove_old(self) -> None:
        whole = [name for name in self.names() if name not in self._damaged]
        for name in [*whole[self.keep :], *self._damaged]:
            self._remove(name)
        self._damaged.clear()

    def _remove(self, name: str) -> None:
        for suffix in (".json", ".pt"):  # in this order: without its description it is no checkpoint
            self._file(name, suffix).unlink(missing_ok=True)

    def _file(self, name: str, suffix: str) -> Path:
        return self.path / f"{name}{suffix}"


def _damaged(name: str, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"The checkpoint {name} is damaged.",
        got=reason.split("\n")[0][:160] or "no reason given",
        wanted="a checkpoint as it was written",
        fix="Look at the disk: files that were written whole do not change by themselves.",
    )


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else 0


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
