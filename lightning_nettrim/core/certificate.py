"""Certificates of the convex program: violation of its constraints, lower bounds of its optimum, duality gap."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.reductions import norm, reduce_over
from lightning_nettrim.core.streaming import row_blocks


def duality_gap(problem: LayerProblem, objective: Tensor, bound: Tensor) -> Tensor:
    """``(*batch)``: (objective − bound) / max(|objective|, |bound|, 0.001·‖λW‖₁ of the trained weights).

    The third term defines a relative gap if the optimum is zero.
    """
    size = torch.maximum(objective.abs(), bound.abs())
    size = torch.maximum(size, 1e-3 * problem.objective(problem.W))
    return (objective - bound) / torch.where(size > 0, size, 1)


def violation(problem: LayerProblem, W: Tensor) -> Tensor:
    """``(*batch)``: distance of W from the ball or above the limits, the larger of the two, relative to ε."""
    return violation_and_price(problem, W, torch.zeros_like(problem.Y[..., :1, :1]).expand_as(problem.Y))[0]


def violation_and_price(problem: LayerProblem, W: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """``(*batch)`` each: the violation of W, and its price at the multipliers ν of the constraints.

    A violation lowers the objective below the optimum, to first order by ‖ν_Ω‖ times the excess over ε plus
    ⟨|ν_Ωᶜ|, excess over V⟩.
    """
    zero = problem.radius.new_zeros(())
    ball, above, dual_norm, price = zero, zero, zero, zero
    for rows, part in row_blocks(problem):
        R, dual = part.X @ W - part.center, nu[..., rows, :]
        ball = torch.hypot(ball, norm(part.on_Omega(R), problem.ball_dims))
        dual_norm = torch.hypot(dual_norm, norm(part.on_Omega(dual), problem.ball_dims))
        excess = part.off_Omega(R).clamp_(min=0)
        above = torch.hypot(above, norm(excess))
        price = price + reduce_over((-2, -1), torch.sum, excess.mul_(part.off_Omega(dual).clamp_(max=0)))
    ball, above, dual_norm = (problem.processes.norm(length) for length in (ball, above, dual_norm))
    excess = (ball - problem.radius).clamp(min=0)
    price = reduce_over((-2, -1), torch.sum, dual_norm * excess) - problem.processes.sum(price)
    return (torch.maximum(norm(excess), above) / norm(problem.radius))[..., 0, 0], price[..., 0, 0]


def dual_bound(problem: LayerProblem, nu: Tensor) -> Tensor:
    r"""``(*batch)``: a lower bound of the optimum from any dual point ν, ``(*batch, P, M)``.

    ⟨ν_Ω, Y_Ω⟩ − ε‖ν_Ω‖ + ⟨ν_Ωᶜ, V_Ωᶜ⟩ ≤ min Σ λₙ|Wₙₘ| whenever |Xᵀν| ≤ λ and ν ≤ 0 off Ω (≥ 0 at lower limits). ν is
    made feasible first: clipped off Ω, shifted on Ω until Xᵀν vanishes on free rows, then scaled column by column.
    """
    lam = problem.lambdas
    free = problem.free_rows
    shift, solved = _balance_free_rows(problem, nu, free) if len(free) else (None, 1.0)
    slope = torch.zeros_like(problem.W)
    for rows, part in row_blocks(problem):
        slope += part.X.mT @ _clipped(part, nu[..., rows, :], free, shift)
    slope = problem.processes.sum(slope)
    scale = solved / torch.where(lam > 0, slope.abs() / lam, 0).amax(-2, keepdim=True).clamp(min=1)
    value, ball = scale.new_zeros(()), scale.new_zeros(())
    for rows, part in row_blocks(problem):
        dual = _clipped(part, nu[..., rows, :], free, shift) * scale
        value = value + reduce_over((-2, -1), torch.sum, dual * part.center)
        ball = torch.hypot(ball, norm(part.on_Omega(dual), problem.ball_dims))
    value, ball = problem.processes.sum(value), problem.processes.norm(ball)
    return (value - reduce_over((-2, -1), torch.sum, problem.radius * ball))[..., 0, 0]


def _clipped(problem: LayerProblem, nu: Tensor, free: Tensor, shift: Tensor | None = None) -> Tensor:
    """ν clipped off Ω and shifted on Ω along the free inputs."""
    shifted = nu if shift is None else nu - problem.X[..., free] @ shift
    if problem.Omega is None:
        return shifted
    clipped = nu.clamp(max=0)
    if problem.has_upper_bound:
        clipped = torch.where(problem.at_upper_bound, nu.clamp(min=0), clipped)
    return torch.where(problem.Omega, shifted, clipped)


def _balance_free_rows(problem: LayerProblem, nu: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The least shift on Ω, ``(*batch, F, M)``, for which Xᵀν = 0 on the F free rows, and whether it exists."""
    total = normal = torch.zeros((), dtype=torch.float64, device=nu.device)
    for rows, part in row_blocks(problem):
        A, clipped = part.X[..., free].double(), _clipped(part, nu[..., rows, :], free).double()
        on = torch.ones_like(clipped) if part.Omega is None else part.Omega.double()
        pairs = (A.unsqueeze(-1) * A.unsqueeze(-2)).flatten(-2)  # (*batch, P, F²)
        # not as a product, whose rounding depends on the batch and on the number of threads
        sums = [reduce_over((-2,), torch.sum, clipped * a.unsqueeze(-1)).squeeze(-2) for a in A.unbind(-1)]
        total = total + torch.stack(sums, -1).unsqueeze(-1)  # (*batch, M, F, 1)
        normal = normal + (on.mT @ pairs).unflatten(-1, total.shape[-2:-1] * 2)
    total, normal = problem.processes.sum(total), problem.processes.sum(normal)
    # one row needs no factorization, for whose success the host would wait
    inverse = torch.where(normal > 0, 1 / normal, 0) if len(free) == 1 else torch.linalg.pinv(normal, hermitian=True)
    shift = inverse @ total
    residual = torch.linalg.vector_norm(total - normal @ shift, dim=(-2, -1))
    solved = residual <= 1e-9 * torch.linalg.vector_norm(total, dim=(-2, -1)).clamp(min=1e-300)
    return shift.squeeze(-1).mT.to(nu), solved.unsqueeze(-2).to(nu)
