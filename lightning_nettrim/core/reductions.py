"""Sums and norms whose rounding does not depend on the batch, and a check that all entries are finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduction = Callable[..., Tensor]


def reduce_over(dims: tuple[int, ...], reduce: Reduction, R: Tensor) -> Tensor:
    """``reduce`` (a sum or a norm) over all entries or, with dims (-2,), over rows; the dimensions are kept.

    The order of the additions, and therefore the rounding, of one problem does not depend on the batch it is in.
    """
    if dims == (-2,):
        return reduce(R.mT.contiguous(), dim=-1).unsqueeze(-2)
    rows = reduce(R, dim=-1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 64)).unflatten(-1, (-1, 64))
    return reduce(reduce(rows, dim=-1), dim=-1)[..., None, None]


def norm(R: Tensor, dims: tuple[int, ...] = (-2, -1)) -> Tensor:
    """‖R‖ over all entries or, with dims (-2,), column by column; the dimensions are kept."""
    return reduce_over(dims, torch.linalg.vector_norm, R)


def all_finite(tensor: Tensor) -> Tensor:
    """``()`` bool: whether there is no NaN and no Inf, without a temporary of the size of the tensor."""
    if not tensor.numel():
        return tensor.new_ones((), dtype=torch.bool)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()
