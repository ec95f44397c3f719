"""Tracing of a forward pass: the layers that it calls, in which order, and what follows each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_nettrim.calibration.batch import AmbiguousBatch, CalibrationBatch
from lightning_nettrim.calibration.direct_products import DirectProducts
from lightning_nettrim.calibration.recording import call_hooks
from lightning_nettrim.calibration.tensor_tracer import BATCH_NORMS, TracedValue, Tracer
from lightning_nettrim.layers import Layer, LayerCall
from lightning_nettrim.layers.context import LayerContext


@dataclass(frozen=True)
class ForwardTrace:
    """The result of `trace_forward`.

    Attributes:
        contexts: what follows each layer that was called, in order of first execution.
        unusable: for each other layer that was called, why its output is not the product of its weights and its inputs.
        direct_products: names of parameters that are multiplied outside the forward pass of a layer.
        batchnorms: names of the BatchNorms with running statistics, in order of first execution, each with the name of
            the layer that was last called before it.
        rows: number of rows of each layer in all batches.
    """

    contexts: dict[str, LayerContext]
    unusable: dict[str, str]
    direct_products: list[str]
    batchnorms: dict[str, str | None]
    rows: dict[str, int]

    def described(self) -> dict[str, str]:
        """``{name: description}`` of layers and BatchNorms; it does not depend on the number of calls."""
        contexts = {
            name: f"{context} after {context.batchnorm}" if context.batchnorm else str(context)
            for name, context in self.contexts.items()
        }
        return contexts | self.unusable | {name: f"after {layer}" for name, layer in self.batchnorms.items()}


def trace_forward(model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[CalibrationBatch]) -> ForwardTrace:
    """Run batches through a model and determine what follows each layer.

    The output of a layer is followed through a BatchNorm with running statistics, residual sums and max-pooling up to a
    rectifier, as long as no other operation reads the values in between. If it is returned, or if different operations
    follow different calls of the layer, its response is linear. A BatchNorm that is also applied to other values does
    not count as part of the layer's response, which is linear then.

    Args:
        model: the model, in evaluation mode.
        layers: ``{name: layer}``.
        batches: batches of the calibration set.

    Raises:
        AmbiguousBatch: if the arguments of the model cannot be determined from a batch.
        ValueError: if the model raises an error on a batch.
    """
    tracer, products = Tracer(model), DirectProducts(model, layers)
    values: dict[str, list[TracedValue]] = {}
    contexts: dict[str, list[LayerContext]] = {}
    calls: dict[str, int] = {}
    unusable: dict[str, str] = {}
    batchnorm_calls: dict[str, int] = {}
    rows: Counter[str] = Counter()
    batchnorms: dict[str, str | None] = {}
    last: str | None = None

    def on_batchnorm(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            batchnorm_calls[name] = batchnorm_calls.get(name, 0) + 1
            batchnorms[name] = last

        return hook

    def on_call(name: str, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal last
        values.setdefault(name, [])
        contexts.setdefault(name, [])
        first = not values[name] and not contexts[name]
        try:
            call = layer.observe(args, kwargs, output)
            rows[name] += call.count
            tensor = call.tensor if not first or _is_product(layer, call) else None
        except ValueError as error:
            unusable[name] = str(error)
            tensor = None
        else:
            if tensor is None and call.tensor is not None:
                unusable[name] = f"{layer.kind} does not compute the product of its weights and inputs"
        if tensor is None:
            values[name].append(TracedValue(name, None))
        else:
            values[name].append(tracer.follow(tensor, name, None, layer.channels_second(tensor)))
        last = last if name in unusable else name

    with call_hooks(layers, on_call), products.following(), ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(on_batchnorm(name)).remove)
        for batch in batches:
            last = None
            try:
                with tracer, products:
                    result = batch(model)
            except AmbiguousBatch:
                raise
            except Exception as error:
                raise ValueError(
                    f"expected batches that {type(model).__name__}.forward takes, got inputs of shapes"
                    f" {batch.shapes()}, for which it raised {type(error).__name__}: {error}: yield batches that it"
                    " takes (of a tuple, the elements that forward requires are passed; of a mapping, the entries with"
                    " the names of its parameters), or pass forward=lambda model, batch: ..."
                ) from error
            for leaf in tree_flatten(result)[0]:
                if isinstance(leaf, Tensor):
                    tracer.record_use(leaf, "returned")
            for name, outputs in values.items():
                calls[name] = max(calls.get(name, 0), len(outputs))
                contexts[name] += [value.context() for value in outputs]
                outputs.clear()
            tracer.forget()
    for name, layer in layers.items():
        if layer.parameter_names(bias=False)[0] in products.found:
            unusable[name] = "its weight is used by an operation outside its own forward, which hooks do not see"
    usable = {}
    for name, by_call in contexts.items():
        consistent = all(context.equals(by_call[0]) for context in by_call)
        exclusive = by_call[0].batchnorm is None or batchnorm_calls[by_call[0].batchnorm] == len(by_call)
        if name not in unusable:
            same = consistent and exclusive
            usable[name] = replace(by_call[0], calls=calls[name]) if same else LayerContext(calls[name])
    return ForwardTrace(usable, unusable, sorted(products.found), batchnorms, dict(rows))


def _is_product(layer: Layer, call: LayerCall, count: int = 16) -> bool:
    """Whether XW = Z on the first ``count`` rows of a call, up to rounding in low precision."""
    positions = torch.arange(min(count, call.count))
    W, Z = layer.matrix(), layer.to_columns(call.outputs(positions))
    X = layer.to_rows(call.inputs(positions), layer.bias is not None)
    return not bool((X @ W - Z).norm() > 2e-2 * Z.norm() + 1e-6)
