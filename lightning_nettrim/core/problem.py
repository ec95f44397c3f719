"""The pruning problem of one layer, as a value: its data and its formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.core.blocks import input_blocks
from lightning_nettrim.core.pattern import Pattern, Unstructured
from lightning_nettrim.core.reductions import reduce_over
from lightning_nettrim.runtime.distributed import SINGLE_PROCESS, ProcessGroup

TENSORS = ("X", "Y", "W", "epsilon", "Omega", "V", "offset")
"""The fields with batch dimensions."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    r"""min Σ λₙ|Wₙₘ|  s.t.  ‖(XW + B − Y)_Ω‖_F ≤ ε,  (XW + B)_Ωᶜ ≤ V_Ωᶜ.

    The layer computes ``Y = ReLU(XW + B)`` and Ω = {Y > 0}; B is a residual that is added to its output, usually zero.
    Without a ReLU the program is the same with Ω everywhere. With another `Rectifier`, Ω is where its response is
    strictly between its bounds; off Ω the upper limit V is its lower bound, and where Y is its upper bound the
    constraint is XW + B ≥ Y. For a slope α below zero an error there is weighted with α² by the methods that are not
    convex. Sizes: ``P`` samples, ``N`` inputs, ``M`` outputs; leading dimensions are a batch of independent problems.

    Args:
        X: ``(*batch, P, N)`` layer inputs, one sample per row; the bias is a column of ones. It may stay on the CPU
            (preferably pinned) while the rest is on an accelerator; it is then transferred in blocks of rows.
        Y: ``(*batch, P, M)`` responses of the trained layer.
        W: ``(*batch, N, M)`` trained weights.
        epsilon: radius in the units of ``Y``: ``(*batch)`` for one ball, ``(*batch, M)`` for one per neuron. If
            ``sparsity`` is set as well, the smallest radius for which the program is known to be feasible.
        Omega: ``(*batch, P, M)`` bool, where the trained layer is active; ``None`` for a linear response.
        V: ``(*batch, P, M)`` limit off Ω; ``None`` is the rectifier's bound, 0 for ReLU.
        offset: ``(*batch, P, M)`` the residual B; ``None`` is 0.
        rectifier: the activation that follows; not used if ``Omega`` is ``None``.
        penalty: ``(N,)`` weights λ ≥ 0 of the ℓ1 norm, one per row; 0 is a free row (the bias), ``None`` is all ones.
        sparsity: fraction of zeros in the penalized rows, in [0, 1); ``None`` if ``epsilon`` is the budget.
        pattern: pattern of the zeros.
        ridge: regularization towards the trained weights, ½·ridge·Σ‖Xₙ‖²(W − W₀)²ₙₘ, of the methods that are not
            convex. It prevents overfitting where there are few samples per input.
        groups: number of consecutive problems of the batch that are the groups of one layer and share its budget of
            zeros. Their matrices side by side form a layer with N inputs and groups·M outputs.
        processes: processes over which the rows are distributed: ``X``, ``Y``, ``Omega``, ``V`` and ``offset`` hold
            the rows of this process; all formulas are over the rows of all processes.

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
    pattern: Pattern = Unstructured()
    ridge: float = 0.0
    groups: int = 1
    processes: ProcessGroup = SINGLE_PROCESS

    @property
    def batch(self) -> torch.Size:
        """The leading dimensions."""
        return self.X.shape[:-2]

    @property
    def lambdas(self) -> Tensor:
        """``(N, 1)`` the weights λ of the ℓ1 norm."""
        if self.penalty is None:
            return self.Y.new_ones(self.X.shape[-1], 1)
        return self.penalty.unsqueeze(-1)

    @cached_property
    def free_rows(self) -> Tensor:
        """Indices of the rows with λ = 0; the host waits for the device only when they are computed."""
        return (self.lambdas == 0).squeeze(-1).nonzero().squeeze(-1)

    @cached_property
    def penalized_rows(self) -> Tensor:
        """Indices of the rows with λ > 0; the host waits for the device only when they are computed."""
        return (self.lambdas > 0).squeeze(-1).nonzero().squeeze(-1)

    @property
    def kept_blocks(self) -> int:
        """Number of blocks that ``sparsity`` keeps in each set of the pattern, in each layer of the batch."""
        return self.pattern.kept_blocks(self._required_sparsity, *self._prunable_shape)

    @property
    def nonzeros(self) -> int:
        """Number of penalized weights that ``sparsity`` keeps, in each layer of the batch."""
        return self.pattern.nonzeros(self._required_sparsity, *self._prunable_shape)

    @property
    def nonzero_blocks(self) -> int:
        """Number of blocks that ``sparsity`` keeps, in each layer of the batch."""
        return self.nonzeros // math.prod(self.pattern.block(*self._prunable_shape))

    @property
    def num_prunable(self) -> int:
        """Number of penalized weights, in each layer of the batch."""
        return math.prod(self._prunable_shape)

    @property
    def _prunable_shape(self) -> tuple[int, int]:
        return len(self.penalized_rows), self.groups * self.Y.shape[-1]

    @property
    def _required_sparsity(self) -> float:
        sparsity = self.pattern.sparsity if self.sparsity is None else self.sparsity
        if sparsity is None:
            raise ValueError("sparsity: expected a problem with a sparsity, got none: set sparsity=, not epsilon=")
        return sparsity

    def num_samples(self) -> int:
        """P summed over all processes."""
        return sum(self.processes.gather(self.X.shape[-2]))

    @property
    def ball_dims(self) -> tuple[int, ...]:
        """The dimensions of one ball: all entries, or those of one neuron."""
        return (-2,) if self._required_epsilon.dim() > len(self.batch) else (-2, -1)

    @property
    def radius(self) -> Tensor:
        """``(*batch, 1, 1)`` or ``(*batch, 1, M)``: ε, broadcastable over ``Y``."""
        epsilon = self._required_epsilon
        return epsilon.unsqueeze(-2) if self.ball_dims == (-2,) else epsilon[..., None, None]

    @property
    def _required_epsilon(self) -> Tensor:
        if self.epsilon is None:
            raise ValueError("epsilon: expected a problem with an epsilon, got none: set epsilon=, in the units of Y")
        return self.epsilon

    @property
    def center(self) -> Tensor:
        """``(*batch, P, M)``: what XW is compared with: Y on Ω, the limit elsewhere, both minus the offset."""
        C = self.Y
        if self.Omega is not None and self.V is not None:
            C = torch.where(self.Omega, C, self.V)
        elif self.Omega is not None and self.rectifier.slope is not None:
            C = C.clamp(min=0)
        return C if self.offset is None else C - self.offset

    @property
    def has_upper_bound(self) -> bool:
        """Whether the rectifier has an upper bound, so that off Ω some limits are lower limits."""
        return self.Omega is not None and self.rectifier.high < math.inf

    @property
    def at_upper_bound(self) -> Tensor:
        """``(*batch, P, M)`` bool: where the trained response is at the rectifier's upper bound."""
        return self.rectifier.high <= self.Y

    def on_Omega(self, R: Tensor) -> Tensor:
        """R_Ω, zero elsewhere."""
        return R if self.Omega is None else torch.where(self.Omega, R, 0)

    def off_Omega(self, R: Tensor) -> Tensor:
        """R_Ωᶜ, zero elsewhere; negated at lower limits, so that positive entries are beyond the limit."""
        if self.Omega is None:
            return torch.zeros_like(R)
        R = torch.where(self.Omega, 0, R)
        return torch.where(self.at_upper_bound, -R, R) if self.has_upper_bound else R

    def response(self, W: Tensor) -> Tensor:
        """``(*batch, P, M)``: ReLU(XW + B), or XW + B for a linear response."""
        XW = torch.cat([X @ W for _, X in input_blocks(self.X, self.Y.device)], -2)
        U = XW if self.offset is None else XW.add_(self.offset)
        return U if self.Omega is None else self.rectifier(U)

    def distance(self, W: Tensor) -> Tensor:
        """``(*batch)``: ‖response(W) − Y‖_F."""
        return self.processes.norm(torch.linalg.matrix_norm(self.response(W) - self.Y))

    def local_error(self, W: Tensor) -> Tensor:
        """``(*batch)``: ‖response(W) − Y‖_F / ‖Y‖_F (divided by 1 where Y = 0)."""
        norm = self.processes.norm(torch.linalg.matrix_norm(self.Y))
        return self.distance(W) / torch.where(norm > 0, norm, 1)

    def objective(self, W: Tensor) -> Tensor:
        """``(*batch)``: Σ λₙ|Wₙₘ|."""
        return reduce_over((-2, -1), torch.sum, self.lambdas * W.abs())[..., 0, 0]

    def keep_largest(self, score: Tensor, kept: int) -> Tensor:
        """``(batch, n, M)`` bool for n penalized rows of a flat batch: the ``kept`` best blocks of each set."""
        if self.groups == 1:
            return self.pattern.keep_largest(score, kept)
        n, M = score.shape[-2:]
        wide = score.reshape(-1, self.groups, n, M).transpose(1, 2).reshape(-1, n, self.groups * M)
        kept_mask = self.pattern.keep_largest(wide, kept)
        return kept_mask.reshape(-1, n, self.groups, M).transpose(1, 2).reshape(score.shape)

    def layer_sum(self, values: Tensor) -> Tensor:
        """``(B, 1, 1)``: the sum of ``(B, ·, ·)`` values over the layer that each problem belongs to."""
        total = values.sum((-2, -1)).reshape(-1, self.groups).sum(1)
        return total.repeat_interleave(self.groups)[:, None, None]

    def layer_max(self, score: Tensor) -> Tensor:
        """``(*batch, 1, 1)``: the largest score in the layer that each problem belongs to."""
        largest = score.amax((-2, -1), keepdim=True)
        if self.groups == 1:
            return largest
        return largest.reshape(-1, self.groups).amax(-1, keepdim=True).expand(-1, self.groups).reshape(largest.shape)

    def flattened(self) -> LayerProblem:
        """The same problems with exactly one batch dimension."""
        return self._map_tensors(lambda t: t.reshape(-1, *t.shape[len(self.batch) :]))

    def subset(self, which: Tensor) -> LayerProblem:
        """The problems of a flat batch at the given indices; expanded tensors stay expanded."""
        count = len(which)
        return self._map_tensors(lambda t: t[:1].expand(count, *t.shape[1:]) if t.stride(0) == 0 else t[which])

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> LayerProblem:
        """The problem with a function applied to every batched tensor."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        mapped: dict[str, Any] = {n: t if t is None else function(t) for n, t in tensors.items()}
        return replace(self, **mapped)
