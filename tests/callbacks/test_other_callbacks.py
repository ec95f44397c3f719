"""NetTrim beside other callbacks, in both orders: what is pruned, what the files hold, and what a failure costs."""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nettrim import Magnitude, NetTrim
from lightning_nettrim.callbacks import run_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside"),
    pytest.mark.filterwarnings("ignore:SWA is initializing after swa_start"),
    pytest.mark.filterwarnings("ignore:NetTrim. the network comes with .* exact zeros in 3 weights"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler"),
]

WEIGHTS = ["fc1.weight", "fc2.weight", "fc3.weight"]


class Net(pl.LightningModule):
    """8-16-12-3, ReLU between; logs its accuracy by step and by epoch, and the best one so far."""

    def __init__(self, lr=0.02):
        super().__init__()
        self.lr, self.batch_size, self.ended = lr, 16, []
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.val_acc_best, self.best = torchmetrics.MaxMetric(), 0.0

    def forward(self, x):
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_acc", self.val_acc, on_step=True, on_epoch=True)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))

    def on_validation_epoch_end(self):
        acc = self.val_acc.compute()
        self.val_acc_best(acc)
        self.best = max(self.best, float(acc))
        self.log("val_acc_best", self.val_acc_best.compute())
        self.log("val_best_by_hand", self.best)
        self.log("age", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

    def on_train_end(self):
        self.ended.append("train")

    def on_fit_end(self):
        self.ended.append("fit")

    def train_dataloader(self):
        return DataLoader(samples(96, 1), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(samples(48, 2), batch_size=16)


def samples(P, seed):
    x = torch.randn(P, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :3] + x[:, 3:6].relu()).argmax(1))


def make_trainer(path, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"logger": False, "max_epochs": 4, "log_every_n_steps": 1} | quiet
    return pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=path, callbacks=list(callbacks), **(defaults | options)
    )


def half(**options):
    """Half of each layer by magnitude: quick."""
    return NetTrim(**({"sparsity": 0.5, "allocate": "uniform", "solver": Magnitude(), "refit": False} | options))


def sparsity(state):
    return [float((state[name] == 0).float().mean()) for name in WEIGHTS]


def stored(path):
    return torch.load(path, map_location="cpu", weights_only=False)["state_dict"]


def ema():
    return EMAWeightAveraging(decay=0.8)


def average():
    return WeightAveraging(avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new)


def swa():
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)


def early():
    return EarlyStopping("val_loss", patience=1)


def finder():
    return LearningRateFinder(num_training_steps=4, early_stop_threshold=None)


def batch_size_finder():
    return BatchSizeFinder(max_trials=1, init_val=16, steps_per_trial=1)


def model_pruning(permanent=True):
    return ModelPruning("l1_unstructured", amount=0.2, make_pruning_permanent=permanent, use_global_unstructured=True)


OTHERS = {
    "EMA": ema,
    "WeightAveraging": average,
    "SWA": swa,
    "EarlyStopping": early,
    "LearningRateFinder": finder,
    "BatchSizeFinder": batch_size_finder,
    "ModelPruning": model_pruning,
    "ModelPruning, not permanent": lambda: model_pruning(False),
    "ModelCheckpoint": lambda: ModelCheckpoint(monitor="val_loss", save_last=True),
    "two loggers": lambda: None,
}


class Average(Callback):
    """Keeps the weights that averaging callbacks leave at the end of training."""

    def __init__(self):
        self.state = None

    def on_train_end(self, trainer, pl_module):
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


@pytest.mark.parametrize("first", [True, False], ids=["NetTrim first", "NetTrim last"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_zeros_in_memory_in_the_file_and_after_a_reload(tmp_path, other, first):
    callback, beside = half(), other()
    callbacks = [callback, beside] if first else [beside, callback]
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")] if beside is None else False
    trainer = make_trainer(
        tmp_path, *filter(None, callbacks), logger=loggers, enable_checkpointing=isinstance(beside, ModelCheckpoint)
    )
    trainer.fit(model := Net())
    file = callback.folder / "pruned.ckpt"
    own = model.state_dict()
    effective = {name: own.get(name, own.get(f"{name}_orig")) for name in WEIGHTS}
    least = [0.5] * 3 if not isinstance(beside, ModelPruning) else sparsity(effective)  # it leaves more zeros in some
    assert sparsity(effective) == least
    assert min(least) == 0.5
    saved = stored(file)
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)
    if not isinstance(beside, ModelPruning):  # which prunes after every validation
        (again,) = trainer.validate(model, verbose=False)
        assert again["val_loss"] == callback.metrics["pruned"]["val_loss"]
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert all(torch.equal(value, own[name]) for name, value in stored(tmp_path / "later.ckpt").items())
    if not any("_orig" in name for name in own):
        reloaded = Net.load_from_checkpoint(file, map_location="cpu")
        assert sparsity(reloaded.state_dict()) == least
        (metrics,) = make_trainer(tmp_path).validate(reloaded, verbose=False)
        assert metrics["val_loss"] == pytest.approx(callback.metrics["pruned"]["val_loss"])
    assert json.loads((callback.folder / "report.json").read_text())["total"]["sparsity"] >= 0.5
    assert not (callback.folder / "dense.ckpt").exists()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [ema, average, swa])
def test_the_averaged_weights_are_what_is_pruned(tmp_path, other, first):
    torch.manual_seed(0)
    watch, plain = Average(), Net()
    make_trainer(tmp_path, other(), watch).fit(plain)
    torch.manual_seed(0)
    callback, model = half(), Net()
    make_trainer(tmp_path, *([callback, other()] if first else [other(), callback])).fit(model)
    for name in WEIGHTS:
        kept = model.state_dict()[name] != 0
        assert torch.equal(model.state_dict()[name][kept], plain.state_dict()[name][kept])
        assert callback.masks[name].sum() == kept.sum() == kept.numel() // 2


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [ema, average, swa])
@pytest.mark.parametrize("resumed", [True, False])
def test_fine_tuning_under_averaging_keeps_the_zeros(tmp_path, other, first, resumed):
    make_trainer(tmp_path, pruned := half()).fit(Net())
    file, again, best = pruned.folder / "pruned.ckpt", half(), ModelCheckpoint(tmp_path / "best", save_top_k=-1)
    model = Net() if resumed else Net.load_from_checkpoint(file, map_location="cpu")
    callbacks = [again, other(), best] if first else [other(), again, best]
    make_trainer(tmp_path, *callbacks, enable_checkpointing=True, max_epochs=8).fit(
        model, ckpt_path=file if resumed else None
    )
    before, after = stored(file), model.state_dict()
    for name in WEIGHTS:
        assert bool((after[name][before[name] == 0] == 0).all())
        assert not torch.equal(after[name], before[name])
    written = list((tmp_path / "best").iterdir())
    assert written
    for path in written:
        assert all(bool((stored(path)[name][before[name] == 0] == 0).all()) for name in WEIGHTS)


def test_a_checkpoint_that_is_not_pruned_is_an_error(tmp_path):
    class Other(Net):
        def on_save_checkpoint(self, checkpoint):
            if bool((self.fc1.weight == 0).any()):
                checkpoint["state_dict"]["fc1.weight"] = torch.ones(16, 8)

    model, callback = Other(), half()
    with pytest.raises(RuntimeError, match="pruned.ckpt: expected zeros where fc1.weight was pruned"):
        make_trainer(tmp_path, callback).fit(model)
    assert model.ended == ["train", "fit"]
    assert sparsity(stored(tmp_path / "nettrim/dense.ckpt")) == [0.0] * 3


# --- which weights


def test_the_best_weights_are_pruned(tmp_path):
    best, callback, model = ModelCheckpoint(tmp_path / "best", monitor="age"), half(checkpoint="best"), Net()
    watch = Average()
    make_trainer(tmp_path, watch, callback, best, enable_checkpointing=True, max_epochs=6).fit(model)
    dense = stored(best.best_model_path)
    assert "epoch=0" in best.best_model_path
    assert not torch.equal(dense["fc1.weight"], watch.state["fc1.weight"])
    for name in WEIGHTS:
        kept = model.state_dict()[name] != 0
        assert torch.equal(model.state_dict()[name][kept], dense[name][kept])
        assert kept.sum() == kept.numel() // 2


@pytest.mark.parametrize("saver", [None, ModelCheckpoint, lambda: ModelCheckpoint(monitor="val_loss", save_top_k=0)])
def test_best_weights_need_a_checkpoint_callback_that_monitors(tmp_path, saver):
    callbacks = [half(checkpoint="best"), *([] if saver is None else [saver()])]
    with pytest.raises(MisconfigurationException, match="checkpoint='best' expected a ModelCheckpoint with a monitor"):
        make_trainer(tmp_path, *callbacks, enable_checkpointing=saver is not None).fit(Net())


# --- going on


def test_another_sparsity_prunes_on_after_a_fit_and_before_a_validate(tmp_path):
    make_trainer(tmp_path, first := half()).fit(Net())
    file = first.folder / "pruned.ckpt"
    further = half(sparsity=0.75)
    make_trainer(tmp_path, further, max_epochs=8).fit(model := Net(), ckpt_path=file)
    assert sparsity(model.state_dict()) == [0.75] * 3
    assert sparsity(stored(further.folder / "pruned.ckpt")) == [0.75] * 3
    again = half(sparsity=0.75)
    make_trainer(tmp_path, again).validate(model := Net(), ckpt_path=file, verbose=False)
    before = stored(file)
    for name in WEIGHTS:
        assert bool((model.state_dict()[name][before[name] == 0] == 0).all())
    assert sparsity(model.state_dict()) == [0.75] * 3


@pytest.mark.parametrize(("asked", "expected"), [(0.5, 0.5), (0.75, 0.75)])
def test_a_network_that_comes_without_masks_keeps_its_zeros(tmp_path, asked, expected):
    make_trainer(tmp_path, first := half()).fit(Net())
    model = Net.load_from_checkpoint(first.folder / "pruned.ckpt", map_location="cpu")
    before, watch, again = {n: v.clone() for n, v in model.state_dict().items()}, Average(), half(sparsity=asked)
    make_trainer(tmp_path, watch, again).fit(model)
    for name in WEIGHTS:
        assert torch.equal(watch.state[name] == 0, before[name] == 0)
        assert not torch.equal(watch.state[name], before[name])
    assert sparsity(model.state_dict()) == [expected] * 3
    assert (again.result is None) == (asked == 0.5)


def test_a_network_that_comes_without_masks_is_not_pruned_twice(tmp_path):
    make_trainer(tmp_path, first := half()).fit(Net())
    model = Net.load_from_checkpoint(first.folder / "pruned.ckpt", map_location="cpu")
    before, again = {n: v.clone() for n, v in model.state_dict().items()}, half()
    with pytest.warns(UserWarning, match="comes with 50% exact zeros in 3 weights, as a pruned one: not pruned again"):
        make_trainer(tmp_path, again).validate(model, verbose=False)
    assert again.result is None
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in WEIGHTS)
    make_trainer(tmp_path, further := half(sparsity=0.75)).validate(model, verbose=False)
    assert further.result.sparsity == 0.75


def test_zeros_of_an_initialization_are_trained(tmp_path):
    model = Net()
    nn.init.eye_(model.fc1.weight)
    nn.init.zeros_(model.fc3.weight)
    make_trainer(tmp_path, watch := Average(), callback := half()).fit(model)
    assert sparsity(watch.state)[0] < 0.2  # of seven eighths
    assert sparsity(watch.state)[1:] == [0.0] * 2
    assert callback.result.sparsity == 0.5


def test_nothing_trained_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"trained nothing .* trainer.validate\(model, ...\)"):
        make_trainer(tmp_path, half(), max_epochs=0).fit(model := Net())
    assert sparsity(model.state_dict()) == [0.0] * 3


# --- nothing is lost

POINTS = {
    "claiming the folder": ("lightning_nettrim.callbacks.folder", "claim"),
    "choosing batches": ("lightning_nettrim.callbacks.nettrim", "calibration_batches"),
    "sampling": ("lightning_nettrim.prepare", "hold"),
    "choosing layers": ("lightning_nettrim.prepare", "choose"),
    "watching": ("lightning_nettrim.plan", "watch"),
    "recording": ("lightning_nettrim.signals", "record"),
    "posing": ("lightning_nettrim.prune", "pose"),
    "solving": ("lightning_nettrim.method", "solve"),
    "refitting": ("lightning_nettrim.method", "refit"),
    "checking an outcome": ("lightning_nettrim.prune", "failure"),
    "reporting a layer": ("lightning_nettrim.prune", "row"),
    "allocating": ("lightning_nettrim.allocate", "uniform"),
    "writing the plan": ("lightning_nettrim.trim", "as_text"),
    "swapping": ("lightning_nettrim.mask", "swap"),
    "measuring sparsity": ("lightning_nettrim.mask", "sparsity"),
    "validating": ("lightning_nettrim.callbacks.nettrim", "validation"),
    "histograms": ("lightning_nettrim.callbacks.nettrim", "publish_histograms"),
    "publishing": ("lightning_nettrim.callbacks.nettrim", "publish"),
    "comparing": ("lightning_nettrim.callbacks.publish", "comparison"),
    "verifying": ("lightning_nettrim.callbacks.publish", "verify_file"),
    "writing the report": ("lightning_nettrim.callbacks.publish", "as_json"),
    "fingerprints": ("lightning_nettrim.trained", "digest"),
}


class Last(Callback):
    """Stands after NetTrim and sees whether it is called."""

    def __init__(self):
        self.calls = []

    def on_train_end(self, trainer, pl_module):
        self.calls.append("train_end")
        self.trained = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_fit_end(self, trainer, pl_module):
        self.calls.append("fit_end")

    def teardown(self, trainer, pl_module, stage):
        self.calls.append("teardown")


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize(("module", "name"), POINTS.values(), ids=POINTS.keys())
@pytest.mark.filterwarnings("ignore:.*while solving")
def test_a_failure_after_training_costs_nothing_but_the_pruning(tmp_path, monkeypatch, caplog, module, name, save):
    source = importlib.import_module(module)
    function = getattr(source, name)

    def failing(*args, **kwargs):
        raise OSError("planned")

    class Armed(Callback):
        """Lets a function fail once training has ended."""

        def on_train_end(self, trainer, pl_module):
            monkeypatch.setattr(source, name, failing)

    last, saver = Last(), ModelCheckpoint(tmp_path / "user", save_last=True, monitor="val_loss")
    options = {"allocate": "uniform", "solver": None, "refit": True, "save": save}
    callback, model = half(**options), Net()
    trainer = make_trainer(tmp_path, callback, Armed(), last, saver, enable_checkpointing=True)
    if not save and name in ("claim", "verify_file", "as_json"):
        trainer.fit(model)  # which does not come there
        return
    with pytest.raises(OSError, match="planned"):
        trainer.fit(model)
    monkeypatch.setattr(source, name, function)
    assert last.calls == ["train_end", "fit_end", "teardown"]
    assert model.ended == ["train", "fit"]
    assert (tmp_path / "user/last.ckpt").exists()
    assert "pruning failed (OSError: planned)" in caplog.text
    files = [*tmp_path.glob("nettrim*/dense.ckpt")]
    if name != "claim" and (save or callback.result is None):
        (file,) = files
        assert all(torch.equal(value, last.trained[key]) for key, value in stored(file).items())
    if callback.result is None:
        assert all(torch.equal(model.state_dict()[key], last.trained[key]) for key in last.trained)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    make_trainer(tmp_path, again := half()).fit(Net())
    assert again.result.sparsity == 0.5


# --- progress bars


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_a_bar_goes_on_through_pruning_and_its_validations(tmp_path, bar, capfd):
    class Slow(Net):
        """Validates long enough for a bar to be drawn meanwhile."""

        def validation_step(self, batch, batch_idx):
            time.sleep(0.15)
            super().validation_step(batch, batch_idx)

    callback, shown = half(), bar(refresh_rate=1)
    trainer = make_trainer(tmp_path, shown, callback, enable_progress_bar=True, max_epochs=1)
    trainer.fit(model := Slow())
    (metrics,) = trainer.validate(model)
    assert metrics["val_loss"] == pytest.approx(callback.metrics["pruned"]["val_loss"])
    output = capfd.readouterr()
    assert "Traceback" not in output.out + output.err
    assert "fc1: 50.0% zeros" in output.out
    assert trainer.progress_bar_callback is shown


# --- folders


def test_runs_without_a_logger_have_folders_of_their_own(tmp_path):
    folders = []
    for _ in range(3):
        make_trainer(tmp_path, callback := half()).fit(Net())
        folders.append(callback.folder)
    assert [each.name for each in folders] == ["nettrim", "nettrim_1", "nettrim_2"]
    assert all({path.name for path in each.iterdir()} == {"pruned.ckpt", "report.json"} for each in folders)


def test_layers_of_a_run_that_is_still_running_are_left_alone(tmp_path):
    def left(process):
        """What a run beside the one of a process finds."""
        trainer = make_trainer(tmp_path)
        trainer.strategy.connect(Net())
        claimed = run_folder.claim(trainer)
        (claimed / "layers").mkdir()
        if process is not None:
            (claimed / "running").write_text(f"{socket.gethostname()} {process}")
        return claimed, [path.parent for path in run_folder.unfinished(trainer, run_folder.claim(trainer))]

    own, found = left(None)
    assert found == [own]
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        theirs, found = left(other.pid)
        assert theirs not in found
    finally:
        other.communicate(b"\n")
    assert theirs in [path.parent for path in run_folder.unfinished(make_trainer(tmp_path), own)]


def test_an_unwritable_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MisconfigurationException, match="expected a folder to write into, got .*file"):
        make_trainer(tmp_path / "file", half()).fit(model)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


# --- metrics


def test_a_monitor_logged_by_step_is_known_by_its_own_name(tmp_path):
    callback = NetTrim(max_drop=0.2, monitor="val_acc", allocate="uniform")
    make_trainer(tmp_path, callback).fit(Net())
    assert callback.result.trials[0].metric == pytest.approx(callback.metrics["dense"]["val_acc_epoch"])


def test_a_best_value_so_far_is_of_the_network_at_hand_and_is_as_before(tmp_path):
    torch.manual_seed(0)
    model = Net()
    watch = Best()
    callback = NetTrim(max_drop=0.05, monitor="val_acc_best", allocate="uniform")
    make_trainer(tmp_path, watch, callback, max_epochs=8).fit(model)
    assert float(model.val_acc_best.max_value) == watch.best
    assert model.best == watch.by_hand
    assert callback.metrics["pruned"]["val_acc_best"] == callback.metrics["pruned"]["val_acc_epoch"]
    assert callback.metrics["pruned"]["val_acc_epoch"] >= callback.metrics["dense"]["val_acc_epoch"] - 0.05


class Best(Callback):
    def on_train_end(self, trainer, pl_module):
        self.best, self.by_hand = float(pl_module.val_acc_best.max_value), pl_module.best


def test_a_monitor_that_cannot_move_is_refused_and_the_network_is_dense(tmp_path, caplog):
    watch, model = Average(), Net()
    with pytest.raises(MisconfigurationException, match="a metric that can fall, got 'val_best_by_hand'"):
        make_trainer(tmp_path, watch, NetTrim(max_drop=0.05, monitor="val_best_by_hand")).fit(model)
    assert all(torch.equal(model.state_dict()[name], watch.state[name]) for name in watch.state)
    assert (tmp_path / "nettrim/dense.ckpt").exists()


@pytest.mark.parametrize("monitor", ["accuracy", "train_loss"])
def test_a_wrong_monitor_is_known_before_training(tmp_path, monitor):
    model, last = Net(), Last()
    with pytest.raises(MisconfigurationException, match=f"monitor: expected one of .*val_loss.*, got '{monitor}'"):
        make_trainer(tmp_path, last, NetTrim(max_drop=0.05, monitor=monitor), num_sanity_val_steps=0).fit(model)
    assert last.calls == []
    assert int(model.val_acc._update_count) == 0


def test_the_users_metrics_are_those_of_the_training(tmp_path):
    seen = []
    for callbacks in ([], [half()]):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, *callbacks)
        trainer.fit(Net())
        seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert seen[0] == seen[1]
