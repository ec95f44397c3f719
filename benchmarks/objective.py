"""The one judge of every solver: figures of an answer from its weights alone, in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_nettrim import LayerProblem


@dataclass(frozen=True)
class Score:
    """What a pair of weights and seconds is worth.

    Attributes:
        objective: Σ λ|W|, in the units of ``W``.
        gap: (objective − optimum) / |optimum|; NaN where no optimum was given.
        violation: of the constraints, relative to ε.
        sparsity: fraction of zeros in the penalized rows.
        relative_error: ‖response(W) − Y‖_F / ‖Y‖_F.
        seconds: that the solver took.
    """

    objective: float
    gap: float
    violation: float
    sparsity: float
    relative_error: float
    seconds: float

    @property
    def error(self) -> float:
        """The larger of |gap| and violation: what a solver is asked to bring down."""
        return max(abs(self.gap), self.violation)


def cast(problem: LayerProblem, *, device: str | None = None, dtype: torch.dtype | None = None) -> LayerProblem:
    """The same program on another device or with its numbers, not its mask, in another dtype."""
    tensors = {f.name: getattr(problem, f.name) for f in fields(problem)}
    tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(
        problem,
        **{n: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for n, t in tensors.items()},
    )


def score(problem: LayerProblem, W: Tensor, seconds: float, optimum: float = float("nan")) -> Score:
    """Judge ``W`` in float64.

    Args:
        problem: one program, without batch dimensions.
        W: ``(N, M)`` answer.
        seconds: that it took.
        optimum: best known value of the program, in the units of ``W``.

    Returns:
        The figures; nothing in them comes from the solver but ``W`` and ``seconds``.

    Raises:
        ValueError: if ``W`` is not shaped like the trained weights.
    """
    if W.shape != problem.W.shape:
        raise ValueError(f"W: expected shape {tuple(problem.W.shape)}, got {tuple(W.shape)}")
    exact = cast(problem, dtype=torch.float64)
    W = W.to(exact.W)
    objective = float(exact.objective(W))
    return Score(
        objective=objective,
        gap=float(objective - optimum) / abs(optimum) if optimum else float("inf"),
        violation=float(exact.violation(W)),
        sparsity=float((W[exact.weights.squeeze(-1) > 0] == 0).double().mean()),
        relative_error=float(exact.local_error(W)),
        seconds=seconds,
    )
