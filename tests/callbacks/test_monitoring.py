"""max_drop: the sparsest network whose monitored metric stays within a drop, and monitors that cannot be used."""

import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from trainers import (
    LIGHTNING_WARNINGS,
    Data,
    EndHooks,
    MetricsNet,
    Net,
    Watch,
    copy_state,
    equal_states,
    half,
    make_trainer,
    read_events,
    train_data,
    val_data,
)

from lightning_nettrim import NetTrim

pytestmark = LIGHTNING_WARNINGS


class Accuracy(Net):
    """Logs its accuracy."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())


DROP = {"sparsity": None, "max_drop": 0.1, "monitor": "val_acc"}


@pytest.mark.parametrize(
    "make",
    [lambda: half(**DROP), pytest.param(lambda: NetTrim(**DROP), marks=pytest.mark.slow)],
    ids=["magnitude", "default"],
)
@pytest.mark.parametrize("fit", [True, False], ids=["fit", "validate"])
def test_the_sparsest_network_within_the_drop(tmp_path, fit, make):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callback, model = make(), Accuracy()
    trainer = make_trainer(tmp_path, callback, logger=logger, max_epochs=6)
    if fit:
        trainer.fit(model, train_data(), val_data())
    else:
        make_trainer(tmp_path, max_epochs=6).fit(model, train_data(), val_data())
        trainer.validate(model, datamodule=Data(), verbose=False)
    trials = callback.result.trials
    assert len(trials) > 2
    assert trials[0].sparsity == 0
    assert callback.result.sparsity == pytest.approx(max(t.sparsity for t in trials if t.within), abs=2e-3)
    assert callback.metrics["pruned"]["val_acc"] >= callback.metrics["dense"]["val_acc"] - 0.1
    saved = Accuracy.load_from_checkpoint(tmp_path / "run/nettrim/pruned.ckpt")
    (metrics,) = make_trainer(tmp_path).validate(saved, val_data(), verbose=False)
    assert metrics["val_acc"] == pytest.approx(callback.metrics["pruned"]["val_acc"])
    curve = read_events(tmp_path / "run").Scalars("nettrim/trials/val_acc")
    assert [event.step for event in curve] == sorted(round(1e4 * trial.sparsity) for trial in trials)
    report = json.loads((tmp_path / "run/nettrim/report.json").read_text())
    assert len(report["trials"]) == len(trials)


def test_a_monitor_logged_by_step_has_its_own_name(tmp_path):
    callback = half(sparsity=None, max_drop=0.2, monitor="val_acc")
    make_trainer(tmp_path, callback, max_epochs=4).fit(MetricsNet())
    assert callback.result.trials[0].metric == pytest.approx(callback.metrics["dense"]["val_acc_epoch"])


class WatchBest(Callback):
    """Records the best accuracies at the end of training."""

    def on_train_end(self, trainer, pl_module):
        self.best_metric, self.best = float(pl_module.val_acc_best.max_value), pl_module.best


def test_a_best_value_so_far_is_that_of_the_current_network_and_is_restored(tmp_path):
    torch.manual_seed(0)
    watch, model = WatchBest(), MetricsNet()
    callback = half(sparsity=None, max_drop=0.05, monitor="val_acc_best", refit=True)
    make_trainer(tmp_path, watch, callback, max_epochs=8).fit(model)
    assert float(model.val_acc_best.max_value) == watch.best_metric
    assert model.best == watch.best
    assert callback.metrics["pruned"]["val_acc_best"] == callback.metrics["pruned"]["val_acc_epoch"]
    assert callback.metrics["pruned"]["val_acc_epoch"] >= callback.metrics["dense"]["val_acc_epoch"] - 0.05


# --- monitors that cannot be used


def test_a_monitor_that_cannot_fall_is_refused_and_the_network_stays_dense(tmp_path):
    watch, model = Watch(), MetricsNet()
    with pytest.raises(MisconfigurationException, match="a metric that can fall, got 'val_best_float'"):
        make_trainer(tmp_path, watch, NetTrim(max_drop=0.05, monitor="val_best_float")).fit(model)
    assert equal_states(copy_state(model), watch.trained)
    assert (tmp_path / "nettrim/dense.ckpt").exists()


def test_a_metric_that_is_not_logged_is_refused_and_nothing_is_pruned(tmp_path):
    model = Accuracy()
    before = copy_state(model)
    with pytest.raises(MisconfigurationException, match="monitor: expected one of .* val_acc, got 'accuracy'"):
        make_trainer(tmp_path, NetTrim(max_drop=0.1, monitor="accuracy")).fit(model, train_data(), val_data())
    assert equal_states(copy_state(model), before)


@pytest.mark.parametrize("monitor", ["accuracy", "train_loss"])
def test_a_wrong_monitor_is_refused_before_training(tmp_path, monitor):
    model, hooks = MetricsNet(), EndHooks()
    with pytest.raises(MisconfigurationException, match=f"monitor: expected one of .*val_loss.*, got '{monitor}'"):
        make_trainer(tmp_path, hooks, NetTrim(max_drop=0.05, monitor=monitor), num_sanity_val_steps=0).fit(model)
    assert hooks.calls == []
    assert model.val_acc.update_count == 0


def test_a_monitor_without_validation_data_is_refused_before_training(tmp_path):
    model = Net()
    before = copy_state(model)
    with pytest.raises(MisconfigurationException, match="monitor='val_loss': expected validation data"):
        make_trainer(tmp_path, NetTrim(max_drop=0.1, monitor="val_loss"), limit_val_batches=0).fit(
            model, train_data(), val_data()
        )
    assert equal_states(copy_state(model), before)
