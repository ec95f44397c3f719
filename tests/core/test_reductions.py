"""Reductions round a matrix in the same way on its own and in a batch."""

from __future__ import annotations

import pytest
import torch

from lightning_nettrim.core.reductions import all_finite, norm, reduce_over


@pytest.mark.parametrize("dims", [(-2, -1), (-2,)])
def test_values_are_those_of_torch(dims):
    R = torch.randn(3, 70, 9, dtype=torch.float64)
    torch.testing.assert_close(norm(R, dims), torch.linalg.vector_norm(R, dim=dims, keepdim=True))
    torch.testing.assert_close(reduce_over(dims, torch.sum, R), R.sum(dims, keepdim=True))


@pytest.mark.parametrize("dims", [(-2, -1), (-2,)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (700, 5), (129, 65)])
def test_the_rounding_does_not_depend_on_the_batch(dims, shape):
    R = torch.randn(5, *shape)
    for reduce in (torch.sum, torch.linalg.vector_norm):
        batched = reduce_over(dims, reduce, R)
        assert torch.equal(batched, torch.stack([reduce_over(dims, reduce, r) for r in R]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_and_inf_are_found(dtype):
    R = torch.randn(3, 70, 9).to(dtype)
    assert all_finite(R)
    assert all_finite(R[:0])
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(R.index_fill(1, torch.tensor([41]), value))
