"""Coresets after a fit: the same files and comparison as with other methods, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from networks import copied_state, equal_states
from trainers import CLI_WARNINGS, Net, make_trainer, train_data, val_data

from lightning_nettrim import Coreset, CoresetPruning, load_compact

pytestmark = CLI_WARNINGS


@pytest.mark.parametrize("refit", [True, False])
def test_a_fit_ends_with_a_compact_network_and_a_comparison(tmp_path, capsys, refit):
    callback = CoresetPruning(sparsity=0.5, refit=refit)
    make_trainer(tmp_path, callback).fit(model := Net(), train_data(), val_data())
    loaded = Net.load_from_checkpoint(callback.folder / "pruned.ckpt")
    assert equal_states(loaded, copied_state(model))
    small = load_compact(copy.deepcopy(loaded), callback.folder / "compact.safetensors")
    x = torch.randn(16, 8)
    torch.testing.assert_close(small(x), loaded(x), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in loaded.parameters())
    assert set(callback.metrics) == {"dense", "pruned"}
    report = json.loads((callback.folder / "report.json").read_text())
    assert report["arguments"]["select"]["init_args"]["inputs"] == "synthetic"
    assert any(note.startswith("coreset of") for note in report["notes"])
    assert "all units" in capsys.readouterr().out


def test_with_a_radius_the_network_does_not_depend_on_the_data(tmp_path):
    model = Net()
    states = []
    for seed in (1, 7):
        callback = CoresetPruning(sparsity=0.5, coreset=Coreset(beta=1.0), calibration="val", save=False)
        own = copy.deepcopy(model)
        make_trainer(tmp_path, callback).validate(own, train_data(seed), verbose=False)
        states.append(copied_state(own))
    assert all(torch.equal(first, second) for first, second in zip(*(s.values() for s in states), strict=True))
    assert not equal_states(model, states[0])


def test_the_number_of_units_of_a_coreset_takes_the_place_of_a_budget(tmp_path):
    model = Net()
    callback = CoresetPruning(coreset=Coreset(count=5), calibration="val", save=False)
    make_trainer(tmp_path, callback).validate(model, val_data(), verbose=False)
    assert [int((layer.weight != 0).any(0).sum()) for layer in (model.fc1, model.fc2, model.fc3)] == [8, 5, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of sparsity, epsilon, max_drop, plan and an n:m pattern, or macs, parameters or latency"),
        ({"sparsity": 1.5}, r"sparsity: expected a fraction of zeros in \[0, 1\), got 1.5"),
        ({"sparsity": 0.5, "coreset": 0.5}, "coreset: expected a Coreset, got 0.5"),
        ({"sparsity": 0.5, "coreset": Coreset(count=4)}, "select: expected no budget beside"),
        ({"max_drop": 0.1}, "max_drop, monitor: expected both"),
        ({"latency": 0.5, "macs": 0.5}, "expected one of sparsity, macs, parameters, latency and max_drop"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        CoresetPruning(**options)
