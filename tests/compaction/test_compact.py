"""Compact networks compute the same, and their files are read back exactly."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import copied_state, equal_states
from safetensors.torch import save_file
from torch import nn
from unit_networks import NETWORKS, network

from lightning_nettrim import compact, load_compact, trim
from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.compaction import save_without_channels
from lightning_nettrim.layers import find_layers
from lightning_nettrim.pruning.units.groups import find_groups, rows_of_channels
from lightning_nettrim.pruning.units.surgery import RemovedChannels, remove_channels


def with_unread_units(name):
    """A network of which every second unit of each group is not read, and its inputs."""
    model, x = network(name, 8)
    layers, _ = find_layers(model)
    groups, _ = find_groups(model, CalibrationBatch(x[:2]), layers)
    with torch.no_grad():
        for group in groups.values():
            for reader, channels in group.readers.items():
                layer = layers[reader]
                W = layer.to_matrix(layer.parameter.data).clone()
                W[:, rows_of_channels(layer, channels[::2]).flatten()] = 0
                layer.parameter.data.copy_(layer.from_matrix(W))
    return model, x


@pytest.mark.parametrize("name", NETWORKS)
def test_the_compact_network_computes_the_same_with_half_the_units(name):
    model, x = with_unread_units(name)
    before = copied_state(model)
    result = compact(model, x)
    assert (result.model(x) - model(x)).norm() <= 1e-5 * model(x).norm()
    assert all(count == size // 2 for count, size in result.report.units.values())
    assert result.report.after.parameters == sum(p.numel() for p in result.model.parameters())
    assert result.report.after.parameters < 0.75 * result.report.before.parameters
    assert equal_states(model, before)
    assert set(result.report.after.milliseconds) == {1}


def test_the_parameters_of_the_model_are_the_same_objects_afterwards():
    model, x = with_unread_units("residual")
    before = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    compact(model, x)
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == before


def test_frozen_parameters_stay_frozen():
    model, x = with_unread_units("residual")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bn" not in name)
    result = compact(model, x, batch_sizes=())
    assert all(p.requires_grad == ("bn" not in name) for name, p in result.model.named_parameters())


def test_a_network_without_unread_units_stays_as_it_is():
    model, x = network("chain", 8)
    result = compact(model, x)
    assert equal_states(result.model, copied_state(model))
    assert not result.report.removed


def test_a_group_of_which_nothing_is_read_keeps_one_unit():
    model, x = network("chain", 8)
    nn.init.zeros_(model[4].weight)
    result = compact(model, x)
    assert result.report.units["2"] == (1, 16)
    assert torch.equal(result.model(x), model(x))


class FixedShape(nn.Module):
    """A network that only works with 16 hidden units."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(20, 16), nn.Linear(16, 4)
        self.other, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.other(self.last(self.first(x).reshape(-1, 16))).relu())


def test_a_group_without_which_the_network_cannot_run_is_skipped_with_the_reason():
    torch.manual_seed(0)
    model, x = FixedShape(), torch.randn(8, 20)
    nn.init.zeros_(model.last.weight[:, :8])
    nn.init.zeros_(model.head.weight[:, :3])
    result = compact(model, x)
    assert "the network cannot run without its units: mat1 and mat2" in result.report.skipped["first"]
    assert result.report.units["other"] == (5, 8)
    torch.testing.assert_close(result.model(x), model(x))
    assert "units of first are all kept" in result.table()


def test_the_table_has_sizes_times_and_units():
    model, x = with_unread_units("chain")
    table = compact(model, x, batch_sizes=(1, 32)).table()
    for text in ("parameters", "MACs", "bytes", "milliseconds at batch 1 ", "milliseconds at batch 32", "0 15 of 30"):
        assert text in table


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_is_read_back_exactly_without_unpickling(name, tmp_path, monkeypatch):
    model, x = with_unread_units(name)
    result = compact(model, x)
    result.save(tmp_path / "compact.safetensors")
    save_without_channels(model, result.report.removed, tmp_path / "other.safetensors")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for file in ("compact.safetensors", "other.safetensors"):
        loaded = load_compact(network(name)[0], tmp_path / file)
        assert equal_states(loaded, copied_state(result.model))
        assert torch.equal(loaded(x), result.model(x))


class Versioned(nn.Linear):
    """A module that refuses a state without its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_a_module_gets_its_version_with_the_state(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(Versioned(6, 4), nn.ReLU(), nn.Linear(4, 2))

    model, x = make(), torch.randn(8, 6)
    model[2].weight.data[:, 1] = 0
    result = compact(model, x, batch_sizes=())
    result.save(tmp_path / "compact.safetensors")
    loaded = load_compact(make(), tmp_path / "compact.safetensors")
    assert result.report.units == {"0": (3, 4)}
    assert torch.equal(loaded(x), result.model(x))


def test_other_channels_of_each_group_of_a_grouped_convolution_are_refused():
    convolution = nn.Conv2d(8, 12, 3, groups=2)
    for channels in (RemovedChannels(inputs=(1, 4)), RemovedChannels(outputs=(0,))):
        with pytest.raises(ValueError, match="expected the same channels of each group of a Conv2d"):
            remove_channels(convolution, channels)
    remove_channels(convolution, RemovedChannels(inputs=(1, 5), outputs=(0, 6)))
    assert convolution(torch.randn(1, 6, 4, 4)).shape == (1, 10, 2, 2)


def test_a_compact_network_can_be_exported_and_trained(tmp_path):
    model, x = with_unread_units("residual")
    result = compact(model, x)
    exported = torch.export.export(result.model, (x,)).module()
    torch.testing.assert_close(exported(x), result.model(x))
    result.model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in result.model.parameters())


def test_files_of_something_else_are_refused_and_the_model_is_not_changed(tmp_path):
    model, x = with_unread_units("chain")
    compact(model, x).save(tmp_path / "chain.safetensors")
    other, _ = network("residual")
    before = copied_state(other)
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for file, message in (
        ("chain.safetensors", "expected the file of a Residual"),
        ("plain.safetensors", "expected a file of a compact network"),
        ("text.safetensors", "expected a safetensors file"),
        ("missing.safetensors", "expected a safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_compact(other, tmp_path / file)
        assert equal_states(other, before)
    wider = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 4))
    before = copied_state(wider)
    with pytest.raises(ValueError, match=r"load_compact: 0\.bias: expected shape \(25,\), got \(15,\)"):
        load_compact(wider, tmp_path / "chain.safetensors")
    assert equal_states(wider, before)


def test_pruning_to_half_the_operations_and_compacting_loses_nothing_further():
    model, x = network("residual")
    dense = copy.deepcopy(model)
    trim(model, x.split(64), pattern="units", macs=0.5)
    result = compact(model, x[:64])
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    assert (result.model(x) - model(x)).norm() <= 1e-5 * model(x).norm()
    assert (result.model(x) - dense(x)).norm() < 0.5 * dense(x).norm()
