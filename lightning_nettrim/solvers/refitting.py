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
"""Ridge of the curvature relative to the mean diagonal of XᵀX; above 1e-6 it costs accuracy."""

MAX_GRAM_RATIO = 16
"""The Gram matrix is computed for at most so many inputs per output; for more of them it costs more than it saves."""


@matmul_precision("highest")
def refit(
    problem: LayerProblem, W: Tensor, *, max_steps: int = 60, cg_steps: int = 30, rtol: float = 1e-6, atol: float = 0.0
) -> Tensor:
    r"""Argmin ½ dist²(XW, K) over W with the given support; K = {Z : Z_Ω = Y_Ω, Z_Ωᶜ ≤ V_Ωᶜ}.

    Nonlinear conjugate gradients (Polak–Ribière), for all neurons together, each with a step of its own: the exact one
    for the active set A = Ω ∪ {XW > V}, halved until the merit decreases. The preconditioner is the inverse of the
    masked Gram matrix, mask∘(XᵀX + λ)∘mask with a small damping λ, by linear conjugate gradients to a relative residual
    of 1/20; it exceeds the curvature, which is that of A, by what is not active. With fewer samples than inputs, or
    many inputs per output, it is the diagonal. The merit is the root of dist² plus the ridge terms of the problem and
    of rare inputs.

    Args:
        problem: the problem of a layer; ``epsilon`` is not used.
        W: ``(*batch, N, M)`` weights whose nonzeros are the support; free rows always belong to it.
        max_steps: maximum number of steps, each with two products with X.
        cg_steps: maximum number of products with the Gram matrix in each step. With the diagonal, so many steps count
            as one.
        rtol: stop when the relative decrease of the merit in a step is at most this in every problem.
        atol: or when the decrease is at most this fraction of ‖Y‖.

    Returns:
        ``(*batch, N, M)`` weights on the same support, whose merit is at most that of ``W``.

    References:
        Nocedal, Wright, "Numerical Optimization", 2006, Section 5.2.
    """
    problem = replace(problem, X=problem.X.to(problem.Y.device))
    X, processes = problem.X, problem.processes
    support = ((W != 0) | (problem.lambdas == 0)).to(W)
    energy = processes.sum(column_energy(X))
    ridge = (problem.ridge * energy + rare_input_ridge(energy) * (problem.lambdas > 0)) * support
    damped_ridge = DAMPING * energy.mean(-2, keepdim=True) + ridge
    diagonal = support / (energy + damped_ridge).clamp(min=torch.finfo(W.dtype).tiny)
    with_gram = X.shape[-1] <= min(problem.num_samples(), MAX_GRAM_RATIO * W.shape[-1])
    gram = processes.sum(X.mT @ X) if with_gram else None

    def precondition(G: Tensor) -> Tensor:
        if gram is None:
            return diagonal * G
        return _conjugate_gradients(lambda D: support * (gram @ D).add_(damped_ridge * D), G, diagonal, cg_steps)

    XW = X @ W
    R, merit = _evaluate(problem, W, XW, ridge)
    smallest = atol * processes.norm(torch.linalg.matrix_norm(problem.Y, keepdim=True))
    direction = last_G = torch.zeros_like(W)
    descent, before = merit.new_ones(()), merit
    period = 1 if with_gram else cg_steps
    for step in range(max_steps * period):
        G = support * processes.sum(X.mT @ R) + ridge * (problem.W - W)  # minus the gradient
        Z = precondition(G)
        direction = Z + _ratio(_dot(Z, G - last_G), descent).clamp(min=0) * direction
        direction = torch.where(_dot(direction, G) > 0, direction, Z)
        last_G, descent = G, _dot(Z, G)
        XD = X @ direction
        squares = XD.square() if problem.Omega is None else XD.square().mul_(_active(problem, XW, R))
        curvature = processes.sum(squares.sum(-2, keepdim=True)) + (damped_ridge * direction.square()).sum(-2, True)
        length = _ratio(_dot(direction, G), curvature)
        W, XW, R, merit = _descend(problem, (W, XW, R, merit), (length * direction, XD.mul_(length)), ridge)
        if step % period == period - 1:
            if not bool((merit < before - torch.maximum(rtol * before, smallest)).any()):
                break
            before = merit
    return W


def column_energy(X: Tensor) -> Tensor:
    """``(*batch, N, 1)``: the diagonal of XᵀX, without a temporary of the size of X."""
    return torch.linalg.vector_norm(X, dim=-2).square().unsqueeze(-1)


def rare_input_ridge(energy: Tensor) -> Tensor:
    """``(*batch, N, 1)``: ridge towards the trained weights of each input, from the energies ‖Xₙ‖²."""
    mean = energy.mean(-2, keepdim=True)
    ridge = RARE_INPUT_RIDGE * mean / (1 + (energy / (RARE_INPUT_ENERGY * mean)).square())
    return torch.where(mean > 0, ridge, 0)


def _dot(A: Tensor, B: Tensor) -> Tensor:
    """``(*batch, 1, M)``: the inner product of each column."""
    return (A * B).sum(-2, keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, 0)


def _evaluate(problem: LayerProblem, W: Tensor, XW: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """``(*batch, P, M)`` Π_K(XW) − XW, and ``(*batch, 1, 1)`` the root of dist²(XW, K) + Σ ridge·(W − W₀)²."""
    R = _residual(problem, XW)
    total = problem.processes.norm(_local_distance(problem, XW, R))
    return R, torch.hypot(total, torch.linalg.matrix_norm(ridge.sqrt() * (problem.W - W), keepdim=True))


def distance(problem: LayerProblem, W: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: dist(XW, K)."""
    total = W.new_zeros(())
    for _, part in row_blocks(problem):
        XW = part.X @ W
        total = torch.hypot(total, _local_distance(part, XW, _residual(part, XW)))
    return problem.processes.norm(total)


def _residual(problem: LayerProblem, XW: Tensor) -> Tensor:
    """``(*batch, P, M)``: Π_K(XW) − XW."""
    return project_responses(problem, XW) - XW


def _local_distance(problem: LayerProblem, XW: Tensor, R: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: dist(XW, K) of the rows of this process; for a slope, weighted as by `project_responses`.

    R is the residual Π_K(XW) − XW.
    """
    if problem.Omega is None or problem.rectifier.slope is None:
        return torch.linalg.matrix_norm(R, keepdim=True)
    T, Z = project_responses(replace(problem, rectifier=Rectifier()), XW), XW + R
    alpha = torch.where(problem.Omega, 0, problem.rectifier.slope)
    # Z − T = α²(Z₀ − T), and T = XW below the limit; the error there is α(Z₀ − XW)
    error = (Z - T) / alpha.clamp(min=1e-12) + alpha * (T - XW)
    return torch.hypot(norm((1 - alpha.square()).sqrt() * (T - XW)), norm(error))


def _active(problem: LayerProblem, XW: Tensor, R: Tensor) -> Tensor:
    """``(*batch, P, M)``: weights of the errors, 1 on Ω and beyond the limit, α² (0 without a slope) elsewhere."""
    assert problem.Omega is not None
    if (slope := problem.rectifier.slope) is None:
        return (problem.Omega | (R != 0)).to(XW)
    return torch.where(problem.Omega | (problem.center < XW), 1, slope.square()).to(XW)


def _descend(
    problem: LayerProblem, at: tuple[Tensor, Tensor, Tensor, Tensor], step: tuple[Tensor, Tensor], ridge: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, XW, the residual and the merit after t times a step, for the first t of 1, ½, …, 1/16, 0 that decreases it.

    Args:
        problem: the problem.
        at: W, XW, the residual and the merit before the step.
        step: D, to be added to W, and XD.
        ridge: of the merit.
    """
    W, XW, _, merit = at
    t = torch.ones_like(merit)
    for halvings in range(6):
        new_W, new_XW = W + t * step[0], XW + t * step[1]
        R, new_merit = _evaluate(problem, new_W, new_XW, ridge)
        worse = ~(new_merit < merit) & (t > 0)
        if not bool(worse.any()):
            break
        t = torch.where(worse, t / 2 if halvings < 4 else 0, t)
    return new_W, new_XW, R, new_merit


def _conjugate_gradients(curvature: Callable[[Tensor], Tensor], b: Tensor, scale: Tensor, steps: int) -> Tensor:
    """Solve curvature(D) = b from D = 0, column by column, with the preconditioner ``scale``, to a residual of 1/20."""
    D, R = torch.zeros_like(b), b
    Q = scale * R
    P, rho = Q, _dot(R, Q)
    initial = rho.sum((-2, -1))
    for step in range(steps):
        AP = curvature(P)
        alpha = _ratio(rho, _dot(P, AP))
        D, R = D + alpha * P, R - alpha * AP
        Q = scale * R
        rho, previous = _dot(R, Q), rho
        if step % 5 == 4 and bool((rho.sum((-2, -1)) <= initial / 400).all()):
            break
        P = Q + _ratio(rho, previous) * P
    return D
