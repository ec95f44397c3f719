"""Outputs of layers that are kept between forward passes, so that unchanged layers are not computed again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.layers import Layer
from lightning_nettrim.layers.context import LayerContext


class OutputCache:
    """The outputs of layers for each calibration batch, valid until a tensor that they depend on changes.

    Layers are pruned in order of execution, each after a forward pass up to it. Without a cache, L layers take L²/2
    calls of a layer per batch, with it L. The output of a layer depends on the parameters and buffers of the layers
    before it, of itself, and of all modules that are not pruned. PyTorch counts the in-place changes of each tensor;
    when a count differs, the outputs of the layers that depend on the tensor are dropped.

    Outputs of layers that are called once per forward pass, in the order of the plan, are kept. If they exceed the
    capacity, those of the layers with the fewest inputs, which are cheapest to compute, are dropped.

    Args:
        model: the model.
        layers: ``{name: layer}`` in order of execution.
        contexts: what follows each layer.
        batchnorms: ``{name of a BatchNorm: name of the layer it follows, if there is one}``.
        capacity: maximum number of bytes that are kept.

    Attributes:
        size: number of bytes that are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        contexts: Mapping[str, LayerContext],
        batchnorms: Mapping[str, str | None],
        capacity: float,
    ) -> None:
        self.capacity, self.size = capacity, 0
        self._layers = list(layers.values())
        self._indices: dict[nn.Module, int] = {}  # of modules, the index of their last layer
        counts: dict[nn.Module, int] = {}
        for index, layer in enumerate(self._layers):
            self._indices[layer.module] = index
            counts[layer.module] = counts.get(layer.module, 0) + 1
        self._cached = {
            self._indices[layer.module]
            for name, layer in layers.items()
            if counts[layer.module] == 1 and contexts[name].calls == 1 and not layer.aliases
            and not any(True for _ in layer.module.children())
        }  # fmt: skip
        self._tensors = _first_dependents(model, layers, batchnorms)
        self._versions: list[int] = []
        self._outputs: weakref.WeakKeyDictionary[Any, dict[int, Tensor]] = weakref.WeakKeyDictionary()

    @contextmanager
    def reused(self, batch: object) -> Iterator[None]:
        """A `with` in which layers return their kept outputs for a batch, and outputs that are computed are kept.

        Nothing is reused or kept while gradients are enabled.

        Args:
            batch: identifies the batch; its outputs are kept as long as it exists.
        """
        if torch.is_grad_enabled() or not self.capacity:
            yield
            return
        self._drop_changed()
        if batch not in self._outputs:
            self._outputs[batch] = {}
            weakref.finalize(batch, self._drop_all, self._outputs[batch]).atexit = False
        outputs = self._outputs[batch]
        latest = -1

        def forward_of(module: nn.Module, index: int) -> Callable[..., Any]:
            compute = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal latest
                in_order, latest = latest < index, max(latest, index)
                if index not in self._cached:
                    return compute(*args, **kwargs)
                if not in_order:  # its output depends on layers that are pruned after it
                    self._cached.discard(index)
                    self._drop(lambda i: i == index)
                    return compute(*args, **kwargs)
                if index not in outputs:
                    output = compute(*args, **kwargs)
                    self._keep(outputs, index, output)
                    return output
                return outputs[index].clone()  # operations that follow may change it in place

            return forward

        with ExitStack() as stack:
            for module, index in self._indices.items():
                stack.enter_context(replaced_forward(module, forward_of(module, index)))
            yield

    def disable(self) -> None:
        """Drop all outputs and keep none from now on, because memory has run out."""
        self.capacity = 0
        self._drop(lambda index: True)

    def _keep(self, outputs: dict[int, Tensor], index: int, output: Any) -> None:
        """Keep a copy of an output, if there is space for it."""
        if not isinstance(output, Tensor):
            self._cached.discard(index)
            return
        size = _bytes(output)
        while self.size + size > self.capacity:
            kept = {i for entry in self._outputs.values() for i in entry}
            cheapest = min(kept | {index}, key=lambda i: self._layers[i].inputs)
            self._cached.discard(cheapest)
            self._drop(lambda i, least=cheapest: i == least)  # type: ignore[misc]
            if cheapest == index:
                return
        outputs[index] = output.detach().clone()
        self.size += size

    def _drop_changed(self) -> None:
        """Drop the outputs that depend on tensors that have been changed since the last forward pass."""
        versions = [_version(tensor) for tensor, _ in self._tensors]
        changed = [
            first
            for (_, first), now, before in zip(self._tensors, versions, self._versions or versions, strict=True)
            if now != before
        ]
        self._versions = versions
        if changed:
            self._drop(lambda index: index >= min(changed))

    def _drop(self, which: Callable[[int], bool]) -> None:
        """Drop the outputs of the layers that a condition on their index selects."""
        for outputs in self._outputs.values():
            for index in [i for i in outputs if which(i)]:
                self.size -= _bytes(outputs.pop(index))

    def _drop_all(self, outputs: dict[int, Tensor]) -> None:
        """Drop the outputs of a batch that exists no longer."""
        self.size -= sum(map(_bytes, outputs.values()))
        outputs.clear()


def _version(tensor: Tensor) -> int:
    """Number of in-place changes; 0 for a tensor made in inference mode, which can be changed in that mode only."""
    return 0 if tensor.is_inference() else tensor._version


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A `with` in which a module computes its output by another function; its hooks are called as before."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _first_dependents(
    model: nn.Module, layers: Mapping[str, Layer], batchnorms: Mapping[str, str | None]
) -> list[tuple[Tensor, int]]:
    """All parameters and buffers, each with the index of the first layer whose output depends on it."""
    positions = {name: index for index, name in enumerate(layers)}
    owners = [
        (model.get_submodule(name), positions[layer] + 1) for name, layer in batchnorms.items() if layer in positions
    ]
    owners += [(layer.module, positions[name]) for name, layer in reversed([*layers.items()])]
    of_module = {part: index for module, index in owners for part in module.modules()}
    first: dict[Tensor, int] = {}
    for module in model.modules():
        index = of_module.get(module, 0)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            first[tensor] = min(index, first.get(tensor, index))
    return [*first.items()]
