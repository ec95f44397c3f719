"""Published one-shot methods: magnitude, Wanda, SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_nettrim.core.blocks import input_blocks
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.prox import project_pattern
from lightning_nettrim.core.streaming import gram
from lightning_nettrim.solvers.base import Solution, Solver


@dataclass(frozen=True)
class Magnitude(Solver):
    """Keep the largest |W|; uses no data."""

    uses_folded_layer: ClassVar[bool] = False

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Solve a problem with a ``sparsity``; there is no certificate."""
        return Solution.uncertified(project_pattern(problem, problem.W))


@dataclass(frozen=True)
class Wanda(Solver):
    """Keep the largest |Wₙₘ|·‖Xₙ‖₂; published with the pattern ``per_neuron`` (or n:m) and without a refit.

    References:
        Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, eq. (1).
    """

    uses_folded_layer: ClassVar[bool] = False

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Solve a problem with a ``sparsity``; there is no certificate."""
        energy = sum(X.square().sum(-2) for _, X in input_blocks(problem.X, problem.Y.device))
        score = problem.W.square() * problem.processes.sum(energy).unsqueeze(-1)  # type: ignore[arg-type]
        return Solution.uncertified(project_pattern(problem, problem.W, score))


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Prune input after input and compensate each on the inputs that follow; published without a refit.

    In each block of inputs the weights with the least w²/[chol(H⁻¹)]² are pruned, H = XᵀX with damping; the error of a
    pruned weight is compensated on the inputs after it by the Cholesky factor. If the blocks of a pattern extend over
    several blocks of inputs, all are chosen before the first input.

    Args:
        block_size: number of inputs whose weights are chosen together.
        damping: ridge, relative to the mean diagonal of H.

    References:
        Frantar, Alistarh, "SparseGPT", ICML 2023, Algorithm 1.
    """

    uses_folded_layer: ClassVar[bool] = False

    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("block_size", "damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SparseGPT.{name}: expected > 0, got {getattr(self, name)}")

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Solve a problem with a ``sparsity``; there is no certificate."""
        whole, problem = problem, problem.flattened()
        rows = problem.penalized_rows
        root = self._root(problem, rows)
        diagonal = root.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        W, kept_before = problem.W[:, rows].clone(), 0
        span = problem.pattern.span(len(rows))
        size = min(max(span, self.block_size // span * span), len(rows))
        for start in range(0, len(rows), size):
            stop = min(start + size, len(rows))
            now = slice(start, stop)
            kept_until = round(stop / len(rows) * problem.kept_blocks)
            choice = problem.keep_largest(
                W[:, now].square() / diagonal[:, now].square(),
                problem.kept_blocks if span > 1 else kept_until - kept_before,
            )
            kept_before = kept_until
            errors = torch.zeros_like(W[:, now])
            for i in range(start, stop):
                lost = torch.where(choice[:, i - start], 0, W[:, i]) / diagonal[:, i]
                W[:, i] = torch.where(choice[:, i - start], W[:, i], 0)
                W[:, i + 1 : stop] -= root[:, i, i + 1 : stop].unsqueeze(-1) * lost.unsqueeze(-2)
                errors[:, i - start] = lost
            W[:, stop:] -= root[:, now, stop:].mT @ errors
        pruned = problem.W.clone()
        pruned[:, rows] = W
        return Solution.uncertified(project_pattern(problem, pruned).reshape(whole.W.shape))

    def _root(self, problem: LayerProblem, rows: Tensor) -> Tensor:
        """``(B, n, n)`` the upper Cholesky factor of the damped inverse of H on the given inputs."""
        H = gram(problem)[:, rows][..., rows]
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        diagonal += torch.where(diagonal == 0, 1, 0) + self.damping * diagonal.mean(-1, keepdim=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        return torch.linalg.cholesky(inverse, upper=True).to(problem.W)
