"""ADMM for the best weights at a given number of zeros in a given pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.core.blocks import BLOCK
from lightning_nettrim.core.problem import LayerProblem
from lightning_nettrim.core.prox import project_pattern, project_responses
from lightning_nettrim.core.streaming import gram, select_rows
from lightning_nettrim.solvers.base import Solution, Solver
from lightning_nettrim.solvers.refitting import column_energy, distance, rare_input_ridge, refit

FINAL_RHO = 3.0
"""ρ, relative to the mean eigenvalue of H, at which the support no longer changes even for uncorrelated inputs."""

STEPS_PER_RHO = 3
"""Number of steps with the same ρ."""

RELAXATION = 1.8
"""Over-relaxation of T: XW + 1.8(T − XW), as H overestimates the curvature of a neuron that is not always active.

On the first layer of LeNet-300-100, 60 steps with it have about the error of 120 without. From 2 on the steps need not
converge.
"""

SETTLED, NEARLY_SETTLED, FASTER = 2e-3, 0.1, 4
"""The steps end if at most a fraction SETTLED of the kept weights has changed while ρ was the same.

If it is at most NEARLY_SETTLED, ρ grows with the power FASTER of its factor. In layers with fewer kept blocks than
MIN_BLOCKS_TO_SETTLE neither is done: a few blocks say too little.
"""

MIN_BLOCKS_TO_SETTLE = 5000
"""Number of kept blocks from which the change of the support is evaluated."""

MAX_BLOCKS_COMPARED = 1000
"""Number of kept blocks up to which the solution is always compared with that of magnitude."""

SMALL_LAYER, SMALL_LAYER_FACTOR = 512, 6
"""A layer of at most SMALL_LAYER weights takes SMALL_LAYER_FACTOR times as many steps, each with all rows."""


class Spectrum(NamedTuple):
    """The eigendecomposition QΛQᵀ of H = XᵀX with its free rows eliminated and each input scaled to unit energy.

    It depends on X alone. The rank r is n or, if there are fewer samples than inputs, P.
    """

    scale: Tensor  # (B, n, 1) root of the diagonal of XᵀX, 0 for dead inputs
    values: Tensor  # (B, 1, r) Λ
    vectors: Tensor  # (B, n, r) Q
    regression: Tensor  # (B, F, n) H_ff⁺ H_fp, regression of the penalized inputs on the free ones
    free_inverse: Tensor  # (B, F, F) H_ff⁺
    ridge: Tensor  # (B, n, 1) ridge towards the scaled trained weights of rare inputs, in the units of Λ

    @property
    def mean(self) -> Tensor:
        """``(B, 1, 1)``: the mean eigenvalue of H; 1 where all inputs are dead."""
        mean = self.values.sum(-1, keepdim=True) / self.scale.shape[-2]
        return torch.where(mean > 0, mean, 1)

    def inverse(self, rho: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        """The product of (H + ρ)⁻¹ with a number of columns.

        It is Q(Λ + ρ)⁻¹Qᵀ or, at a lower rank, (1 − QΛ(Λ + ρ)⁻¹Qᵀ)/ρ. The matrix is formed, at the cost of n columns,
        unless it is cheaper to apply the factors in each of the `STEPS_PER_RHO` steps.
        """
        rank, n = self.vectors.shape[-1], self.vectors.shape[-2]
        if rank == n > STEPS_PER_RHO * columns:
            weights = 1 / (self.values + rho).mT
            return lambda B: torch.bmm(self.vectors, weights * torch.bmm(self.vectors.mT, B))
        if rank == n:
            inverse = torch.bmm(self.vectors / (self.values + rho), self.vectors.mT)
            return lambda B: torch.bmm(inverse, B)
        part = (self.values / (self.values + rho)).mT
        return lambda B: torch.baddbmm(B, self.vectors, part * torch.bmm(self.vectors.mT, B), alpha=-1).div_(rho)


@dataclass(frozen=True)
class Cardinality(Solver):
    r"""min ½ dist²(XW, K)  over W with the pattern's zeros;  K = {Z : Z_Ω = Y_Ω, Z_Ωᶜ ≤ V_Ωᶜ}.

    ADMM on the Gram matrix: W = (H + ρ)⁻¹(XᵀT + ρ(S − U)), S = Π(W + U), U ← U + W − S, with ρ growing slowly while
    the support is selected. The ReLU is handled by majorization–minimization: T is Y on Ω and min(XW, V) elsewhere,
    over-relaxed and updated on one part of the rows in every step; for a linear response T is Y and a step does not
    depend on P. Free rows (the bias) are eliminated. The steps end when the support has settled. The problem is not
    convex, so there is no certificate.

    Args:
        max_steps: maximum number of steps; layers of at most 512 weights take six times as many. The local error
            decreases slowly with it.
        rho_start: initial ρ, relative to the mean eigenvalue of H with the ridge of the problem.
        rho_end: ρ, relative to the same, up to which it grows geometrically before the support is fixed; it grows
            faster when the support changes little.
        row_parts: number of parts of the rows; T is updated on one of them in each step.

    References:
        Meng, Behdin, Wang, Mazumder, "ALPS", NeurIPS 2024, Section 3, for ADMM at a cardinality with a growing ρ.
    """

    state_depends_on_inputs_only: ClassVar[bool] = True
    minimizes_distance: ClassVar[bool] = True

    max_steps: int = 120
    rho_start: float = 0.02
    rho_end: float = 0.5
    row_parts: int = 4

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("max_steps", "rho_start", "rho_end", "row_parts"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Cardinality.{name}: expected > 0, got {getattr(self, name)}")

    def solve(self, problem: LayerProblem, warm: Spectrum | None = None) -> Solution:
        """The weights before a refit; ``state`` can be reused for other sparsities on the same X.

        Raises:
            ValueError: for a problem without a sparsity.
        """
        shape, problem = problem.batch, problem.flattened()
        spectrum = compute_spectrum(problem) if warm is None else warm
        small = problem.num_prunable <= SMALL_LAYER
        run = replace(self, max_steps=SMALL_LAYER_FACTOR * self.max_steps, row_parts=1) if small else self
        if problem.num_prunable == problem.nonzeros:
            W, steps = problem.W, 0
        else:
            W, steps = run._run(problem, spectrum)
            W = _better_of_magnitude(problem, W)
        return Solution.uncertified(W.reshape(shape + W.shape[1:]), steps, spectrum)

    def _growth(self) -> list[float]:
        """The factors by which ρ grows: up to ``rho_end``, and to FINAL_RHO in the last sixth of the steps."""
        times = -(-self.max_steps // STEPS_PER_RHO)
        final = times // 6
        slow = (self.rho_end / self.rho_start) ** (1 / (times - final))
        fast = max(FINAL_RHO / self.rho_end, 1.0) ** (1 / max(final, 1))
        return [slow] * (times - final) + [fast] * final

    def _run(self, problem: LayerProblem, spectrum: Spectrum) -> tuple[Tensor, int]:
        """The weights of a flat batch, and the number of steps."""
        rows, free, kept = problem.penalized_rows, problem.free_rows, problem.kept_blocks
        scale, _, _, regression, free_inverse, rare_ridge = spectrum
        unscale = torch.where(scale > 0, 1 / scale, 0)
        parts = _row_parts(problem, self.row_parts)
        products = [target_product(problem, part, problem.W) for part in parts]
        total = torch.stack(products).sum(0)  # XᵀT
        W = scale * problem.W[:, rows]
        trained = (problem.ridge + rare_ridge) * W
        support = problem.keep_largest(W.square(), kept)
        S, U = torch.where(support, W, 0), torch.zeros_like(W)
        rho = self.rho_start * (spectrum.mean + problem.ridge)
        full = problem.W.clone()  # W or S, unscaled, with the optimal free rows

        def complete(penalized_rows: Tensor, free_products: Tensor) -> Tensor:
            full[:, rows] = unscale * penalized_rows
            full[:, free] = free_inverse @ free_products - regression @ full[:, rows]
            return full

        settled, may_settle = torch.zeros_like(rho, dtype=torch.bool), problem.nonzero_blocks >= MIN_BLOCKS_TO_SETTLE
        final, steps = (S, total[:, free]), 0
        for growth in self._growth():
            inverse, previous = spectrum.inverse(rho + problem.ridge, W.shape[-1]), support
            for step in range(steps, min(steps + STEPS_PER_RHO, self.max_steps)):
                b = unscale * (total[:, rows] - regression.mT @ total[:, free]) + trained
                W = inverse((S - U).mul_(rho).add_(b))  # W-update
                U += W
                support = problem.keep_largest(U.square(), kept)
                S = torch.where(support, U, 0)  # S-update
                U -= S  # dual ascent
                if problem.Omega is not None:
                    part = step % len(parts)
                    full_W = complete(W, total[:, free])
                    product = target_product(problem, parts[part], full_W, RELAXATION)  # T-update
                    total += product - products[part]
                    products[part] = product
            final = torch.where(settled, final[0], S), torch.where(settled, final[1], total[:, free])
            steps = step + 1
            factor = torch.full_like(rho, growth)
            if may_settle:
                changed = problem.layer_sum(support & ~previous) / problem.nonzeros
                settled = settled | (changed <= SETTLED)
                if bool(settled.all()):
                    break
                factor = torch.where(changed <= NEARLY_SETTLED, growth**FASTER, factor)
            rho = rho * factor
            U /= factor
        score = torch.zeros_like(full)
        score[:, rows] = final[0].square()
        return project_pattern(problem, complete(*final), score), steps


def _better_of_magnitude(problem: LayerProblem, W: Tensor) -> Tensor:
    """W, or the largest trained weights after a refit if their error is lower, as it can be for uncorrelated inputs.

    They are compared only if the supports share three quarters of their weights, or have few blocks, and if, after one
    step of a refit, in a large layer on a part of its rows, the distance of the largest trained weights is less than
    twice that of W; otherwise W is far better.
    """
    largest = project_pattern(problem, problem.W)
    shared = problem.layer_sum((W != 0) & (largest != 0) & (problem.lambdas > 0))
    similar = (4 * shared >= 3 * problem.nonzeros) | (problem.nonzero_blocks <= MAX_BLOCKS_COMPARED)
    if not bool(similar.any()):
        return W
    P, N = problem.X.shape[-2:]
    part = problem
    if problem.nonzero_blocks >= MIN_BLOCKS_TO_SETTLE:
        part = select_rows(problem, slice(0, max(P // 4, min(2 * N, P))), problem.processes)
    fitted = refit(part, largest, max_steps=1, cg_steps=10)
    of_W, of_largest = (problem.layer_sum(distance(part, w).square()) for w in (W, fitted))
    comparable = of_W > 0.25 * of_largest
    if not bool(comparable.any()):
        return W
    largest, fitted = refit(problem, largest, max_steps=3, cg_steps=10), refit(problem, W, max_steps=3, cg_steps=10)
    of_largest, of_fitted = (problem.layer_sum(distance(problem, w).square()) for w in (largest, fitted))
    better = of_largest < of_fitted
    return torch.where(better & comparable & similar, largest, W)


def compute_spectrum(problem: LayerProblem) -> Spectrum:
    """The eigendecomposition of the scaled Gram matrices of a flat batch."""
    penalized, free = problem.penalized_rows, problem.free_rows
    if problem.processes.count == 1 and problem.X.shape[-2] < len(penalized):
        return _spectrum_of_few_samples(problem)
    H = gram(problem)
    rows = H[:, free]
    free_inverse = torch.linalg.pinv(rows[..., free], hermitian=True)
    regression = free_inverse @ rows[..., penalized]
    H = H[:, penalized][..., penalized]
    energy = H.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    ridge = rare_input_ridge(energy)
    scale = (energy + ridge).sqrt()
    unscale = torch.where(scale > 0, 1 / scale, 0)
    H = H + torch.diag_embed(ridge.squeeze(-1))
    H = unscale * (H - rows[..., penalized].mT @ regression) * unscale.mT
    values, vectors = torch.linalg.eigh(H.to(problem.W))
    return Spectrum(
        scale.to(vectors), values.clamp(min=0).unsqueeze(-2), vectors, regression.to(vectors), free_inverse.to(vectors),
        (ridge * unscale.square()).to(vectors),
    )  # fmt: skip


def _spectrum_of_few_samples(problem: LayerProblem) -> Spectrum:
    """The spectrum for fewer samples than inputs, from AAᵀ, ``(P, P)``, whose nonzero eigenvalues are those of AᵀA.

    A, the scaled penalized inputs without their regression on the free ones, is computed in blocks of inputs, so that
    X and Q are the only matrices of size P × N.
    """
    X = problem.X.to(problem.Y.device)
    rows, free = problem.penalized_rows, X[..., problem.free_rows]
    free_inverse = torch.linalg.pinv((free.mT @ free).double(), hermitian=True)
    regression = (free_inverse @ (free.mT @ X).double())[..., rows].to(X)
    energy = column_energy(X)[..., rows, :]
    scale = (energy + rare_input_ridge(energy)).sqrt()
    unscale = torch.where(scale > 0, 1 / scale, 0)
    (P, n), size = (X.shape[-2], len(rows)), max(BLOCK // X.shape[-2], 1)

    def scaled_inputs(start: int) -> Tensor:
        block = slice(start, start + size)
        A = X.index_select(-1, rows[block])
        return A.sub_(free @ regression[..., block]).mul_(unscale[..., block, :].mT)

    K = X.new_zeros(len(X), P, P)
    for start in range(0, n, size):
        A = scaled_inputs(start)
        K.baddbmm_(A, A.mT)
    values, U = torch.linalg.eigh(K.double())
    root = torch.where(values > 1e-6 * values.amax(-1, keepdim=True), values, 0).sqrt().to(X)
    U = U.to(X) * torch.where(root > 0, 1 / root, 0).unsqueeze(-2)
    vectors = X.new_empty(len(X), n, P)
    for start in range(0, n, size):
        vectors[:, start : start + size] = scaled_inputs(start).mT @ U
    return Spectrum(
        scale, root.square().unsqueeze(-2), vectors, regression, free_inverse.to(X), torch.zeros_like(scale)
    )


def _row_parts(problem: LayerProblem, parts: int) -> list[slice]:
    """The rows of this process in parts, the same number of them in all processes; one for a linear response."""
    P = problem.X.shape[-2]
    size = -(-P // (1 if problem.Omega is None else parts))
    count = max(problem.processes.gather(-(-P // size)))
    return [slice(min(i * size, P), min((i + 1) * size, P)) for i in range(count)]


def target_product(problem: LayerProblem, rows: slice, W: Tensor, relaxation: float = 1.0) -> Tensor:
    """``(B, N, M)``: Xᵀ(XW + relaxation·(T − XW)) of some rows, where T is the point of K nearest to XW."""
    part = select_rows(problem, rows)
    if part.Omega is None:
        T = part.center
    else:
        XW = torch.bmm(part.X, W)
        T = XW.lerp_(project_responses(part, XW), relaxation)
    return problem.processes.sum(torch.bmm(part.X.mT, T))
