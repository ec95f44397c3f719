"""Recording of the inputs and outputs of layers on the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.batch import CalibrationBatch, StopForward
from lightning_nettrim.calibration.padding import PaddingMasks
from lightning_nettrim.calibration.reservoir import Reservoir
from lightning_nettrim.calibration.tensor_tracer import Tracer
from lightning_nettrim.layers import Layer
from lightning_nettrim.layers.context import LayerContext


@dataclass(frozen=True, eq=False)
class Recording:
    """Recorded activations of one layer.

    Attributes:
        X: ``(P, groups·N)`` inputs, without the bias column; ``None`` if they are not recorded.
        Z: ``(P, groups·M)`` outputs, before everything that follows the layer; ``None`` if they are not recorded.
        R: ``(P, groups·M)`` residual that is added to the outputs; ``None`` if there is none.
        total_rows: number of rows that passed through the layer, of which P are recorded.
    """

    X: Tensor | None
    Z: Tensor | None
    R: Tensor | None
    total_rows: int

    @property
    def rows(self) -> int:
        """P, the number of recorded rows."""
        return next(len(t) for t in (self.X, self.Z) if t is not None)


@contextmanager
def call_hooks(
    layers: Mapping[str, Layer], on_call: Callable[[str, Layer, tuple[Any, ...], dict[str, Any], Any], None]
) -> Iterator[None]:
    """A `with` in which a function is called after each call of a layer or of one of its aliases.

    Args:
        layers: ``{name: layer}``.
        on_call: called as ``on_call(name, layer or alias, args, kwargs, output)``.
    """

    def hook(name: str, alias: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        return lambda module, args, kwargs, output: on_call(name, alias, args, kwargs, output)

    with ExitStack() as stack:
        for name, layer in layers.items():
            for alias in (layer, *layer.aliases):
                handle = alias.module.register_forward_hook(hook(name, alias), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def record(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[CalibrationBatch],
    *,
    contexts: Mapping[str, LayerContext] | None = None,
    inputs: Collection[str] | None = None,
    outputs: Collection[str] | None = None,
    num_samples: int | Mapping[str, int],
    seed: int,
    stop: bool = False,
) -> dict[str, Recording]:
    """Run the calibration set through a model and record a sample of the inputs and outputs of layers.

    Rows are selected by their index in the stream alone: two recordings of one layer on the same batches contain the
    same rows, whatever the weights of the model are. Padded tokens are not counted. Only selected rows are copied.

    Args:
        model: the model, in evaluation mode.
        layers: ``{name: layer}`` to record.
        batches: the batches of the calibration set.
        contexts: what follows each layer; if ``None``, no residuals are recorded.
        inputs: names of layers to record X of; ``None`` is all.
        outputs: names of layers to record Z of; ``None`` is all.
        num_samples: maximum number of rows per layer, one number for all layers or ``{name: number}``.
        seed: seed of the sample.
        stop: end each forward pass when all layers have been called as often as their contexts say.

    Returns:
        ``{name: recording}`` of the layers that were called.

    Raises:
        ValueError: if a residual sum that follows a layer according to its context is missing in a batch.
    """
    max_rows = dict.fromkeys(layers, num_samples) if isinstance(num_samples, int) else num_samples
    reservoirs = {name: Reservoir(max_rows[name], seed) for name in layers}
    with_inputs, with_outputs = (set(layers if names is None else names) for names in (inputs, outputs))
    residual_sums = {name: contexts[name].residual_sums if contexts else 0 for name in layers}
    pending: dict[str, list[_PendingCall]] = {name: [] for name in layers}
    stop = stop and CalibrationBatch.can_stop(model)
    expected = sum(contexts[name].calls for name in layers) if contexts and stop else 0
    finished = 0

    def finish(name: str, call: _PendingCall) -> None:
        nonlocal finished
        reservoirs[name].keep(call.keys, [t for t in (call.X, call.Z, call.R) if t is not None])
        finished += 1
        if finished == expected:
            raise StopForward

    def on_call(name: str, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        observed = layer.observe(args, kwargs, output)
        tokens = masks.kept(observed.shape, next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None))
        positions, keys = reservoirs[name].pick(observed.count if tokens is None else len(tokens))
        positions = positions if tokens is None else tokens[positions]
        call = _PendingCall(layer, positions, keys, residual_sums[name])
        call.X = observed.inputs(positions) if name in with_inputs else None
        call.Z = observed.outputs(positions) if name in with_outputs else None
        if not call.missing_sums:
            finish(name, call)
        else:
            assert observed.tensor is not None
            pending[name].append(call)
            tracer.follow(observed.tensor, name, call, layer.channels_second(observed.tensor))

    def on_sum(name: str, call: _PendingCall, residual: Tensor) -> None:
        R = call.layer.take_rows(residual, call.positions)
        call.R = R if call.R is None else call.R + R
        call.missing_sums -= 1
        if not call.missing_sums:
            pending[name].remove(call)
            finish(name, call)

    tracer = Tracer(model, on_sum)
    padding = PaddingMasks().followed(model)
    with padding as masks, call_hooks(layers, on_call), tracer if any(residual_sums.values()) else ExitStack():
        for batch in batches:
            finished = 0
            try:
                batch.run_until_stopped(model)
            finally:
                tracer.forget()
                masks.forget()
            for name, calls in pending.items():
                if calls:
                    raise ValueError(
                        f"{name}: expected a residual sum after it as in other batches, got none: whether the network"
                        " computes it depends on the batch; ignore it"
                    )
    return {
        name: _recording(reservoir, name in with_inputs, name in with_outputs, residual_sums[name] > 0)
        for name, reservoir in reservoirs.items()
        if reservoir.seen
    }


@dataclass(eq=False)
class _PendingCall:
    """The selected rows of one call of a layer, which are complete when no residual sums are missing."""

    layer: Layer
    positions: Tensor
    keys: Tensor
    missing_sums: int
    X: Tensor | None = None
    Z: Tensor | None = None
    R: Tensor | None = None


def _recording(reservoir: Reservoir, inputs: bool, outputs: bool, residuals: bool) -> Recording:
    """The content of a reservoir whose chunks hold X, Z and R, each of them if the corresponding flag is set."""
    tensors = iter([torch.cat(parts) for parts in zip(*(c.load() for c in reservoir.chunks()), strict=True)])
    X, Z, R = (next(tensors) if recorded else None for recorded in (inputs, outputs, residuals))
    return Recording(X, Z, R, reservoir.seen)
