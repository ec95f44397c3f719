"""What a layer is to a pruner: matrices with a bias, and positions at which rows of inputs become rows of outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer, of which only the asked-for positions are ever laid out as rows.

    Attributes:
        count: positions.
        inputs: ``(n,)`` positions to ``(n, groups·N)`` rows of inputs, without the bias column.
        outputs: ``(n,)`` positions to ``(n, groups·M)`` rows of outputs, before anything that follows.
        tensor: the output itself, by which what follows is found; ``None`` where no hook sees it.
        shape: the leading dimensions whose product the positions are; empty where positions are no tokens.
    """

    count: int
    inputs: Callable[[Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor]
    tensor: Tensor | None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """The weights of one or more modules, as ``groups`` matrices of ``inputs`` by ``outputs``.

    Attributes:
        path: name of the module in the model.
        module: whose forward pass is listened to.
        weight: where its weight lies in the module.
        bias: the same of its bias; ``None`` where it has none.
        aliases: the same layer of other modules that have the very same parameters.
    """

    path: str
    module: nn.Module
    weight: str = "weight"
    bias: str | None = "bias"
    aliases: tuple[Layer, ...] = ()

    is_plain_matrix: ClassVar[bool] = False
    """Whether each output row is an input row times the matrix, and nothing else, as for ``nn.Linear``."""

    @classmethod
    def from_module(cls, path: str, module: nn.Module) -> Iterator[tuple[str, Layer | str]]:
        """The layers of a module by name, each with the reason instead if it cannot be pruned.

        Args:
            path: name of the module in the model.
            module: of a class that this layer type is registered for.
        """
        weight = _own_parameter(module, "weight")
        bias = None if getattr(module, "bias", None) is None else _own_parameter(module, "bias")
        if weight is None or (bias is None and getattr(module, "bias", None) is not None):
            yield path, "its weight is computed by a hook: remove weight_norm or spectral_norm from the layer first"
        else:
            yield path, cls(path, module, weight, bias)

    @classmethod
    def submodules(cls, module: nn.Module) -> list[nn.Module]:
        """Submodules of a module whose parameters belong to its layers, so that they are no layers of their own."""
        return []

    @property
    def name(self) -> str:
        """Name of the module, followed by the name of the weight if the module has several."""
        return joined(self.path, self.weight.removesuffix("_orig").removesuffix("weight").rstrip("._"))

    @property
    def groups(self) -> int:
        """Matrices."""
        return 1

    @property
    @abstractmethod
    def inputs(self) -> int:
        """N of each matrix."""

    @property
    def outputs(self) -> int:
        """M of each matrix."""
        return self.parameter.numel() // (self.groups * self.inputs)

    @property
    def parameter(self) -> Tensor:
        """The weight, in the module's own form."""
        return self.module.get_parameter(self.weight)

    def parameter_names(self, bias: bool = True) -> list[str]:
        """Of its parameters in the model: the weight and, if it is asked for, the bias."""
        own = [self.weight, *([self.bias] if bias and self.bias is not None else [])]
        return [joined(self.path, key) for key in own]

    @property
    def kind(self) -> str:
        """The class of the module."""
        return type(self.module).__name__

    @abstractmethod
    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
        """One call of the module, as its hook gets it."""

    def channels_second(self, output: Tensor) -> bool:
        """Whether the second dimension of the output is that of the layer's outputs."""
        return output.dim() == 2

    def take_rows(self, output: Tensor, positions: Tensor) -> Tensor:
        """``(n, groups·M)``: rows of a tensor that lies as the output does."""
        return output.detach().reshape(-1, output.shape[-1])[positions.to(output.device)]

    def to_matrix(self, weight: Tensor) -> Tensor:
        """``(groups, N, M)`` from the weight's own form."""
        return weight.reshape(self.groups, self.outputs, self.inputs).mT

    def from_matrix(self, W: Tensor) -> Tensor:
        """The weight's own form; `to_matrix` turned round."""
        return W.mT.reshape(self.parameter.shape)

    def matrix(self) -> Tensor:
        """``(groups, N, M)`` weights, or ``(groups, N + 1, M)`` with the bias as the last row; a copy."""
        W = self.to_matrix(self._effective(self.weight))
        if self.bias is not None:
            W = torch.cat([W, self.per_output(self._effective(self.bias))], -2)
        return W.to(solve_dtype(W.dtype), copy=True)

    def per_output(self, values: Tensor) -> Tensor:
        """``(groups, 1, M)`` of one value for each output."""
        return values.reshape(self.groups, 1, self.outputs)

    def to_parameters(self, W: Tensor) -> dict[str, Tensor]:
        """The matrices as the module's own parameters, under their names in the model; `matrix` turned round."""
        parts = [self.from_matrix(W[:, : self.inputs]), W[:, -1].reshape(-1)]
        values = dict(zip(self.parameter_names(), parts, strict=False))
        return values | {_mask(name): (value != 0).to(W.dtype) for name, value in values.items() if _mask(name)}

    @property
    def written_names(self) -> list[str]:
        """Names of all parameters and buffers of the model that `parameters` has values for."""
        return [*self.parameter_names(), *filter(None, map(_mask, self.parameter_names()))]

    def _effective(self, key: str) -> Tensor:
        """A parameter as the forward pass uses it, masked where ``torch.nn.utils.prune`` does so."""
        value = self.module.get_parameter(key).detach()
        return value * self.module.get_buffer(_mask(key)) if _mask(key) else value

    def penalty(self, like: Tensor) -> Tensor:
        """``(N + 1,)``: 1 for the rows of the weight, 0 for the row of a free bias."""
        return torch.cat([like.new_ones(self.inputs), like.new_zeros(1)])

    def to_rows(self, X: Tensor, ones: bool) -> Tensor:
        """``(groups, P, N)`` or, with a column of ones, ``(groups, P, N + 1)``, in the solve's dtype."""
        X = X.to(solve_dtype(X.dtype)).unflatten(-1, (self.groups, self.inputs)).movedim(-2, 0)
        return torch.cat([X, X.new_ones(*X.shape[:-1], 1)], -1) if ones else X.contiguous()

    def to_columns(self, Z: Tensor) -> Tensor:
        """``(groups, P, M)`` from ``(P, groups·M)``, in the solve's dtype."""
        Z = Z.to(solve_dtype(Z.dtype)).unflatten(-1, (self.groups, self.outputs))
        return Z.movedim(-2, 0).contiguous()


def _own_parameter(module: nn.Module, key: str) -> str | None:
    """The name of a parameter, which `torch.nn.utils.prune` changes; ``None`` if it is computed by something else."""
    if key in module._parameters:
        return key
    return f"{key}_orig" if f"{key}_orig" in module._parameters and f"{key}_mask" in module._buffers else None


def _mask(name: str) -> str:
    """The name of the mask that ``torch.nn.utils.prune`` keeps beside a parameter; empty where there is none."""
    return f"{name.removesuffix('_orig')}_mask" if name.endswith("_orig") else ""


def eager_name(name: str) -> str:
    """The name that a module or a parameter has where nothing is compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def joined(*parts: str) -> str:
    """Dotted, without the empty ones."""
    return ".".join(part for part in parts if part)


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
