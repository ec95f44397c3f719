"""Detection of matrix products with parameters outside the forward pass of the layers they belong to."""

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
from lightning_nettrim.runtime.sharded import is_sharded, units

PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "convolution", "_convolution",
    "convolution_overrideable", "mkldnn_linear", "mkldnn_convolution", "_grouped_mm", "_scaled_grouped_mm",
}  # fmt: skip
"""Names of the ATen operations that multiply matrices."""


class DirectProducts(TorchDispatchMode):
    """A `with` that finds the parameters that are multiplied while no layer they belong to is running.

    Args:
        model: the model.
        layers: ``{name: layer}``.

    Attributes:
        found: names of these parameters.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._running: Counter[str] = Counter()  # calls of each layer that have not returned
        self._layers = layers
        self._model = model
        self._names = _addresses(model)
        own_names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._owners: dict[str, list[str]] = {}
        for name, layer in layers.items():
            self._owners.setdefault(own_names.get(id(layer.parameter), ""), []).append(name)

    @contextmanager
    def following(self) -> Iterator[None]:
        """A `with` in which hooks record which layers are running; enter it after other hooks are registered."""

        def enter(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, args: self._running.update([name])

        def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, args, output: self._running.subtract([name])

        def locate(*_: Any) -> None:
            self._names = _addresses(self._model)

        with ExitStack() as stack:
            for unit in units(self._model):  # parameters that are divided among processes are gathered while it runs
                stack.callback(unit.register_forward_pre_hook(locate).remove)
                stack.callback(unit.register_forward_hook(locate).remove)
            for name, layer in self._layers.items():
                for alias in (layer, *layer.aliases):
                    stack.callback(alias.module.register_forward_pre_hook(enter(name)).remove)
                    stack.callback(alias.module.register_forward_hook(leave(name)).remove)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record the parameters among its arguments."""
        kwargs = kwargs or {}
        backward = torch._C._current_graph_task_id() != -1  # its products belong to calls of layers that have returned
        if func._schema.name.removeprefix("aten::") in PRODUCTS and not backward:
            for leaf in tree_flatten((args, kwargs))[0]:
                name = self._names.get(_address(leaf)) if isinstance(leaf, Tensor) and leaf.dim() > 1 else None
                if name is not None and not any(self._running[owner] > 0 for owner in self._owners.get(name, [])):
                    self.found.add(name)
        return func(*args, **kwargs)


def _addresses(model: nn.Module) -> dict[int, str]:
    """The names of the matrices of a model by address; those that are divided among processes have none."""
    return {_address(p): name for name, p in model.named_parameters() if p.dim() > 1 and _address(p) >= 0}


def _address(tensor: Tensor) -> int:
    """Address of the first element, which views of a whole matrix share; −1 for a tensor without memory of its own."""
    if is_sharded(tensor):
        return -1
    try:
        return tensor.data_ptr() or -1
    except (RuntimeError, NotImplementedError):
        return -1
