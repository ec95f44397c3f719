"""Published one-shot baselines behind the same interface, so that a comparison is one line of YAML."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.prox import project_topk
from lightning_nettrim.solvers.base import Solution, Solver, Status


@dataclass(frozen=True)
class Magnitude(Solver):
    """Keep the largest |W| of a layer: blind to the data, the baseline of every comparison."""

    def solve(self, problem: LayerProblem) -> Solution:
        """Needs a ``sparsity``; has neither objective nor certificate, so those are NaN."""
        penalised = problem.weights > 0
        score = torch.where(penalised, problem.W.abs(), -1)
        W = torch.where(penalised, project_topk(problem.W, problem.nonzeros, score), problem.W)
        whole = torch.zeros(problem.batch, dtype=torch.long, device=W.device)
        unknown = W.new_full(problem.batch, torch.nan)
        return Solution(W, whole + Status.CONVERGED, whole, unknown, unknown, unknown, unknown, unknown)
