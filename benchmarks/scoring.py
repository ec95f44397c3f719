"""Scores of a solution, computed in float64 from its weights alone, in the same way for every solver."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_nettrim import LayerProblem
from lightning_nettrim.core.certificate import violation


@dataclass(frozen=True)
class Score:
    """The scores of a solution.

    Attributes:
        objective: Σ λ|W|, in the units of ``W``.
        gap: (objective − optimum) / |optimum|; NaN if no optimum was given.
        violation: of the constraints, relative to ε.
        sparsity: fraction of zeros in the penalized rows.
        local_error: ‖response(W) − Y‖_F / ‖Y‖_F.
        seconds: run time of the solver.
    """

    objective: float
    gap: float
    violation: float
    sparsity: float
    local_error: float
    seconds: float

    @property
    def optimality_error(self) -> float:
        """The larger of |gap| and violation."""
        return max(abs(self.gap), self.violation)


def cast(problem: LayerProblem, *, device: str | None = None, dtype: torch.dtype | None = None) -> LayerProblem:
    """The same problem on another device or with its floating-point tensors in another dtype."""
    tensors = {f.name: getattr(problem, f.name) for f in fields(problem)}
    tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(
        problem,
        **{n: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for n, t in tensors.items()},
    )


def score(problem: LayerProblem, W: Tensor, seconds: float, optimum: float = float("nan")) -> Score:
    """Compute the scores of ``W`` in float64.

    Args:
        problem: one problem, without batch dimensions.
        W: ``(N, M)`` weights of the solution.
        seconds: run time of the solver.
        optimum: best known optimum of the problem, in the units of ``W``.

    Returns:
        The scores. Only ``W`` and ``seconds`` come from the solver.

    Raises:
        ValueError: if the shape of ``W`` differs from that of the trained weights.
    """
    if W.shape != problem.W.shape:
        raise ValueError(f"W: expected shape {tuple(problem.W.shape)}, got {tuple(W.shape)}")
    exact = cast(problem, dtype=torch.float64)
    W = W.to(exact.W)
    objective = float(exact.objective(W))
    return Score(
        objective=objective,
        gap=float(objective - optimum) / abs(optimum) if optimum else float("inf"),
        violation=float(violation(exact, W)),
        sparsity=float((W[exact.lambdas.squeeze(-1) > 0] == 0).double().mean()),
        local_error=float(exact.local_error(W)),
        seconds=seconds,
    )
