"""A layer's problem in blocks of rows, so that no temporary has the size of the responses, and compressed problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_nettrim.core.blocks import BLOCK, input_blocks
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup


def row_blocks(problem: LayerProblem) -> Iterator[tuple[slice, LayerProblem]]:
    """The problem block by block of its rows, so that an evaluation needs no temporary of the size of Y."""
    (P, N), M = problem.X.shape[-2:], problem.Y.shape[-1]
    size = max(1, BLOCK // max(N, M))
    for start in range(0, P, size):
        rows = slice(start, min(start + size, P))
        yield rows, select_rows(problem, rows)


def select_rows(problem: LayerProblem, rows: slice, processes: ProcessGroup = SINGLE_PROCESS) -> LayerProblem:
    """Some rows of this process on the device of Y, as a problem of a single process unless processes are given."""
    part: dict[str, Any] = {name: getattr(problem, name) for name in ("Y", "Omega", "V", "offset")}
    part = {name: t if t is None else t[..., rows, :] for name, t in part.items()}
    return replace(problem, X=problem.X[..., rows, :].to(problem.Y.device), processes=processes, **part)


def select_outputs(problem: LayerProblem, outputs: slice) -> LayerProblem:
    """Some outputs of every problem of the batch, with the same inputs; ``epsilon`` is kept as it is."""
    part: dict[str, Any] = {name: getattr(problem, name) for name in ("Y", "W", "Omega", "V", "offset")}
    part = {name: t if t is None else t[..., outputs] for name, t in part.items()}
    return replace(problem, **part)


def concatenate(problems: Sequence[LayerProblem]) -> LayerProblem:
    """Flat batches of problems of equal shape, which differ in their tensors only, as one; ε is left out."""
    first, *others = problems
    if not others:
        return first
    tensors = {name: [getattr(p, name) for p in problems] for name in ("X", "Y", "W", "Omega", "V", "offset")}
    joined: dict[str, Any] = {name: None if parts[0] is None else torch.cat(parts) for name, parts in tensors.items()}
    return replace(first, epsilon=None, **joined)


def gram(problem: LayerProblem) -> Tensor:
    """``(batch, N, N)``: XᵀX of a flat batch, in float64 from products in the precision of X."""
    N = problem.X.shape[-1]
    H = problem.Y.new_zeros(len(problem.Y), N, N)
    for _, X in input_blocks(problem.X, problem.Y.device):
        H.baddbmm_(X.mT, X)
    return problem.processes.sum(H.double())


def compress(problem: LayerProblem) -> LayerProblem:
    """A problem with a linear response on at most N + 1 rows: the same W are feasible, at the same distance from Y.

    With (X Y) = Q (A B; 0 C), ‖XW − Y‖² = ‖AW − B‖² + ‖C‖², column by column; the last row holds the column norms of
    C. Every process holds all rows of the result. Other problems are returned as they are.
    """
    N = problem.X.shape[-1]
    if problem.Omega is not None or problem.num_samples() <= N + 1:
        return problem
    joint = torch.cat([problem.X, problem.center.to(problem.X.device)], -1)
    R = torch.linalg.qr(joint, mode="r").R
    if problem.processes.count > 1:
        R = torch.linalg.qr(problem.processes.gather_rows(R), mode="r").R
    R = R.to(problem.Y.device)
    A, B, C = R[..., :N, :N], R[..., :N, N:], R[..., N:, N:]
    X = torch.cat([A, torch.zeros_like(A[..., :1, :])], -2)
    Y = torch.cat([B, torch.linalg.vector_norm(C, dim=-2, keepdim=True)], -2)
    return replace(problem, X=X, Y=Y, offset=None, processes=SINGLE_PROCESS)
