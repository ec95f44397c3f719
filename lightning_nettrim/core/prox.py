"""Proximal maps and projections: stateless, batched over leading dimensions, one line of mathematics each."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.reductions import norm
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup


def soft_threshold(T: Tensor, threshold: Tensor, *, out: Tensor | None = None) -> Tensor:
    """argmin_S threshold·‖S‖₁ + ½‖S − T‖² = T − min(max(T, −threshold), threshold); shapes broadcast."""
    return torch.sub(T, torch.clamp(T, -threshold, threshold, out=out), out=out)


def reflect_relu_ball(
    D: Tensor,
    radius: Tensor,
    Omega: Tensor | None = None,
    ball_dims: tuple[int, ...] = (-2, -1),
    lower_limits: Tensor | None = None,
    *,
    processes: ProcessGroup = SINGLE_PROCESS,
    out: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """D − 2·argmin_Z ‖Z − D‖  s.t.  ‖Z_Ω‖ ≤ radius over ``ball_dims``,  Z_Ωᶜ ≤ 0 (≥ 0 at lower limits).

    It equals (1 − 2 min(1, radius/‖D_Ω‖))·D on Ω and |D| elsewhere, −|D| at lower limits. The projection is half of the
    difference between D and the result.

    Args:
        D: ``(*batch, P, M)`` point, relative to the center of the ball on Ω and to the limit elsewhere.
        radius: ``(*batch, 1, 1)`` or ``(*batch, 1, M)``.
        Omega: ``(*batch, P, M)`` bool; ``None`` is everywhere.
        ball_dims: dimensions of one ball.
        lower_limits: ``(*batch, P, M)`` bool, where off Ω the limit is a lower one; ``None`` is nowhere.
        processes: processes over which the rows of D are distributed.
        out: buffer for the result.
        work: buffer for intermediate values.

    References:
        Aghasi, Abdi, Romberg 2020, Section 4.1.
    """
    on = D if Omega is None else torch.mul(D, Omega, out=work)
    length = processes.norm(norm(on, ball_dims))
    shrink = 1 - 2 * torch.where(length > radius, radius / length, 1)
    if Omega is None:
        return torch.mul(D, shrink, out=out)
    G = torch.sub(D, on, out=out).abs_()
    if lower_limits is not None:
        G.mul_(1 - 2 * lower_limits.to(G.dtype))
    return G.addcmul_(on, shrink)


def project_responses(problem: LayerProblem, XW: Tensor) -> Tensor:
    """argmin_Z ‖Z − XW‖  s.t.  Z_Ω = C_Ω, Z_Ωᶜ ≤ C_Ωᶜ (≥ at lower limits): the nearest point with the same response.

    C is the center of the problem. For a slope α below zero the result is moved towards the trained values Z₀ by α²,
    so that XW minus the result is the gradient of
    ½‖(XW − C)_Ω‖² + ½α²‖(XW − Z₀)_Ωᶜ‖² + ½(1 − α²)‖(XW − C)₊‖²_Ωᶜ.
    """
    C = problem.center
    if problem.Omega is None:
        return C
    T = torch.where(problem.Omega, C, torch.minimum(XW, C))
    if problem.has_upper_bound:
        T = torch.where(problem.at_upper_bound, torch.maximum(XW, C), T)
    if (slope := problem.rectifier.slope) is not None:
        Z = problem.rectifier.inverse(problem.Y)
        Z = Z if problem.offset is None else Z - problem.offset
        T = torch.where(problem.Omega, T, T.lerp(Z, slope.square().expand_as(T)))
    return T


def project_pattern(problem: LayerProblem, S: Tensor, score: Tensor | None = None) -> Tensor:
    """Argmin ‖S′ − S‖  s.t.  S′ keeps exactly the number of blocks that the problem's pattern and sparsity define.

    If S has fewer nonzero blocks than are kept, the largest trained ones are added. Free rows are not changed.

    Args:
        problem: defines pattern, sparsity, free rows and trained weights.
        S: ``(*batch, N, M)``.
        score: ``(*batch, N, M)`` ≥ 0, summed over each block; ``None`` is S².
    """
    penalized = problem.penalized_rows
    part, trained = S[..., penalized, :], problem.W[..., penalized, :]
    score = part.square() if score is None else score[..., penalized, :]
    tiny = torch.finfo(S.dtype).tiny
    tie_break = trained.square() / problem.layer_max(trained.square()).clamp(min=tiny)
    score = score / problem.layer_max(score).clamp(min=tiny) + 1e-12 * tie_break
    kept = problem.keep_largest(score, problem.kept_blocks)
    result = S.clone()
    result[..., penalized, :] = torch.where(kept, torch.where(part == 0, trained, part), 0)
    return result
