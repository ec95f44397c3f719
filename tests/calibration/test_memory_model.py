"""Rows and groups of layers are chosen by the available memory."""

from __future__ import annotations

from networks import conv2d_network

from lightning_nettrim.calibration.memory_model import (
    MIN_ROWS,
    max_rows_within,
    recording_bytes,
    recording_groups,
    resident_bytes,
    solving_bytes,
)
from lightning_nettrim.layers import find_layers


def test_the_number_of_rows_is_reduced_until_the_memory_suffices():
    layers, _ = find_layers(conv2d_network())
    for layer in layers.values():
        assert max_rows_within(layer, 8192, float("inf")) == 8192
        assert max_rows_within(layer, 8192, 0.0) == MIN_ROWS
        available = solving_bytes(layer, 3000)
        rows = max_rows_within(layer, 8192, available)
        needed = recording_bytes(layer, rows, True), recording_bytes(layer, rows, False), solving_bytes(layer, rows)
        assert max(needed) <= available


def test_layers_are_recorded_together_if_the_memory_suffices():
    layers, _ = find_layers(conv2d_network())
    rows = dict.fromkeys(layers, 8192)
    assert recording_groups(layers, rows, float("inf")) == [[*layers]]
    assert recording_groups(layers, rows, 0.0) == [[name] for name in layers]
    first, second, third = (recording_bytes(layers[name], 8192, False) for name in layers)
    assert recording_groups(layers, rows, first + second) == [["0", "4"], ["6"]]
    assert second + third <= first + second


def test_resident_memory_is_three_copies_of_the_weights_and_the_stored_tensors():
    layers, _ = find_layers(conv2d_network())
    weights, rows = 4 * (54 + 4320 + 80), dict.fromkeys(layers, 1000)
    assert resident_bytes(layers, rows, 0.0, False) == 3 * weights
    assert resident_bytes(layers, rows, float("inf"), False) == 3 * weights + 4 * 1000 * (6 + 20 + 4)
    spectra = 4 * (9**2 + 216**2 + 20**2)
    assert resident_bytes(layers, rows, float("inf"), True) == 3 * weights + 4 * 1000 * (6 + 20 + 4) + spectra
