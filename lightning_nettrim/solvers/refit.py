"""Refit: on a fixed support, the weights whose response is closest to the trained layer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.prox import project_responses
from lightning_nettrim.rectifier import Rectifier
from lightning_nettrim.solvers.base import coarse_products
from lightning_nettrim.sums import norm

HOLD, RARE = 1e-3, 1e-2
"""How strongly the weights of an input without energy are held to the trained ones, relative to the mean energy of all
inputs, and the energy by the same measure below which one is held.

An input that the samples hardly show would get whatever weight fits them, and answer to others with it: through a deep
network that explodes.
"""

DAMPING = 1e-7
"""Ridge of the normal equations relative to the mean diagonal of XᵀX; above 1e-6 it costs accuracy."""


def refit(
    problem: LayerProblem, W: Tensor, *, steps: int = 8, inner: int = 30, rtol: float = 1e-6, tf32: bool = True
) -> Tensor:
    r"""Argmin ½ dist²(XW, K) over W with the given support; K = {Z : Z_Ω = Y_Ω, Z_Ωᶜ ≤ V_Ωᶜ}.

    Semismooth Newton: on the active set A = Ω ∪ {XW > V} the masked normal equations
    mask∘(Xᵀ(A∘(Xp)) + λp), λ a trace of damping, are solved by conjugate gradients with a Jacobi preconditioner to a
    twentieth of their right-hand side, all neurons at once, each step halved until the distance falls. A linear
    response has A everywhere and needs only the Gram matrix. The problem's anchor counts as distance.

    Args:
        problem: the layer's program; ``epsilon`` is not used.
        W: ``(*batch, N, M)`` weights whose non-zeros are the support; free rows always belong to it.
        steps: Newton steps at most.
        inner: conjugate gradient steps in each at most; five times as many on a Gram matrix.
        rtol: ends when a step lowers no problem's distance by more, relatively.
        tf32: let the products of a direction, not those of a residual, use faster formats.

    Returns:
        ``(*batch, N, M)`` weights on the same support, never farther than ``W``.
    """
    problem = replace(problem, X=problem.X.to(problem.Y.device))
    X = problem.X
    support = ((W != 0) | (problem.weights == 0)).to(W)
    energy = problem.ranks.sum(X.square().sum(-2)).unsqueeze(-1)  # (*batch, N, 1), the diagonal of XᵀX
    pull = (problem.anchor * energy + held(energy) * (problem.weights > 0)) * support
    ridge = DAMPING * energy.mean(-2, keepdim=True) + pull
    scale = support / (energy + ridge).clamp(min=torch.finfo(W.dtype).tiny)
    linear = problem.Omega is None and X.shape[-1] <= problem.samples()
    gram = problem.ranks.sum(X.mT @ X) if linear else None
    XW = X @ W
    R, far = _residual(problem, XW), _merit(problem, W, XW, pull)
    for _ in range(steps):
        if gram is None:
            active = torch.ones_like(R) if problem.Omega is None else _active(problem, XW, R)

            def curvature(D: Tensor, active: Tensor = active) -> Tensor:
                return support * problem.ranks.sum(X.mT @ (X @ D).mul_(active)).add_(ridge * D)
        else:

            def curvature(D: Tensor, active: Tensor = gram) -> Tensor:
                return support * (active @ D).add_(ridge * D)

        slope = support * problem.ranks.sum(X.mT @ R) + pull * (problem.W - W)
        with coarse_products(tf32):
            D = _conjugate_gradients(curvature, slope, scale, inner if gram is None else 5 * inner)
        W, XW = _descend(problem, W, XW, D, far, pull)
        R, far, before = _residual(problem, XW), _merit(problem, W, XW, pull), far
        if bool((far >= (1 - rtol) * before).all()):
            break
    return W


def held(energy: Tensor) -> Tensor:
    """``(*batch, N, 1)``: how strongly weights are held to the trained ones, by the energies of their inputs."""
    mean = energy.mean(-2, keepdim=True)
    return torch.where(mean > 0, HOLD * mean / (1 + (energy / (RARE * mean)).square()), 0)


def _merit(problem: LayerProblem, W: Tensor, XW: Tensor, pull: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: the distance and the pull of the anchor in one."""
    far = problem.ranks.norm(_far(problem, XW))
    return torch.hypot(far, torch.linalg.matrix_norm(pull.sqrt() * (problem.W - W), keepdim=True))


def distance(problem: LayerProblem, W: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: dist(XW, K)."""
    far = W.new_zeros(())
    for _, part in problem.blocks():
        far = torch.hypot(far, _far(part, part.X @ W))
    return problem.ranks.norm(far)


def _residual(problem: LayerProblem, XW: Tensor) -> Tensor:
    """``(*batch, P, M)``: Π_K(XW) − XW."""
    return project_responses(problem, XW) - XW


def _far(problem: LayerProblem, XW: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: dist(XW, K) of this process's rows; below a slope, as `project_responses` weighs it."""
    if problem.Omega is None or problem.rectifier.slope is None:
        return torch.linalg.matrix_norm(_residual(problem, XW), keepdim=True)
    beyond = replace(problem, rectifier=Rectifier())
    T, Z = project_responses(beyond, XW), project_responses(problem, XW)
    alpha = torch.where(problem.Omega, 0, problem.rectifier.slope)
    # Z − T = α²(trained − T), and T = XW below the bound
    below = (Z - T) / alpha.clamp(min=1e-12) + alpha * (T - XW)
    return torch.hypot(norm((1 - alpha.square()).sqrt() * (T - XW)), norm(below))


def _active(problem: LayerProblem, XW: Tensor, R: Tensor) -> Tensor:
    """``(*batch, P, M)``: what an entry's error counts, 1 on Ω and beyond a bound, α² below it."""
    assert problem.Omega is not None
    if (slope := problem.rectifier.slope) is None:
        return (problem.Omega | (R != 0)).to(XW)
    return torch.where(problem.Omega | (problem.centre < XW), 1, slope.square()).to(XW)


def _descend(
    problem: LayerProblem, W: Tensor, XW: Tensor, D: Tensor, far: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor]:
    """W + tD for the largest t of 1, ½, ¼, … that lowers the merit, in each problem of the batch; else W."""
    XD = problem.X @ D
    taken = torch.zeros_like(far)
    for halvings in range(5):
        t = 0.5**halvings
        lower = _merit(problem, W + t * D, XW + t * XD, pull) < far
        taken = torch.where(lower & (taken == 0), t, taken)
        if bool((taken > 0).all()):
            break
    return W + taken * D, XW + taken * XD


def _conjugate_gradients(curvature: Callable[[Tensor], Tensor], b: Tensor, scale: Tensor, steps: int) -> Tensor:
    """Solve curvature(D) = b column by column, preconditioned by ``scale``, from zero, to a twentieth of b."""
    D, R = torch.zeros_like(b), b
    Q = scale * R
    P, rho = Q, (R * Q).sum(-2, keepdim=True)
    first = rho.sum((-2, -1))
    for _ in range(steps):
        AP = curvature(P)
        slope = (P * AP).sum(-2, keepdim=True)
        alpha = torch.where(slope > 0, rho / slope, 0)
        D, R = D + alpha * P, R - alpha * AP
        Q = scale * R
        rho, previous = (R * Q).sum(-2, keepdim=True), rho
        if bool((rho.sum((-2, -1)) <= first / 400).all()):
            break
        P = Q + torch.where(previous > 0, rho / previous, 0) * P
    return D
