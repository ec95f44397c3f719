"""Fold: a layer's matrices as what follows it sees them, behind its BatchNorm, and back into its own parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.flow import Flow
from lightning_nettrim.layers import Layer, joined
from lightning_nettrim.rectifier import FLATTEST, Rectifier

LEAST = 1e-3
"""A BatchNorm's scale counts as this fraction of the largest one at least: what it shuts off still has weights."""


@dataclass(frozen=True, eq=False)
class Fold:
    """u = (XW)·scale + shift + R, then the rectifier: R is what residual sums add.

    A BatchNorm γ(z − μ)/σ + β has scale γ/σ and shift β − μγ/σ. The shift joins the bias in the last row of the matrix,
    on a column of ones, where there is a parameter that can take it: β, or else the layer's own bias. A bias that may
    be pruned stays what it is.

    Attributes:
        layer: whose matrices.
        W: ``(groups, N or N + 1, M)`` the layer's own trained matrices.
        scale: ``(groups, 1, M)``.
        shift: ``(groups, 1, M)``.
        rectifier: what comes last; ``None`` is nothing.
        shifted: the parameter that takes a change of the last row, by name, ``None`` where it is the layer's bias.
        beta: its trained value, ``(groups, 1, M)``.
        ones: whether there is a last row, on a column of ones.
        total: whether the last row holds the shift as well; it is no weight then, and has no penalty.
        alive: ``(groups, 1, M)`` bool, where the BatchNorm lets anything through.
    """

    layer: Layer
    W: Tensor
    scale: Tensor
    shift: Tensor
    rectifier: Rectifier | None
    shifted: str | None
    beta: Tensor | None
    ones: bool
    total: bool
    alive: Tensor

    @classmethod
    def of(cls, layer: Layer, flow: Flow, model: nn.Module, penalize_bias: bool) -> Fold:
        """What follows a layer, by the parameters that the model has now."""
        W = layer.matrix()
        like = W[:, :1]
        scale, shift, alive = _passed(layer, flow, model, like)
        shifted, beta = None, None
        if flow.norm is not None and not penalize_bias:
            norm: Any = model.get_submodule(flow.norm)
            if norm.bias is not None:
                shifted, beta = joined(flow.norm, "bias"), layer.across(norm.bias.detach().to(like))
        total = shifted is not None or (layer.bias is not None and not penalize_bias)
        rectifier = flow.rectifier
        if rectifier is not None and rectifier.slope is not None:
            slope = rectifier.slope.to(like).clamp(min=FLATTEST)
            rectifier = replace(rectifier, slope=slope if slope.numel() == 1 else layer.across(slope))
        ones = total or layer.bias is not None
        return cls(layer, W, scale, shift, rectifier, shifted, beta, ones, total, alive)

    def now(self, flow: Flow, model: nn.Module) -> Fold:
        """The same fold by the BatchNorm as it is now, whose parameters a solution changes."""
        if flow.norm is None:
            return self
        scale, shift, alive = _passed(self.layer, flow, model, self.scale)
        return replace(self, scale=scale, shift=shift, alive=alive)

    @property
    def written(self) -> list[str]:
        """Names of the parameters that a solve may change."""
        return [*self.layer.written, *([] if self.shifted is None else [self.shifted])]

    def fold(self, W: Tensor) -> Tensor:
        """``(groups, N or N + 1, M)`` from the layer's own matrices."""
        folded = W * self.scale
        if self.ones and self.layer.bias is None:
            folded = torch.cat([folded, torch.zeros_like(self.shift)], -2)
        if self.total:
            folded[:, -1:] += self.shift
        return folded

    def matrix(self) -> Tensor:
        """The trained weights, folded."""
        return self.fold(self.W)

    def rows(self, X: Tensor) -> Tensor:
        """``(groups, P, N or N + 1)``: recorded inputs, with the column of ones that the last row needs."""
        return self.layer.rows(X, self.ones)

    def offset(self, R: Tensor | None) -> Tensor | None:
        """``(groups, P or 1, M)``: what is added to XW before the rectifier; ``None`` is nothing."""
        residual = None if R is None else self.layer.columns(R)
        if self.total or not bool(self.shift.any()):
            return residual
        return self.shift if residual is None else residual + self.shift

    def answer(self, Z: Tensor, R: Tensor | None) -> Tensor:
        """``(groups, P, M)``: the response to recorded outputs, which stay as they are."""
        U = torch.addcmul(self.shift, self.layer.columns(Z), self.scale)
        if R is not None:
            U.add_(self.layer.columns(R))
        return U if self.rectifier is None else self.rectifier(U)

    def parameters(self, W: Tensor) -> dict[str, Tensor]:
        """Folded matrices as parameters of the model, by name; `fold` turned round."""
        layer = self.layer
        own = W[:, : layer.inputs] / self.scale
        if layer.bias is None:
            values = layer.parameters(own)
        else:
            trained = self.W[:, -1:]
            row = W[:, -1:] - self.shift if self.total else W[:, -1:]
            values = layer.parameters(torch.cat([own, trained if self.shifted is not None else row / self.scale], -2))
        if self.shifted is not None:
            assert self.beta is not None
            before = self.matrix()[:, -1:]
            values[self.shifted] = torch.where(self.alive, self.beta + W[:, -1:] - before, self.beta).flatten()
        return values


def _passed(layer: Layer, flow: Flow, model: nn.Module, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(groups, 1, M)`` each: scale and shift of the BatchNorm that follows, and where it lets anything through."""
    if flow.norm is None:
        return torch.ones_like(like), torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool)
    norm: Any = model.get_submodule(flow.norm)
    deviation = (norm.running_var.detach().to(like) + norm.eps).sqrt()
    gamma = torch.ones_like(deviation) if norm.weight is None else norm.weight.detach().to(like)
    bias = torch.zeros_like(deviation) if norm.bias is None else norm.bias.detach().to(like)
    shift = layer.across(bias - norm.running_mean.detach().to(like) * gamma / deviation)
    scale = layer.across(gamma / deviation)
    least = LEAST * scale.abs().amax()
    alive = scale.abs() > least
    return torch.where(alive, scale, torch.where(scale < 0, -1.0, 1.0) * (least if least > 0 else 1.0)), shift, alive
