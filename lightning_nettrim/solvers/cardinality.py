"""Cardinality: the weights that answer as the trained layer did, at a given number of zeros in a given pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nettrim.problem import LayerProblem
from lightning_nettrim.prox import project_pattern, project_responses
from lightning_nettrim.solvers.base import Solution, Solver, Status, coarse_products
from lightning_nettrim.solvers.refit import distance, held, refit

SETTLED = 3.0
"""ρ, relative to the mean eigenvalue of H, at which a support is at rest even for uncorrelated inputs."""


FEW, MORE = 512, 6
"""A layer of so few weights takes so many times the steps, renewing all rows in each: it costs next to nothing."""


class Spectrum(NamedTuple):
    """What depends on X alone: H = XᵀX without its free rows, each input scaled to unit energy, as QΛQᵀ.

    The rank r is n or, where there are fewer samples than inputs, P.
    """

    scale: Tensor  # (B, n, 1) root of the diagonal of XᵀX, 0 for dead inputs
    values: Tensor  # (B, 1, r) Λ
    vectors: Tensor  # (B, n, r) Q
    across: Tensor  # (B, F, n) H_ff⁺ H_fp, the free rows' regression on the penalised ones
    inner: Tensor  # (B, F, F) H_ff⁺
    hold: Tensor  # (B, n, 1) how strongly a scaled weight is held to the trained one, in Λ

    @property
    def mean(self) -> Tensor:
        """``(B, 1, 1)``: the mean eigenvalue of H; 1 where all inputs are dead."""
        mean = self.values.sum(-1, keepdim=True) / self.scale.shape[-2]
        return torch.where(mean > 0, mean, 1)

    def inverse(self, rho: Tensor) -> Callable[[Tensor], Tensor]:
        """What multiplies by (H + ρ)⁻¹: Q(Λ + ρ)⁻¹Qᵀ or, at a lower rank, (1 − QΛ(Λ + ρ)⁻¹Qᵀ)/ρ."""
        if self.vectors.shape[-1] == self.vectors.shape[-2]:
            inverse = torch.bmm(self.vectors / (self.values + rho), self.vectors.mT)
            return lambda B: torch.bmm(inverse, B)
        part = (self.values / (self.values + rho)).mT
        return lambda B: torch.baddbmm(B, self.vectors, part * torch.bmm(self.vectors.mT, B), alpha=-1).div_(rho)


@dataclass(frozen=True)
class Cardinality(Solver):
    r"""min ½ dist²(XW, K)  over W with the pattern's zeros;  K = {Z : Z_Ω = Y_Ω, Z_Ωᶜ ≤ V_Ωᶜ}.

    ADMM on the Gram matrix: W = (H + ρ)⁻¹(XᵀT + ρ(S − U)), S = Π(W + U), U ← U + W − S, with ρ growing slowly, since
    the support is decided on the way. The ReLU enters by majorise–minimise: T is Y on Ω and min(XW, V) elsewhere,
    renewed on one part of the rows in every step; for a linear response T stays Y and a step does not depend on P. Free
    rows (the bias) are eliminated. The problem is not convex: there is no certificate, and the status says only whether
    the support had come to rest.

    Args:
        steps: in all, for a layer of very few weights six times as many; the response error falls slowly with them
            (360 in place of 120: 8 % at 80, 5 % at 95 % zeros).
        first: ρ at the beginning, relative to the mean eigenvalue of H.
        last: ρ at the end, by the same measure; between them it grows geometrically.
        parts: of the rows, of which a step renews one.
        tf32: let the float32 products of a step use faster formats, TF32 on CUDA, what torch calls "medium" on the CPU.

    References:
        Meng, Behdin, Wang, Mazumder, "ALPS", NeurIPS 2024, Section 3, for ADMM at a cardinality with a growing ρ.
    """

    steps: int = 120
    first: float = 0.02
    last: float = 0.5
    parts: int = 4
    tf32: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name in ("steps", "first", "last", "parts"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Cardinality.{name}: expected > 0, got {getattr(self, name)}")

    def solve(self, problem: LayerProblem, warm: Spectrum | None = None) -> Solution:
        """The weights before any refit; ``state`` serves further sparsities of the same X.

        Raises:
            ValueError: for a problem without a sparsity.
        """
        shape, problem = problem.batch, problem.flat()
        spectrum = spectrum_of(problem) if warm is None else warm
        run = replace(self, steps=MORE * self.steps, parts=1) if problem.prunable <= FEW else self
        if problem.prunable == problem.nonzeros:
            W, moved = problem.W, problem.W.new_zeros(len(problem.W))
        else:
            W, moved = run._run(problem, spectrum)
            W = _or_magnitude(problem, W)
        lost = ~W.isfinite().all(-1).all(-1)
        W = torch.where(lost[:, None, None], problem.W, W)
        status = torch.where(moved > 1e-3, int(Status.MAX_STEPS), int(Status.CONVERGED))
        status = torch.where(lost, int(Status.NONFINITE), status).reshape(shape)
        return Solution.uncertified(W.reshape(shape + W.shape[1:]), status, run.steps, spectrum)

    def _growth(self) -> list[float]:
        """The factors of ρ, every third step: slowly to ``last``, and in the last sixth of the steps on to SETTLED."""
        times = -(-self.steps // 3)
        settling = times // 6
        slow = (self.last / self.first) ** (1 / (times - settling))
        fast = max(SETTLED / self.last, 1.0) ** (1 / max(settling, 1))
        return [slow] * (times - settling) + [fast] * settling

    def _run(self, problem: LayerProblem, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
        """The answer of a flat batch, and which fraction of the kept weights the last tenth of the steps exchanged."""
        penalised = (problem.weights > 0).squeeze(-1)
        heavy, free = penalised.nonzero().squeeze(-1), (~penalised).nonzero().squeeze(-1)  # once: a mask would wait
        kept = problem.kept  # once: it is counted
        scale, _, _, across, inner, hold = spectrum
        unscale = torch.where(scale > 0, 1 / scale, 0)
        rows = _parts(problem, self.parts)
        images = [_image(problem, part, problem.W) for part in rows]
        total = torch.stack(images).sum(0)  # XᵀT
        W = scale * problem.W[:, heavy]
        trained = (problem.anchor + hold) * W
        S = torch.where(problem.choose(W.square(), kept), W, 0)
        U, rest = torch.zeros_like(W), S
        rho, growth = self.first * spectrum.mean, self._growth()
        full = problem.W.clone()  # W or S, unscaled, with the free rows that suit it

        def complete(penalised_rows: Tensor) -> Tensor:
            full[:, heavy] = unscale * penalised_rows
            full[:, free] = inner @ total[:, free] - across @ full[:, heavy]
            return full

        for step in range(self.steps):
            with coarse_products(self.tf32):
                if step % 3 == 0:
                    inverse = spectrum.inverse(rho + problem.anchor)
                b = unscale * (total[:, heavy] - across.mT @ total[:, free]) + trained
                W = inverse((S - U).mul_(rho).add_(b))  # W-update
                U += W
                S = torch.where(problem.choose(U.square(), kept), U, 0)  # S-update
                U -= S  # dual ascent
                if problem.Omega is not None:
                    part = step % len(rows)
                    image = _image(problem, rows[part], complete(W))
                    total += image - images[part]
                    images[part] = image
            if step % 3 == 2:
                rho = rho * growth[step // 3]
                U /= growth[step // 3]
            if step == self.steps - self.steps // 10 - 1:
                rest = S
        moved = ((S != 0) & (rest == 0)).sum((-2, -1)) / (S != 0).sum((-2, -1)).clamp(min=1)
        score = torch.zeros_like(full)
        score[:, heavy] = S.square()
        return project_pattern(problem, complete(S), score), moved


def _or_magnitude(problem: LayerProblem, W: Tensor) -> Tensor:
    """W, or the largest trained weights refitted where those are no worse a choice: inputs without correlation.

    Looked at only where both supports share three quarters of their weights and one Newton step brings the magnitudes
    near; elsewhere the calibrated choice is far ahead.
    """
    largest = project_pattern(problem, problem.W)
    penalised = problem.weights > 0

    def whole(values: Tensor) -> Tensor:
        """``(B, 1, 1)``: the sum over the groups of each layer, whose zeros are shared."""
        return values.reshape(-1, problem.groups).sum(1).repeat_interleave(problem.groups)[:, None, None]

    shared = whole((((W != 0) & (largest != 0)) & penalised).sum((-2, -1)))
    alike = 4 * shared >= 3 * problem.nonzeros
    if not bool(alike.any()):
        return W
    largest = refit(problem, largest, steps=1, inner=10)
    near = whole(distance(problem, W).square()) > 0.25 * whole(distance(problem, largest).square())
    if not bool(near.any()):
        return W
    largest, fitted = refit(problem, largest, steps=3, inner=10), refit(problem, W, steps=3, inner=10)
    better = whole(distance(problem, largest).square()) < whole(distance(problem, fitted).square())
    return torch.where(better & near & alike, largest, W)


def spectrum_of(problem: LayerProblem) -> Spectrum:
    """The eigenvalues and eigenvectors of a flat batch's scaled Gram matrix."""
    penalised = (problem.weights > 0).squeeze(-1)
    if problem.ranks.count == 1 and problem.X.shape[-2] < int(penalised.sum()):
        return _spectrum_of_samples(problem, penalised)
    H = problem.gram()
    rows = H[:, ~penalised]
    inner = torch.linalg.pinv(rows[..., ~penalised], hermitian=True)
    across = inner @ rows[..., penalised]
    H = H[:, penalised][..., penalised]
    energy = H.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    hold = held(energy)
    scale = (energy + hold).sqrt()
    unscale = torch.where(scale > 0, 1 / scale, 0)
    H = H + torch.diag_embed(hold.squeeze(-1))
    H = unscale * (H - rows[..., penalised].mT @ across) * unscale.mT
    values, vectors = torch.linalg.eigh(H.to(problem.W))
    return Spectrum(
        scale.to(vectors), values.clamp(min=0).unsqueeze(-2), vectors, across.to(vectors), inner.to(vectors),
        (hold * unscale.square()).to(vectors),
    )  # fmt: skip


def _spectrum_of_samples(problem: LayerProblem, penalised: Tensor) -> Spectrum:
    """The same of fewer samples than inputs, from the P by P matrix of the samples: AᵀA has the eigenvalues of AAᵀ."""
    X = problem.X.to(problem.Y.device)
    A, free = X[..., penalised], X[..., ~penalised]
    inner = torch.linalg.pinv((free.mT @ free).double(), hermitian=True)
    across = (inner @ (free.mT @ A).double()).to(A)
    energy = A.square().sum(-2).unsqueeze(-1)
    scale = (energy + held(energy)).sqrt()
    A = (A - free @ across) * torch.where(scale > 0, 1 / scale, 0).mT
    values, U = torch.linalg.eigh((A @ A.mT).double())
    root = torch.where(values > 1e-6 * values.amax(-1, keepdim=True), values, 0).sqrt().to(A)
    vectors = A.mT @ (U.to(A) * torch.where(root > 0, 1 / root, 0).unsqueeze(-2))
    return Spectrum(scale, root.square().unsqueeze(-2), vectors, across, inner.to(A), torch.zeros_like(scale))


def _parts(problem: LayerProblem, parts: int) -> list[slice]:
    """This process's rows in as many parts as those of every other; one for a linear response, of a fixed target."""
    P = problem.X.shape[-2]
    size = -(-P // (1 if problem.Omega is None else parts))
    count = max(problem.ranks.gather(-(-P // size)))
    return [slice(min(i * size, P), min((i + 1) * size, P)) for i in range(count)]


def _image(problem: LayerProblem, rows: slice, W: Tensor) -> Tensor:
    """``(B, N, M)``: XᵀT on some rows, where T is the point of K nearest to XW."""
    part = problem.part(rows)
    T = part.centre if part.Omega is None else project_responses(part, torch.bmm(part.X, W))
    return problem.ranks.sum(torch.bmm(part.X.mT, T))
