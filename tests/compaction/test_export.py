"""A compact network can be exported, and computes the same as the network with all units."""

from __future__ import annotations

import pytest
import torch
from unit_networks import NETWORKS, network

from benchmarks.exports import exported_outputs, onnx_outputs
from benchmarks.planting import plant_unread_units
from lightning_nettrim import compact
from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.layers import find_layers
from lightning_nettrim.pruning.units.groups import find_groups


def compacted(name):
    """The outputs of a network of which every second unit is not read, the compact network, and the inputs."""
    model, x = network(name, 8)
    layers, _ = find_layers(model)
    groups, _ = find_groups(model, CalibrationBatch(x[:2]), layers)
    plant_unread_units(layers, groups, {key: torch.arange(0, group.size, 2) for key, group in groups.items()})
    result = compact(model, x, batch_sizes=())
    assert all(count == size // 2 for count, size in result.report.units.values())
    return model(x).detach(), result.model, x


@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_computes_exactly_what_the_compact_one_does(name):
    outputs, model, x = compacted(name)
    exported = exported_outputs(model, x)
    assert torch.equal(exported, model(x))
    assert (exported - outputs).norm() <= 1e-5 * outputs.norm()


@pytest.mark.parametrize("name", ["flatten", "residual", "depthwise", "grouped", "concatenation", "gated"])
def test_onnx_runtime_computes_the_same_as_the_network_with_all_units(name):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    outputs, model, x = compacted(name)
    assert (onnx_outputs(model, x) - outputs).norm() <= 1e-5 * outputs.norm()
