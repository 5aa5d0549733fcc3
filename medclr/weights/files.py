"""Weights files: safetensors with a header that holds the manifest, or a plain state dict saved by torch.

Nothing in a file is ever executed: ``torch.load`` reads tensors only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medclr.errors import WeightsError
from medclr.weights.manifest import Manifest

HEADER: Final = "medclr"
"""The one entry of the safetensors metadata; a single one, since safetensors writes several in random order."""
SAFETENSORS: Final = ".safetensors"
TORCH: Final = (".pt", ".pth")


@dataclass
class Stored:
    """The content of a weights file."""

    tensors: dict[str, Tensor]
    """On the CPU; empty where only the header was read."""
    manifest: Manifest | None = None
    """None for a file that save_encoder did not write."""
    probe: dict[str, Any] | None = None
    """See :mod:`medclr.weights.probe`."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names of tensors that are stored once."""


def write(path: Path, tensors: Mapping[str, Tensor], manifest: Manifest, probe: dict[str, Any]) -> None:
    """Write ``path`` and, beside it, the manifest as readable JSON. A crash leaves the old file or the new one."""
    unique, aliases = share(tensors)
    header = {"manifest": json.loads(manifest.to_json()), "probe": probe, "aliases": aliases}
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, save(unique, metadata={HEADER: json.dumps(header, allow_nan=False)}))
    _replace(path.with_suffix(".json"), (manifest.to_json(indent=2) + "\n").encode())


def share(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, contiguous and on the CPU, and the further names of those that have several."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in first_name:
            aliases[name] = first_name[identity]
            continue
        first_name[identity] = name
        # A clone, since safetensors also refuses different views of one storage.
        unique[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return unique, aliases


def read(path: Path, *, header_only: bool = False) -> Stored:
    """Read a weights file.

    Raises:
        WeightsError: for a file that is not there, broken, of another kind, or that holds more than tensors.
    """
    if not path.is_file():
        raise WeightsError(
            "There is no such weights file.", got=path, wanted=f"a file *{SAFETENSORS}", fix="Check the path."
        )
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path, header_only)
    if path.suffix in TORCH:
        return Stored({} if header_only else _read_torch(path))
    raise WeightsError(
        "Unknown kind of weights file.",
        got=path.name,
        wanted=f"a name that ends in {', '.join((SAFETENSORS, *TORCH))}",
        fix="Rename the file, or save the weights as safetensors.",
    )


def _read_safetensors(path: Path, header_only: bool) -> Stored:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {} if header_only else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        _broken(path, error)
    if header is None:
        return Stored(tensors)
    try:
        content = json.loads(header)
        manifest = Manifest.from_json(json.dumps(content["manifest"]))
        probe, aliases = dict(content["probe"]), dict(content["aliases"])
        if not header_only:
            tensors.update({name: tensors[kept] for name, kept in aliases.items()})
    except (ValueError, KeyError, TypeError) as error:
        _broken(path, error)
    return Stored(tensors, manifest, probe, aliases)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, depending on where a file is broken
        _broken(path, error)
    entries = content if isinstance(content, Mapping) else {}
    if entries and all(isinstance(name, str) and _is_dense(value) for name, value in entries.items()):
        return dict(entries)
    inner = [
        str(name)
        for name, value in entries.items()
        if isinstance(value, Mapping) and value and all(map(_is_dense, value.values()))
    ]
    raise WeightsError(
        f"{path.name} is no plain state dict.",
        got=f"{type(content).__name__}" + (f" with state dicts under {', '.join(inner)}" if inner else ""),
        wanted="a dictionary of names and tensors",
        fix=f"Save that entry by itself: torch.save(torch.load(path, weights_only=True)[{inner[0]!r}], new_path)."
        if inner
        else "Save network.state_dict() by itself.",
    )


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _broken(path: Path, error: Exception) -> NoReturn:
    text = str(error) or type(error).__name__
    code = "weights_only" in text or "Weights only" in text
    raise WeightsError(
        f"{path.name} holds more than tensors, and was not executed." if code else f"{path.name} cannot be read.",
        got="a pickle that would run code on loading" if code else f"{path.stat().st_size} bytes, {_first_line(text)}",
        wanted="tensors only" if code else "a whole weights file",
        fix="Do not trust this file; ask for the weights as safetensors."
        if code
        else "Copy or download it again; it may be cut short.",
    ) from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:160] if text.strip() else "no reason given"


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
