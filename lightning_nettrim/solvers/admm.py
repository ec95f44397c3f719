"""ADMM for the convex Net-Trim program, at a radius ε or at a sparsity reached by searching ε."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.prox import project_relu_ball, project_topk, soft_threshold
from lightning_nettrim.solvers.base import Certificate, IterativeSolver, Solution, iterate


class _State(NamedTuple):
    """Copies Z = XW and S = W, the point T that Z projects (U₁ = Z − T), the dual U₂, and the penalties."""

    T: Tensor  # (*batch, P, M)
    Z: Tensor  # (*batch, P, M)
    S: Tensor  # (*batch, N, M)
    U: Tensor  # (*batch, N, M)
    tau: Tensor  # (*batch, 1, 1) soft threshold 1/(ρκ), in the units of W
    kappa: Tensor  # (*batch, N, 1) weight of the split S = W, 0 on free rows
    inverse: Tensor  # (*batch, N, N) (XᵀX + κ)⁻¹


@dataclass(frozen=True)
class ADMM(IterativeSolver):
    """The convex Net-Trim program by over-relaxed ADMM, certified by its duality gap.

    Two products with X per step. The factor does not depend on ρ, so a new ρ is free; ρ is moved until the violation
    and the duality gap, each over its tolerance, fall together. Free rows (the bias) are eliminated, not split, which
    centres the inputs. At a ``sparsity`` the radius is searched, the support then cut or filled to the exact count.

    Args:
        max_steps: steps at most.
        rtol: relative duality gap to reach.
        atol: violation to reach, as a fraction of ε.
        check_every: steps between two looks at the certificate.
        relaxation: over-relaxation α in (0, 2).

    References:
        Aghasi, Abdi, Romberg 2020, Section 4; Boyd et al., "Distributed Optimization ... ADMM", 2011, Section 3.4.
    """

    relaxation: float = 1.7

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        super().__post_init__()
        if not 0 < self.relaxation < 2:
            raise ValueError(f"ADMM.relaxation: expected a number in (0, 2), got {self.relaxation}")

    def solve(self, problem: LayerProblem) -> Solution:
        """Solve at the problem's radius, or at its sparsity where one is set."""
        return iterate(problem, self) if problem.sparsity is None else self._at_sparsity(problem)

    def init(self, problem: LayerProblem, warm: _State | None = None) -> _State:
        """Start from the trained weights, whose duals are zero, or from a neighbouring radius."""
        if warm is not None:
            return warm
        penalised = problem.weights > 0
        H = (problem.X.mT @ problem.X).double()
        kappa = torch.where(penalised, _mean_energy(H, penalised.squeeze(-1)), 0)
        inverse = torch.linalg.inv_ex(H + torch.diag_embed(kappa.squeeze(-1))).inverse
        S = problem.W.clone()
        XW = problem.X @ S
        Z = project_relu_ball(XW, problem.Y, problem.radius, problem.Omega, problem.V, problem.balls)
        size = (problem.weights * S.abs()).sum((-2, -1), keepdim=True) / (penalised.sum() * S.shape[-1])
        tau = 0.3 * torch.where(size > 0, size, 1)
        return _State(Z.clone(), Z, S, torch.zeros_like(S), tau, kappa.to(S), inverse.to(S))

    def step(self, problem: LayerProblem, state: _State) -> _State:
        """One round of W, Z, S and both duals; with U₁ = Z − T the dual ascent of Z is in T."""
        T, Z, S, U, tau, kappa, inverse = state
        alpha = torch.where(kappa > 0, self.relaxation, 1.0).to(S)
        W = inverse @ torch.addcmul(problem.X.mT @ torch.sub(2 * Z, T), kappa, S + U)  # W-update, Z + U₁ = 2Z − T
        T = T.add(torch.sub(problem.X @ W, Z), alpha=self.relaxation)  # over-relaxed XW − U₁
        Z = project_relu_ball(T, problem.Y, problem.radius, problem.Omega, problem.V, problem.balls)
        R = alpha * W + (1 - alpha) * S - U  # over-relaxed W − U₂
        S = soft_threshold(R, tau * problem.weights)
        return _State(T, Z, S, S - R, tau, kappa, inverse)

    def certify(self, problem: LayerProblem, state: _State) -> Certificate:
        """The sparse copy S, and the bound of ν = ρU₁."""
        kappa = state.kappa.amax(-2, keepdim=True)
        nu = (state.Z - state.T) / (kappa * state.tau)
        objective, bound = problem.objective(state.S), problem.bound(nu)
        return Certificate(state.S, objective, bound, problem.duality_gap(objective, bound), problem.violation(state.S))

    def adapt(self, problem: LayerProblem, previous: _State, state: _State, certificate: Certificate) -> _State:
        """Move ρ = 1/(κτ) to where the primal and the dual residual, each over its variable's size, are in balance.

        The balance leans, by a factor of ten at most, towards the one of violation and gap that is farther from done.
        """
        alpha, root = self.relaxation, state.kappa.sqrt()
        Z, S = state.Z - previous.Z, root * (state.S - previous.S)
        over = root * (state.S - state.U + previous.U - previous.S)
        primal = _length((state.T - previous.T) / alpha - Z, over / alpha - S)
        dual = _length(Z, S)
        relative = primal / _length(problem.Y, root * state.S) * _length(state.Z - state.T, root * state.U) / dual
        lean = (certificate.violation / self.atol / (certificate.gap.clamp(min=0) / self.rtol)).sqrt()
        lean = lean.nan_to_num(1.0).clamp(0.1, 10.0)[..., None, None]
        factor = (relative * lean).sqrt().nan_to_num(1.0).clamp(0.5, 2.0)
        factor = torch.where((factor > 1.2) | (factor < 0.8), factor, 1)
        return state._replace(T=torch.lerp(state.Z, state.T, 1 / factor), U=state.U / factor, tau=state.tau / factor)

    def _at_sparsity(self, problem: LayerProblem) -> Solution:
        """Search log ε for the number of non-zeros, solve there, and cut or fill the support to the exact count."""
        k, size = problem.nonzeros, int((problem.weights > 0).sum()) * problem.Y.shape[-1]
        norm = torch.linalg.matrix_norm(problem.Y)
        norm = torch.where(norm > 0, norm, 1)
        floor = 1e-3 * norm
        if problem.epsilon is not None:
            floor = torch.maximum(floor, torch.linalg.matrix_norm(problem.radius))
        loose = replace(self, rtol=10 * self.rtol, atol=10 * self.atol)
        epsilon = torch.maximum((0.01 + 0.4 * (1 - k / size) ** 6) * norm, floor)
        low, high = floor.clone(), torch.full_like(floor, torch.inf)  # radii that keep too much, too little
        count_low, count_high = torch.full_like(norm, float(size)), torch.zeros_like(norm)
        best, state = epsilon.clone(), None
        for _ in range(10):
            solution = iterate(replace(problem, epsilon=epsilon, sparsity=None), loose, state)
            state = solution.state
            count = ((solution.W != 0) & (problem.weights > 0)).sum((-2, -1)).to(norm)
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
        return replace(solution, W=_exactly(k, solution.W, problem))


def _length(P: Tensor, N: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: the joint norm of a P×M and an N×M matrix."""
    return torch.hypot(torch.linalg.matrix_norm(P, keepdim=True), torch.linalg.matrix_norm(N, keepdim=True))


def _mean_energy(H: Tensor, penalised: Tensor) -> Tensor:
    """``(*batch, 1, 1)``: mean diagonal of H over the penalised rows, once the free rows are eliminated."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)[..., penalised]
    if not bool(penalised.all()):
        F = H[..., ~penalised, :]
        B = F[..., penalised]
        diagonal = diagonal - (B * (torch.linalg.pinv(F[..., ~penalised], hermitian=True) @ B)).sum(-2)
    energy = diagonal.mean(-1).clamp(min=0)
    return torch.where(energy > 0, energy, 1)[..., None, None]


def _exactly(k: int, S: Tensor, problem: LayerProblem) -> Tensor:
    """S with exactly k penalised weights: its largest, then the largest trained ones that it lacks."""
    penalised = problem.weights > 0
    peak = torch.finfo(S.dtype).tiny + problem.W.abs().amax((-2, -1), keepdim=True)
    filled = torch.where((S == 0) & penalised, problem.W, S)
    first = (S != 0).to(S) * (2 + S.abs() / (S.abs().amax((-2, -1), keepdim=True) + torch.finfo(S.dtype).tiny))
    score = torch.where(S != 0, first, problem.W.abs() / peak)
    kept = project_topk(filled, k, torch.where(penalised, score, -1))
    return torch.where(penalised, kept, S)
