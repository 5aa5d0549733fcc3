"""Save an encoder's weights, and load them into the networks that are built on such an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import Tensor, nn

from medclr.distributed import rank
from medclr.errors import ConfigError, MedclrError, WeightsError
from medclr.models import ARCHITECTURES, Encoder, find_encoder
from medclr.weights import files
from medclr.weights.coverage import Coverage, compare
from medclr.weights.manifest import Manifest
from medclr.weights.probe import TOLERANCE, check_probe, take_probe
from medclr.weights.refusals import (
    differences_of,
    other_architecture,
    refuse_other_preprocessing,
    refuse_unusable,
    too_little,
)

_STRIPPED: Final = ("module.", "encoder.", "network.")
"""Prefixes that other people's state dicts may have, alone or one inside another."""


def save_encoder(path: str | Path, encoder: nn.Module, manifest: Manifest) -> Manifest:
    """Write an encoder's weights with their manifest, and the manifest once more as readable JSON beside them.

    The same encoder and manifest give the same bytes. A crash leaves the old file or the new one. Call it on one rank.

    Args:
        path: a name that ends in ``.safetensors``; folders are made.
        encoder: an ``Encoder``, or a network that holds one.
        manifest: how the weights were made; ``architecture``, ``norm`` and ``in_channels`` are filled in.

    Returns:
        The manifest as written.

    Raises:
        ConfigError: for another suffix, or a network without a supported encoder.
        WeightsError: for weights that are not finite, or zero.

    Example:
        >>> save_encoder("encoder.safetensors", method.encoder, Manifest("SimCLR"))  # doctest: +SKIP
        >>> load_encoder("encoder.safetensors", into=SegResNet(init_filters=8))  # doctest: +SKIP
    """
    path = checked_path(path)
    encoder = find_encoder(encoder)
    state = encoder.state_dict()
    refuse_unusable(state, "the encoder")
    manifest = replace(
        manifest,
        architecture=encoder.architecture,
        norm=encoder.architecture["norm"],
        in_channels=encoder.in_channels,
        parts=("encoder",),
    )
    files.write(path, state, manifest, take_probe(encoder))
    return manifest


def checked_path(path: str | Path) -> Path:
    """Where an encoder is to be saved, or :class:`ConfigError` for a name that does not end in ``.safetensors``."""
    path = Path(path)
    if path.suffix != files.SAFETENSORS:
        raise ConfigError(
            "An encoder is saved as safetensors.",
            got=path.name,
            wanted=f"a name that ends in {files.SAFETENSORS}",
            fix=f"Save to {path.with_suffix(files.SAFETENSORS).name}.",
        )
    return path


def find_manifest(path: str | Path) -> Manifest | None:
    """The manifest of a weights file, without reading the weights; None where it has none.

    Raises:
        WeightsError: for a file that cannot be read.
    """
    return files.read(Path(path), header_only=True).manifest


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a weights file, without reading the weights.

    Raises:
        WeightsError: for a file that cannot be read, or has no manifest.
    """
    manifest = find_manifest(path)
    if manifest is None:
        raise WeightsError(
            "This weights file has no manifest.",
            got=Path(path).name,
            wanted="a file written by medclr.save_encoder",
            fix="Load it into the network it was made with, and save that with medclr.save_encoder.",
        )
    return manifest


def encoder_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A file's tensors under the plain names of the MONAI network, on the CPU, for code of your own.

    MONAI's ``copy_model_state`` takes it as it is. Saved with ``torch.save``, ``CheckpointLoader`` reads it, with
    ``strict=False`` where the network is more than the encoder (not with ``strict_shape=False``, which loads nothing).
    Neither complains where nothing matches; :func:`load_encoder` does.

    Raises:
        WeightsError: for a file that cannot be read.
    """
    return files.read(Path(path)).tensors


def load_encoder(
    path: str | Path,
    into: nn.Module,
    *,
    parts: Sequence[str] = ("encoder",),
    minimum_coverage: float = 1.0,
    key_map: Mapping[str, str] | None = None,
    same_features: bool = True,
    preprocessing: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Coverage:
    """Load an encoder's weights into a network, wholly or not at all.

    What is required are the parameters and buffers of the *target's* encoder. They must be there under the same name
    and in the same shape, nothing of another encoder may be left over, and with a file of :func:`save_encoder` the
    target must then compute the features that the saved encoder computed. The target is not touched before all of this
    holds.

    Args:
        path: a file of :func:`save_encoder`, or a plain state dict (``.safetensors``, ``.pt``, ``.pth``) from anywhere;
            from the latter a prefix of ``module.``, ``encoder.``, ``network.`` is taken off where all fits then.
        into: an ``Encoder``, a supported MONAI network, or what holds one (FlexibleUNet, a method, DDP).
        parts: what to load; ``"encoder"`` is all there is.
        minimum_coverage: in (0, 1]; below 1, tensors may be missing, left over or of another shape: those that fit
            are loaded, and features are compared only where all fit.
        key_map: names in the file to names in the target, of tensors or of modules (``{"stem": "conv1"}``).
        same_features: False skips the comparison of features, for a target that differs from the saved encoder on
            purpose, such as in a stride.
        preprocessing: settings of the target's preprocessing (``Preprocessing.describe``), where it must be that of
            pretraining, as for embeddings; None does not compare them.
        quiet: do not print the coverage.

    Returns:
        The coverage, also printed as a table (on rank 0).

    Raises:
        ConfigError: for an unsupported target, unknown parts, or an unusable ``minimum_coverage``.
        WeightsError: for a file that cannot be read or trusted, another architecture, too little coverage, weights that
            are zero or not finite, other features than those of the saved encoder, or another preprocessing.
    """
    path = Path(path)
    if not 0 < minimum_coverage <= 1:
        raise ConfigError(
            "minimum_coverage is unusable.", got=minimum_coverage, wanted="in (0, 1]", fix="Drop it, for full coverage."
        )
    stored = files.read(path)
    held = stored.manifest.parts if stored.manifest is not None else ["encoder"]
    if not parts or not set(parts) <= set(held) & {"encoder"}:
        raise ConfigError(
            "These parts cannot be loaded.",
            got=list(parts),
            wanted=f"what the file holds: {', '.join(held)}",
            fix="Set parts: [encoder].",
        )
    encoder = find_encoder(into)
    required = encoder.state_dict()
    if any(tensor.is_meta for tensor in required.values()):
        raise ConfigError(
            "The target has no memory to load into.",
            got="parameters on the meta device",
            wanted="parameters on the CPU or a GPU",
            fix="Call into.to_empty(device='cpu') first.",
        )
    if preprocessing is not None and stored.manifest is not None:
        refuse_other_preprocessing(stored.manifest, preprocessing)
    differences = differences_of(stored.manifest, encoder)
    found, coverage = _match(stored, encoder, required, key_map, path.name, type(into).__name__)
    found = {name: found[name] for name in coverage.matched}
    try:
        if "architecture" in differences or not (coverage.matched or coverage.mismatched):
            raise other_architecture(stored, encoder, coverage)
        if coverage.fraction < minimum_coverage or (minimum_coverage == 1 and not coverage.complete):
            raise too_little(coverage, minimum_coverage, differences, encoder)
        refuse_unusable(found, path.name)
        coverage = coverage.with_check("differ from those of the saved encoder")
        coverage = coverage.with_check(_check(stored, encoder, found, coverage, same_features, differences))
    finally:
        if not quiet and rank() == 0:
            Console().print(coverage.table())
    with torch.no_grad():
        for name, tensor in found.items():
            required[name].copy_(tensor)
    return coverage


def _match(
    stored: files.Stored,
    encoder: Encoder,
    required: Mapping[str, Tensor],
    key_map: Mapping[str, str] | None,
    source: str,
    target: str,
) -> tuple[dict[str, Tensor], Coverage]:
    prefixes = ARCHITECTURES[encoder.target].prefixes
    found = _mapped(stored.tensors, key_map or {})
    plain = compare(found, required, prefixes, source, target)
    if stored.manifest is not None or key_map is not None or plain.complete:
        return found, plain
    full = []
    for prefix in ("".join(names) for depth in (1, 2, 3) for names in product(_STRIPPED, repeat=depth)):
        inner = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
        outer = {name: tensor for name, tensor in found.items() if not name.startswith(prefix)}
        coverage = compare(inner, required, prefixes, source, target)
        if coverage.complete:
            full.append((prefix, inner, replace(coverage, ignored=(*coverage.ignored, *outer))))
    if len(full) > 1:
        raise WeightsError(
            f"{source} holds several encoders that fit.",
            got=f"one under each of {', '.join(prefix for prefix, _, _ in full)}",
            wanted="one encoder",
            fix="Say which with key_map, for example key_map={'encoder': ''}.",
        )
    return (full[0][1], full[0][2]) if full else (found, plain)


def _mapped(tensors: Mapping[str, Tensor], key_map: Mapping[str, str]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = max((old for old in key_map if name == old or name.startswith(f"{old}.")), key=len, default=None)
        new = name if old is None else (key_map[old] + name.removeprefix(old)).removeprefix(".")
        if new in result:
            raise WeightsError(
                "key_map gives two tensors one name.", got=new, wanted="one tensor a name", fix="Correct key_map."
            )
        result[new] = tensor
    return result


def _check(
    stored: files.Stored,
    encoder: Encoder,
    found: Mapping[str, Tensor],
    coverage: Coverage,
    same_features: bool,
    differences: Mapping[str, str],
) -> str:
    if stored.probe is None:
        return "not run: the file has no features to compare with"
    if not same_features:
        return "not run: same_features is False"
    if not coverage.complete:
        return "not run: not all of the encoder was loaded"
    try:
        difference, first = check_probe(encoder, stored.probe, found)
    except MedclrError as error:
        got, differs = error.problem, True
    else:
        got, differs = f"a relative difference of {difference:.2g}, from feature map {first} on", first >= 0
    if not differs:
        return f"equal to those of the saved encoder (relative difference {difference:.1g})"
    hint = "; ".join(differences.values())
    raise WeightsError(
        "All weights fit, but the encoder would compute other features than the saved one.",
        got=got,
        wanted=f"the same features of the same image, within {TOLERANCE:g}",
        fix=f"Build the network like the saved one: {hint}. If the difference is meant, set same_features=False."
        if hint
        else "Check key_map and the order of the layers: tensors of one shape may be swapped. The file may be damaged.",
    )
