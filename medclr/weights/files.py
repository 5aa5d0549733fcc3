"""Weights files: safetensors with a header that holds the manifest, or a plain state dict saved by torch.

Nothing in a file is ever executed: ``torch.load`` reads tensors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medclr.disk import replacing
from medclr.errors import WeightsError
from medclr.weights.digest import DIGEST, damaged_part, seal
from medclr.weights.manifest import Manifest

HEADER: Final = "medclr"
"""The one entry of the safetensors metadata; a single one, since safetensors writes several in random order."""
ENTRIES: Final = ("manifest", "probe", "aliases")
"""What the header holds, beside the digests of it and of the tensors."""
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
    """Write ``path`` and, beside it, the manifest as readable JSON. A crash leaves the old file or the new one.

    Raises:
        OSError: a file cannot be written.
    """
    unique, aliases = share(tensors)
    header = seal({"manifest": json.loads(manifest.to_json()), "probe": probe, "aliases": aliases}, unique)
    content = save(unique, metadata={HEADER: json.dumps(header, allow_nan=False)})
    with replacing(path) as file:
        file.write(content)
    with replacing(path.with_suffix(".json")) as file:
        file.write((manifest.to_json(indent=2) + "\n").encode())


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
            metadata = file.metadata() or {}
            tensors = {} if header_only else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        _broken(path, error)
    if HEADER not in metadata:
        if any(map(_is_ours, metadata.values())):
            raise _damaged(path, "the name of its header is not as it was written")
        return Stored(tensors)
    try:
        content = json.loads(metadata[HEADER])
        part = damaged_part(content, None if header_only else tensors) if DIGEST in content else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"a header that cannot be read: {_first_line(str(error))}") from error
    if part is not None:
        raise _damaged(path, f"the digest of its {part} is not the one that was written")
    if DIGEST not in content:
        raise _damaged(path, "no digest: it is damaged, or an older development version of medclr wrote it")
    try:
        manifest = Manifest.from_json(json.dumps(content["manifest"]))
        probe, aliases = dict(content["probe"]), dict(content["aliases"])
        if not header_only:
            tensors.update({name: tensors[kept] for name, kept in aliases.items()})
    except (ValueError, KeyError, TypeError) as error:
        _broken(path, error)
    return Stored(tensors, manifest, probe, aliases)


def _is_ours(text: str) -> bool:
    """Whether a piece of metadata is our header under another name: a flipped bit must not make it a foreign file."""
    return sum(f'"{name}"' in text for name in ENTRIES) > 1


def _damaged(path: Path, got: str) -> WeightsError:
    return WeightsError(
        f"{path.name} is damaged.",
        got=got,
        wanted="the file as save_encoder wrote it",
        fix="Copy or download it again, or save the encoder again with medclr.save_encoder.",
    )


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
