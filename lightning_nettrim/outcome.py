"""Outcome: what became of a layer and of the network, in numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_nettrim.layers import Layer
from lightning_nettrim.plan import Plan
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.report import LayerReport
from lightning_nettrim.solvers import Solution, Status


def relative_error(problem: LayerProblem, W: Tensor) -> float:
    """‖response(W) − Y‖ / ‖Y‖ of a whole layer (over 1 where Y = 0)."""
    return length(problem.response(W) - problem.Y, problem.ranks) / (length(problem.Y, problem.ranks) or 1.0)


def length(R: Tensor, ranks: Ranks = ALONE) -> float:
    """‖R‖ of the rows of all processes, summed in double precision."""
    return float(ranks.norm(torch.linalg.vector_norm(R, dtype=torch.float64)))


def discrepancy_bound(errors: Mapping[str, float], pruned: Mapping[str, Tensor], todo: Plan) -> float:
    """Σ ε̂ℓ Π_{j>ℓ} ‖Ŵⱼ‖₂, with 1e-5 on top for the rounding of the sums.

    A layer adds its own error to that of the layer before it, which its weights can stretch by their spectral norm and
    its ReLU not at all.
    """
    bound = 0.0
    for name, layer in todo.layers.items():
        weight = pruned[layer.names()[0]].double()
        bound = bound * float(torch.linalg.matrix_norm(weight, 2)) + errors[name]
    return bound * (1 + 1e-5)


def row(layer: Layer, problem: LayerProblem, solution: Solution, W: Tensor, zeros: int, seconds: float) -> LayerReport:
    """The row of one layer, but for its discrepancy, which only the finished network shows."""
    prunable = problem.prunable
    size = length(problem.Y, problem.ranks) or 1.0

    def known(value: Tensor) -> float | None:
        return float(value) if bool(value.isfinite()) else None

    objective, bound = solution.objective.sum(), solution.bound.sum()
    return LayerReport(
        name=layer.name,
        type=layer.kind,
        shape=tuple(layer.parameter.shape),
        sparsity=zeros / prunable,
        zeros=zeros,
        relative_error=relative_error(problem, W),
        discrepancy=float("nan"),
        objective=known(objective),
        bound=known(bound),
        duality_gap=known(solution.gap[0] if len(solution.gap) == 1 else (objective - bound) / objective),
        violation=known(solution.violation.amax()),
        epsilon=known(torch.linalg.vector_norm(solution.epsilon) / size),
        pattern=problem.pattern.name,
        steps=int(solution.steps.amax()),
        seconds=seconds,
        status=Status(int(solution.status.amax())).name,
    )
