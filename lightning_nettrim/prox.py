"""Proximal maps and projections: stateless, batched over leading dimensions, one line of mathematics each."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.sums import norm


def soft_threshold(T: Tensor, threshold: Tensor, *, out: Tensor | None = None) -> Tensor:
    """argmin_S threshold·‖S‖₁ + ½‖S − T‖² = T − min(max(T, −threshold), threshold); shapes broadcast."""
    return torch.sub(T, torch.clamp(T, -threshold, threshold, out=out), out=out)


def reflect_relu_ball(
    D: Tensor,
    radius: Tensor,
    Omega: Tensor | None = None,
    balls: tuple[int, ...] = (-2, -1),
    floors: Tensor | None = None,
    *,
    ranks: Ranks = ALONE,
    out: Tensor | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """D − 2·argmin_Z ‖Z − D‖  s.t.  ‖Z_Ω‖ ≤ radius over the dimensions ``balls``,  Z_Ωᶜ ≤ 0 (≥ 0 at floors).

    It is (1 − 2 min(1, radius/‖D_Ω‖))·D on Ω and |D| elsewhere, −|D| at floors; the projection itself is half of D less
    it.

    Args:
        D: ``(*batch, P, M)`` point, measured from the centre of the ball on Ω and from the ceiling elsewhere.
        radius: ``(*batch, 1, 1)`` or ``(*batch, 1, M)``.
        Omega: ``(*batch, P, M)`` bool; ``None`` is everywhere.
        balls: dimensions over which one ball reaches.
        floors: ``(*batch, P, M)`` bool, off Ω; ``None`` is nowhere.
        ranks: the processes over which the rows of D are spread.
        out: where to write the answer.
        work: where to write what is needed on the way.

    References:
        Aghasi, Abdi, Romberg 2020, Section 4.1.
    """
    on = D if Omega is None else torch.mul(D, Omega, out=work)
    length = ranks.norm(norm(on, balls))
    shrink = 1 - 2 * torch.where(length > radius, radius / length, 1)
    if Omega is None:
        return torch.mul(D, shrink, out=out)
    G = torch.sub(D, on, out=out).abs_()
    if floors is not None:
        G.mul_(1 - 2 * floors.to(G.dtype))
    return G.addcmul_(on, shrink)


def project_responses(problem: LayerProblem, XW: Tensor) -> Tensor:
    """argmin_Z ‖Z − XW‖  s.t.  Z_Ω = C_Ω, Z_Ωᶜ ≤ C_Ωᶜ (≥ at floors): what answers as the trained layer does.

    C is the problem's centre. Below a slope α it is drawn towards the trained layer's own values by α², so that XW less
    it is the gradient of ½‖(XW − C)_Ω‖² + ½α²‖(XW − Z)_Ωᶜ‖² + ½(1 − α²)‖(XW − C)₊‖²_Ωᶜ.
    """
    C = problem.centre
    if problem.Omega is None:
        return C
    T = torch.where(problem.Omega, C, torch.minimum(XW, C))
    if problem.bounded:
        T = torch.where(problem.floors, torch.maximum(XW, C), T)
    if (slope := problem.rectifier.slope) is not None:
        Z = problem.rectifier.inverse(problem.Y)
        Z = Z if problem.offset is None else Z - problem.offset
        T = torch.where(problem.Omega, T, T.lerp(Z, slope.square().expand_as(T)))
    return T


def project_pattern(problem: LayerProblem, S: Tensor, score: Tensor | None = None) -> Tensor:
    """Argmin ‖S′ − S‖  s.t.  S′ keeps exactly as many blocks of the problem's pattern as its sparsity says.

    Where S has fewer blocks than are to be kept, the largest trained ones that it lacks fill it up. Free rows stay.

    Args:
        problem: for its pattern, sparsity, free rows and trained weights.
        S: ``(*batch, N, M)``.
        score: ``(*batch, N, M)`` ≥ 0, summed over a block; S² if not given.
    """
    penalised = (problem.weights > 0).squeeze(-1)
    part, trained = S[..., penalised, :], problem.W[..., penalised, :]
    score = part.square() if score is None else score[..., penalised, :]
    tiny = torch.finfo(S.dtype).tiny
    tie = trained.square() / problem.largest(trained.square()).clamp(min=tiny)
    score = score / problem.largest(score).clamp(min=tiny) + 1e-12 * tie
    chosen = problem.choose(score, problem.kept)
    answer = S.clone()
    answer[..., penalised, :] = torch.where(chosen, torch.where(part == 0, trained, part), 0)
    return answer
