"""The Net-Trim program of one layer, as a value: its data and every formula by which an answer is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_nettrim.pattern import Pattern
from lightning_nettrim.ranks import ALONE, Ranks
from lightning_nettrim.rectifier import Rectifier
from lightning_nettrim.sums import norm, over

BLOCK = 2**22  # entries of the largest temporary of an evaluation, one problem's


@dataclass(frozen=True, eq=False)
class LayerProblem:
    r"""min Σ λₙ|Wₙₘ|  s.t.  ‖(XW + B − Y)_Ω‖_F ≤ ε,  (XW + B)_Ωᶜ ≤ V_Ωᶜ.

    The layer answers ``Y = ReLU(XW + B)`` and Ω = {Y > 0}; B is what others add to it, a residual sum, mostly nothing.
    A layer without a ReLU is the same program with Ω everywhere. With another rectifier Ω is where it answers
    faithfully; off Ω the ceiling is its lower bound, and where Y is its upper bound, that is a floor: XW + B ≥ Y. Below
    a slope α an error counts α², for the methods that are not convex. Sizes: ``P`` samples, ``N`` inputs, ``M``
    outputs; any leading dimensions are a batch of independent problems.

    Args:
        X: ``(*batch, P, N)`` layer inputs, one sample per row; a bias is a column of ones. It may stay on the CPU
            (best pinned) while the rest is on an accelerator: it is then streamed there in blocks of rows.
        Y: ``(*batch, P, M)`` responses of the trained layer.
        W: ``(*batch, N, M)`` trained weights.
        epsilon: radius in the units of ``Y``: ``(*batch)`` for one ball, ``(*batch, M)`` for one per neuron.
            Beside ``sparsity`` it is the smallest radius for which the program is known to be feasible.
        Omega: ``(*batch, P, M)`` bool, where the trained layer fires; ``None`` for a linear response.
        V: ``(*batch, P, M)`` ceiling (or floor) off Ω; ``None`` is the rectifier's bound, 0.
        offset: ``(*batch, P, M)`` B; ``None`` is 0.
        rectifier: what follows, unless ``Omega`` is ``None``.
        penalty: ``(N,)`` weights λ ≥ 0 of the ℓ1 norm, row by row; 0 is a free row (the bias), ``None`` is all ones.
        sparsity: fraction of zeros asked of the penalised rows, in [0, 1); ``None`` where ``epsilon`` decides.
        pattern: of those zeros.
        anchor: how strongly the methods that are not convex hold to the trained weights, by ½·anchor·Σ‖Xₙ‖²(W − W₀)²ₙₘ
            beside the distance: for few samples, which a fit would answer to alone.
        groups: so many neighbours in the batch are the groups of one layer and share its zeros: their matrices, side by
            side, are that layer's N inputs by groups·M outputs.
        ranks: the processes over which the rows are spread: ``X``, ``Y``, ``Omega``, ``V`` and ``offset`` hold those of
            this one, and all formulas speak of all of them.

    References:
        Aghasi, Abdi, Romberg, "Fast Convex Pruning of Deep Neural Networks", SIAM J. Math. Data Sci. 2020, eq. (6).
    """

    X: Tensor
    Y: Tensor
    W: Tensor
    epsilon: Tensor | None = None
    Omega: Tensor | None = None
    V: Tensor | None = None
    offset: Tensor | None = None
    rectifier: Rectifier = Rectifier()
    penalty: Tensor | None = None
    sparsity: float | None = None
    pattern: Pattern = Pattern()
    anchor: float = 0.0
    groups: int = 1
    ranks: Ranks = ALONE

    @property
    def batch(self) -> torch.Size:
        """The leading dimensions."""
        return self.X.shape[:-2]

    @property
    def weights(self) -> Tensor:
        """``(N, 1)`` the ℓ1 weights λ."""
        if self.penalty is None:
            return self.Y.new_ones(self.X.shape[-1], 1)
        return self.penalty.unsqueeze(-1)

    @property
    def kept(self) -> int:
        """Number of blocks of the pattern that ``sparsity`` keeps in each of its sets, in each layer of the batch."""
        return self.pattern.kept(self._sparsity, *self._prunable)

    @property
    def nonzeros(self) -> int:
        """Number of penalised weights that ``sparsity`` keeps, in each layer of the batch."""
        return self.pattern.nonzeros(self._sparsity, *self._prunable)

    @property
    def prunable(self) -> int:
        """Number of penalised weights, in each layer of the batch."""
        return math.prod(self._prunable)

    @property
    def _prunable(self) -> tuple[int, int]:
        return int((self.weights > 0).sum()), self.groups * self.Y.shape[-1]

    @property
    def _sparsity(self) -> float:
        sparsity = self.pattern.sparsity if self.sparsity is None else self.sparsity
        if sparsity is None:
            raise ValueError("expected a problem with a sparsity, got none: set sparsity=, not epsilon=")
        return sparsity

    def samples(self) -> int:
        """P of all processes together."""
        return sum(self.ranks.gather(self.X.shape[-2]))

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

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """``(batch, n, M)`` bool of some penalised rows of a flat batch: so many blocks of each set of the pattern."""
        if self.groups == 1:
            return self.pattern.choose(score, kept)
        n, M = score.shape[-2:]
        wide = score.reshape(-1, self.groups, n, M).transpose(1, 2).reshape(-1, n, self.groups * M)
        chosen = self.pattern.choose(wide, kept)
        return chosen.reshape(-1, n, self.groups, M).transpose(1, 2).reshape(score.shape)

    def largest(self, score: Tensor) -> Tensor:
        """``(*batch, 1, 1)``: the largest score in the layer of each problem."""
        largest = score.amax((-2, -1), keepdim=True)
        if self.groups == 1:
            return largest
        return largest.reshape(-1, self.groups).amax(-1, keepdim=True).expand(-1, self.groups).reshape(largest.shape)

    def flat(self) -> LayerProblem:
        """The same problems with exactly one batch dimension."""
        return self._each(lambda t: t.reshape(-1, *t.shape[len(self.batch) :]))

    def take(self, which: Tensor) -> LayerProblem:
        """The problems of a flat batch that a mask names; what the whole batch shares stays shared."""
        count = int(which.sum())
        return self._each(lambda t: t[:1].expand(count, *t.shape[1:]) if t.stride(0) == 0 else t[which])

    def _each(self, change: Callable[[Tensor], Tensor]) -> LayerProblem:
        """The problem with every batched tensor changed."""
        names = ("X", "Y", "W", "epsilon", "Omega", "V", "offset")
        tensors = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {n: t if t is None else change(t) for n, t in tensors.items()}
        return replace(self, **changed)

    def inputs(self) -> Iterator[tuple[slice, Tensor]]:
        """X where the rest is: whole if it is there, otherwise block by block, with the rows of each block."""
        if self.X.device == self.Y.device:
            yield slice(None), self.X
            return
        P, N = self.X.shape[-2:]
        size = max(1, 8 * BLOCK // N)
        for start in range(0, P, size):
            rows = slice(start, min(start + size, P))
            yield rows, self.X[..., rows, :].to(self.Y.device, non_blocking=True)

    def blocks(self) -> Iterator[tuple[slice, LayerProblem]]:
        """The problem's rows, a block at a time, so that an evaluation needs no temporary of the size of Y."""
        (P, N), M = self.X.shape[-2:], self.Y.shape[-1]
        size = max(1, BLOCK // max(N, M))
        for start in range(0, P, size):
            rows = slice(start, min(start + size, P))
            yield rows, self.part(rows)

    def part(self, rows: slice) -> LayerProblem:
        """Some of this process's rows of the problem, X where the rest is, for formulas that speak of those alone."""
        part: dict[str, Any] = {n: getattr(self, n) for n in ("Y", "Omega", "V", "offset")}
        part = {n: t if t is None else t[..., rows, :] for n, t in part.items()}
        return replace(self, X=self.X[..., rows, :].to(self.Y.device), ranks=ALONE, **part)

    def gram(self) -> Tensor:
        """``(batch, N, N)``: XᵀX of a flat batch, in float64 from products in X's own precision."""
        N = self.X.shape[-1]
        H = self.Y.new_zeros(len(self.Y), N, N)
        for _, X in self.inputs():
            H.baddbmm_(X.mT, X)
        return self.ranks.sum(H.double())

    @property
    def centre(self) -> Tensor:
        """``(*batch, P, M)``: where XW has to be: Y on Ω, the ceiling or the floor elsewhere, both less the offset."""
        C = self.Y
        if self.Omega is not None and self.V is not None:
            C = torch.where(self.Omega, C, self.V)
        elif self.Omega is not None and self.rectifier.slope is not None:
            C = C.clamp(min=0)
        return C if self.offset is None else C - self.offset

    @property
    def bounded(self) -> bool:
        """Whether the rectifier has an upper bound, so that some constraints are floors."""
        return self.Omega is not None and self.rectifier.high < math.inf

    @property
    def floors(self) -> Tensor:
        """``(*batch, P, M)`` bool: where off Ω the trained layer is at its upper bound."""
        return self.rectifier.high <= self.Y

    def on_Omega(self, R: Tensor) -> Tensor:
        """R_Ω, zero elsewhere."""
        return R if self.Omega is None else torch.where(self.Omega, R, 0)

    def off_Omega(self, R: Tensor) -> Tensor:
        """R_Ωᶜ with its sign turned at floors, so that what is positive is beyond the bound; zero elsewhere."""
        if self.Omega is None:
            return torch.zeros_like(R)
        R = torch.where(self.Omega, 0, R)
        return torch.where(self.floors, -R, R) if self.bounded else R

    def response(self, W: Tensor) -> Tensor:
        """``(*batch, P, M)``: ReLU(XW + B), or XW + B for a linear response."""
        XW = torch.cat([X @ W for _, X in self.inputs()], -2)
        U = XW if self.offset is None else XW.add_(self.offset)
        return U if self.Omega is None else self.rectifier(U)

    def relative_error(self, W: Tensor) -> Tensor:
        """``(*batch)``: ‖response(W) − Y‖_F / ‖Y‖_F (over 1 where Y = 0)."""
        size = self.ranks.norm(torch.linalg.matrix_norm(self.Y))
        return self.distance(W) / torch.where(size > 0, size, 1)

    def distance(self, W: Tensor) -> Tensor:
        """``(*batch)``: ‖response(W) − Y‖_F."""
        return self.ranks.norm(torch.linalg.matrix_norm(self.response(W) - self.Y))

    def objective(self, W: Tensor) -> Tensor:
        """``(*batch)``: Σ λₙ|Wₙₘ|."""
        return over((-2, -1), torch.sum, self.weights * W.abs())[..., 0, 0]

    def duality_gap(self, objective: Tensor, bound: Tensor) -> Tensor:
        """``(*batch)``: (objective − bound) relative to the larger of both, in size.

        Relative to a thousandth of the trained weights' norm where that is larger, so that an optimum of zero has one.
        """
        size = torch.maximum(objective.abs(), bound.abs())
        size = torch.maximum(size, 1e-3 * self.objective(self.W))
        return (objective - bound) / torch.where(size > 0, size, 1)

    def violation(self, W: Tensor) -> Tensor:
        """``(*batch)``: how far W is outside the ball or above the ceiling, the larger of both, relative to ε."""
        return self.infeasibility(W, torch.zeros_like(self.Y[..., :1, :1]).expand_as(self.Y))[0]

    def infeasibility(self, W: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """``(*batch)`` each: the violation of W, and what it is worth at the prices ν of the constraints.

        An objective below the optimum is bought by violation: to first order, by ‖ν_Ω‖ times the excess over ε plus
        ⟨|ν_Ωᶜ|, excess over V⟩.
        """
        zero = self.radius.new_zeros(())
        ball, above, price, worth = zero, zero, zero, zero
        for rows, part in self.blocks():
            R, dual = part.X @ W - part.centre, nu[..., rows, :]
            ball = torch.hypot(ball, norm(part.on_Omega(R), self.balls))
            price = torch.hypot(price, norm(part.on_Omega(dual), self.balls))
            excess = part.off_Omega(R).clamp_(min=0)
            above = torch.hypot(above, norm(excess))
            worth = worth + over((-2, -1), torch.sum, excess.mul_(part.off_Omega(dual).clamp_(max=0)))
        ball, above, price = (self.ranks.norm(length) for length in (ball, above, price))
        excess = (ball - self.radius).clamp(min=0)
        worth = over((-2, -1), torch.sum, price * excess) - self.ranks.sum(worth)
        return (torch.maximum(norm(excess), above) / norm(self.radius))[..., 0, 0], worth[..., 0, 0]

    def bound(self, nu: Tensor) -> Tensor:
        r"""``(*batch)``: a lower bound of the optimum from any dual guess ν, ``(*batch, P, M)``.

        ⟨ν_Ω, Y_Ω⟩ − ε‖ν_Ω‖ + ⟨ν_Ωᶜ, V_Ωᶜ⟩ ≤ min Σ λₙ|Wₙₘ| whenever |Xᵀν| ≤ λ and ν ≤ 0 off Ω (≥ 0 at
        floors). The guess is made feasible: clipped off Ω, shifted on Ω until Xᵀν vanishes on free rows, then scaled
        column by column.
        """
        lam = self.weights
        free = (lam == 0).squeeze(-1)
        shift, solved = self._balance(nu, free) if bool(free.any()) else (None, 1.0)
        slope = torch.zeros_like(self.W)
        for rows, part in self.blocks():
            slope += part.X.mT @ part._clip(nu[..., rows, :], free, shift)
        slope = self.ranks.sum(slope)
        scale = solved / torch.where(lam > 0, slope.abs() / lam, 0).amax(-2, keepdim=True).clamp(min=1)
        value, ball = scale.new_zeros(()), scale.new_zeros(())
        for rows, part in self.blocks():
            dual = part._clip(nu[..., rows, :], free, shift) * scale
            value = value + over((-2, -1), torch.sum, dual * part.centre)
            ball = torch.hypot(ball, norm(part.on_Omega(dual), self.balls))
        value, ball = self.ranks.sum(value), self.ranks.norm(ball)
        return (value - over((-2, -1), torch.sum, self.radius * ball))[..., 0, 0]

    def _clip(self, nu: Tensor, free: Tensor, shift: Tensor | None = None) -> Tensor:
        """ν clipped off Ω and moved on Ω by the shift along the free inputs."""
        moved = nu if shift is None else nu - self.X[..., free] @ shift
        if self.Omega is None:
            return moved
        within = nu.clamp(max=0)
        if self.bounded:
            within = torch.where(self.floors, nu.clamp(min=0), within)
        return torch.where(self.Omega, moved, within)

    def _balance(self, nu: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """The least shift on Ω, ``(*batch, F, M)``, after which Xᵀν = 0 on the F free rows, and where there is one."""
        total = gram = torch.zeros((), dtype=torch.float64, device=nu.device)
        for rows, part in self.blocks():
            A, clipped = part.X[..., free].double(), part._clip(nu[..., rows, :], free).double()
            on = torch.ones_like(clipped) if part.Omega is None else part.Omega.double()
            pairs = (A.unsqueeze(-1) * A.unsqueeze(-2)).flatten(-2)  # (*batch, P, F²)
            total = total + (clipped.mT @ A).unsqueeze(-1)  # (*batch, M, F, 1)
            gram = gram + (on.mT @ pairs).unflatten(-1, total.shape[-2:-1] * 2)
        total, gram = self.ranks.sum(total), self.ranks.sum(gram)
        shift = torch.linalg.pinv(gram, hermitian=True) @ total
        missing = torch.linalg.vector_norm(total - gram @ shift, dim=(-2, -1))
        solved = missing <= 1e-9 * torch.linalg.vector_norm(total, dim=(-2, -1)).clamp(min=1e-300)
        return shift.squeeze(-1).mT.to(nu), solved.unsqueeze(-2).to(nu)

    def compressed(self) -> LayerProblem:
        """A linear response's program on at most N + 1 rows: the same W are feasible, at the same distance from Y.

        With (X Y) = Q (A B; 0 C), ‖XW − Y‖² = ‖AW − B‖² + ‖C‖², in each column; the last row holds the norms of C's.
        Every process has all of these rows.
        """
        N = self.X.shape[-1]
        if self.Omega is not None or self.samples() <= N + 1:
            return self
        joint = torch.cat([self.X, self.centre.to(self.X.device)], -1)
        R = torch.linalg.qr(joint, mode="r").R
        if self.ranks.count > 1:
            R = torch.linalg.qr(self.ranks.rows(R), mode="r").R
        R = R.to(self.Y.device)
        A, B, C = R[..., :N, :N], R[..., :N, N:], R[..., N:, N:]
        X = torch.cat([A, torch.zeros_like(A[..., :1, :])], -2)
        Y = torch.cat([B, torch.linalg.vector_norm(C, dim=-2, keepdim=True)], -2)
        return replace(self, X=X, Y=Y, offset=None, ranks=ALONE)

    def validate(self) -> LayerProblem:
        """The problem itself, once its shapes, dtypes and values are seen to be usable.

        Raises:
            ValueError: naming the tensor, what was expected and what was found.
        """
        with self.ranks.together():
            self._validate()
        return self

    def _validate(self) -> None:
        """Raise ValueError for what is unusable in this process."""
        batch, (P, N), M = self.batch, self.X.shape[-2:], self.Y.shape[-1]
        expected: dict[str, tuple[tuple[int, ...], ...]] = {
            "X": ((*batch, P, N),),
            "Y": ((*batch, P, M),),
            "W": ((*batch, N, M),),
            "epsilon": (tuple(batch), (*batch, M)),
            "Omega": ((*batch, P, M),),
            "V": ((*batch, P, M),),
            "offset": ((*batch, P, M),),
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
            streamed = name == "X" and tensor.device.type == "cpu"
            if tensor.dtype != kind or (tensor.device != self.Y.device and not streamed):
                raise ValueError(
                    f"{name}: expected {kind} on {self.Y.device}, got {tensor.dtype} on {tensor.device}: convert it"
                )
            if name != "Omega" and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}: expected finite values, got NaN or Inf: look at what feeds this layer")
        if self.X.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"X: expected float32 or float64, got {self.X.dtype}: convert the problem first")
        if P == 0:
            raise ValueError("X: expected at least one sample, got none: feed some batches")
        if math.prod(batch) % self.groups:
            raise ValueError(f"groups: expected a divisor of the batch {tuple(batch)}, got {self.groups}")
        if self.epsilon is None and self.sparsity is None:
            raise ValueError("expected an epsilon or a sparsity, got neither: set one")
        if self.epsilon is not None and not bool((self.epsilon > 0).all()):
            raise ValueError(f"epsilon: expected > 0, got {self.epsilon.min():g}: set a positive radius")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction in [0, 1), got {self.sparsity}")
        if self.penalty is not None and not bool((self.penalty >= 0).all()):
            raise ValueError(f"penalty: expected weights >= 0, got {self.penalty.min():g}")
