"""Folding of the BatchNorm that follows a layer into the layer's matrices, and back into the parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.core.activation import MIN_SLOPE, Rectifier
from lightning_nettrim.layers import Layer, joined
from lightning_nettrim.layers.context import LayerContext
from lightning_nettrim.runtime.sharded import full, sharded_like

MIN_SCALE = 1e-3
"""Smallest scale of a BatchNorm that is folded, relative to the largest of the layer, so that folding is invertible."""


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """A layer with the BatchNorm that follows: response = act(u), u = (XW)·scale + shift + R, with a residual R.

    A BatchNorm γ(z − μ)/σ + β has scale γ/σ and shift β − μγ/σ. The folded matrices are W·scale. If the bias is not
    pruned and there is a parameter that can absorb the shift (β, otherwise the layer's own bias), the shift is part of
    the last row of the folded matrices, which is multiplied by a column of ones. Otherwise it is an offset.

    Attributes:
        layer: the layer.
        trained: ``(groups, N or N + 1, M)`` the trained matrices of the layer, divided like its weight; see `W`.
        scale: ``(groups, 1, M)`` scale of the BatchNorm; 1 without BatchNorm.
        shift: ``(groups, 1, M)`` shift of the BatchNorm; 0 without BatchNorm.
        rectifier: activation that is applied last; ``None`` if the response is linear.
        bias_parameter: name of the β that absorbs changes of the last row; ``None`` if the layer's own bias does.
        beta: ``(groups, 1, M)`` trained value of ``bias_parameter``; ``None`` if there is none.
        has_ones: whether the folded matrices have a last row that is multiplied by a column of ones.
        shift_in_bias: whether the shift is part of the last row, which then has no penalty.
        active: ``(groups, 1, M)`` bool, where the scale of the BatchNorm is not negligible (see `MIN_SCALE`).
    """

    layer: Layer
    trained: Tensor
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
        """Fold a layer with the current parameters of the model.

        Args:
            layer: the layer.
            context: what follows it.
            model: the model.
            penalize_bias: whether the bias is pruned like a weight; the shift is then not folded into it.
        """
        W = layer.matrix()
        like = W[:, :1]
        scale, shift, active = _batchnorm_affine(layer, context, model, like)
        bias_parameter, beta = None, None
        if context.batchnorm is not None and not penalize_bias:
            norm: Any = model.get_submodule(context.batchnorm)
            if norm.bias is not None:
                bias_parameter, beta = joined(context.batchnorm, "bias"), layer.per_output(full(norm.bias).to(like))
        shift_in_bias = bias_parameter is not None or (layer.bias is not None and not penalize_bias)
        rectifier = context.rectifier
        if rectifier is not None and rectifier.slope is not None:
            slope = rectifier.slope.to(like).clamp(min=MIN_SLOPE)
            rectifier = replace(rectifier, slope=slope if slope.numel() == 1 else layer.per_output(slope))
        has_ones = shift_in_bias or layer.bias is not None
        trained = sharded_like(W, layer.parameter, -1)
        return cls(layer, trained, scale, shift, rectifier, bias_parameter, beta, has_ones, shift_in_bias, active)

    def updated(self, context: LayerContext, model: nn.Module) -> FoldedLayer:
        """Replace scale and shift by the current ones of the BatchNorm, which solutions of layers change.

        Args:
            context: what follows the layer.
            model: the model.
        """
        if context.batchnorm is None:
            return self
        scale, shift, active = _batchnorm_affine(self.layer, context, model, self.scale)
        return replace(self, scale=scale, shift=shift, active=active)

    @property
    def W(self) -> Tensor:
        """``(groups, N or N + 1, M)``: the trained matrices of the layer, not folded; gathered if they are divided."""
        return full(self.trained)

    @property
    def written_names(self) -> list[str]:
        """Names of the parameters and buffers that a solution may change."""
        return [*self.layer.written_names, *([] if self.bias_parameter is None else [self.bias_parameter])]

    def fold_weights(self, W: Tensor) -> Tensor:
        """Fold ``(groups, N or N + 1, M)`` matrices of the layer; the result has a last row if ``has_ones``."""
        folded = W * self.scale
        if self.has_ones and self.layer.bias is None:
            folded = torch.cat([folded, torch.zeros_like(self.shift)], -2)
        if self.shift_in_bias:
            folded[:, -1:] += self.shift
        return folded

    def matrix(self) -> Tensor:
        """``(groups, N or N + 1, M)``: the folded trained weights."""
        return self.fold_weights(self.W)

    def input_rows(self, X: Tensor) -> Tensor:
        """``(groups, P, N or N + 1)``: recorded inputs ``(P, groups·N)``, with a column of ones if ``has_ones``."""
        return self.layer.to_rows(X, self.has_ones)

    def offset(self, R: Tensor | None) -> Tensor | None:
        """``(groups, P or 1, M)``: what is added to the products with the folded matrices; ``None`` is zero.

        Args:
            R: ``(P, groups·M)`` recorded residual; ``None`` if there is none.
        """
        residual = None if R is None else self.layer.to_columns(R)
        if self.shift_in_bias or not bool(self.shift.any()):
            return residual
        return self.shift if residual is None else residual + self.shift

    def response(self, Z: Tensor, R: Tensor | None) -> Tensor:
        """``(groups, P, M)``: the response of the layer, computed from its recorded outputs, which are not modified.

        Args:
            Z: ``(P, groups·M)`` recorded outputs.
            R: ``(P, groups·M)`` recorded residual; ``None`` if there is none.
        """
        U = torch.addcmul(self.shift, self.layer.to_columns(Z), self.scale)
        if R is not None:
            U.add_(self.layer.to_columns(R))
        return U if self.rectifier is None else self.rectifier(U)

    def to_parameters(self, W: Tensor) -> dict[str, Tensor]:
        """``{name: values}``: convert folded matrices to parameters of the model; the inverse of `fold_weights`."""
        layer = self.layer
        weights = W[:, : layer.inputs] / self.scale
        if layer.bias is None:
            values = layer.to_parameters(weights)
        else:
            trained_bias = self.W[:, -1:]
            last_row = W[:, -1:] - self.shift if self.shift_in_bias else W[:, -1:]
            bias = trained_bias if self.bias_parameter is not None else last_row / self.scale
            values = layer.to_parameters(torch.cat([weights, bias], -2))
        if self.bias_parameter is not None:
            assert self.beta is not None
            trained_row = self.matrix()[:, -1:]
            beta = torch.where(self.active, self.beta + W[:, -1:] - trained_row, self.beta)
            values[self.bias_parameter] = beta.flatten()
        return values


def _batchnorm_affine(
    layer: Layer, context: LayerContext, model: nn.Module, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift of the BatchNorm that follows, and where its scale is not negligible; each ``(groups, 1, M)``.

    A negligible scale is replaced by `MIN_SCALE` times the largest one, with the same sign, so that it can be inverted.
    """
    if context.batchnorm is None:
        return torch.ones_like(like), torch.zeros_like(like), torch.ones_like(like, dtype=torch.bool)
    norm: Any = model.get_submodule(context.batchnorm)
    deviation = (norm.running_var.detach().to(like) + norm.eps).sqrt()
    gamma = torch.ones_like(deviation) if norm.weight is None else full(norm.weight).to(like)
    bias = torch.zeros_like(deviation) if norm.bias is None else full(norm.bias).to(like)
    shift = layer.per_output(bias - norm.running_mean.detach().to(like) * gamma / deviation)
    scale = layer.per_output(gamma / deviation)
    smallest = MIN_SCALE * scale.abs().amax()
    active = scale.abs() > smallest
    replacement = torch.where(scale < 0, -1.0, 1.0) * (smallest if smallest > 0 else 1.0)
    return torch.where(active, scale, replacement), shift, active
