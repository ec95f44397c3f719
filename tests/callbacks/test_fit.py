"""A fit with NetTrim: what it prunes, writes and leaves unchanged."""

import copy
import json
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import RunningStage
from trainers import (
    LIGHTNING_WARNINGS,
    NO_VALIDATION_DATA,
    WEIGHTS,
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
    validate,
    zeros,
)

from lightning_nettrim import ADMM, NetTrim

pytestmark = LIGHTNING_WARNINGS

REPORT_KEYS = {
    "schema_version", "layers", "skipped", "total", "recovery", "trials", "notes", "metrics", "arguments", "versions",
}  # fmt: skip


def test_fit_prunes_and_writes_checkpoint_and_report(tmp_path):
    watch, callback, model = Watch(), NetTrim(epsilon=0.1), Net()
    make_trainer(tmp_path, watch, callback).fit(model, train_data(), val_data())
    after, result = copy_state(model), callback.result

    assert [report.name for report in result.reports] == ["fc1", "fc2", "fc3"]
    assert 0.05 < result.sparsity < 1
    for name in WEIGHTS:
        assert torch.equal(after[name] != 0, callback.masks[name])
    assert after.keys() == watch.trained.keys()
    assert all(after[name].shape == watch.trained[name].shape for name in after)

    report = json.loads((tmp_path / "nettrim/report.json").read_text())
    assert set(report) == REPORT_KEYS
    assert report["schema_version"] == 1
    assert report["total"]["sparsity"] == result.sparsity
    assert report["total"]["end_to_end_error"] == result.end_to_end_error
    assert [layer["local_error"] for layer in report["layers"]] == [each.local_error for each in result.reports]
    assert report["arguments"]["epsilon"] == 0.1
    assert report["arguments"]["solver"]["class_path"].endswith("ADMM")
    assert set(report["versions"]) == {"lightning_nettrim", "torch", "lightning"}
    assert report["metrics"] == callback.metrics
    checkpoint = torch.load(tmp_path / "nettrim/pruned.ckpt", weights_only=True)
    assert equal_states(checkpoint["state_dict"], after)

    assert validate(tmp_path, model) == [callback.metrics["pruned"]]
    model.load_state_dict(watch.trained)
    assert validate(tmp_path, model) == [callback.metrics["dense"]]
    assert callback.metrics["dense"] != callback.metrics["pruned"]


def test_all_modules_are_in_training_mode_after_a_fit(tmp_path):
    model = Net(dropout=0.5)
    make_trainer(tmp_path, half()).fit(model, train_data(), val_data())
    assert all(module.training for module in model.modules())


def test_nothing_is_written_or_compared_without_save_and_compare(tmp_path):
    callback, model = half(save=False, compare=False), Net()
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    assert pruned_by_half(model)
    assert callback.metrics == {}
    assert not list(tmp_path.iterdir())


def test_a_callback_prunes_another_model_in_a_second_fit(tmp_path):
    callback = half()
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Net()
        make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
        assert pruned_by_half(model)
        assert all(torch.equal(callback.masks[name], ~mask) for name, mask in zeros(model).items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_copies_of_the_callback_have_its_masks(tmp_path, duplicate):
    callback, model = duplicate(half()), Net()
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    assert pruned_by_half(model)
    again = duplicate(callback)
    assert equal_states(again.masks, callback.masks)
    assert again.result.total() == callback.result.total()
    make_trainer(tmp_path, again).fit(model, train_data(), val_data())
    assert equal_states(again.masks, callback.masks)
    assert pruned_by_half(model)


def test_warns_if_nothing_was_trained(tmp_path):
    with pytest.warns(UserWarning, match=r"trained nothing .* trainer.validate\(model, ...\)"):
        make_trainer(tmp_path, half(), max_epochs=0).fit(model := MetricsNet())
    assert sparsities(model.state_dict()) == [0.0] * 3


# --- the best weights


def test_the_best_weights_are_pruned(tmp_path):
    best, callback = ModelCheckpoint(tmp_path / "best", monitor="epoch_number"), half(checkpoint="best")
    watch, model = Watch(), MetricsNet()
    make_trainer(tmp_path, watch, callback, best, enable_checkpointing=True, max_epochs=3).fit(model)
    dense = load_state(best.best_model_path)
    assert "epoch=0" in best.best_model_path
    assert not torch.equal(dense["fc1.weight"], watch.trained["fc1.weight"])
    for name in WEIGHTS:
        kept = model.state_dict()[name] != 0
        assert torch.equal(model.state_dict()[name][kept], dense[name][kept])
        assert kept.sum() == kept.numel() // 2


# --- options of the Trainer


@pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but `Trainer.barebones=True.`")
@pytest.mark.parametrize(
    "options",
    [
        {"barebones": True, "max_epochs": 1},
        {"overfit_batches": 2},
        {"limit_train_batches": 2, "limit_val_batches": 1},
        {"limit_train_batches": 0.5, "limit_val_batches": 0.5},
        {"limit_val_batches": 0},
        {"accumulate_grad_batches": 4},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"max_steps": 3, "max_epochs": -1},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_prunes_under_trainer_options(tmp_path, options):
    if options.get("barebones"):
        quiet = ("logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        options = options | dict.fromkeys(quiet)
    callback, model = half(solver=ADMM(), refit=True), Net()
    make_trainer(tmp_path, callback, **options).fit(model, train_data(), val_data())
    assert pruned_by_half(model)
    assert bool(callback.metrics["dense"]) == ("barebones" not in options and options.get("limit_val_batches") != 0)
    assert (tmp_path / "nettrim/pruned.ckpt").exists() == ("barebones" not in options)


def test_fast_dev_run_prunes_and_writes_nothing(tmp_path):
    callback, model = half(), Net()
    make_trainer(tmp_path, callback, fast_dev_run=True).fit(model, train_data(), val_data())
    assert pruned_by_half(model)
    assert not list(tmp_path.iterdir())


# --- validation


class NoValidation(Net):
    """Has no validation step."""

    validation_step = pl.LightningModule.validation_step


@NO_VALIDATION_DATA
@pytest.mark.parametrize("model", [NoValidation, Net])
def test_prunes_without_validation(tmp_path, model):
    callback, model = half(), model()
    make_trainer(tmp_path, callback).fit(model, train_data())
    assert pruned_by_half(model)
    assert callback.metrics == {"dense": {}, "pruned": {}}
    assert (tmp_path / "nettrim/report.json").exists()


class FailsIfPruned(Net):
    """Raises in the validation of a pruned network."""

    def validation_step(self, batch, batch_idx):
        if not self.fc1.weight.all():
            raise RuntimeError("pruned")
        super().validation_step(batch, batch_idx)


def test_the_trainer_is_restored_if_the_pruned_validation_raises(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, watch, half(), logger=CSVLogger(tmp_path))
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    verbose = trainer.fit_loop.epoch_loop.val_loop.verbose
    with pytest.raises(RuntimeError, match="pruned"):
        trainer.fit(FailsIfPruned(), train_data(), val_data())
    assert trainer.callbacks == callbacks
    assert trainer.loggers == loggers
    assert trainer.fit_loop.epoch_loop.val_loop.verbose == verbose
    assert watch.calls[-1] == RunningStage.TRAINING
