"""Refit of the weights on a fixed support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.core.precision import matmul_precision
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.prox import project_responses
from lightning_nettrim.core.reductions import norm
from lightning_nettrim.core.streaming import row_blocks

RARE_INPUT_RIDGE, RARE_INPUT_ENERGY = 1e-3, 1e-2
"""Ridge towards the trained weights for an input without energy, and the energy below which a ridge is applied.

Both relative to the mean energy of all inputs. The weights of an input that is nearly always zero in the samples are
not determined by them; without a ridge they would overfit, and in deep networks the errors would grow.
"""

DAMPING = 1e-7
"""Ridge of the normal equations relative to the mean diagonal of XᵀX; above 1e-6 it costs accuracy."""


@matmul_precision("highest")
def refit(
    problem: LayerProblem, W: Tensor, *, max_steps: int = 8, cg_steps: int = 30, rtol: float = 1e-6, atol: float = 0.0
) -> Tensor:
    r"""Argmin ½ dist²(XW, K) over W with the given support; K = {Z : Z_Ω = Y_Ω, Z_Ωᶜ ≤ V_Ωᶜ}.

    Semismooth Newton: on the active set A = Ω ∪ {XW > V} the masked normal equations
    mask∘(Xᵀ(A∘(Xp)) + λp), with a small damping λ, are solved by conjugate gradients with a Jacobi preconditioner to a
    relative residual of 1/20, for all neurons together; each step is halved until the merit decreases. For a linear
    response A is everywhere and only the Gram matrix is needed. The merit is the root of dist² plus the ridge terms
    of the problem and of rare inputs.

    Args:
        problem: the problem of a layer; ``epsilon`` is not used.
        W: ``(*batch, N, M)`` weights whose nonzeros are the support; free rows always belong to it.
        max_steps: maximum number of Newton steps.
        cg_steps: maximum number of conjugate gradient steps in each; five times as many with a Gram matrix.
        rtol: stop when the relative decrease of the merit is at most this in every problem.
        atol: or when the decrease is at most this fraction of ‖Y‖.

    Returns:
        ``(*batch, N, M)`` weights on the same support, whose merit is at most that of ``W``.
    """
    problem = replace(problem, X=problem.X.to(problem.Y.device))
    X = problem.X
    support = ((W != 0) | (problem.lambdas == 0)).to(W)
    energy = problem.processes.sum(column_energy(X))
    ridge = (problem.ridge * energy + rare_input_ridge(energy) * (problem.lambdas > 0)) * support
    damped_ridge = DAMPING * energy.mean(-2, keepdim=True) + ridge
    scale = support / (energy + damped_ridge).clamp(min=torch.finfo(W.dtype).tiny)
    linear = problem.Omega is None and X.shape[-1] <= problem.num_samples()
    gram = problem.processes.sum(X.mT @ X) if linear else None
    XW = X @ W
    R, merit = _residual(problem, XW), _merit(problem, W, XW, ridge)
    smallest = atol * problem.processes.norm(torch.linalg.matrix_norm(problem.Y, keepdim=True))
    for _ in range(max_steps):
        if gram is None:
            active = torch.ones_like(R) if problem.Omega is None else _active(problem, XW, R)

            def curvature(D: Tensor, A: Tensor = active) -> Tensor:
                return support * problem.processes.sum(X.mT @ (X @ D).mul_(A)).add_(damped_ridge * D)
        else:

            def curvature(D: Tensor, A: Tensor = gram) -> Tensor:
                return support * (A @ D).add_(damped_ridge * D)

        b = support * problem.processes.sum(X.mT @ R) + ridge * (problem.W - W)
        D = _conjugate_gradients(curvature, b, scale, cg_steps if gram is None else 5 * cg_steps)
        W, XW = _descend(problem, W, XW, D, merit, ridge)
        R, merit, previous = _residual(problem, XW), _merit(problem, W, XW, ridge), merit
        if bool((merit >= previous - torch.maximum(rtol * previous, smallest)).all()):
            break
    return W


def column_energy(X: Tensor) -> Tensor:
    """``(*batch, N, 1)``: the diagonal of XᵀX, without a temporary of the size of X."""
    return torch.linalg.vector_norm(X, dim=-2).square().unsqueeze(-1)


def rare_input_ridge(energy: Tensor) -> Tensor:
    """``(*batch, N, 1)``: ridge towards the trained weights of each input, from the energies ‖Xₙ‖²."""
    mean = energy.mean(-2, keepdim=True)
    ridge = RARE_INPUT_RIDGE * mean / (1 + (energy / (RARE_INPUT_ENERGY * mean)).square())
    return torch.where(mean > 0, ridge, 0)


def _merit(problem: LayerProblem, W: Tensor, XW: Tensor, ridge: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: the root of dist²(XW, K) + Σ ridge·(W − W₀)²."""
    total = problem.processes.norm(_local_distance(problem, XW))
    return torch.hypot(total, torch.linalg.matrix_norm(ridge.sqrt() * (problem.W - W), keepdim=True))


def distance(problem: LayerProblem, W: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: dist(XW, K)."""
    total = W.new_zeros(())
    for _, part in row_blocks(problem):
        total = torch.hypot(total, _local_distance(part, part.X @ W))
    return problem.processes.norm(total)


def _residual(problem: LayerProblem, XW: Tensor) -> Tensor:
    """``(*batch, P, M)``: Π_K(XW) − XW."""
    return project_responses(problem, XW) - XW


def _local_distance(problem: LayerProblem, XW: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: dist(XW, K) of the rows of this process; for a slope, weighted as by `project_responses`."""
    if problem.Omega is None or problem.rectifier.slope is None:
        return torch.linalg.matrix_norm(_residual(problem, XW), keepdim=True)
    without_slope = replace(problem, rectifier=Rectifier())
    T, Z = project_responses(without_slope, XW), project_responses(problem, XW)
    alpha = torch.where(problem.Omega, 0, problem.rectifier.slope)
    # Z − T = α²(Z₀ − T), and T = XW below the limit; R = α(Z₀ − XW)
    R = (Z - T) / alpha.clamp(min=1e-12) + alpha * (T - XW)
    return torch.hypot(norm((1 - alpha.square()).sqrt() * (T - XW)), norm(R))


def _active(problem: LayerProblem, XW: Tensor, R: Tensor) -> Tensor:
    """``(*batch, P, M)``: weights of the errors, 1 on Ω and beyond the limit, α² (0 without a slope) elsewhere."""
    assert problem.Omega is not None
    if (slope := problem.rectifier.slope) is None:
        return (problem.Omega | (R != 0)).to(XW)
    return torch.where(problem.Omega | (problem.center < XW), 1, slope.square()).to(XW)


def _descend(
    problem: LayerProblem, W: Tensor, XW: Tensor, D: Tensor, merit: Tensor, ridge: Tensor
) -> tuple[Tensor, Tensor]:
    """W + tD and X(W + tD) for the first t of 1, ½, …, 1/16 that decreases the merit of each problem, else t = 0."""
    XD = problem.X @ D
    step = torch.zeros_like(merit)
    for halvings in range(5):
        t = 0.5**halvings
        decreased = _merit(problem, W + t * D, XW + t * XD, ridge) < merit
        step = torch.where(decreased & (step == 0), t, step)
        if bool((step > 0).all()):
            break
    return W + step * D, XW + step * XD


def _conjugate_gradients(curvature: Callable[[Tensor], Tensor], b: Tensor, scale: Tensor, steps: int) -> Tensor:
    """Solve curvature(D) = b from D = 0, column by column, with the preconditioner ``scale``, to a residual of 1/20."""
    D, R = torch.zeros_like(b), b
    Q = scale * R
    P, rho = Q, (R * Q).sum(-2, keepdim=True)
    initial = rho.sum((-2, -1))
    for _ in range(steps):
        AP = curvature(P)
        PAP = (P * AP).sum(-2, keepdim=True)
        alpha = torch.where(PAP > 0, rho / PAP, 0)
        D, R = D + alpha * P, R - alpha * AP
        Q = scale * R
        rho, previous = (R * Q).sum(-2, keepdim=True), rho
        if bool((rho.sum((-2, -1)) <= initial / 400).all()):
            break
        P = Q + torch.where(previous > 0, rho / previous, 0) * P
    return D
