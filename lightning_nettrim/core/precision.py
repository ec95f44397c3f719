"""Precision of float32 matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch


@contextmanager
def matmul_precision(precision: Literal["highest", "high", "medium"]) -> Iterator[None]:
    """A `with` in which float32 matrix products have this precision, whichever of torch's settings was used before.

    Lightning advises to set the precision to "high" or "medium" for training. With "medium", an Intel CPU with AMX
    rounds factors to bfloat16; normal equations and certificates would be wrong by more than the errors they measure.

    Args:
        precision: as in ``torch.set_float32_matmul_precision``.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    own = {backend: backend.fp32_precision for backend in backends if hasattr(backend, "fp32_precision")}
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a backend has a setting of its own that differs from the common one, which cannot be read
        before = "highest"
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, value in own.items():
            backend.fp32_precision = value
