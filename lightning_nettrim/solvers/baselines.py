"""Published one-shot baselines behind the same interface, so that a comparison is one line of YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.prox import project_pattern
from lightning_nettrim.solvers.base import Solution, Solver


@dataclass(frozen=True)
class Magnitude(Solver):
    """Keep the largest |W|: blind to the data, the baseline of every comparison."""

    behind: ClassVar[bool] = False

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Needs a ``sparsity``; has neither objective nor certificate, so those are NaN."""
        return Solution.uncertified(project_pattern(problem, problem.W))


@dataclass(frozen=True)
class Wanda(Solver):
    """Keep the largest |Wₙₘ|·‖Xₙ‖₂; published with the pattern ``per_neuron`` (or n:m) and without a refit.

    References:
        Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, eq. (1).
    """

    behind: ClassVar[bool] = False

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Needs a ``sparsity``; has neither objective nor certificate, so those are NaN."""
        energy = sum(X.square().sum(-2) for _, X in problem.inputs())
        score = problem.W.square() * problem.ranks.sum(energy).unsqueeze(-1)  # type: ignore[arg-type]
        return Solution.uncertified(project_pattern(problem, problem.W, score))


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Prune input after input, the later weights making up for it; published without a refit.

    In each block of inputs the weights with the least w²/[chol(H⁻¹)]² go, H = XᵀX with some damping; what a pruned
    weight leaves behind is put on the inputs after it, by the Cholesky factor. Patterns whose blocks reach over several
    of these are chosen before the first.

    Args:
        block: inputs between two choices.
        damping: ridge, relative to the mean diagonal of H.

    References:
        Frantar, Alistarh, "SparseGPT", ICML 2023, Algorithm 1.
    """

    behind: ClassVar[bool] = False

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name in ("block", "damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SparseGPT.{name}: expected > 0, got {getattr(self, name)}")

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Needs a ``sparsity``; has neither objective nor certificate, so those are NaN."""
        whole, problem = problem, problem.flat()
        rows = (problem.weights > 0).squeeze(-1).nonzero().squeeze(-1)
        root = self._root(problem, rows)
        diagonal = root.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        W, kept_before = problem.W[:, rows].clone(), 0
        at_once = problem.pattern.name not in ("unstructured", "per_neuron") and problem.pattern.n_of_m is None
        size = len(rows) if at_once else self._multiple(problem)
        for start in range(0, len(rows), size):
            stop = min(start + size, len(rows))
            now = slice(start, stop)
            kept_until = round(stop / len(rows) * problem.kept)
            choice = problem.choose(
                W[:, now].square() / diagonal[:, now].square(),
                problem.kept if at_once or problem.pattern.n_of_m else kept_until - kept_before,
            )
            kept_before = kept_until
            errors = torch.zeros_like(W[:, now])
            for i in range(start, stop):
                lost = torch.where(choice[:, i - start], 0, W[:, i]) / diagonal[:, i]
                W[:, i] = torch.where(choice[:, i - start], W[:, i], 0)
                W[:, i + 1 : stop] -= root[:, i, i + 1 : stop].unsqueeze(-1) * lost.unsqueeze(-2)
                errors[:, i - start] = lost
            W[:, stop:] -= root[:, now, stop:].mT @ errors
        answer = problem.W.clone()
        answer[:, rows] = W
        return Solution.uncertified(project_pattern(problem, answer).reshape(whole.W.shape))

    def _multiple(self, problem: LayerProblem) -> int:
        """Inputs of a block, a multiple of the pattern's m."""
        m = problem.pattern.n_of_m[1] if problem.pattern.n_of_m else 1
        return max(m, self.block // m * m)

    def _root(self, problem: LayerProblem, rows: Tensor) -> Tensor:
        """``(B, n, n)`` the upper Cholesky factor of the damped inverse of H on the given inputs."""
        H = problem.gram()[:, rows][..., rows]
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        diagonal += torch.where(diagonal == 0, 1, 0) + self.damping * diagonal.mean(-1, keepdim=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        return torch.linalg.cholesky(inverse, upper=True).to(problem.W)
