"""Elimination of whole inputs from the layers that read them, by the exact increase of their squared errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_nettrim.core.precision import matmul_precision
from lightning_nettrim.core.problem import TENSORS, LayerProblem
from lightning_nettrim.core.streaming import gram
from lightning_nettrim.solvers.cardinality import RELAXATION, target_product
from lightning_nettrim.solvers.refitting import DAMPING, rare_input_ridge

PART = 64
"""At most one PARTth of the remaining units is removed between two evaluations of the increases."""

TARGET_UPDATES = 3
"""Updates of the targets of a ReLU after the removals of a stage."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer, or one group of a layer, that reads units.

    Attributes:
        problem: with a batch of one and no zeros.
        rows: ``(units, b)`` the inputs of the layer that belong to each unit.
        weights: ``(M,)`` weights ≥ 0 of the squared errors of its outputs.
    """

    problem: LayerProblem
    rows: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Stage:
    """The units that are left, and the layers without the others.

    Attributes:
        kept: ``(units,)`` bool.
        solutions: ``(1, N, M)`` weights of each reader; those of removed units are zero.
    """

    kept: Tensor
    solutions: list[Tensor]


@matmul_precision("highest")
def eliminate(readers: Sequence[Reader], stages: Sequence[int]) -> Iterator[Stage]:
    r"""Remove the units whose loss increases Σᵣ Σₘ weightsₘ·dist²(XᵣWᵣ, Kᵣ)ₘ least, one after the other.

    For a target T of XW, the optimal weights are W = BXᵀT with B = (XᵀX + λ)⁻¹. Without the inputs j of a unit, the
    squared error is larger by tr(WⱼᵀBⱼⱼ⁻¹Wⱼ), and the optimal weights are W − B[:, j]Bⱼⱼ⁻¹Wⱼ; this is exact, and so is
    B − B[:, j]Bⱼⱼ⁻¹B[j, :]. The ReLU is handled by majorization–minimization: at the end of each stage T is the point
    of K nearest to XW, over-relaxed. λ is the ridge of the problem and of rare inputs, towards the trained weights.

    Args:
        readers: all layers that read the units.
        stages: numbers of units, descending.

    Yields:
        The units kept at each stage, of which those of a later one are a part.

    References:
        Meng, Ibrahim, Behdin, Hazimeh, Ponomareva, Mazumder, "OSSCAR", ICML 2024, for the elimination with a linear
        response.
    """
    states = [_State(reader) for reader in readers]
    kept = torch.ones(len(readers[0].rows), dtype=torch.bool, device=readers[0].rows.device)
    left = len(kept)
    for count in stages:
        while left > count:
            increases = torch.stack([state.increases() for state in states]).sum(0)
            lowest = increases.masked_fill(~kept, torch.inf).topk(
                min(left - count, max(left // PART, 1)), largest=False
            )
            for state in states:
                state.remove(lowest.indices)
            kept[lowest.indices] = False
            left -= len(lowest.indices)
        for state in states:
            state.update_targets()
        yield Stage(kept.clone(), [state.solution for state in states])


def problems_of_groups(problem: LayerProblem) -> list[LayerProblem]:
    """The problems of the groups of a layer, each with a batch of one."""
    tensors = {name: value for name in TENSORS if (value := getattr(problem, name)) is not None}
    return [
        replace(problem, groups=1, **{name: value[i : i + 1] for name, value in tensors.items()})
        for i in range(len(problem.X))
    ]


def without_inputs(problem: LayerProblem, removed: Tensor) -> Tensor:
    """``(groups, N, M)``: the weights of a layer that does not read some inputs, with about the smallest dist²(XW, K).

    Args:
        problem: of the layer, with its groups as batch.
        removed: ``(n,)`` indices of inputs.
    """
    kept = torch.ones(problem.X.shape[-1], dtype=torch.bool, device=removed.device).index_fill(0, removed, False)
    solutions = []
    for own in problems_of_groups(problem):
        no_units = Reader(own, removed.new_zeros(0, 1), own.Y.new_ones(own.Y.shape[-1]))
        state = _State(no_units, kept.nonzero().squeeze(-1))
        state.update_targets(4 * TARGET_UPDATES)
        solutions.append(state.solution)
    return torch.cat(solutions)


class _State:
    """A reader during the elimination: W and B = (XᵀX + λ)⁻¹ of the inputs that are left, in float64.

    Args:
        reader: the reader.
        inputs: indices of the inputs at the beginning; ``None`` is all.
    """

    def __init__(self, reader: Reader, inputs: Tensor | None = None) -> None:
        problem = replace(reader.problem, X=reader.problem.X.to(reader.problem.Y.device))
        self._problem, self._weights, self._positions = problem, reader.weights.double(), reader.rows
        self._inputs = torch.arange(problem.X.shape[-1], device=problem.Y.device) if inputs is None else inputs
        self._units = torch.arange(len(reader.rows), device=problem.Y.device)
        H = gram(problem)[0]
        energy = H.diagonal().clone().unsqueeze(-1)
        ridge = problem.ridge * energy + rare_input_ridge(energy)
        self._ridge = torch.where(problem.lambdas > 0, ridge, 0)
        damping = DAMPING * energy.mean().clamp(min=torch.finfo(torch.float32).tiny)
        H.diagonal().add_(self._ridge.squeeze(-1) + damping)
        H = H[self._inputs][:, self._inputs]
        self._B = torch.cholesky_inverse(torch.linalg.cholesky(H))
        self._W = problem.W[0, self._inputs].double()
        self._fit(1.0)

    @property
    def solution(self) -> Tensor:
        """``(1, N, M)``: the weights."""
        return torch.zeros_like(self._problem.W).index_copy(1, self._inputs, self._W.to(self._problem.W).unsqueeze(0))

    def increases(self) -> Tensor:
        """``(units,)``: the increase of the squared error by the removal of each unit; 0 for removed ones."""
        rows = self._positions[self._units]
        B = self._B[rows.unsqueeze(-1), rows.unsqueeze(-2)]
        W = self._W[rows]
        C = (W * self._weights) @ W.mT
        alone = torch.diag_embed((B.diagonal(dim1=-2, dim2=-1) == 0).to(B))  # removed since the last stage
        increases = torch.linalg.solve(B + alone, C).diagonal(dim1=-2, dim2=-1).sum(-1)
        return increases.new_zeros(len(self._positions)).index_copy(0, self._units, increases)

    def remove(self, units: Tensor) -> None:
        """Remove units; the weights are optimal for the same targets."""
        rows = self._positions[units].flatten()
        K = torch.linalg.solve(self._B[rows][:, rows], self._B[rows]).mT
        self._W.addmm_(K, self._W[rows], alpha=-1)
        self._B.addmm_(K, self._B[rows], alpha=-1)
        self._W[rows] = 0
        self._B[rows] = 0
        self._B[:, rows] = 0

    def update_targets(self, updates: int = TARGET_UPDATES) -> None:
        """Make the responses of the weights the targets; a linear response has the same targets always."""
        self._leave_out_removed()
        if self._problem.Omega is not None:
            for _ in range(updates):
                self._fit(RELAXATION)

    def _leave_out_removed(self) -> None:
        """Make the matrices as small as the inputs that are left."""
        left = self._B.diagonal() != 0
        positions = left.cumsum(0) - 1
        self._units = self._units[left[self._positions[self._units]].all(-1)]
        self._positions = self._positions.index_copy(0, self._units, positions[self._positions[self._units]])
        self._inputs, self._W, self._B = self._inputs[left], self._W[left], self._B[left][:, left]

    def _fit(self, relaxation: float) -> None:
        """The optimal weights for the target XW + relaxation·(T − XW), where T is the point of K nearest to XW."""
        product = target_product(self._problem, slice(None), self.solution, relaxation)[0, self._inputs].double()
        self._W = self._B @ (product + self._ridge[self._inputs] * self._problem.W[0, self._inputs])
