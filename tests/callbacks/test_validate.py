"""A validate, test or predict with NetTrim: a dense network is pruned before it is validated, once."""

import json

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from trainers import (
    LIGHTNING_WARNINGS,
    WEIGHTS,
    Data,
    MetricsNet,
    Net,
    copy_state,
    equal_states,
    half,
    load_state,
    make_trainer,
    pruned_by_half,
    samples,
    sparsities,
    train_data,
    val_data,
    validate,
)

from lightning_nettrim import ADMM

pytestmark = LIGHTNING_WARNINGS


@pytest.mark.parametrize("calibration", ["train", "val"])
@pytest.mark.parametrize("compare", [True, False])
def test_validate_prunes_a_dense_checkpoint(tmp_path, dense_checkpoint, calibration, compare):
    callback, model = half(calibration=calibration, compare=compare, solver=ADMM()), Net(dropout=0.5)
    trainer = make_trainer(tmp_path, callback)
    metrics = trainer.validate(model, datamodule=Data(), ckpt_path=dense_checkpoint, verbose=False)
    assert pruned_by_half(model)
    assert validate(tmp_path, model) == metrics == [callback.metrics["pruned"]]
    if compare:
        reference = make_trainer(tmp_path).validate(Net(), val_data(), ckpt_path=dense_checkpoint, verbose=False)
        assert reference == [callback.metrics["dense"]]
    assert json.loads((tmp_path / "nettrim/report.json").read_text())["metrics"] == callback.metrics
    assert all(module.training for module in model.modules())


def test_validate_of_a_pruned_checkpoint_does_not_solve_again(tmp_path):
    first = half()
    make_trainer(tmp_path, first).fit(Net(), train_data(), val_data())
    again = half(num_samples=1000)
    metrics = make_trainer(tmp_path, again).validate(
        model := Net(), val_data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt", verbose=False
    )
    assert pruned_by_half(model)
    assert again.result is None
    assert metrics == [first.metrics["pruned"]]


def test_validate_of_a_pruned_network_without_masks_does_not_solve_again(tmp_path):
    make_trainer(tmp_path, first := half()).fit(MetricsNet())
    model = MetricsNet.load_from_checkpoint(first.folder / "pruned.ckpt", map_location="cpu")
    before, again = copy_state(model), half()
    match = "has 50% exact zeros in 3 weights, so it is treated as pruned: not pruned again"
    with pytest.warns(UserWarning, match=match):
        make_trainer(tmp_path, again).validate(model, verbose=False)
    assert again.result is None
    assert equal_states(copy_state(model), before)
    make_trainer(tmp_path, further := half(sparsity=0.75)).validate(model, verbose=False)
    assert further.result.sparsity == 0.75


def test_validate_prunes_a_pruned_checkpoint_to_a_higher_sparsity(tmp_path):
    make_trainer(tmp_path, first := half()).fit(MetricsNet())
    file, again = first.folder / "pruned.ckpt", half(sparsity=0.75)
    make_trainer(tmp_path, again).validate(model := MetricsNet(), ckpt_path=file, verbose=False)
    before = load_state(file)
    for name in WEIGHTS:
        assert bool((model.state_dict()[name][before[name] == 0] == 0).all())
    assert sparsities(model.state_dict()) == [0.75] * 3


def test_validate_after_fit_keeps_the_pruned_network(tmp_path):
    callback, model = half(), Net()
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model, train_data(), val_data())
    before, result = copy_state(model), callback.result
    assert trainer.validate(model, val_data(), verbose=False) == [callback.metrics["pruned"]]
    assert callback.result is result
    assert equal_states(copy_state(model), before)


def test_validate_of_another_model_after_a_fit_prunes_that_on_its_own_data(tmp_path):
    callback = half(calibration="val")
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(Net(), train_data(), [val_data(), val_data(3)])
    other = Net()
    metrics = trainer.validate(other, val_data(), verbose=False)
    assert pruned_by_half(other)
    assert metrics == [callback.metrics["pruned"]]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_validation_with_persistent_workers_is_complete(tmp_path, dense_checkpoint):
    loader = DataLoader(samples(48, 2), batch_size=16, num_workers=1, persistent_workers=True)
    metrics = make_trainer(tmp_path, half(calibration="val")).validate(
        model := Net(), loader, ckpt_path=dense_checkpoint, verbose=False
    )
    assert metrics == validate(tmp_path, model)


# --- validate(), test() and predict() without a model, which load a checkpoint of the dense network


@pytest.mark.filterwarnings("ignore:`.*ckpt_path=None.*` was called without a model")
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_warns_if_the_dense_checkpoint_is_loaded_after_a_fit(tmp_path, method):
    callback, model = half(), Net()
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    trainer = make_trainer(tmp_path, callback, best, enable_checkpointing=True)
    trainer.fit(model, train_data(), val_data())
    with pytest.warns(UserWarning, match="dense network") as caught:
        getattr(trainer, method)(dataloaders=val_data())
    (message,) = (str(each.message) for each in caught if "dense network" in str(each.message))
    assert f"trainer.{method}(model) right after the fit" in message
    assert str(tmp_path / "nettrim/pruned.ckpt") in message
    assert best.best_model_path in message
    getattr(trainer, method)(model, val_data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt")
    assert pruned_by_half(model)


def test_a_test_of_the_pruned_network_warns_of_nothing(tmp_path):
    callback, model = half(), Net()
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model, train_data(), val_data())
    (metrics,) = trainer.test(model, val_data(), verbose=False)
    assert metrics["test_loss"] == pytest.approx(callback.metrics["pruned"]["val_loss"])
