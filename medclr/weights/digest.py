"""Digests: how a file with tensors shows that it is as it was written.

Neither torch's format nor safetensors has a checksum: of files in which one bit has flipped, ``torch.load`` takes most,
and gives other numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

TENSORS_DIGEST: Final = "tensors_digest"
"""Key of a sealed header: the digest of the tensors."""
DIGEST: Final = "digest"
"""Key of a sealed header: the digest of all its other entries, ``TENSORS_DIGEST`` among them, and so of the whole."""


def digest(tensors: Mapping[str, Tensor], content: object) -> str:
    """Sha256 (hex) of tensors and plain values, whatever the order of their names.

    Args:
        tensors: of any shape, kind and device, by name; names, kinds, shapes and values count, strides do not.
        content: what JSON can hold.

    Raises:
        TypeError: JSON cannot hold ``content``.

    Example:
        >>> digest({}, {"a": 1, "b": 2}) == digest({}, {"b": 2, "a": 1})
        True
    """
    state = hashlib.sha256()
    # A line of JSON ends where it ends, and says how many bytes follow: no two inputs give the same stream.
    state.update(f"{json.dumps(content, sort_keys=True)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{json.dumps([name, str(tensor.dtype), list(tensor.shape)])}\n".encode())
        # As bytes, since numpy knows no bfloat16; flat, since a tensor without dimensions has no bytes to view.
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def seal(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A header with two digests more: of the tensors, and of the header, which can then be read and checked alone."""
    inner = {**content, TENSORS_DIGEST: digest(tensors, None)}
    return {**inner, DIGEST: digest({}, inner)}


def damaged_part(sealed: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> str | None:
    """What is not as it was sealed, ``"header"`` or ``"tensors"``; None if all is.

    Args:
        sealed: what :func:`seal` returned, after JSON.
        tensors: None leaves them out.

    Raises:
        KeyError: the header was never sealed.
    """
    inner = {name: value for name, value in sealed.items() if name != DIGEST}
    if sealed[DIGEST] != digest({}, inner):
        return "header"
    return None if tensors is None or inner[TENSORS_DIGEST] == digest(tensors, None) else "tensors"
