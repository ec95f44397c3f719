"""Usage: matrix products with parameters outside the forward of the layer that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_nettrim.layers import Layer

PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "convolution", "_convolution",
    "convolution_overrideable", "mkldnn_linear", "mkldnn_convolution", "_grouped_mm", "_scaled_grouped_mm",
}  # fmt: skip


class DirectProducts(TorchDispatchMode):
    """Notes every parameter that is multiplied while no layer that it belongs to is running.

    Attributes:
        found: names of those parameters.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._running: Counter[str] = Counter()
        self._layers = layers
        self._names = {_place(p): name for name, p in model.named_parameters() if p.dim() > 1 and _place(p) >= 0}
        self._owners: dict[str, list[str]] = {}
        for name, layer in layers.items():
            self._owners.setdefault(self._names.get(_place(layer.parameter), ""), []).append(name)

    @contextmanager
    def following(self) -> Iterator[None]:
        """A `with` in which it is known which layers are running; their own hooks have to be there already."""

        def enter(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, args: self._running.update([name])

        def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, args, output: self._running.subtract([name])

        with ExitStack() as stack:
            for name, layer in self._layers.items():
                for user in (layer, *layer.partners):
                    stack.callback(user.module.register_forward_pre_hook(enter(name)).remove)
                    stack.callback(user.module.register_forward_hook(leave(name)).remove)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note the parameters in it."""
        kwargs = kwargs or {}
        backward = torch._C._current_graph_task_id() != -1  # whose products are those of the layers once more
        if func._schema.name.removeprefix("aten::") in PRODUCTS and not backward:
            for leaf in tree_flatten((args, kwargs))[0]:
                name = self._names.get(_place(leaf)) if isinstance(leaf, Tensor) and leaf.dim() > 1 else None
                if name is not None and not any(self._running[owner] > 0 for owner in self._owners.get(name, [])):
                    self.found.add(name)
        return func(*args, **kwargs)


def _place(tensor: Tensor) -> int:
    """Where its first value lies, which views of a whole matrix share; −1 where it has no memory of its own."""
    try:
        return tensor.data_ptr() or -1
    except (RuntimeError, NotImplementedError):
        return -1
