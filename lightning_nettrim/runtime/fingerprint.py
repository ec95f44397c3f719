"""Fingerprints of values, to compare them across runs, files and processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_nettrim.runtime.sharded import full


def fingerprint(*parts: Any) -> str:
    """SHA-256 of numbers, strings, tensors and nested containers of them; equal contents have equal fingerprints.

    Tensors that are divided among processes are gathered, so that all of these must call it.
    """
    digest = hashlib.sha256()
    for part in parts:
        _update(digest, part)
    return digest.hexdigest()


def _update(digest: Any, part: Any) -> None:
    if isinstance(part, Tensor):
        part = full(part).cpu().contiguous()
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        for key, value in sorted(part.items()):
            digest.update(f"{key}:".encode())
            _update(digest, value)
    elif isinstance(part, list | tuple):
        digest.update(f"[{len(part)}]".encode())
        for value in part:
            _update(digest, value)
    else:
        digest.update(f"{type(part).__name__}{part!r};".encode())
