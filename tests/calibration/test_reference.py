"""Reference outputs, and distances from them."""

from __future__ import annotations

import pytest
import torch
from networks import activations_of, conv2d_inputs, conv2d_network

from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.runtime.offload import TensorStore


@pytest.fixture
def activations():
    return activations_of(conv2d_network(), conv2d_inputs(300).split(100), rows=200)


@pytest.mark.parametrize("offload", ["device", "cpu", "disk"])
@pytest.mark.parametrize("available", [0.0, float("inf")])
def test_the_responses_are_the_same_in_any_number_of_passes_and_any_store(activations, offload, available):
    reference = ReferenceOutputs(TensorStore(offload), available)
    with evaluation_mode(activations.model):
        reference.record(activations)
        responses = activations.responses("0", "4", "6")
        assert reference.distances(activations) == {"0": 0.0, "4": 0.0, "6": 0.0}
    for name, Y in responses.items():
        assert torch.equal(reference[name], Y)
        assert reference.rows[name] == 200
        assert reference.norms[name] == pytest.approx(float(Y.norm()))


def test_distances_are_those_of_the_current_weights(activations):
    reference = ReferenceOutputs(TensorStore("device"), float("inf"))
    model = activations.model
    with evaluation_mode(model):
        reference.record(activations)
        before = activations.responses("6")["6"]
        with torch.no_grad():
            model[6].weight.mul_(1.5)
        distances = reference.distances(activations)
        after = activations.responses("6")["6"]
    assert distances["0"] == distances["4"] == 0
    assert distances["6"] == pytest.approx(float((after - before).norm()))


def test_the_fingerprint_depends_on_the_responses(activations):
    first, second = (ReferenceOutputs(TensorStore("device"), available) for available in (0.0, float("inf")))
    with evaluation_mode(activations.model):
        first.record(activations)
        second.record(activations)
        assert first.fingerprint() == second.fingerprint()
        with torch.no_grad():
            activations.model[6].bias.add_(1e-3)
        second.record(activations)
    assert first.fingerprint() != second.fingerprint()


def test_a_layer_with_another_number_of_rows_is_an_error(activations):
    reference = ReferenceOutputs(TensorStore("device"), float("inf"))
    with evaluation_mode(activations.model):
        reference.record(activations)
    with pytest.raises(ValueError, match="4: expected 200 rows as in the trained network, got 100"):
        reference.check_rows("4", 100, activations.processes)
