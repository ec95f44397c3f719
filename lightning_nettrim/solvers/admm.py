"""ADMM for the convex Net-Trim program, at a radius ε or at a sparsity, for which ε is searched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.core.blocks import input_blocks
from lightning_nettrim.core.certificate import dual_bound, violation_and_price
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.prox import project_pattern, reflect_relu_ball, soft_threshold
from lightning_nettrim.core.reductions import norm, reduce_over
from lightning_nettrim.core.streaming import compress, gram, row_blocks
from lightning_nettrim.solvers.base import Certificate, IterativeSolver, Solution, coarse_products, iterate

SPLIT_WEIGHT = 0.3
"""κ, relative to the mean energy of the penalized inputs. With 1, a solve takes about a third more steps."""


class ADMMState(NamedTuple):
    """Copies Z = XW and S = W with scaled duals U₁, U₂, stored in combinations that a step uses; C is the center."""

    W: Tensor  # (B, N, M)
    S: Tensor  # (B, N, M)
    T: Tensor  # (B, N, M) S − U₂
    g: Tensor  # (B, N, M) Xᵀ(Z + U₁ − XW)
    R: Tensor  # (B, P, M) XW − C
    D: Tensor  # (B, P, M) Z − U₁ − C
    G: Tensor  # (B, P, M) D − 2(Z − C), so that Z − C = (D − G)/2 and U₁ = −(D + G)/2
    E: Tensor  # (B, P, M) intermediate values
    F: Tensor  # (B, P, M) with tf32: the G + R from which g was computed; else empty
    tau: Tensor  # (B, 1, 1) soft threshold 1/(ρκ), in the units of W
    kappa: Tensor  # (B, N, 1) weight of the split S = W, 0 on free rows
    inverse: Tensor  # (B, N, N) (XᵀX + κ)⁻¹


@dataclass(frozen=True)
class ADMM(IterativeSolver):
    """The convex Net-Trim program by over-relaxed ADMM, certified by its duality gap.

    A step takes two products with X, in buffers that are allocated once: four of the size of Y in addition to Y itself
    (five with ``tf32``), and six of the size of W, two of them only within a step. A step updates W and the residuals
    by increments; the residuals are recomputed at each evaluation of the certificate, so that rounding errors do not
    accumulate. The factor (XᵀX + κ)⁻¹ does not depend on ρ, so that a change of ρ costs nothing; ρ is adapted until
    violation and duality gap, relative to their tolerances, decrease together. Free rows (the bias) are eliminated, not
    split, which centers the inputs. A problem with a linear response is first compressed to N + 1 rows. At a
    ``sparsity``, the radius is searched and the support is then cut or filled to the exact number of nonzeros.

    Args:
        max_steps: maximum number of steps.
        rtol: relative duality gap to reach.
        atol: violation to reach, as a fraction of ε.
        check_every: number of steps between two evaluations of the certificate.
        relaxation: over-relaxation α in (0, 2).
        tf32: allow faster float32 formats for the products of a step: TF32 on CUDA, torch's "medium" precision on the
            CPU. Residuals are recomputed and certificates evaluated in full precision.

    References:
        Aghasi, Abdi, Romberg 2020, Section 4; Boyd et al., "Distributed Optimization ... ADMM", 2011, Section 3.4.
    """

    relaxation: float = 1.8
    tf32: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if not 0 < self.relaxation < 2:
            raise ValueError(f"ADMM.relaxation: expected a number in (0, 2), got {self.relaxation}")

    def solve(self, problem: LayerProblem, warm: ADMMState | None = None) -> Solution:
        """Solve at the problem's radius or, if it is set, at its sparsity; the warm start is used for a radius only."""
        if problem.sparsity is None:
            return iterate(compress(problem), self, warm)
        return self._at_sparsity(compress(problem))

    def init(self, problem: LayerProblem, warm: ADMMState | None = None) -> ADMMState:
        """The initial state, with all penalized weights zero, or the given state of another radius.

        From zero the objective approaches the optimum from below, as the dual bound does. From the trained weights it
        would approach from far above, and be the last quantity to converge.
        """
        if warm is not None:
            return warm
        penalized = problem.lambdas > 0
        kappa, inverse = _factor(problem)
        S = torch.where(penalized, 0, problem.W)
        mean_weight = problem.objective(problem.W)[..., None, None] / (penalized.sum() * S.shape[-1])
        tau = 0.15 / SPLIT_WEIGHT * torch.where(mean_weight > 0, mean_weight, 1)
        D = torch.empty_like(problem.Y)
        G, R, E = torch.empty_like(D), torch.empty_like(D), torch.empty_like(D)
        _residual(problem, S, R)
        _reflect(problem, R, G, E)
        torch.sub(R, G, out=D).mul_(0.5)
        torch.neg(D, out=G)
        F = torch.empty_like(D) if self.tf32 else D[:, :0, :0]
        return ADMMState(S.clone(), S, S.clone(), torch.empty_like(S), R, D, G, E, F, tau, kappa, inverse)

    def step(self, problem: LayerProblem, state: ADMMState) -> ADMMState:
        """Update W, Z, S and both duals once."""
        W, S, T, g, R, D, G, E, F, tau, kappa, inverse = state
        alpha = self.relaxation
        with coarse_products(self.tf32):
            increment = torch.bmm(inverse, torch.sub(S, T).add_(S).sub_(W).mul_(kappa).add_(g))  # W-update
            W += increment
            for rows, X in input_blocks(problem.X, problem.Y.device):
                R[:, rows].baddbmm_(X, increment)
            D.lerp_(G, alpha / 2).add_(R, alpha=alpha)  # over-relaxed XW − U₁, with the dual ascent of Z
            _reflect(problem, D, G, E)  # Z-update
            if self.tf32:  # the product of the change only, for which the lower precision suffices
                change = F.sub_(torch.add(G, R, out=E))
                _adjoint(problem, change, g, beta=1)
                F.copy_(E)
            else:
                _adjoint(problem, torch.add(G, R, out=E).neg_(), g)
        relaxed = torch.where(kappa > 0, alpha, 1.0).to(W)
        T.addcmul_(relaxed, W).addcmul_(relaxed, S, value=-1)  # over-relaxed W − U₂
        soft_threshold(T, tau * problem.lambdas, out=S)  # S-update
        return state

    def certify(self, problem: LayerProblem, state: ADMMState) -> Certificate:
        """The sparse copy S, and the lower bound from ν = ρU₁."""
        kappa = state.kappa.amax(-2, keepdim=True)
        nu = torch.add(state.D, state.G, out=state.E).mul_(-0.5 / (kappa * state.tau))
        violation, price = violation_and_price(problem, state.S, nu)
        return Certificate(state.S, problem.objective(state.S), dual_bound(problem, nu), violation, price)

    def adapt(self, problem: LayerProblem, state: ADMMState, lag: Tensor | None) -> ADMMState:
        """Recompute the residuals and adapt ρ = 1/(κτ) to balance the primal residual and the increments.

        The balance is weighted, by a factor of at most ten, in favor of the side of the certificate that lags, and by
        another factor of four in favor of the primal side: of the dual bounds, the best so far is kept.
        """
        if lag is not None:
            weight = lag.sqrt().nan_to_num(1.0).clamp(0.1, 10.0)[..., None, None]
            factor = (4 * weight * self._balance(problem, state)).sqrt().nan_to_num(1.0).clamp(0.5, 2.0)
            state = self.penalize(state, torch.where((factor > 1.6) | (factor < 1 / 1.6), factor, 1))
        _residual(problem, state.W, state.R)
        _adjoint(problem, torch.add(state.G, state.R, out=state.E).neg_(), state.g)
        if self.tf32:
            torch.neg(state.E, out=state.F)
        return state

    def _balance(self, problem: LayerProblem, state: ADMMState) -> Tensor:
        """``(B, 1, 1)``: primal residual relative to the copies, over the next increment relative to the duals."""
        W, S, T, g, R, D, G, E, _, _, kappa, inverse = state
        root, U = kappa.sqrt(), S - T
        torch.sub(D, G, out=E).mul_(-0.5).add_(R)  # XW − Z
        total = problem.processes.norm
        primal = torch.hypot(total(norm(E)), norm(root * (W - S)))
        primal = primal / torch.hypot(total(norm(problem.Y)), norm(root * S))
        b = g + kappa * (S + U - W)
        increment = reduce_over((-2, -1), torch.sum, b * torch.bmm(inverse, b)).clamp(min=0).sqrt()
        torch.add(D, G, out=E).mul_(-0.5)  # U₁
        return primal / (increment / torch.hypot(total(norm(E)), norm(root * U)))

    def penalize(self, state: ADMMState, factor: Tensor) -> ADMMState:
        """Multiply ρ by a factor, ``(B, 1, 1)``, and divide the scaled duals by it; Z and S are unchanged."""
        S, T, D, G, E = state.S, state.T, state.D, state.G, state.E
        # U₁ = −(D + G)/2 is divided, Z − C = (D − G)/2 is not
        same, other = (1 / factor + 1) / 2, (1 / factor - 1) / 2
        torch.mul(D, other, out=E)
        D.mul_(same).addcmul_(G, other)
        G.mul_(same).add_(E)
        T.sub_(S).div_(factor).add_(S)
        return state._replace(tau=state.tau / factor)

    def _at_sparsity(self, problem: LayerProblem) -> Solution:
        """Search log ε for the number of nonzeros, solve there, and cut or fill the support to the exact number."""
        k, size = problem.nonzeros, problem.num_prunable
        response = problem.processes.norm(torch.linalg.matrix_norm(problem.Y))
        response = torch.where(response > 0, response, 1)
        floor = 1e-3 * response
        if problem.epsilon is not None:
            floor = torch.maximum(floor, torch.linalg.matrix_norm(problem.radius))
        coarse = replace(self, rtol=10 * self.rtol, atol=10 * self.atol)
        epsilon = torch.maximum((0.01 + 0.4 * (1 - k / size) ** 6) * response, floor)
        low, high = floor.clone(), torch.full_like(floor, torch.inf)  # too many nonzeros at low, too few at high
        count_low, count_high = torch.full_like(response, float(size)), torch.zeros_like(response)
        last, state = epsilon.clone(), None
        for _ in range(10):
            solution = iterate(replace(problem, epsilon=epsilon, sparsity=None), coarse, state)
            state = solution.state
            count = ((solution.W != 0) & (problem.lambdas > 0)).sum((-2, -1)).to(response)
            last = epsilon
            enough = count >= k
            done = (enough & (count <= 1.02 * k + 1)) | (~enough & (epsilon <= floor))
            if bool(done.all()):
                break
            low, count_low = torch.where(enough, epsilon, low), torch.where(enough, count, count_low)
            high, count_high = torch.where(enough, high, epsilon), torch.where(enough, count_high, count)
            # interpolate log counts in log ε if both ends are known, else extrapolate from the last count
            fraction = (count_low / (1.01 * k)).log() / (count_low / count_high.clamp(min=0.5)).log()
            interpolated = low * (high / low) ** fraction.clamp(0.1, 0.9)
            extrapolated = epsilon * (count.clamp(min=0.5) / (1.01 * k)).sqrt().clamp(0.4, 2.5)
            bracketed = torch.isfinite(high) & (low > floor)
            proposal = torch.where(bracketed, interpolated, extrapolated).clamp(min=floor)
            epsilon = torch.where(done, epsilon, proposal)
        solution = iterate(replace(problem, epsilon=last, sparsity=None), self, state)
        return replace(solution, W=project_pattern(problem, solution.W))


def _residual(problem: LayerProblem, W: Tensor, R: Tensor) -> None:
    """R ← XW − C, in full precision."""
    for rows, part in row_blocks(problem):
        R[:, rows] = torch.baddbmm(part.center, part.X, W, beta=-1)


def _reflect(problem: LayerProblem, D: Tensor, G: Tensor, E: Tensor) -> None:
    """G ← D − 2(Z − C), where Z − C is the projection of D onto the constraints; E is overwritten."""
    lower_limits = problem.at_upper_bound if problem.has_upper_bound else None
    reflect_relu_ball(
        D, problem.radius, problem.Omega, problem.ball_dims, lower_limits, processes=problem.processes, out=G, work=E
    )  # fmt: skip


def _adjoint(problem: LayerProblem, E: Tensor, g: Tensor, beta: int = 0) -> None:
    """In place, g ← βg + XᵀE over the rows of all processes."""
    share = beta / problem.processes.count  # the sum contains the g of every process
    for rows, X in input_blocks(problem.X, problem.Y.device):
        g.baddbmm_(X.mT, E[:, rows], beta=share)
        share = 1
    g.copy_(problem.processes.sum(g))


def _factor(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """κ, ``(B, N, 1)``: in proportion to the mean energy of the penalized inputs, 0 on free rows; and (XᵀX + κ)⁻¹."""
    H = gram(problem)
    energy, penalized = _mean_energy(problem, H), (problem.lambdas > 0).squeeze(-1)
    kappa = torch.where(penalized.unsqueeze(-1), SPLIT_WEIGHT * energy, 0)
    # small damping, a proximal term of the W-update, for free rows that are zero or linearly dependent
    H.diagonal(dim1=-2, dim2=-1).add_(torch.where(penalized, SPLIT_WEIGHT, 1e-6) * energy[..., 0])
    inverse = torch.stack([torch.cholesky_inverse(torch.linalg.cholesky_ex(h).L) for h in H])
    return kappa.to(problem.W), inverse.to(problem.W)


def _mean_energy(problem: LayerProblem, H: Tensor) -> Tensor:
    """``(B, 1, 1)``: mean diagonal of H over the penalized rows after elimination of the free rows."""
    penalized, free = problem.penalized_rows, problem.free_rows
    diagonal = H.diagonal(dim1=-2, dim2=-1)[..., penalized]
    if len(free):
        F = H[..., free, :]
        B = F[..., penalized]
        diagonal = diagonal - (B * (torch.linalg.pinv(F[..., free], hermitian=True) @ B)).sum(-2)
    energy = diagonal.mean(-1).clamp(min=0)
    return torch.where(energy > 0, energy, 1)[..., None, None]
