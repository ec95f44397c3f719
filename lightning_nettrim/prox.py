"""Proximal maps and projections: stateless, batched over leading dimensions, one line of mathematics each."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(T: Tensor, threshold: Tensor | float) -> Tensor:
    """argmin_S threshold·‖S‖₁ + ½‖S − T‖² = sign(T)·max(|T| − threshold, 0); shapes broadcast."""
    return T.sign() * (T.abs() - threshold).clamp_(min=0)


def project_relu_ball(
    T: Tensor,
    Y: Tensor,
    radius: Tensor,
    Omega: Tensor | None = None,
    V: Tensor | None = None,
    balls: tuple[int, ...] = (-2, -1),
) -> Tensor:
    """argmin_Z ‖Z − T‖  s.t.  ‖(Z − Y)_Ω‖ ≤ radius over the dimensions ``balls``,  Z_Ωᶜ ≤ V_Ωᶜ.

    Args:
        T: ``(*batch, P, M)`` point to project.
        Y: ``(*batch, P, M)`` centre of the balls.
        radius: ``(*batch, 1, 1)`` or ``(*batch, 1, M)``.
        Omega: ``(*batch, P, M)`` bool; ``None`` is everywhere.
        V: ``(*batch, P, M)`` ceiling; ``None`` is 0.
        balls: dimensions over which one ball reaches.

    References:
        Aghasi, Abdi, Romberg 2020, Section 4.1.
    """
    E = T - Y
    R = E if Omega is None else torch.where(Omega, E, 0)
    norm = torch.linalg.vector_norm(R, dim=balls, keepdim=True)
    Z = torch.addcmul(Y, E, torch.where(norm > radius, radius / norm, 1))
    if Omega is None:
        return Z
    return torch.where(Omega, Z, T.clamp(max=0) if V is None else torch.minimum(T, V))


def project_topk(W: Tensor, k: int, score: Tensor | None = None) -> Tensor:
    """argmin_S ‖S − W‖  s.t.  at most k non-zeros in the last two dimensions; ranked by ``score``, by |W| if None."""
    flat = (W.abs() if score is None else score).flatten(-2)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(k, dim=-1).indices, True)
    return torch.where(kept.unflatten(-1, W.shape[-2:]), W, 0)
