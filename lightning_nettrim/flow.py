"""Flow: what a layer's output meets in a forward pass, found by following the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_nettrim.rectifier import Rectifier

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Flow:
    """How one layer is used in a forward pass: how often, and all that its output meets before others read it.

    Attributes:
        calls: in one forward pass.
        norm: name of the BatchNorm that it goes through first, by its running statistics.
        sums: residual sums that it goes through then.
        rectifier: what it meets last; ``None`` where its response is linear.
    """

    calls: int
    norm: str | None = None
    sums: int = 0
    rectifier: Rectifier | None = None

    def __str__(self) -> str:
        """What follows, in words."""
        steps = [*(["BatchNorm"] if self.norm is not None else []), *["sum"] * self.sums]
        return ", ".join([*steps, str(self.rectifier or "linear")])

    def same(self, other: Flow) -> bool:
        """Whether the same follows, however often the layer is called."""
        if (self.norm, self.sums) != (other.norm, other.sums):
            return False
        if self.rectifier is None or other.rectifier is None:
            return self.rectifier is other.rectifier
        return self.rectifier.same(other.rectifier)


@dataclass(eq=False)
class Point:
    """A value on the way of a layer's output, under whatever views.

    Attributes:
        name: of the layer.
        call: whatever stands for the call of it.
        channels: whether the second dimension is that of the layer's outputs.
        uses: what reads the value: ``("norm", name, next)``, ``("sum", None, next)``, ``("rectifier", it, None)`` or
            ``(operation, None, None)``.
    """

    name: str
    call: Any
    channels: bool = True
    uses: list[tuple[str, Any, Point | None]] = field(default_factory=list)

    def flow(self) -> Flow:
        """What follows, as far as nothing else reads the values between."""
        norm, sums, point = None, 0, self
        while True:
            kinds = [use[0] for use in point.uses]
            rectifiers = [use[1] for use in point.uses if use[0] == "rectifier"]
            if rectifiers and len(rectifiers) == len(kinds) and all(r.same(rectifiers[0]) for r in rectifiers):
                return Flow(1, norm, sums, rectifiers[0])
            if kinds == ["norm"] and norm is None and not sums:
                norm = point.uses[0][1]
            elif kinds == ["sum"]:
                sums += 1
            else:
                return Flow(1, norm, sums)
            following = point.uses[0][2]
            assert following is not None
            point = following


_SAME_PLACES = {
    "contiguous", "clone", "detach", "alias", "dropout", "feature_dropout", "alpha_dropout", "to", "_to_copy",
}  # fmt: skip
_SAME_VALUES = _SAME_PLACES | {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t",
}  # fmt: skip
_LARGEST = {"max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"}


class Tracer(TorchDispatchMode):
    """Follows tensors by identity through the operations of a forward pass, and keeps none of them alive.

    Args:
        model: whose BatchNorms are to be known by name.
        summed: told, before a residual sum of a followed tensor, the layer's name, the call and the other summand.
    """

    def __init__(self, model: nn.Module, summed: Callable[[str, Any, Tensor], None] | None = None) -> None:
        super().__init__()
        self._norms = {
            id(module.running_mean): name
            for name, module in model.named_modules()
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None
        }
        self._summed = summed
        self._followed = WeakTensorKeyDictionary()  # the points that a tensor is at

    def follow(self, tensor: Tensor, name: str, call: Any = None, channels: bool = True) -> Point:
        """From now on, note what reads this output of a layer.

        ``channels`` says that its second dimension is that of the layer's outputs, as BatchNorm and PReLU read it.
        """
        point = Point(name, call, channels)
        self._add(tensor, point, True)
        return point

    def forget(self) -> None:
        """Follow nothing any more."""
        self._followed.clear()

    def met(self, tensor: Tensor, use: str) -> None:
        """Note a use of a tensor, if it is followed."""
        for point, _ in self._points(tensor):
            point.uses.append((use, None, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note it for the followed tensors that it reads."""
        kwargs = kwargs or {}
        read = {id(leaf): leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
        followed = [(leaf, points) for leaf in read.values() if (points := self._points(leaf))]
        name = func._schema.name.removeprefix("aten::")
        if not followed:
            return func(*args, **kwargs)
        sums = self._is_sum(name, args, kwargs)
        arriving: list[tuple[Point, bool]] = []
        for leaf, points in followed:
            for point, in_place in points:
                following = self._use(name, args, kwargs, leaf, point, in_place, sums)
                if following is not None:
                    arriving.append(following)
        result = func(*args, **kwargs)
        if name.endswith("_"):
            self._forget_storage(args[0])
        main = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(main, Tensor):
            for point, in_place in arriving:
                self._add(main, point, in_place)
        return result

    def _use(
        self, name: str, args: Any, kwargs: dict[str, Any], leaf: Tensor, point: Point, in_place: bool, sums: bool
    ) -> tuple[Point, bool] | None:
        """Note one use of a followed tensor; returns the point that the result is at, if that is to be followed."""
        if name in _SAME_VALUES or name in _LARGEST:
            return point, in_place and name in _SAME_PLACES
        rectifier = _rectifier(name, args, kwargs) if leaf is args[0] else None
        if rectifier is not None and (point.channels or rectifier.slope is None or rectifier.slope.numel() == 1):
            point.uses.append(("rectifier", rectifier, None))
            return None
        norm = self._norm(name, args) if leaf is args[0] and in_place and point.channels else None
        if norm is None and not (sums and in_place):
            point.uses.append((name, None, None))
            return None
        following = Point(point.name, point.call, point.channels)
        point.uses.append(("norm" if norm is not None else "sum", norm, following))
        if norm is None and self._summed is not None:
            self._summed(point.name, point.call, args[1] if leaf is args[0] else args[0])
        return following, True

    def _norm(self, name: str, args: Any) -> str | None:
        """The BatchNorm that an operation is, if it goes by running statistics."""
        if "batch_norm" not in name or len(args) < 5 or (args[5:] and args[5] is True):
            return None
        return self._norms.get(id(args[3]))

    def _is_sum(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether an operation adds two different tensors of one shape."""
        if name not in ("add", "add_") or len(args) != 2 or kwargs.get("alpha", 1) != 1:
            return False
        one, other = args
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and one is not other

    def _points(self, tensor: Tensor) -> list[tuple[Point, bool]]:
        return self._followed.get(tensor, [])

    def _add(self, tensor: Tensor, point: Point, in_place: bool) -> None:
        points = self._points(tensor)
        if all(known is not point for known, _ in points):
            self._followed[tensor] = [*points, (point, in_place)]

    def _forget_storage(self, tensor: Tensor) -> None:
        """After an operation in place the memory holds other values, under whatever view."""
        place = tensor.untyped_storage().data_ptr()
        for other in [*self._followed]:
            if other.untyped_storage().data_ptr() == place:
                del self._followed[other]


def _rectifier(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rectifier | None:
    """The rectifier that an operation is, or None."""
    name = name.removesuffix("_")
    given = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
    low, high = given.get("min"), given.get("max")
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
