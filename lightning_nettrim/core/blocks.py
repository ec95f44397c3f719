"""Transfer of layer inputs to the device of a problem in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**22
"""Entries of the largest temporary of an evaluation, for one problem of the batch."""


def input_blocks(X: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """``(*batch, P, N)`` inputs on a device: whole if they are there, otherwise in blocks of rows, with the rows."""
    if X.device == device:
        yield slice(None), X
        return
    P, N = X.shape[-2:]
    size = max(1, 8 * BLOCK // N)
    for start in range(0, P, size):
        rows = slice(start, min(start + size, P))
        yield rows, X[..., rows, :].to(device, non_blocking=True)
