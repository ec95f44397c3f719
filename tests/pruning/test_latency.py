"""The latency as a budget: by measurements of the networks themselves, here replaced by their multiply-accumulates."""

from __future__ import annotations

import pytest
import torch
from networks import copied_state, equal_states
from torch import nn
from unit_networks import network

from lightning_nettrim import compact, trim
from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.pruning.units.costs import count_macs
from lightning_nettrim.pruning.units.latency import milliseconds

TIMES = "lightning_nettrim.pruning.units.latency.milliseconds"


@pytest.fixture
def measured(monkeypatch):
    """Batch sizes and times; the time of a network is 10 plus its multiply-accumulates in tens of thousands."""
    seen = []

    def milliseconds(model, batch):
        _, macs = count_macs(model, batch, {})
        seen.append((len(batch.batch), 10 + macs / 1e4))
        return seen[-1][1]

    monkeypatch.setattr(TIMES, milliseconds)
    return seen


def test_the_network_keeps_within_the_latency_and_uses_it(measured):
    model, x = network("residual")
    result = trim(model, x.split(64), pattern="units", latency=0.7, latency_batch_size=96)
    assert {size for size, _ in measured} == {96}
    dense = max(time for _, time in measured)
    small = compact(model, x[:2], batch_sizes=()).model
    _, macs = count_macs(small, CalibrationBatch(x[:2]), {})
    assert 0.7 * 0.95 <= (10 + macs / 1e4) / dense <= 0.7
    assert any(note.startswith("latency: 0.") and note.endswith("batch size 96") for note in result.notes)


def test_what_the_network_with_the_fewest_units_takes_is_said(measured):
    model, x = network("residual")
    before = copied_state(model)
    with pytest.raises(
        ValueError, match=r"latency: expected at least 0\.\d\d, which the network with the fewest units"
    ):
        trim(model, x.split(64), pattern="units", latency=0.1)
    assert equal_states(model, before)


class TimeFirst(nn.Module):
    """A network with the batch in the second dimension of one input and the first of the other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x, scale):
        return self.last(self.first(x).relu()) * scale.unsqueeze(0)


def test_without_a_common_batch_dimension_it_is_refused(measured):
    torch.manual_seed(0)
    model = TimeFirst()
    before = copied_state(model)
    batch = {"x": torch.randn(5, 40, 6), "scale": torch.rand(40, 1)}
    with pytest.raises(ValueError, match="latency: expected batches whose tensors have a common first dimension"):
        trim(model, [batch], pattern="units", latency=0.5)
    assert equal_states(model, before)


def test_a_time_is_the_median_of_forward_passes_of_a_batch_of_this_size():
    sizes = []
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    batch = CalibrationBatch(torch.arange(6.0).reshape(2, 3)).repeated(5)
    assert torch.equal(batch.batch[:, 0], torch.tensor([0.0, 3.0, 0.0, 3.0, 0.0]))
    assert milliseconds(model, batch) > 0
    assert len(sizes) > 1
    assert set(sizes) == {5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 0.0}, r"latency: expected the fraction that is left, in \(0, 1\], got 0.0"),
        ({"latency": 0.5, "latency_batch_size": 0}, "latency_batch_size: expected at least 1, got 0"),
        ({"latency": "0.5"}, "latency: expected a number, got '0.5': leave out the quotes"),
        ({"latency": 0.5, "pattern": "neuron"}, "latency: expected the pattern 'units', got latency=0.5"),
    ],
)
def test_unusable_options_are_refused(options, message):
    model, x = network("chain")
    with pytest.raises(ValueError, match=message):
        trim(model, x.split(64), **{"pattern": "units"} | options)
