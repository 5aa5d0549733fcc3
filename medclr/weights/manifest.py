"""The manifest: what an encoder's weights are, how they were made, and what they may be used for.

It travels inside the weights file. It holds no patient ids, dates or paths; of patients it holds digests, which lead to
nobody where the ids are the pseudonyms of ``medclr index`` (see :mod:`medclr.weights.patients`).
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version as installed_version
from pathlib import PurePath
from typing import Any, Final

from medclr import keys
from medclr.errors import ConfigError, WeightsError
from medclr.weights.patients import checked_digests

FORMAT_VERSION: Final = 1
INTENDED_USE: Final = "Research use only, not a medical device."
LEFT_OUT: Final = "(left out)"
"""Stands in ``settings`` and ``run`` for a value that is, or may be, a path, a date, or a patient's."""

_FILTERED: Final = ("settings", "run")
_DIGESTS: Final = ("patient_digests", "validation_digests")
_LONGEST_LIST: Final = 64
_PRIVATE_TEXT: Final = re.compile(
    r"[\\/]|^~|\.(nii|gz|dcm|mha|nrrd|json|csv|tsv|h5|npy|npz|pt|pth|safetensors|ya?ml)$"
    r"|(?<!\d)(19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d(?!\d)",
    re.IGNORECASE,
)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that weights depend on."""
    packages = ("medclr", "monai", "torch", "numpy")
    return {"python": platform.python_version(), **{name: installed_version(name) for name in packages}}


@dataclass
class Manifest:
    """What is known about an encoder's weights. Every field but ``method`` may stay None: unknown.

    ``settings`` and ``run`` keep names and numbers only: values that may be a path, a date or a patient's are left out.

    Args:
        method: name of the method, such as ``"SimCLR"``.
        preprocessing: settings of the preprocessing that the encoder expects, as plain values.
        crop_size: voxels along each axis.
        spacing: millimetres along each axis, where scans were resampled.
        steps: optimizer steps done.
        epochs: epochs done.
        datalist_digest: digest of the datalist trained on.
        patients: how many patients were trained on.
        scans: how many scans were trained on.
        seed: the run's seed.
        settings: resolved top-level keys of the bundle.
        run: how the run was started and went: command, versions of code, hardware, wall time.
        architecture: ``Encoder.architecture``; filled in by save_encoder, as ``norm`` and ``in_channels`` are.
        norm: MONAI's norm argument.
        in_channels: C of the images.
        parts: what the file holds.
        versions: of the packages.
        intended_use: one sentence.
        format_version: of this layout.
        patient_digests: of all patients whose scans the run could train on, as
            :func:`medclr.weights.patient_digests` gives them; sorted, and left out where the manifest is printed.
        validation_digests: of the patients that the run looked at meanwhile, likewise.
        extra: fields that this version of medclr does not know; they survive reading and writing.

    Raises:
        ConfigError: for an empty method, a negative count, or digests that are none.

    Example:
        >>> manifest = Manifest("SimCLR", crop_size=(32, 48, 32), steps=300)
        >>> Manifest.from_json(manifest.to_json()) == manifest
        True
    """

    method: str
    preprocessing: Mapping[str, Any] | None = None
    crop_size: list[int] | tuple[int, ...] | None = None
    spacing: list[float] | tuple[float, ...] | None = None
    steps: int | None = None
    epochs: int | None = None
    datalist_digest: str | None = None
    patients: int | None = None
    scans: int | None = None
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    architecture: Mapping[str, Any] | None = None
    norm: list[Any] | None = None
    in_channels: int | None = None
    parts: list[str] | tuple[str, ...] = ("encoder",)
    versions: Mapping[str, str] = field(default_factory=package_versions)
    intended_use: str = INTENDED_USE
    format_version: int = FORMAT_VERSION
    patient_digests: list[str] | tuple[str, ...] | None = field(default=None, repr=False)
    validation_digests: list[str] | tuple[str, ...] | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise ConfigError(
                "A manifest names its method.", got=repr(self.method), wanted="a name such as SimCLR", fix="Set method."
            )
        for name in ("steps", "epochs", "patients", "scans", "in_channels"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
                raise ConfigError(
                    f"A manifest's {name} is a count.",
                    got=repr(count),
                    wanted="a whole number >= 0",
                    fix=f"Set {name}.",
                )
        for name in _DIGESTS:
            setattr(self, name, checked_digests(name, getattr(self, name)))
        # Plain JSON values from the start, so that what is read equals what was written.
        for item in fields(self):
            setattr(self, item.name, _plain(getattr(self, item.name), private=item.name in _FILTERED))

    def preprocessing_differences(self, preprocessing: Mapping[str, Any]) -> list[str]:
        """What differs between the preprocessing in pretraining and another one, a line each; none if unknown.

        Args:
            preprocessing: its settings, as ``medclr.data.Preprocessing.describe`` gives them.
        """
        theirs, ours = self.preprocessing, _plain(preprocessing, private=False)
        if theirs is None:
            return []
        names = [name for name in dict.fromkeys([*theirs, *ours]) if theirs.get(name) != ours.get(name)]
        return [f"{name} {ours.get(name)} here, {theirs.get(name)} in pretraining" for name in names]

    def to_json(self, indent: int | None = None) -> str:
        """As JSON text, unknown fields beside the known ones; digests of patients last, each list on one line."""
        known = asdict(self)
        extra = known.pop("extra")
        digests = {name: known.pop(name) for name in _DIGESTS}
        others = {name: value for name, value in extra.items() if name not in digests}
        text = json.dumps({**known, **others, **known}, indent=indent, allow_nan=False)
        # Thousands of lines of digests would hide all the rest from those who read the file.
        start = ", " if indent is None else ",\n" + " " * indent
        lists = "".join(f"{start}{json.dumps(name)}: {json.dumps(value)}" for name, value in digests.items())
        return text[:-1].rstrip("\n") + lists + ("}" if indent is None else "\n}")

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """From JSON text.

        Raises:
            WeightsError: for text that is no manifest, or one of a newer layout.
        """
        try:
            content = json.loads(text)
            layout = content["format_version"]
            newer = layout > FORMAT_VERSION
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _unreadable(text, error) from error
        if newer:
            raise WeightsError(
                "The manifest was written by a newer medclr.",
                got=f"format_version {layout}",
                wanted=f"at most {FORMAT_VERSION}",
                fix="Update medclr.",
            )
        names = {item.name for item in fields(cls)} - {"extra"}
        known = {name: value for name, value in content.items() if name in names}
        try:
            return cls(**known, extra={name: value for name, value in content.items() if name not in names})
        except (TypeError, RecursionError, ConfigError) as error:
            raise _unreadable(text, error) from error


def _unreadable(text: str, error: Exception) -> WeightsError:
    return WeightsError(
        "This is no manifest.",
        got=f"{text[:80]!r} ({str(error).splitlines()[0]})",
        wanted="a JSON object with method, architecture, format_version, ...",
        fix="Save the encoder again with medclr.save_encoder.",
    )


def _plain(value: Any, *, private: bool) -> Any:
    """``value`` as JSON has it; with ``private``, without anything that may lead to a person or a machine."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return LEFT_OUT if private and _PRIVATE_TEXT.search(value) else value
    if isinstance(value, PurePath):
        return LEFT_OUT
    if isinstance(value, Mapping):
        if private and keys.PATIENT_ID in value:
            return LEFT_OUT
        return {str(key): _plain(item, private=private) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if private and len(value) > _LONGEST_LIST:
            return LEFT_OUT
        return [_plain(item, private=private) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), private=private)
    # An object says its kind only: its text may hold an address or a path.
    return f"({type(value).__name__})"
