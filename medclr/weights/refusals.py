"""Why weights are refused: what was got, what was wanted, and what the user can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medclr.errors import WeightsError
from medclr.models import ARCHITECTURES, Encoder
from medclr.weights.coverage import Coverage, first_few
from medclr.weights.files import Stored
from medclr.weights.manifest import Manifest


def differences_of(manifest: Manifest | None, encoder: Encoder) -> dict[str, str]:
    """Settings in which the saved encoder and the target differ, in words, by name; empty without a manifest.

    For another network the one entry is called ``architecture``.
    """
    if manifest is None or not isinstance(manifest.architecture, Mapping):
        return {}
    theirs: Any = manifest.architecture.get("network")
    ours = encoder.architecture["network"]
    if not isinstance(theirs, Mapping) or theirs.get("_target_") != ours["_target_"]:
        return {"architecture": str(theirs)}
    pairs = {name: (theirs.get(name), ours.get(name)) for name in sorted({*theirs, *ours} - {"norm", "dropout_prob"})}
    pairs["norm"] = (manifest.architecture.get("norm"), encoder.architecture["norm"])
    return {name: f"{name} is {a} in the file and {b} here" for name, (a, b) in pairs.items() if a != b}


def refuse_other_preprocessing(manifest: Manifest, preprocessing: Mapping[str, Any]) -> None:
    """Refuse scans that would look otherwise than in pretraining.

    Raises:
        WeightsError: naming what differs.
    """
    differences = manifest.preprocessing_differences(preprocessing)
    if differences:
        raise WeightsError(
            "The scans would be preprocessed otherwise than in pretraining.",
            got="; ".join(differences),
            wanted="the preprocessing that the manifest names",
            fix="Set orientation, spacing and intensity as in pretraining.",
        )


def other_architecture(stored: Stored, encoder: Encoder, coverage: Coverage) -> WeightsError:
    """The error for weights of another network."""
    architecture = stored.manifest.architecture if stored.manifest is not None else None
    network = architecture.get("network") if architecture is not None else None
    name = network.get("_target_") if isinstance(network, Mapping) else None
    return WeightsError(
        "The weights are those of another architecture.",
        got=name or f"tensors such as {first_few(list(stored.tensors)) or 'none'}",
        wanted=f"{encoder.target}, with tensors such as {first_few((*coverage.missing, *coverage.matched))}",
        fix="Build the network as the manifest says (medclr.weights.read_manifest), or take other weights. Names that "
        "only carry a prefix need key_map, for example key_map={'backbone': ''}.",
    )


def too_little(coverage: Coverage, minimum: float, differences: Mapping[str, str], encoder: Encoder) -> WeightsError:
    """The error for a file that does not fill the encoder, naming what is amiss first."""
    first = f"{ARCHITECTURES[encoder.target].first_convolution}.weight"
    reasons = [f"{first_few(names)} {kind}" for kind, names in _gaps(coverage).items() if names]
    hint = "; ".join(differences.values())
    if not hint and any(mismatch.name == first for mismatch in coverage.mismatched):
        hint = f"the images have {encoder.in_channels} channels here and another number in the file (in_channels)"
    return WeightsError(
        f"{coverage.source} does not fit the encoder of {coverage.target}.",
        got=f"{coverage.fraction:.1%} of {coverage.required} tensors; " + "; ".join(reasons),
        wanted=f"{minimum:.0%}" + (", and no tensor of another encoder" if minimum == 1 else ""),
        fix=(f"Build the network like the saved one: {hint}." if hint else "Build the network that the weights are of.")
        + " To load only what fits, lower minimum_coverage.",
    )


def _gaps(coverage: Coverage) -> dict[str, Sequence[object]]:
    return {
        "missing": coverage.missing,
        "of another shape": coverage.mismatched,
        "left over in the file": coverage.unexpected,
    }


def refuse_unusable(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not finite, and layers of zeros.

    Raises:
        WeightsError: naming the first such tensors.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # Zero biases, and zero scales of a norm, occur in sound networks; a convolution of zeros does not.
    problems = {
        "not finite": [name for name, tensor in floating.items() if not bool(torch.isfinite(tensor).all())],
        "zero": [name for name, tensor in floating.items() if tensor.ndim > 1 and not bool(tensor.any())],
    }
    for problem, names in problems.items():
        if names:
            raise WeightsError(
                f"Weights of {source} are {problem}.",
                got=f"{len(names)} of {len(floating)} tensors: {first_few(names)}",
                wanted="finite weights, and no layer of zeros",
                fix="Use an earlier checkpoint, or look into why training went wrong; a file may also be damaged.",
            )
