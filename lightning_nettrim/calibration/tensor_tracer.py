"""Tracing of the operations that follow a layer in a forward pass, by following its output tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.layers.context import LayerContext

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Modules that are treated as BatchNorm."""


@dataclass(eq=False)
class TracedValue:
    """The output of a layer, or the value after some of the operations that follow; all its views are the same value.

    Attributes:
        name: name of the layer.
        call: identifies the call of the layer.
        channels: whether the second dimension is that of the layer's outputs.
        uses: the operations that read the value: ``("norm", name, next value)``, ``("sum", None, next value)``,
            ``("rectifier", rectifier, None)`` or, for any other one, ``(operation, None, None)``.
    """

    name: str
    call: Any
    channels: bool = True
    uses: list[tuple[str, Any, TracedValue | None]] = field(default_factory=list)

    def context(self) -> LayerContext:
        """The operations that follow, up to the first value that any other operation reads as well."""
        norm, sums, value = None, 0, self
        while True:
            kinds = [use[0] for use in value.uses]
            rectifiers = [use[1] for use in value.uses if use[0] == "rectifier"]
            if rectifiers and len(rectifiers) == len(kinds) and all(r.equals(rectifiers[0]) for r in rectifiers):
                return LayerContext(1, norm, sums, rectifiers[0])
            if kinds == ["norm"] and norm is None and not sums:
                norm = value.uses[0][1]
            elif kinds == ["sum"]:
                sums += 1
            else:
                return LayerContext(1, norm, sums)
            following = value.uses[0][2]
            assert following is not None
            value = following


_SAME_LAYOUT = {
    "contiguous", "clone", "detach", "alias", "dropout", "feature_dropout", "alpha_dropout", "to", "_to_copy",
}  # fmt: skip
_SAME_VALUES = _SAME_LAYOUT | {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t",
}  # fmt: skip
_MAX_POOLING = {"max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"}


class Tracer(TorchDispatchMode):
    """A `with` in which the operations that read the followed tensors, by identity, are recorded.

    Tensors are referenced weakly.

    Args:
        model: the model; its BatchNorms are identified by their running statistics.
        on_sum: called as ``on_sum(name, call, other summand)`` before a residual sum of a followed tensor.
    """

    def __init__(self, model: nn.Module, on_sum: Callable[[str, Any, Tensor], None] | None = None) -> None:
        super().__init__()
        self._norms = {
            id(module.running_mean): name
            for name, module in model.named_modules()
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None
        }
        self._on_sum = on_sum
        self._followed = WeakTensorKeyDictionary()  # tensor → [(value, whether it is laid out as the layer's output)]

    def follow(self, tensor: Tensor, name: str, call: Any = None, channels: bool = True) -> TracedValue:
        """Start to record the operations that read an output of a layer.

        Args:
            tensor: the output.
            name: name of the layer.
            call: identifies the call of the layer.
            channels: whether the second dimension is that of the layer's outputs, as BatchNorm and PReLU expect it.
        """
        value = TracedValue(name, call, channels)
        self._add(tensor, value, True)
        return value

    def forget(self) -> None:
        """Stop following all tensors."""
        self._followed.clear()

    def record_use(self, tensor: Tensor, use: str) -> None:
        """Record a use of a tensor, if it is followed."""
        for value, _ in self._values(tensor):
            value.uses.append((use, None, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record it as a use of the followed tensors that it reads."""
        kwargs = kwargs or {}
        if not self._followed:
            return func(*args, **kwargs)
        read = {id(tensor): tensor for tensor in _tensors((args, kwargs))}
        followed = [(tensor, values) for tensor in read.values() if (values := self._values(tensor))]
        name = func._schema.name.removeprefix("aten::")
        if not followed:
            return func(*args, **kwargs)
        is_sum = is_residual_sum(name, args, kwargs)
        results: list[tuple[TracedValue, bool]] = []
        for tensor, values in followed:
            for value, same_layout in values:
                following = self._record_use(name, args, kwargs, tensor, value, same_layout, is_sum)
                if following is not None:
                    results.append(following)
        result = func(*args, **kwargs)
        if name.endswith("_"):
            self._forget_storage(args[0])
        output = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(output, Tensor):
            for value, same_layout in results:
                self._add(output, value, same_layout)
        return result

    def _record_use(
        self,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        tensor: Tensor,
        value: TracedValue,
        same_layout: bool,
        is_sum: bool,
    ) -> tuple[TracedValue, bool] | None:
        """Record one use of a followed tensor.

        Returns:
            The value of the result, and whether it is laid out as the layer's output; ``None`` if it is not followed.
        """
        if name in _SAME_VALUES or name in _MAX_POOLING:
            return value, same_layout and name in _SAME_LAYOUT
        rectifier = _rectifier(name, args, kwargs) if tensor is args[0] else None
        if rectifier is not None and (value.channels or rectifier.slope is None or rectifier.slope.numel() == 1):
            value.uses.append(("rectifier", rectifier, None))
            return None
        norm = self._norm(name, args) if tensor is args[0] and same_layout and value.channels else None
        if norm is None and not (is_sum and same_layout):
            value.uses.append((name, None, None))
            return None
        following = TracedValue(value.name, value.call, value.channels)
        value.uses.append(("norm" if norm is not None else "sum", norm, following))
        if norm is None and self._on_sum is not None:
            self._on_sum(value.name, value.call, args[1] if tensor is args[0] else args[0])
        return following, True

    def _norm(self, name: str, args: Any) -> str | None:
        """Name of the BatchNorm that an operation computes with running statistics; ``None`` for other operations."""
        if "batch_norm" not in name or len(args) < 5 or (args[5:] and args[5] is True):
            return None
        return self._norms.get(id(args[3]))

    def _values(self, tensor: Tensor) -> list[tuple[TracedValue, bool]]:
        return self._followed.get(tensor, [])

    def _add(self, tensor: Tensor, value: TracedValue, same_layout: bool) -> None:
        values = self._values(tensor)
        if all(known is not value for known, _ in values):
            self._followed[tensor] = [*values, (value, same_layout)]

    def _forget_storage(self, tensor: Tensor) -> None:
        """Stop following all tensors that share the storage of a tensor that has been overwritten."""
        address = tensor.untyped_storage().data_ptr()
        for other in [*self._followed]:
            if other.untyped_storage().data_ptr() == address:
                del self._followed[other]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def is_residual_sum(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation adds two different tensors of one shape."""
    if name not in ("add", "add_") or len(args) != 2 or kwargs.get("alpha", 1) != 1:
        return False
    a, b = args
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a is not b


def _rectifier(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rectifier | None:
    """The `Rectifier` that an operation computes; ``None`` for other operations."""
    name = name.removesuffix("_")
    bounds = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
    low, high = bounds.get("min"), bounds.get("max")
    if name == "relu":
        return Rectifier()
    if name == "relu6":
        return Rectifier(0.0, 6.0)
    if name == "hardtanh":
        low, high = kwargs.get("min_val", low), kwargs.get("max_val", high)
        return Rectifier(-1.0 if low is None else low, 1.0 if high is None else high)
    if name == "leaky_relu":
        slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
        return Rectifier(slope=torch.tensor(float(slope))) if 0 <= slope <= 1 else None
    if name in ("prelu", "_prelu_kernel"):
        slopes = args[1].detach().flatten().clone()
        return Rectifier(slope=slopes) if bool(((slopes >= 0) & (slopes <= 1)).all()) else None
    if name in ("clamp", "clamp_min") and isinstance(low, int | float) and not isinstance(high, Tensor):
        return Rectifier(float(low), float("inf") if high is None else float(high))
    return None
