"""Estimates of the memory that recording and solving a layer take, and of the rows that the available memory allows."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_nettrim.layers import Layer
from lightning_nettrim.runtime.sharded import local

MIN_ROWS = 256
"""Minimum number of rows of a layer that are recorded, even if they exceed the available memory."""


RESIDENT_COPIES = 3
"""Copies of the weights that are in use throughout a run."""


def recording_bytes(layer: Layer, rows: int, inputs: bool) -> int:
    """Bytes that the recording of a layer takes: a reservoir with up to twice the rows, and a copy of the rows.

    Args:
        layer: the layer.
        rows: number of rows.
        inputs: whether its inputs are recorded, with the response of the layer before and the residual; otherwise its
            outputs and the residual are.
    """
    columns = layer.groups * (2 * layer.inputs + layer.outputs if inputs else 2 * layer.outputs)
    return 3 * rows * columns * layer.parameter.element_size()


def solving_bytes(layer: Layer, rows: int) -> int:
    """Approximate number of bytes that a solve takes for inputs, responses, Gram matrix and weights."""
    N, M = layer.inputs + 1, layer.outputs
    return 4 * layer.groups * (3 * rows * N + 10 * rows * M + 12 * N * min(N, rows) + 10 * N * M)


def resident_bytes(layers: Mapping[str, Layer], rows: Mapping[str, int], available: float, spectra: bool) -> float:
    """Bytes that are in use throughout a run: three copies of the weights, and the stored tensors.

    Args:
        layers: ``{name: layer}``.
        rows: ``{name: number of rows}``.
        available: bytes of stored tensors that may be kept in memory.
        spectra: whether the spectra of all layers are stored, in addition to the reference outputs.
    """
    weights = sum(local(layer.parameter).numel() * layer.parameter.element_size() for layer in layers.values())
    stored = sum(4 * rows[name] * layer.groups * layer.outputs for name, layer in layers.items())
    if spectra:
        stored += sum(4 * a.groups * a.inputs * min(a.inputs, rows[name]) for name, a in layers.items())
    return RESIDENT_COPIES * weights + min(stored, available)


def layer_bytes(layer: Layer, rows: int) -> int:
    """Bytes that recording and solving a layer take."""
    recordings = (recording_bytes(layer, rows, inputs) for inputs in (True, False))
    return max(*recordings, solving_bytes(layer, rows))


def max_rows_within(layer: Layer, rows: int, available: float) -> int:
    """Number of rows of a layer that can be recorded and solved within the available memory.

    Args:
        layer: the layer.
        rows: upper limit, which is halved until the memory suffices, but not below ``MIN_ROWS``.
        available: bytes.
    """
    while rows > MIN_ROWS and layer_bytes(layer, rows) > available:
        rows = max(rows // 2, MIN_ROWS)
    return rows


def recording_groups(layers: Mapping[str, Layer], rows: Mapping[str, int], available: float) -> list[list[str]]:
    """Consecutive groups of layers, as few as possible, the outputs of each of which can be recorded in one pass.

    Args:
        layers: ``{name: layer}`` in order of execution.
        rows: ``{name: number of rows}``.
        available: bytes that the recording of one group may take; a single layer may exceed it.
    """
    groups: list[list[str]] = []
    remaining = 0.0
    for name, layer in layers.items():
        size = recording_bytes(layer, rows[name], inputs=False)
        if not groups or size > remaining:
            groups.append([])
            remaining = available
        groups[-1].append(name)
        remaining -= size
    return groups
