"""Base class of layers: weights as matrices, and inputs and outputs as rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_nettrim.runtime.sharded import class_of, full


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer, whose inputs and outputs are converted to rows at selected positions only.

    Attributes:
        count: number of positions, each of which has one row of inputs and one row of outputs.
        inputs: function that maps ``(n,)`` positions to ``(n, groups·N)`` rows of inputs, without the bias column.
        outputs: function that maps ``(n,)`` positions to ``(n, groups·M)`` rows of outputs, before the operations that
            follow the layer.
        tensor: the output tensor, from which the operations that follow are traced; ``None`` if it is not the output
            of a module.
        shape: leading dimensions, whose product is ``count``; empty if the positions are not tokens.
    """

    count: int
    inputs: Callable[[Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor]
    tensor: Tensor | None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """The weight of a module, as ``groups`` matrices of size N × M, and its bias.

    Attributes:
        path: name of the module in the model.
        module: the module; a hook on it records its calls.
        weight: name of the weight parameter in the module.
        bias: name of the bias parameter in the module; ``None`` if there is none.
        aliases: layers of other modules that share the parameters of this layer.
    """

    path: str
    module: nn.Module
    weight: str = "weight"
    bias: str | None = "bias"
    aliases: tuple[Layer, ...] = ()

    is_plain_matrix: ClassVar[bool] = False
    """Whether the rows of the output are the rows of the input times the matrix, as for ``nn.Linear``."""

    @classmethod
    def from_module(cls, path: str, module: nn.Module) -> Iterator[tuple[str, Layer | str]]:
        """The layers of a module.

        Args:
            path: name of the module in the model.
            module: module of a class that this layer type is registered for.

        Yields:
            The name of each layer with the layer or, if it cannot be pruned, the reason.
        """
        weight = _parameter_key(module, "weight")
        bias = None if getattr(module, "bias", None) is None else _parameter_key(module, "bias")
        if weight is None or (bias is None and getattr(module, "bias", None) is not None):
            yield path, "its weight is computed by a hook: remove weight_norm or spectral_norm from the layer first"
        else:
            yield path, cls(path, module, weight, bias)

    @classmethod
    def submodules(cls, module: nn.Module) -> list[nn.Module]:
        """Submodules whose parameters belong to the layers of the module, so that they are not separate layers."""
        return []

    @property
    def name(self) -> str:
        """Name of the module in the model, followed by the name of the weight if the module has several."""
        return joined(self.path, self.weight.removesuffix("_orig").removesuffix("weight").rstrip("._"))

    @property
    def groups(self) -> int:
        """Number of matrices."""
        return 1

    @property
    def inputs(self) -> int:
        """N, the number of inputs of each matrix; by default the number of values of the weight per output."""
        return self.parameter.shape[1:].numel()  # no value is read, which might be divided among processes

    @property
    def outputs(self) -> int:
        """M, the number of outputs of each matrix."""
        return self.parameter.numel() // (self.groups * self.inputs)

    @property
    def parameter(self) -> Tensor:
        """The weight parameter, in the shape that the module uses; it may be divided among processes."""
        return self.module.get_parameter(self.weight)

    def parameter_names(self, bias: bool = True) -> list[str]:
        """Names of the parameters in the model.

        Args:
            bias: include the bias, if there is one.
        """
        keys = [self.weight, *([self.bias] if bias and self.bias is not None else [])]
        return [joined(self.path, key) for key in keys]

    @property
    def kind(self) -> str:
        """Name of the class of the module."""
        return class_of(self.module).__name__

    @abstractmethod
    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
        """Describe one call of the module; called in its forward hook.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            output: output of the call.

        Raises:
            ValueError: if the layer cannot be pruned when it is called in this way, with the reason.
        """

    def token_call(self, x: Tensor, output: Tensor) -> LayerCall:
        """A call in which each index of the leading dimensions of input and output is a row."""
        shape = tuple(output.shape[:-1])
        return LayerCall(
            math.prod(shape), lambda i: self.take_rows(x, i), lambda i: self.take_rows(output, i), output, shape
        )

    def channels_second(self, output: Tensor) -> bool:
        """Whether the second dimension of the output tensor is the one of size groups·M."""
        return output.dim() == 2

    def take_rows(self, output: Tensor, positions: Tensor) -> Tensor:
        """``(n, groups·M)``: rows of a tensor at some positions.

        Args:
            output: tensor with the shape of the layer's output.
            positions: ``(n,)`` indices of the rows.
        """
        return output.detach().reshape(-1, output.shape[-1])[positions.to(output.device)]

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Convert a tensor with the shape of the weight parameter to ``(groups, N, M)``."""
        return weight.reshape(self.groups, self.outputs, self.inputs).mT

    def from_matrix(self, W: Tensor) -> Tensor:
        """Convert ``(groups, N, M)`` to the shape of the weight parameter; the inverse of `to_matrix`."""
        return W.mT.reshape(self.parameter.shape)

    def matrix(self) -> Tensor:
        """``(groups, N, M)``, or ``(groups, N + 1, M)`` with the bias as the last row: a copy of the weights."""
        W = self.to_matrix(self._masked_parameter(self.weight))
        if self.bias is not None:
            W = torch.cat([W, self.per_output(self._masked_parameter(self.bias))], -2)
        return W.to(solve_dtype(W.dtype), copy=True)

    def per_output(self, values: Tensor) -> Tensor:
        """Reshape ``(groups·M,)``, one value per output, to ``(groups, 1, M)``."""
        return values.reshape(self.groups, 1, self.outputs)

    def to_parameters(self, W: Tensor) -> dict[str, Tensor]:
        """Convert matrices to parameters; the inverse of `matrix`.

        Args:
            W: ``(groups, N, M)``, or ``(groups, N + 1, M)`` with the bias as the last row.

        Returns:
            ``{name: values}`` of the parameters and of the masks of ``torch.nn.utils.prune``, by name in the model.
        """
        parts = [self.from_matrix(W[:, : self.inputs]), W[:, -1].reshape(-1)]
        values = dict(zip(self.parameter_names(), parts, strict=False))
        return values | {
            _mask_name(name): (value != 0).to(W.dtype) for name, value in values.items() if _mask_name(name)
        }

    @property
    def written_names(self) -> list[str]:
        """Names of all parameters and buffers of the model that `to_parameters` returns values for."""
        return [*self.parameter_names(), *filter(None, map(_mask_name, self.parameter_names()))]

    def _masked_parameter(self, key: str) -> Tensor:
        """A parameter, gathered, and multiplied by its mask if ``torch.nn.utils.prune`` has added one."""
        value = full(self.module.get_parameter(key))
        return value * self.module.get_buffer(_mask_name(key)) if _mask_name(key) else value

    def penalty(self, like: Tensor) -> Tensor:
        """``(N + 1,)``: weights λ of the ℓ1 norm if the bias is not pruned, 1 for the weight and 0 for the bias.

        Args:
            like: tensor with the dtype and device of the result.
        """
        return torch.cat([like.new_ones(self.inputs), like.new_zeros(1)])

    def to_rows(self, X: Tensor, ones: bool) -> Tensor:
        """``(groups, P, N)`` or, with a column of ones, ``(groups, P, N + 1)``: inputs of each matrix in `solve_dtype`.

        Args:
            X: ``(P, groups·N)`` recorded inputs.
            ones: append a column of ones.
        """
        X = X.to(solve_dtype(X.dtype)).unflatten(-1, (self.groups, self.inputs)).movedim(-2, 0)
        return torch.cat([X, X.new_ones(*X.shape[:-1], 1)], -1) if ones else X.contiguous()

    def to_columns(self, Z: Tensor) -> Tensor:
        """Convert ``(P, groups·M)`` recorded outputs to ``(groups, P, M)`` in `solve_dtype`."""
        Z = Z.to(solve_dtype(Z.dtype)).unflatten(-1, (self.groups, self.outputs))
        return Z.movedim(-2, 0).contiguous()


def _parameter_key(module: nn.Module, key: str) -> str | None:
    """Name of a parameter in a module, also if ``torch.nn.utils.prune`` has renamed it; ``None`` if it is computed."""
    if key in module._parameters:
        return key
    return f"{key}_orig" if f"{key}_orig" in module._parameters and f"{key}_mask" in module._buffers else None


def _mask_name(name: str) -> str:
    """Name of the mask that ``torch.nn.utils.prune`` has added for a parameter; empty if there is none."""
    return f"{name.removesuffix('_orig')}_mask" if name.endswith("_orig") else ""


def eager_name(name: str) -> str:
    """Name of a module or parameter without the prefixes that ``torch.compile`` adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def joined(*parts: str) -> str:
    """Join the parts of a name with dots, without empty ones."""
    return ".".join(part for part in parts if part)


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which layers of a dtype are solved: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
