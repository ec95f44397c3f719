"""Windows: a network in parts of consecutive modules, each of which can be run alone on recorded inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nettrim.calibration.batch import CalibrationBatch, StopForward
from lightning_nettrim.calibration.nested import flatten, map_tensors, tensors_of
from lightning_nettrim.calibration.stored_batch import StoredBatch
from lightning_nettrim.calibration.tensor_tracer import is_residual_sum
from lightning_nettrim.layers import Layer, joined
from lightning_nettrim.runtime.offload import StoredTensors, TensorStore

MAX_LAYERS = 4
"""A window without residual sums has at most so many pruned layers, if it can be divided."""


CONSTANTS = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device, Enum, FunctionType, nn.Module)
"""Types of arguments of a window."""


class Window(NamedTuple):
    """Consecutive modules: each takes what the one before returns.

    Attributes:
        name: of the first module.
        modules: each is called once in a forward pass.
        layers: number of pruned layers in it.
    """

    name: str
    modules: tuple[nn.Module, ...]
    layers: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of all modules."""
        for module in self.modules:
            yield from module.parameters()

    def outputs(self, inputs: Sequence[StoredBatch]) -> Callable[[int], Tensor]:
        """The function ``index → output`` for recorded arguments, with gradients if they are enabled."""
        return lambda index: self.run(inputs[index])

    def run(self, inputs: StoredBatch) -> Tensor:
        """The output for recorded arguments; autocast is disabled, as in all passes over the calibration set."""
        device = next(self.parameters()).device
        args, kwargs = map_tensors(inputs.load(), lambda t: t.to(device, copy=True))  # a module may overwrite them
        with torch.autocast(device.type, enabled=False):
            output = self.modules[0](*args, **kwargs)
            for module in self.modules[1:]:
                output = module(output)
        return output_tensor(output)

    def record_inputs(
        self, model: nn.Module, batches: Sequence[CalibrationBatch], store: TensorStore
    ) -> list[StoredBatch]:
        """The arguments of its first module for each batch, with the current weights of the model.

        Raises:
            ValueError: for a batch in which it is not called, and for an argument that a call might change.
        """
        recorded: list[StoredBatch] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded.append(self.store(args, kwargs, store))
            raise StopForward

        with ExitStack() as stack:
            stack.callback(self.modules[0].register_forward_pre_hook(hook, with_kwargs=True).remove)
            for i, batch in enumerate(batches):
                batch.run_until_stopped(model)
                self.check_calls(len(recorded) - i)
        return recorded

    def store(self, args: tuple[Any, ...], kwargs: dict[str, Any], store: TensorStore) -> StoredBatch:
        """Store the arguments of a call.

        Raises:
            ValueError: for an argument that a call might change, such as a cache.
        """
        for leaf in flatten((args, kwargs))[0]:
            if not isinstance(leaf, CONSTANTS):
                raise ValueError(
                    f"recover: expected tensors and numbers as arguments of {self.name!r}, got {type(leaf).__name__},"
                    " which a call might change: switch caches off, or use scope='network'"
                )
        return StoredBatch.of(map_tensors((args, kwargs), Tensor.detach), store, divisible=False)

    def check_calls(self, calls: int) -> None:
        """Check that it was called once in a batch.

        Raises:
            ValueError: if it was not.
        """
        if calls != 1:
            raise ValueError(
                f"recover: expected one call of {self.name!r} in each batch, got {calls}: use scope='network'"
            )


def record_outputs(
    model: nn.Module, windows: Sequence[Window], batches: Sequence[CalibrationBatch], store: TensorStore
) -> list[list[StoredTensors]]:
    """Outputs of each window for each batch, with the current weights of the model, in one pass.

    Raises:
        ValueError: for a batch in which a window is not called once.
    """
    recorded: list[list[StoredTensors]] = [[] for _ in windows]

    def hook(outputs: list[StoredTensors]) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: outputs.append(store.put([output_tensor(output).detach().clone()]))

    with ExitStack() as stack:
        for window, outputs in zip(windows, recorded, strict=True):
            stack.callback(window.modules[-1].register_forward_hook(hook(outputs)).remove)
        for i, batch in enumerate(batches):
            batch(model)
            for window, outputs in zip(windows, recorded, strict=True):
                window.check_calls(len(outputs) - i)
    return recorded


def output_tensor(output: Any) -> Tensor:
    """The first tensor that a module returns."""
    return tensors_of(output)[0]


def find_windows(
    model: nn.Module, batch: CalibrationBatch, layers: Mapping[str, Layer], tuned: Collection[nn.Parameter]
) -> list[Window]:
    """Cut a network into windows, in order of execution.

    A module that computes a residual sum in its own forward is one window, unless it contains a sequence of such
    modules. Any other module is divided into its children if there are residual sums or more than `MAX_LAYERS` pruned
    layers in it; children of an ``nn.Sequential`` without residual sums are joined up to `MAX_LAYERS`. A module is not
    divided if its parts, which are called once, would not have all of its tuned parameters. Parameters outside the
    windows are not tuned.

    Args:
        model: the model, in evaluation mode.
        batch: a batch of the calibration set.
        layers: the pruned layers.
        tuned: the parameters that are tuned.

    Raises:
        ValueError: if there is no window.
    """
    trace = _Calls(model, layers, tuned)
    with trace.counting(model), trace:
        batch(model)
    windows = sorted(trace.cut("", model), key=lambda window: trace.order[window.modules[0]])
    if not windows:
        raise ValueError("recover: expected modules that are called once per batch, got none: use scope='network'")
    return windows


class _Calls(TorchDispatchMode):
    """A `with` that counts the calls of modules and records which of them compute residual sums."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], tuned: Collection[nn.Parameter]) -> None:
        super().__init__()
        self.calls: Counter[nn.Module] = Counter()
        self.order: dict[nn.Module, int] = {}
        self._running: list[nn.Module] = []
        self._with_sum: set[nn.Module] = set()
        self._pruned = Counter(layer.module for layer in layers.values())
        self._tuned = {id(parameter) for parameter in tuned}

    def counting(self, model: nn.Module) -> ExitStack:
        """Hooks on all modules, in a `with`."""

        def start(module: nn.Module, args: Any) -> None:
            self.order.setdefault(module, len(self.order))
            self.calls[module] += 1
            self._running.append(module)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()

        stack = ExitStack()
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(start).remove)
            stack.callback(module.register_forward_hook(end).remove)
        return stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; a residual sum belongs to the innermost module that is running."""
        kwargs = kwargs or {}
        if self._running and is_residual_sum(func._schema.name.removeprefix("aten::"), args, kwargs):
            self._with_sum.add(self._running[-1])
        return func(*args, **kwargs)

    def cut(self, name: str, module: nn.Module) -> list[Window]:
        """The windows of a module."""
        tuned = self._tuned_in(module)
        whole = [Window(name, (module,), self._layers_in(module))] if tuned and self.calls[module] == 1 else []
        if not tuned or (whole and not self._is_divided(module)):
            return whole
        parts = self._parts(name, module)
        covered = {key for window in parts for part in window.modules for key in self._tuned_in(part)}
        return whole if whole and covered != tuned else parts

    def _parts(self, name: str, module: nn.Module) -> list[Window]:
        """The windows of the children of a module."""
        is_chain = type(module).forward is nn.Sequential.forward and self.calls[module] == 1
        parts: list[Window] = []
        joinable = False
        for key, child in module.named_children():
            single, layers = not self._is_divided(child) and not self._contains_sum(child), self._layers_in(child)
            last = parts[-1] if parts else None
            if is_chain and single and joinable and last and (not layers or last.layers + layers <= MAX_LAYERS):
                parts[-1] = Window(last.name, (*last.modules, child), last.layers + layers)
                continue
            windows = self.cut(joined(name, key), child)
            parts += windows
            joinable = single and bool(windows)
        return parts

    def _is_divided(self, module: nn.Module) -> bool:
        """Whether a module should be divided into its children."""
        if module in self._with_sum:
            lists = [m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
            return any(sum(map(self._contains_sum, blocks.children())) > 1 for blocks in lists)
        return self._contains_sum(module) or self._layers_in(module) > MAX_LAYERS

    def _contains_sum(self, module: nn.Module) -> bool:
        return any(part in self._with_sum for part in module.modules())

    def _layers_in(self, module: nn.Module) -> int:
        return sum(self._pruned[part] for part in module.modules())

    def _tuned_in(self, module: nn.Module) -> set[int]:
        return {id(parameter) for parameter in module.parameters()} & self._tuned
