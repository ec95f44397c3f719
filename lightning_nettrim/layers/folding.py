"""Fold: a layer's matrices as what follows it sees them, behind its BatchNorm, and back into its own parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.core.activation import MIN_SLOPE, Rectifier
from lightning_nettrim.layers import Layer, joined
from lightning_nettrim.layers.context import LayerContext

MIN_SCALE = 1e-3
"""A BatchNorm's scale counts as this fraction of the largest one at least: what it shuts off still has weights."""


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """u = (XW)·scale + shift + R, then the rectifier: R is what residual sums add.

    A BatchNorm γ(z − μ)/σ + β has scale γ/σ and shift β − μγ/σ. The shift joins the bias in the last row of the matrix,
    on a column of has_ones, where there is a parameter that can take it: β, or else the layer's own bias. A bias that may
    be pruned stays what it is.

    Attributes:
        layer: whose matrices.
        W: ``(groups, N or N + 1, M)`` the layer's own trained matrices.
        scale: ``(groups, 1, M)``.
        shift: ``(groups, 1, M)``.
        rectifier: what comes last; ``None`` is nothing.
        bias_parameter: the parameter that takes a change of the last row, by name, ``None`` where it is the layer's bias.
        beta: its trained value, ``(groups, 1, M)``.
        has_ones: whether there is a last row, on a column of has_ones.
        shift_in_bias: whether the last row holds the shift as well; it is no weight then, and has no penalty.
        active: ``(groups, 1, M)`` bool, where the BatchNorm lets anything through.
    """

    layer: Layer
    W: Tensor
    scale: Tensor
    shift: Tensor
    rectifier: Rectifier | None
    bias_parameter: str | None
    beta: Tensor | None
    has_ones: bool
    shift_in_bias: bool
    active: Tensor

    @classmethod
    def create(cls, layer: Layer, context: LayerContext, model: nn.Module, penalize_bias: bool) -> FoldedLayer:
        """What follows a layer, by the parameters that the model has now."""
        W = layer.matrix()
        like = W[:, :1]
        scale, shift, active = _passed(layer, context, model, like)
        bias_parameter, beta = None, None
        if context.batchnorm is not None and not penalize_bias:
            norm: Any = model.get_submodule(context.batchnorm)
            if norm.bias is not None:
                bias_parameter, beta = joined(context.batchnorm, "bias"), layer.per_output(norm.bias.detach().to(like))
        shift_in_bias = bias_parameter is not None or (layer.bias is not None and not penalize_bias)
        rectifier = context.rectifier
        if rectifier is not None and rectifier.slope is not None:
            slope = rectifier.slope.to(like).clamp(min=MIN_SLOPE)
            rectifier = replace(rectifier, slope=slope if slope.numel() == 1 else layer.per_output(slope))
        has_ones = shift_in_bias or layer.bias is not None
        return cls(layer, W, scale, shift, rectifier, bias_parameter, beta, has_ones, shift_in_bias, active)

    def updated(self, context: LayerContext, model: nn.Module) -> FoldedLayer:
        """The same fold by the BatchNorm as it is now, whose parameters a solution changes."""
        if context.batchnorm is None:
            return self
        scale, shift, active = _passed(self.layer, context, model, self.scale)
        return replace(self, scale=scale, shift=shift, active=active)

    @property
    def written_names(self) -> list[str]:
        """Names of the parameters that a solve may change."""
        return [*self.layer.written_names, *([] if self.bias_parameter is None else [self.bias_parameter])]

    def fold_weights(self, W: Tensor) -> Tensor:
        """``(groups, N or N + 1, M)`` from the layer's own matrices."""
        folded = W * self.scale
        if self.has_ones and self.layer.bias is None:
            folded = torch.cat([folded, torch.zeros_like(self.shift)], -2)
        if self.shift_in_bias:
            folded[:, -1:] += self.shift
        return folded

    def matrix(self) -> Tensor:
        """The trained weights, folded."""
        return self.fold_weights(self.W)

    def input_rows(self, X: Tensor) -> Tensor:
        """``(groups, P, N or N + 1)``: recorded inputs, with the column of has_ones that the last row needs."""
        return self.layer.to_rows(X, self.has_ones)

    def offset(self, R: Tensor | None) -> Tensor | None:
        """``(groups, P or 1, M)``: what is added to XW before the rectifier; ``None`` is nothing."""
        residual = None if R is None else self.layer.to_columns(R)
        if self.shift_in_bias or not bool(self.shift.any()):
            return residual
        return self.shift if residual is None else residual + self.shift

    def response(self, Z: Tensor, R: Tensor | None) -> Tensor:
        """``(groups, P, M)``: the response to recorded outputs, which stay as they are."""
        U = torch.addcmul(self.shift, self.layer.to_columns(Z), self.scale)
        if R is not None:
            U.add_(self.layer.to_columns(R))
        return U if self.rectifier is None else self.rectifier(U)

    def to_parameters(self, W: Tensor) -> dict[str, Tensor]:
        """Folded matrices as parameters of the model, by name; `fold` turned round."""
        layer = self.layer
        own = W[:, : layer.inputs] / self.scale
        if layer.bias is None:
            values = layer.to_parameters(own)
        else:
            trained = self.W[:, -1:]
            row = W[:, -1:] - self.shift if self.shift_in_bias else W[:, -1:]
            values = layer.to_parameters(
                torch.cat([own, trained if self.bias_parameter is not None else row / self.scale], -2)
            )
        if self.bias_parameter is not None:
            assert self.beta is not None
            before = self.matrix()[:, -1:]
            values[self.bias_parameter] = torch.where(self.active, self.beta + W[:, -1:] - before, self.beta).flatten()
        return values


def _passed(layer: Layer, context: LayerContext, model: nn.Module, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(groups, 1, M)`` each: scale and shift of the BatchNorm that follows, and where it lets anything through."""
    if context.batchnorm is None:
        return torch.ones_like(like), torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool)
    norm: Any = model.get_submodule(context.batchnorm)
    deviation = (norm.running_var.detach().to(like) + norm.eps).sqrt()
    gamma = torch.ones_like(deviation) if norm.weight is None else norm.weight.detach().to(like)
    bias = torch.zeros_like(deviation) if norm.bias is None else norm.bias.detach().to(like)
    shift = layer.per_output(bias - norm.running_mean.detach().to(like) * gamma / deviation)
    scale = layer.per_output(gamma / deviation)
    least = MIN_SCALE * scale.abs().amax()
    active = scale.abs() > least
    return torch.where(active, scale, torch.where(scale < 0, -1.0, 1.0) * (least if least > 0 else 1.0)), shift, active
