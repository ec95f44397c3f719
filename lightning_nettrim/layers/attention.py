"""The two matrices of ``nn.MultiheadAttention``, whose inputs no hook of a Linear sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nettrim.layers.base import Layer, LayerCall, joined


class InProjection(Layer):
    """The queries, keys and values of self-attention: three matrices of one input, side by side."""

    @classmethod
    def from_module(cls, path: str, module: nn.Module) -> Iterator[tuple[str, Layer | str]]:
        """The input projection and the `OutProjection` of an ``nn.MultiheadAttention``."""
        assert isinstance(module, nn.MultiheadAttention)
        if module.in_proj_weight is None:
            yield joined(path, "in_proj"), "its queries, keys and values have separate matrices"
        else:
            bias = None if module.in_proj_bias is None else "in_proj_bias"
            projection = cls(path, module, "in_proj_weight", bias)
            yield projection.name, projection
        if "weight" not in module.out_proj._parameters:
            yield joined(path, "out_proj"), "its weight is computed by a hook or a parametrization: remove that first"
        else:
            bias = None if module.out_proj.bias is None else "out_proj.bias"
            last = OutProjection(path, module, "out_proj.weight", bias)
            yield last.name, last

    @classmethod
    def submodules(cls, module: nn.Module) -> list[nn.Module]:
        """The output projection."""
        assert isinstance(module, nn.MultiheadAttention)
        return [module.out_proj]

    @property
    def inputs(self) -> int:
        """The embedding's size."""
        return self.parameter.shape[1]

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
        """Rows of the query; the outputs are computed for the rows asked for.

        Raises:
            ValueError: if query, key and value are not one tensor.
        """
        x, *others = _operands(args, kwargs)
        if any(other is not x for other in others):
            raise ValueError(
                f"{self.name}: expected self-attention, where query, key and value are one tensor, got several:"
                " ignore this layer"
            )
        bias = None if self.bias is None else self.module.get_parameter(self.bias)
        return LayerCall(
            x.numel() // x.shape[-1],
            lambda i: self.take_rows(x, i),
            lambda i: F.linear(self.take_rows(x, i), self.parameter, bias).detach(),
            None,
            tuple(x.shape[:-1]),
        )


class OutProjection(Layer):
    """What follows the heads; its input is what the attention answers with the identity in its place."""

    module: nn.MultiheadAttention

    @property
    def inputs(self) -> int:
        """The embedding's size."""
        return self.parameter.shape[1]

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
        """Rows of the heads' answers and of the output."""
        heads = None

        def inputs(positions: Tensor) -> Tensor:
            nonlocal heads
            if heads is None:
                heads = self._heads(args, kwargs)
            return self.take_rows(heads, positions)

        answer = output[0]
        shape = tuple(answer.shape[:-1])
        return LayerCall(math.prod(shape), inputs, lambda i: self.take_rows(answer, i), answer, shape)

    def _heads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The attention without its last matrix, past any hooks."""
        last, weight, bias = self.module.out_proj, self.module.out_proj.weight, self.module.out_proj.bias
        try:
            last.weight = nn.Parameter(torch.eye(len(weight)).to(weight), requires_grad=False)
            last.bias = None if bias is None else nn.Parameter(torch.zeros_like(bias), requires_grad=False)
            return self.module.forward(*args, **kwargs)[0]
        finally:
            last.weight, last.bias = weight, bias


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Query, key and value."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    return [given[name] for name in ("query", "key", "value")]
