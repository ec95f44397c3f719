"""ADMM for the convex Net-Trim program, at a radius ε or at a sparsity reached by searching ε."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.prox import project_pattern, reflect_relu_ball, soft_threshold
from lightning_nettrim.solvers.base import Certificate, IterativeSolver, Solution, coarse_products, iterate
from lightning_nettrim.sums import norm, over


class ADMMState(NamedTuple):
    """Copies Z = XW and S = W with scaled duals U₁, U₂, kept as what the steps read; C is Y on Ω and V elsewhere."""

    W: Tensor  # (B, N, M)
    S: Tensor  # (B, N, M)
    T: Tensor  # (B, N, M) S − U₂
    g: Tensor  # (B, N, M) Xᵀ(Z + U₁ − XW)
    R: Tensor  # (B, P, M) XW − C
    D: Tensor  # (B, P, M) Z − U₁ − C
    G: Tensor  # (B, P, M) D − 2(Z − C), so that Z − C = (D − G)/2 and U₁ = −(D + G)/2
    E: Tensor  # (B, P, M) work
    F: Tensor  # (B, P, M) with products in TF32: G + R, of which g is the image; else (B, 0, 0)
    tau: Tensor  # (B, 1, 1) soft threshold 1/(ρκ), in the units of W
    kappa: Tensor  # (B, N, 1) weight of the split S = W, 0 on free rows
    inverse: Tensor  # (B, N, N) (XᵀX + κ)⁻¹


@dataclass(frozen=True)
class ADMM(IterativeSolver):
    """The convex Net-Trim program by over-relaxed ADMM, certified by its duality gap.

    Two products with X per step, in buffers that are allocated once: four of the size of Y beside Y itself (five with
    ``tf32``), and six of the size of W, two of them within a step only. The steps move W by increments and the
    residuals are renewed at each look at the certificate, so that rounding does not pile up. The factor does not
    depend on ρ, so a new ρ is free; ρ is moved until the violation and the duality gap, each over its tolerance, fall
    together. Free rows (the bias) are eliminated, not split, which centres the inputs. A linear response is compressed
    to N + 1 rows first. At a ``sparsity`` the radius is searched, the support then cut or filled to the exact count.

    Args:
        max_steps: steps at most.
        rtol: relative duality gap to reach.
        atol: violation to reach, as a fraction of ε.
        check_every: steps between two looks at the certificate.
        relaxation: over-relaxation α in (0, 2).
        tf32: let the float32 products of a step use faster formats, TF32 on CUDA, what torch calls "medium" on the
            CPU; the residuals are renewed and the certificate is taken in full precision.

    References:
        Aghasi, Abdi, Romberg 2020, Section 4; Boyd et al., "Distributed Optimization ... ADMM", 2011, Section 3.4.
    """

    relaxation: float = 1.8
    tf32: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        super().__post_init__()
        if not 0 < self.relaxation < 2:
            raise ValueError(f"ADMM.relaxation: expected a number in (0, 2), got {self.relaxation}")

    def solve(self, problem: LayerProblem, warm: ADMMState | None = None) -> Solution:
        """Solve at the problem's radius, or at its sparsity where one is set; a warm start is for radii only."""
        if problem.sparsity is None:
            return iterate(problem.compressed(), self, warm)
        return self._at_sparsity(problem.compressed())

    def init(self, problem: LayerProblem, warm: ADMMState | None = None) -> ADMMState:
        """Start from the free rows alone, below the optimum as the dual is, or go on from a neighbouring radius.

        From the trained weights, far above the optimum, the objective is still too large when all else is done.
        """
        if warm is not None:
            return warm
        penalised = problem.weights > 0
        kappa, inverse = _factor(problem, penalised.squeeze(-1))
        S = torch.where(penalised, 0, problem.W)
        size = problem.objective(problem.W)[..., None, None] / (penalised.sum() * S.shape[-1])
        tau = 0.15 * torch.where(size > 0, size, 1)
        D = torch.empty_like(problem.Y)
        G, R, E = torch.empty_like(D), torch.empty_like(D), torch.empty_like(D)
        _residual(problem, S, R)
        _reflect(problem, R, G, E)
        torch.sub(R, G, out=D).mul_(0.5)
        torch.neg(D, out=G)
        F = torch.empty_like(D) if self.tf32 else D[:, :0, :0]
        return ADMMState(S.clone(), S, S.clone(), torch.empty_like(S), R, D, G, E, F, tau, kappa, inverse)

    def step(self, problem: LayerProblem, state: ADMMState) -> ADMMState:
        """One round of W, Z, S and both duals."""
        W, S, T, g, R, D, G, E, F, tau, kappa, inverse = state
        alpha = self.relaxation
        with coarse_products(self.tf32):
            move = torch.bmm(inverse, torch.sub(S, T).add_(S).sub_(W).mul_(kappa).add_(g))  # W-update
            W += move
            for rows, X in problem.inputs():
                R[:, rows].baddbmm_(X, move)
            D.lerp_(G, alpha / 2).add_(R, alpha=alpha)  # over-relaxed XW − U₁, the dual ascent of Z included
            _reflect(problem, D, G, E)  # Z-update
            if self.tf32:  # the product of the change alone, in which a coarse rounding does no harm
                change = F.sub_(torch.add(G, R, out=E))
                _adjoint(problem, change, g, beta=1)
                F.copy_(E)
            else:
                _adjoint(problem, torch.add(G, R, out=E).neg_(), g)
        relaxed = torch.where(kappa > 0, alpha, 1.0).to(W)
        T.addcmul_(relaxed, W).addcmul_(relaxed, S, value=-1)  # over-relaxed W − U₂
        soft_threshold(T, tau * problem.weights, out=S)  # S-update
        return state

    def certify(self, problem: LayerProblem, state: ADMMState) -> Certificate:
        """The sparse copy S, and the bound of ν = ρU₁."""
        kappa = state.kappa.amax(-2, keepdim=True)
        nu = torch.add(state.D, state.G, out=state.E).mul_(-0.5 / (kappa * state.tau))
        violation, worth = problem.infeasibility(state.S, nu)
        return Certificate(state.S, problem.objective(state.S), problem.bound(nu), violation, worth)

    def adapt(self, problem: LayerProblem, state: ADMMState, lag: Tensor | None) -> ADMMState:
        """Take the state's residuals afresh, and move ρ = 1/(κτ) until what is missing balances what still moves.

        The balance leans, by a factor of ten at most, towards the side of the certificate that lags, and always by four
        towards the primal one: the dual one keeps the best that it has been.
        """
        if lag is not None:
            lean = lag.sqrt().nan_to_num(1.0).clamp(0.1, 10.0)[..., None, None]
            factor = (4 * lean * self._balance(problem, state)).sqrt().nan_to_num(1.0).clamp(0.5, 2.0)
            state = self.penalise(state, torch.where((factor > 1.6) | (factor < 1 / 1.6), factor, 1))
        _residual(problem, state.W, state.R)
        _adjoint(problem, torch.add(state.G, state.R, out=state.E).neg_(), state.g)
        if self.tf32:
            torch.neg(state.E, out=state.F)
        return state

    def _balance(self, problem: LayerProblem, state: ADMMState) -> Tensor:
        """``(B, 1, 1)``: the primal residual over the copies' size, over the coming move over the duals' size."""
        W, S, T, g, R, D, G, E, _, _, kappa, inverse = state
        root, U = kappa.sqrt(), S - T
        torch.sub(D, G, out=E).mul_(-0.5).add_(R)  # XW − Z
        spread = problem.ranks.norm
        primal = torch.hypot(spread(norm(E)), norm(root * (W - S)))
        primal = primal / torch.hypot(spread(norm(problem.Y)), norm(root * S))
        slope = g + kappa * (S + U - W)
        move = over((-2, -1), torch.sum, slope * torch.bmm(inverse, slope)).clamp(min=0).sqrt()
        torch.add(D, G, out=E).mul_(-0.5)  # U₁
        return primal / (move / torch.hypot(spread(norm(E)), norm(root * U)))

    def penalise(self, state: ADMMState, factor: Tensor) -> ADMMState:
        """ρ multiplied by the factor, ``(B, 1, 1)``; the scaled duals shrink by as much, Z and S stay."""
        S, T, D, G, E = state.S, state.T, state.D, state.G, state.E
        same, other = (1 / factor + 1) / 2, (1 / factor - 1) / 2
        torch.mul(D, other, out=E)
        D.mul_(same).addcmul_(G, other)
        G.mul_(same).add_(E)
        T.sub_(S).div_(factor).add_(S)
        return state._replace(tau=state.tau / factor)

    def _at_sparsity(self, problem: LayerProblem) -> Solution:
        """Search log ε for the number of non-zeros, solve there, and cut or fill the support to the exact count."""
        k, size = problem.nonzeros, problem.prunable
        response = problem.ranks.norm(torch.linalg.matrix_norm(problem.Y))
        response = torch.where(response > 0, response, 1)
        floor = 1e-3 * response
        if problem.epsilon is not None:
            floor = torch.maximum(floor, torch.linalg.matrix_norm(problem.radius))
        loose = replace(self, rtol=10 * self.rtol, atol=10 * self.atol)
        epsilon = torch.maximum((0.01 + 0.4 * (1 - k / size) ** 6) * response, floor)
        low, high = floor.clone(), torch.full_like(floor, torch.inf)  # radii that keep too much, too little
        count_low, count_high = torch.full_like(response, float(size)), torch.zeros_like(response)
        best, state = epsilon.clone(), None
        for _ in range(10):
            solution = iterate(replace(problem, epsilon=epsilon, sparsity=None), loose, state)
            state = solution.state
            count = ((solution.W != 0) & (problem.weights > 0)).sum((-2, -1)).to(response)
            best = epsilon
            enough = count >= k
            done = (enough & (count <= 1.02 * k + 1)) | (~enough & (epsilon <= floor))
            if bool(done.all()):
                break
            low, count_low = torch.where(enough, epsilon, low), torch.where(enough, count, count_low)
            high, count_high = torch.where(enough, high, epsilon), torch.where(enough, count_high, count)
            # between both ends as the counts suggest (they fall about exponentially), else by the count's own ratio
            inside = (count_low / (1.01 * k)).log() / (count_low / count_high.clamp(min=0.5)).log()
            between = low * (high / low) ** inside.clamp(0.1, 0.9)
            beyond = epsilon * (count.clamp(min=0.5) / (1.01 * k)).sqrt().clamp(0.4, 2.5)
            proposal = torch.where(torch.isfinite(high) & (low > floor), between, beyond).clamp(min=floor)
            epsilon = torch.where(done, epsilon, proposal)
        solution = iterate(replace(problem, epsilon=best, sparsity=None), self, state)
        return replace(solution, W=project_pattern(problem, solution.W))


def _residual(problem: LayerProblem, W: Tensor, R: Tensor) -> None:
    """R ← XW − C, in full precision."""
    for rows, part in problem.blocks():
        R[:, rows] = torch.baddbmm(part.centre, part.X, W, beta=-1)


def _reflect(problem: LayerProblem, D: Tensor, G: Tensor, E: Tensor) -> None:
    """G ← D − 2(Z − C), Z − C the projection of D onto the constraints; E is work."""
    floors = problem.floors if problem.bounded else None
    reflect_relu_ball(
        D, problem.radius, problem.Omega, problem.balls, floors, ranks=problem.ranks, out=G, work=E
    )  # fmt: skip


def _adjoint(problem: LayerProblem, E: Tensor, g: Tensor, beta: int = 0) -> None:
    """In place, g ← βg + XᵀE."""
    share = beta / problem.ranks.count  # of g, which every process adds
    for rows, X in problem.inputs():
        g.baddbmm_(X.mT, E[:, rows], beta=share)
        share = 1
    g.copy_(problem.ranks.sum(g))


def _factor(problem: LayerProblem, penalised: Tensor) -> tuple[Tensor, Tensor]:
    """κ, ``(B, N, 1)``, the mean energy of the penalised inputs, and (XᵀX + κ)⁻¹."""
    H = problem.gram()
    energy = _mean_energy(H, penalised)
    kappa = torch.where(penalised.unsqueeze(-1), energy, 0)
    # a trace of damping, which a proximal W-update allows, for free rows that are nothing or one another
    H.diagonal(dim1=-2, dim2=-1).add_(torch.where(penalised, energy[..., 0], 1e-6 * energy[..., 0]))
    inverse = torch.stack([torch.cholesky_inverse(torch.linalg.cholesky_ex(h).L) for h in H])
    return kappa.to(problem.W), inverse.to(problem.W)


def _mean_energy(H: Tensor, penalised: Tensor) -> Tensor:
    """``(B, 1, 1)``: mean diagonal of H over the penalised rows, once the free rows are eliminated."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)[..., penalised]
    if not bool(penalised.all()):
        F = H[..., ~penalised, :]
        B = F[..., penalised]
        diagonal = diagonal - (B * (torch.linalg.pinv(F[..., ~penalised], hermitian=True) @ B)).sum(-2)
    energy = diagonal.mean(-1).clamp(min=0)
    return torch.where(energy > 0, energy, 1)[..., None, None]
