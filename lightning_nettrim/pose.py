"""Pose: the program of one layer, from what was recorded and what follows it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_nettrim.fold import Fold
from lightning_nettrim.pattern import Pattern
from lightning_nettrim.plan import Budget
from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.rectifier import Rectifier

GAMMA = 1.1
"""Slack γ of the cascade's ball, ε² ≥ γ‖(XW − Y)_Ω‖², which keeps the trained weights feasible [Aghasi et al. 2020]."""

ANCHOR = 1e-2
"""How strongly weights are held to the trained ones where there are as few samples as inputs.

A fit of few samples answers to them alone, and to all other inputs with whatever weights that takes; through the layers
of a deep network this explodes.
"""


def pose(
    fold: Fold,
    X: Tensor,
    Y: Tensor,
    offset: Tensor | None,
    wanted: Budget,
    convex: bool,
    trained_signal: bool,
    ranks: Ranks = ALONE,
) -> LayerProblem:
    """One layer's program, behind what follows it: parallel on the trained signal, else the cascade's.

    For the convex program, of which the trained weights must stay feasible, the cascade asks ε² ≥ γ‖(XW − Y)_Ω‖²
    and takes V = max(XW, 0) for its ceiling: what is below zero off Ω is zero after the ReLU, so the paper's V = XW
    would only forbid answers that are as good. Other methods answer as the trained layer did. A slope has no place
    in the convex program: there the response is linear.

    Args:
        fold: the layer and what follows it.
        X: ``(groups, P, N)`` what it sees, with the column of ones that the fold asks for.
        Y: ``(groups, P, M)`` what it answered when trained.
        offset: ``(groups, P or 1, M)`` what is added to its products.
        wanted: its budget.
        convex: whether it is for a method that solves the convex program.
        trained_signal: whether X is the trained network's.
        ranks: the processes over which the samples are spread.
    """
    rectifier = fold.rectifier
    if convex and rectifier is not None and rectifier.slope is not None:
        Y, rectifier = torch.where(Y > 0, Y, rectifier.inverse(Y)), None
    problem = LayerProblem(
        X,
        Y,
        fold.matrix(),
        sparsity=wanted.sparsity,
        Omega=None if rectifier is None else rectifier.inside(Y),
        rectifier=rectifier or Rectifier(),
        offset=None if offset is None else offset.expand_as(Y),
        penalty=fold.layer.penalty(X) if fold.total else None,
        pattern=Pattern(wanted.pattern),
        groups=fold.layer.groups,
        ranks=ranks,
    )
    problem = replace(problem, anchor=_anchor(problem.samples(), X.shape[-1]))
    norm = ranks.norm(torch.linalg.matrix_norm(Y))
    radius = (wanted.epsilon or 1e-3) * torch.where(norm > 0, norm, 1)
    if not convex:
        return replace(problem, epsilon=radius)
    U = X @ problem.W if problem.offset is None else X @ problem.W + problem.offset
    missed = ranks.norm(torch.linalg.matrix_norm(problem.on_Omega(U - Y))) * GAMMA**0.5
    ceiling = None
    if not trained_signal and rectifier is not None:
        ceiling = torch.where(problem.floors, U.clamp(max=rectifier.high), U.clamp(min=rectifier.low))
    return replace(problem, epsilon=torch.maximum(radius, missed), V=ceiling)


def _anchor(P: int, N: int) -> float:
    """ANCHOR·(N/P)⁸: nothing to speak of from four samples for each input on."""
    held = min(ANCHOR * (N / P) ** 8, 1e4)
    return held if held > 1e-7 else 0.0
