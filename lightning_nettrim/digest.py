"""Digest: a fingerprint by which contents are known again, in a file or in another process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(*parts: Any) -> str:
    """A fingerprint of numbers, strings, tensors and nested containers of them: equal contents, equal fingerprint."""
    state = hashlib.sha256()
    for part in parts:
        _feed(state, part)
    return state.hexdigest()


def _feed(state: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        part = part.detach().cpu().contiguous()
        state.update(f"{part.dtype}{tuple(part.shape)}".encode())
        state.update(part.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        for key, value in sorted(part.items()):
            state.update(f"{key}:".encode())
            _feed(state, value)
    elif isinstance(part, list | tuple):
        state.update(f"[{len(part)}]".encode())
        for value in part:
            _feed(state, value)
    else:
        state.update(f"{type(part).__name__}{part!r};".encode())
