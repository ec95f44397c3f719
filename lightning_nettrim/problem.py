"""The Net-Trim program of one layer, as a value: its data and every formula by which an answer is judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerProblem:
    r"""min Σ λₙ|Wₙₘ|  s.t.  ‖(XW − Y)_Ω‖_F ≤ ε,  (XW)_Ωᶜ ≤ V_Ωᶜ.

    The layer answers ``Y = ReLU(XW)`` and Ω = {Y > 0}. A layer without a ReLU is the same program with Ω everywhere.
    Sizes: ``P`` samples, ``N`` inputs, ``M`` outputs; any leading dimensions are a batch of independent problems.

    Args:
        X: ``(*batch, P, N)`` layer inputs, one sample per row; a bias is a column of ones.
        Y: ``(*batch, P, M)`` responses of the trained layer.
        W: ``(*batch, N, M)`` trained weights, the warm start.
        epsilon: radius in the units of ``Y``: ``(*batch)`` for one ball, ``(*batch, M)`` for one per neuron.
            Beside ``sparsity`` it is the smallest radius for which the program is known to be feasible.
        Omega: ``(*batch, P, M)`` bool, where the trained layer fires; ``None`` for a linear response.
        V: ``(*batch, P, M)`` ceiling off Ω; ``None`` is 0.
        penalty: ``(N,)`` weights λ ≥ 0 of the ℓ1 norm, row by row; 0 is a free row (the bias), ``None`` is all ones.
        sparsity: fraction of zeros asked of the penalised rows, in [0, 1); ``None`` where ``epsilon`` decides.

    References:
        Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Sci. 2020, eq. (6).
    """

    X: Tensor
    Y: Tensor
    W: Tensor
    epsilon: Tensor | None = None
    Omega: Tensor | None = None
    V: Tensor | None = None
    penalty: Tensor | None = None
    sparsity: float | None = None

    @property
    def batch(self) -> torch.Size:
        """The leading dimensions."""
        return self.X.shape[:-2]

    @property
    def weights(self) -> Tensor:
        """``(N, 1)`` the ℓ1 weights λ."""
        if self.penalty is None:
            return self.X.new_ones(self.X.shape[-1], 1)
        return self.penalty.unsqueeze(-1)

    @property
    def nonzeros(self) -> int:
        """Number of penalised weights that ``sparsity`` keeps, in each problem of the batch."""
        if self.sparsity is None:
            raise ValueError("expected a problem with a sparsity, got none: set sparsity=, not epsilon=")
        size = int((self.weights > 0).sum()) * self.Y.shape[-1]
        return size - round(self.sparsity * size)

    @property
    def balls(self) -> tuple[int, ...]:
        """The dimensions over which one ball reaches: all entries, or those of a neuron."""
        return (-2,) if self._epsilon.dim() > len(self.batch) else (-2, -1)

    @property
    def radius(self) -> Tensor:
        """``(*batch, 1, 1)`` or ``(*batch, 1, M)``: ε, ready to be broadcast over ``Y``."""
        return self._epsilon.unsqueeze(-2) if self.balls == (-2,) else self._epsilon[..., None, None]

    @property
    def _epsilon(self) -> Tensor:
        if self.epsilon is None:
            raise ValueError("expected a problem with an epsilon, got none: set epsilon=, in the units of Y")
        return self.epsilon

    def on_Omega(self, R: Tensor) -> Tensor:
        """R_Ω, zero elsewhere."""
        return R if self.Omega is None else torch.where(self.Omega, R, 0)

    def off_Omega(self, R: Tensor) -> Tensor:
        """R_Ωᶜ, zero elsewhere."""
        return torch.zeros_like(R) if self.Omega is None else torch.where(self.Omega, 0, R)

    def response(self, W: Tensor) -> Tensor:
        """``(*batch, P, M)``: ReLU(XW), or XW for a linear response."""
        return self.X @ W if self.Omega is None else (self.X @ W).relu_()

    def relative_error(self, W: Tensor) -> Tensor:
        """``(*batch)``: ‖response(W) − Y‖_F / ‖Y‖_F (over 1 where Y = 0)."""
        norm = torch.linalg.matrix_norm(self.Y)
        return torch.linalg.matrix_norm(self.response(W) - self.Y) / torch.where(norm > 0, norm, 1)

    def objective(self, W: Tensor) -> Tensor:
        """``(*batch)``: Σ λₙ|Wₙₘ|."""
        return (self.weights * W.abs()).sum((-2, -1))

    def duality_gap(self, objective: Tensor, bound: Tensor) -> Tensor:
        """``(*batch)``: (objective − bound) relative to the larger of both.

        Relative to a thousandth of the trained weights' norm where that is larger, so that an optimum of zero has one.
        """
        size = torch.maximum(objective.abs(), bound.abs())
        size = torch.maximum(size, 1e-3 * self.objective(self.W))
        return (objective - bound) / torch.where(size > 0, size, 1)

    def violation(self, W: Tensor) -> Tensor:
        """``(*batch)``: how far W is outside the ball or above the ceiling, the larger of both, relative to ε."""
        XW = self.X @ W
        ball = torch.linalg.vector_norm(self.on_Omega(XW - self.Y), dim=self.balls, keepdim=True)
        outside = torch.linalg.matrix_norm((ball - self.radius).clamp(min=0))
        above = torch.linalg.matrix_norm(self.off_Omega(XW if self.V is None else XW - self.V).clamp(min=0))
        return torch.maximum(outside, above) / torch.linalg.matrix_norm(self.radius)

    def bound(self, nu: Tensor) -> Tensor:
        r"""``(*batch)``: a lower bound of the optimum from any dual guess ν, ``(*batch, P, M)``.

        ⟨ν_Ω, Y_Ω⟩ − ε‖ν_Ω‖ + ⟨ν_Ωᶜ, V_Ωᶜ⟩ ≤ min Σ λₙ|Wₙₘ| whenever |Xᵀν| ≤ λ and ν ≤ 0 off Ω. The guess is made
        feasible: clipped off Ω, shifted on Ω until Xᵀν vanishes on free rows, then scaled column by column.
        """
        if self.Omega is not None:
            nu = torch.where(self.Omega, nu, nu.clamp(max=0))
        lam = self.weights
        free = (lam == 0).squeeze(-1)
        if self.penalty is not None and bool(free.any()):
            nu = self._balance(nu, self.X[..., free])
        slope = torch.where(lam > 0, (self.X.mT @ nu).abs() / lam, 0)
        nu = nu / slope.amax(-2, keepdim=True).clamp(min=1)
        on = self.on_Omega(nu)
        value = (on * self.Y).sum((-2, -1))
        value = value - (self.radius * torch.linalg.vector_norm(on, dim=self.balls, keepdim=True)).sum((-2, -1))
        return value if self.V is None else value + (self.off_Omega(nu) * self.V).sum((-2, -1))

    def _balance(self, nu: Tensor, A: Tensor) -> Tensor:
        """ν moved on Ω, as little as possible, until Aᵀν = 0; columns for which that cannot be are set to zero."""
        on = torch.ones_like(nu) if self.Omega is None else self.Omega.to(nu)
        A, total = A.double(), (A.double().mT @ nu.double()).mT.unsqueeze(-1)  # (*batch, M, F, 1)
        gram = torch.einsum("...pf,...pm,...pg->...mfg", A, on.double(), A)
        shift = torch.linalg.pinv(gram, hermitian=True) @ total
        nu = nu - on * (A @ shift.squeeze(-1).mT).to(nu)
        missing = torch.linalg.vector_norm(total - gram @ shift, dim=(-2, -1))
        solved = missing <= 1e-9 * torch.linalg.vector_norm(total, dim=(-2, -1)).clamp(min=1e-300)
        return nu * solved.unsqueeze(-2).to(nu)

    def validate(self) -> LayerProblem:
        """The problem itself, once its shapes, dtypes and values are seen to be usable.

        Raises:
            ValueError: naming the tensor, what was expected and what was found.
        """
        batch, (P, N), M = self.batch, self.X.shape[-2:], self.Y.shape[-1]
        expected: dict[str, tuple[tuple[int, ...], ...]] = {
            "X": ((*batch, P, N),),
            "Y": ((*batch, P, M),),
            "W": ((*batch, N, M),),
            "epsilon": (tuple(batch), (*batch, M)),
            "Omega": ((*batch, P, M),),
            "V": ((*batch, P, M),),
            "penalty": ((N,),),
        }
        for name, shapes in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) not in shapes:
                raise ValueError(
                    f"{name}: expected shape {' or '.join(map(str, shapes))} to fit X {tuple(self.X.shape)}"
                    f" and Y {tuple(self.Y.shape)}, got {tuple(tensor.shape)}"
                )
            kind = torch.bool if name == "Omega" else self.X.dtype
            if tensor.dtype != kind or tensor.device != self.X.device:
                raise ValueError(
                    f"{name}: expected {kind} on {self.X.device}, got {tensor.dtype} on {tensor.device}: convert it"
                )
            if name != "Omega" and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}: expected finite values, got NaN or Inf: look at what feeds this layer")
        if self.X.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"X: expected float32 or float64, got {self.X.dtype}: convert the problem first")
        if P == 0:
            raise ValueError("X: expected at least one sample, got none: feed some batches")
        if self.epsilon is None and self.sparsity is None:
            raise ValueError("expected an epsilon or a sparsity, got neither: set one")
        if self.epsilon is not None and not bool((self.epsilon > 0).all()):
            raise ValueError(f"epsilon: expected > 0, got {self.epsilon.min():g}: set a positive radius")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction in [0, 1), got {self.sparsity}")
        if self.penalty is not None and not bool((self.penalty >= 0).all()):
            raise ValueError(f"penalty: expected weights >= 0, got {self.penalty.min():g}")
        return self
