"""The input and output projections of ``nn.MultiheadAttention``, which does not call them as modules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nettrim.layers.base import Layer, LayerCall, joined
from lightning_nettrim.runtime.sharded import gathered


class InProjection(Layer):
    """The query, key and value projections of self-attention: three matrices with one input, stacked along M."""

    @classmethod
    def from_module(cls, path: str, module: nn.Module) -> Iterator[tuple[str, Layer | str]]:
        """The input projection and the output projection, or the reasons why they cannot be pruned.

        Args:
            path: name of the module in the model.
            module: an ``nn.MultiheadAttention``.
        """
        assert isinstance(module, nn.MultiheadAttention)
        if module.in_proj_weight is None:
            yield joined(path, "in_proj"), "its query, key and value projections have separate weights"
        else:
            bias = None if module.in_proj_bias is None else "in_proj_bias"
            projection = cls(path, module, "in_proj_weight", bias)
            yield projection.name, projection
        if "weight" not in module.out_proj._parameters:
            yield joined(path, "out_proj"), "its weight is computed by a hook or a parametrization: remove that first"
        else:
            bias = None if module.out_proj.bias is None else "out_proj.bias"
            out_projection = OutProjection(path, module, "out_proj.weight", bias)
            yield out_projection.name, out_projection

    @classmethod
    def submodules(cls, module: nn.Module) -> list[nn.Module]:
        """The output projection module."""
        assert isinstance(module, nn.MultiheadAttention)
        return [module.out_proj]

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
        """The rows of the query; the outputs are computed from them, for the selected positions only.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            output: output of the call.

        Raises:
            ValueError: if query, key and value are not the same tensor.
        """
        query, *others = _query_key_value(args, kwargs)
        if any(other is not query for other in others):
            raise ValueError(
                "expected self-attention, where query, key and value are the same tensor, got different"
                " tensors: ignore this layer"
            )

        def outputs(positions: Tensor) -> Tensor:
            with gathered(self.module):
                bias = None if self.bias is None else self.module.get_parameter(self.bias)
                return F.linear(self.take_rows(query, positions), self.parameter, bias).detach()

        return LayerCall(
            query.numel() // query.shape[-1],
            lambda i: self.take_rows(query, i),
            outputs,
            None,
            tuple(query.shape[:-1]),
        )


class OutProjection(Layer):
    """The output projection; its inputs are the concatenated outputs of the heads.

    They are obtained from a forward pass of the attention with the identity in place of this projection.
    """

    module: nn.MultiheadAttention

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
        """The rows of the concatenated heads and of the output.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            output: output of the call.
        """
        heads = None

        def inputs(positions: Tensor) -> Tensor:
            nonlocal heads
            if heads is None:
                with gathered(self.module):
                    heads = self._concatenated_heads(args, kwargs)
            return self.take_rows(heads, positions)

        projected = output[0]
        shape = tuple(projected.shape[:-1])
        return LayerCall(math.prod(shape), inputs, lambda i: self.take_rows(projected, i), projected, shape)

    def _concatenated_heads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Output of the attention without its output projection, computed without calling hooks."""
        out_proj, weight, bias = self.module.out_proj, self.module.out_proj.weight, self.module.out_proj.bias
        try:
            out_proj.weight = nn.Parameter(torch.eye(len(weight)).to(weight), requires_grad=False)
            out_proj.bias = None if bias is None else nn.Parameter(torch.zeros_like(bias), requires_grad=False)
            return self.module.forward(*args, **kwargs)[0]
        finally:
            out_proj.weight, out_proj.bias = weight, bias


def _query_key_value(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Query, key and value among the arguments of a call."""
    arguments = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    return [arguments[name] for name in ("query", "key", "value")]
