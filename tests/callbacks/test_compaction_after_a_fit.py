"""A fit that ends with pruning of units, whose compact network is written beside the checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from networks import copied_state, equal_states
from torch import nn
from trainers import CLI_WARNINGS, Data, Net, make_trainer, train_data, val_data

from lightning_nettrim import NetTrim, compact, load_compact

pytestmark = CLI_WARNINGS


def test_a_fit_writes_the_compact_network(tmp_path, capsys):
    callback = NetTrim(pattern="units", macs=0.5)
    make_trainer(tmp_path, callback).fit(model := Net(), train_data(), val_data())
    loaded = Net.load_from_checkpoint(callback.folder / "pruned.ckpt")
    assert equal_states(loaded, copied_state(model))
    small = load_compact(copy.deepcopy(loaded), callback.folder / "compact.safetensors")
    x = torch.randn(16, 8)
    torch.testing.assert_close(small(x), loaded(x), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in loaded.parameters())
    printed = capsys.readouterr().out
    for text in ("all units", "MACs", "milliseconds at batch 256", "units kept:", "compact.safetensors"):
        assert text in printed


def test_the_module_is_not_changed_by_compaction_and_can_be_copied_with_its_trainer(tmp_path):
    callback = NetTrim(pattern="units", sparsity=0.5)
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model := Net(), train_data(), val_data())
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in callback.masks.items())
    assert model.trainer is trainer
    result = compact(model, torch.randn(8, 8))
    assert model.trainer is trainer
    assert result.model._trainer is None
    x = torch.randn(16, 8)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_validate_prunes_the_units_of_a_dense_checkpoint(tmp_path, dense_checkpoint):
    """A Trainer validates in inference mode, in which its batches are made as well."""
    callback, model = NetTrim(pattern="units", sparsity=0.5), Net()
    make_trainer(tmp_path, callback).validate(model, datamodule=Data(), ckpt_path=dense_checkpoint, verbose=False)
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in callback.masks.items())
    small = load_compact(Net(), callback.folder / "compact.safetensors")
    x = torch.randn(16, 8)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_second_fit_keeps_the_removed_units(tmp_path):
    callback = NetTrim(pattern="units", sparsity=0.5)
    make_trainer(tmp_path, callback).fit(model := Net(), train_data(), val_data())
    before = compact(model, torch.randn(8, 8), batch_sizes=()).report.units
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    assert compact(model, torch.randn(8, 8), batch_sizes=()).report.units == before


def test_a_failure_of_compaction_is_a_warning(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr("lightning_nettrim.callbacks.trainer_pruning.report_compaction", fail)
    callback = NetTrim(pattern="units", sparsity=0.5)
    with pytest.warns(UserWarning, match="the pruned network was not made compact: RuntimeError: no memory"):
        make_trainer(tmp_path, callback).fit(Net(), train_data(), val_data())
    assert (callback.folder / "pruned.ckpt").exists()
    assert not (callback.folder / "compact.safetensors").exists()


def test_the_compact_network_is_written_before_files_are_uploaded(tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(
        "lightning_nettrim.callbacks.publishing._upload",
        lambda trainer, folder: uploaded.extend(path.name for path in folder.iterdir()),
    )
    make_trainer(tmp_path, NetTrim(pattern="units", sparsity=0.5)).fit(Net(), train_data(), val_data())
    assert {"pruned.ckpt", "report.json", "compact.safetensors"} <= set(uploaded)


class NothingToRemove(Net):
    """A network whose hidden units are normalized together."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 3), nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.fc1(x)


def test_a_network_without_removable_units_is_refused_before_training(tmp_path):
    callback = NetTrim(pattern="units", sparsity=0.5)
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(MisconfigurationException, match="expected a group of units that can be removed"):
        trainer.fit(NothingToRemove(), train_data(), val_data())
    assert trainer.global_step == 0
