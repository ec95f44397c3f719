"""Later fits of a pruned network: its zeros stay zero, everything else is trained, and it can be pruned further."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from trainers import (
    LIGHTNING_WARNINGS,
    WEIGHTS,
    Data,
    MetricsNet,
    Net,
    Watch,
    copy_state,
    equal_states,
    half,
    load_state,
    make_trainer,
    pruned_by_half,
    sparsities,
    train_data,
    val_data,
    zeros,
)

from lightning_nettrim import NetTrim, compact

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:NetTrim. the network has .* exact zeros in 3 weights"),
]


def test_a_resumed_fit_keeps_every_zero_and_trains_the_rest(tmp_path):
    first, model = half(), Net()
    make_trainer(tmp_path, first).fit(model, train_data(), val_data())
    before = copy_state(model)
    model, again = Net(), half()
    make_trainer(tmp_path, again, max_epochs=4).fit(
        model, train_data(), val_data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt"
    )
    after = copy_state(model)
    for name in WEIGHTS:
        assert torch.equal(after[name] != 0, first.masks[name])
        moved = (after[name] != before[name])[first.masks[name]]
        assert moved.float().mean() > 0.9
    assert again.result is None


def test_the_zeros_are_in_every_validation_and_checkpoint_of_a_later_fit(tmp_path):
    found = []

    class CheckZeros(Callback):
        def on_validation_start(self, trainer, pl_module):
            found.append(pruned_by_half(pl_module))

    callback, model = half(), Net()
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    saver = ModelCheckpoint(tmp_path / "later", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(tmp_path, callback, CheckZeros(), saver, enable_checkpointing=True)
    trainer.fit(model, train_data(), val_data())
    assert found == [True] * 3
    paths = list((tmp_path / "later").iterdir())
    assert len(paths) == 12
    for path in paths:
        saved = torch.load(path, weights_only=True)
        assert all(torch.equal(saved["state_dict"][name] != 0, callback.masks[name]) for name in WEIGHTS)


def test_a_second_fit_of_the_pruned_model_keeps_its_zeros(tmp_path):
    callback, model = half(), Net()
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    before, result = copy_state(model), callback.result
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    assert callback.result is result
    assert all(torch.equal(copy_state(model)[name] == 0, before[name] == 0) for name in WEIGHTS)
    assert not equal_states(copy_state(model), before)


def test_the_zeros_are_trained_without_enforce(tmp_path):
    make_trainer(tmp_path, half()).fit(Net(), train_data(), val_data())
    watch, again, model = Watch(), half(enforce=False, sparsity=0.75), Net()
    make_trainer(tmp_path, watch, again, max_epochs=4).fit(
        model, train_data(), val_data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt"
    )
    assert not any((watch.trained[name] == 0).any() for name in WEIGHTS)
    assert again.result.sparsity == 0.75


@pytest.mark.parametrize("keep", [True, False])
def test_a_network_pruned_by_validate_can_be_trained_further(tmp_path, keep):
    callback, model = half(), Net(dropout=0.1)
    with pytest.warns(UserWarning, match="expected a train_dataloader .* got none"):
        make_trainer(tmp_path, callback).validate(model, val_data(), verbose=False)
    before = copy_state(model)
    make_trainer(tmp_path, *([callback] if keep else [])).fit(model, train_data(), val_data())
    after = copy_state(model)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert keep == all(bool((after[name][before[name] == 0] == 0).all()) for name in WEIGHTS)


def test_a_checkpoint_pruned_by_validate_can_be_trained_further(tmp_path, dense_checkpoint):
    callback, model = half(), Net()
    make_trainer(tmp_path, callback).validate(Net(), datamodule=Data(), ckpt_path=dense_checkpoint, verbose=False)
    resumed, watch = half(), Watch()
    trainer = make_trainer(tmp_path, watch, resumed)
    trainer.fit(model, datamodule=Data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt")
    assert trainer.global_step == 12
    assert resumed.result is None
    assert all(torch.equal(mask, ~callback.masks[name]) for name, mask in zeros(model).items())


# --- other budgets, and networks without masks


def test_a_higher_sparsity_is_pruned_to_after_a_later_fit(tmp_path):
    make_trainer(tmp_path, first := half()).fit(MetricsNet())
    further = half(sparsity=0.75)
    make_trainer(tmp_path, further, max_epochs=4).fit(model := MetricsNet(), ckpt_path=first.folder / "pruned.ckpt")
    assert sparsities(model.state_dict()) == [0.75] * 3
    assert sparsities(load_state(further.folder / "pruned.ckpt")) == [0.75] * 3


def test_units_are_pruned_to_a_smaller_budget_after_a_later_fit(tmp_path):
    make_trainer(tmp_path, first := NetTrim(pattern="units", parameters=0.6)).fit(model := MetricsNet())
    further = NetTrim(pattern="units", parameters=0.3)
    make_trainer(tmp_path, further, max_epochs=4).fit(model, ckpt_path=first.folder / "pruned.ckpt")
    small = compact(model, torch.randn(2, 8), batch_sizes=()).model
    count = sum(p.numel() for p in MetricsNet().parameters())
    assert sum(p.numel() for p in small.parameters()) <= 0.3 * count


@pytest.mark.parametrize(("requested", "expected"), [(0.5, 0.5), (0.75, 0.75)])
def test_a_network_without_masks_keeps_its_zeros(tmp_path, requested, expected):
    make_trainer(tmp_path, first := half()).fit(MetricsNet())
    model = MetricsNet.load_from_checkpoint(first.folder / "pruned.ckpt", map_location="cpu")
    before, watch, again = copy_state(model), Watch(), half(sparsity=requested)
    make_trainer(tmp_path, watch, again).fit(model)
    for name in WEIGHTS:
        assert torch.equal(watch.trained[name] == 0, before[name] == 0)
        assert not torch.equal(watch.trained[name], before[name])
    assert sparsities(model.state_dict()) == [expected] * 3
    assert (again.result is None) == (requested == 0.5)


def test_zeros_of_an_initialization_are_trained(tmp_path):
    model = MetricsNet()
    nn.init.eye_(model.fc1.weight)
    nn.init.zeros_(model.fc3.weight)
    make_trainer(tmp_path, watch := Watch(), callback := half(), max_epochs=4).fit(model)
    assert sparsities(watch.trained)[0] < 0.2  # 0.9375 after the initialization
    assert sparsities(watch.trained)[1:] == [0.0] * 2
    assert callback.result.sparsity == 0.5
