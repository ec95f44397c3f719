"""Further epochs of the training loop on the pruned network: which ones, at which rate, and what is published."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from networks import equal_states as equal_modules
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from trainers import (
    CLI_WARNINGS,
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
    read_events,
    sparsities,
    train_data,
    val_data,
    validate,
)

from lightning_nettrim import NetTrim, compact, load_compact

pytestmark = [
    *CLI_WARNINGS,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:SWA is initializing after swa_start"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]


def finetuned(epochs=2, **options):
    """NetTrim with half of the weights by magnitude, and further epochs."""
    return half(finetune_epochs=epochs, **options)


class Record(Callback):
    """Records, of every batch after pruning, the epoch, the learning rates and whether all zeros are zero."""

    def __init__(self):
        self.pruned = None
        self.rows, self.before = [], []
        self.hooks = []

    def on_train_start(self, trainer, pl_module):
        self.hooks.append("train_start")
        if pruned_by_half(pl_module):
            self.pruned = copy_state(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.hooks.append("train_end")

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.now = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer, pl_module, *args):
        rows = self.before if self.pruned is None else self.rows
        rows.append((trainer.current_epoch, self.now, pruned_by_half(pl_module)))

    def on_train_epoch_start(self, trainer, pl_module):
        self.hooks.append("epoch_start")

    def on_train_epoch_end(self, trainer, pl_module):
        self.hooks.append("epoch_end")

    @property
    def epochs(self):
        return sorted({epoch for epoch, _, _ in self.rows})

    @property
    def rates(self):
        return [rates for _, rates, _ in self.rows]


# --- the epochs


def test_the_loop_goes_on_with_exact_zeros_after_each_step_and_in_each_checkpoint(tmp_path):
    record, callback = Record(), finetuned()
    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(tmp_path, record, callback, saver, enable_checkpointing=True)
    trainer.fit(model := Net(), train_data(), val_data())
    assert trainer.global_step == 24
    assert trainer.current_epoch == 4
    assert (trainer.max_epochs, trainer.min_epochs, trainer.max_steps, trainer.should_stop) == (2, 0, -1, False)
    assert record.epochs == [2, 3]
    assert [zero for _, _, zero in record.rows] == [True] * 12
    for name in WEIGHTS:
        kept = callback.masks[name]
        assert torch.equal(model.state_dict()[name] != 0, kept)
        moved = (model.state_dict()[name] != record.pruned[name])[kept]
        assert moved.float().mean() > 0.9
    paths = sorted((tmp_path / "steps").iterdir(), key=lambda path: int(path.stem.split("=")[-1]))
    assert len(paths) == 24
    assert [sparsities(load_state(path)) == [0.5] * 3 for path in paths] == [False] * 12 + [True] * 12
    assert equal_states(load_state(callback.folder / "pruned.ckpt"), copy_state(model))
    fit = ["train_start", *["epoch_start", "epoch_end"] * 2, "train_end"]
    assert record.hooks == fit * 2


def test_nothing_changes_without_further_epochs(tmp_path):
    states = []
    for options in ({}, {"finetune_epochs": 0}):
        torch.manual_seed(0)
        make_trainer(tmp_path, half(**options)).fit(model := Net(), train_data(), val_data())
        states.append(copy_state(model))
    assert equal_states(*states)


def test_metrics_report_table_and_notes_are_those_of_the_fine_tuned_network(tmp_path, capsys):
    logger, callback = TensorBoardLogger(tmp_path), finetuned()
    make_trainer(tmp_path, callback, logger=logger).fit(model := Net(), train_data(), val_data())
    assert list(callback.metrics) == ["dense", "pruned", "finetuned"]
    assert len({side["val_loss"] for side in callback.metrics.values()}) == 3
    assert validate(tmp_path, model) == [callback.metrics["finetuned"]]
    report = json.loads((callback.folder / "report.json").read_text())
    assert report["metrics"] == callback.metrics
    assert (report["arguments"]["finetune_epochs"], report["arguments"]["finetune_lr"]) == (2, None)
    (note,) = [note for note in report["notes"] if note.startswith("fine-tuned")]
    assert note == (
        "fine-tuned for 2 epochs, learning rate 0.02: the errors are those of the pruned network before them"
    )
    zeros = sum(int((value == 0).sum()) for value in model.parameters())
    assert report["total"]["model_sparsity"] == zeros / sum(value.numel() for value in model.parameters())
    printed = capsys.readouterr().out
    assert note in printed
    assert "metric     dense  pruned  finetuned  difference" in printed
    assert printed.count("sparsity of the pruned layers") == 1
    for side in callback.metrics:
        run = read_events(Path(logger.log_dir, side))
        assert run.Scalars("val_loss")[-1].value == pytest.approx(callback.metrics[side]["val_loss"], rel=1e-6)
        assert "nettrim/fc1/weight" in run.Tags()["histograms"]
    assert not (callback.folder / "dense.ckpt").exists()


@pytest.mark.parametrize("ending", ["EarlyStopping", "max_steps", "max_steps only", "max_time", "should_stop"])
def test_the_number_of_epochs_does_not_depend_on_what_ended_the_training(tmp_path, ending):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    others, options, steps = {
        "EarlyStopping": ([EarlyStopping("val_loss", patience=1, min_delta=9.0)], {"max_epochs": 50}, 12),
        "max_steps": ([], {"max_steps": 9, "max_epochs": 50}, 9),
        "max_steps only": ([], {"max_steps": 3, "max_epochs": -1}, 3),
        "max_time": ([Timer(duration={"microseconds": 1})], {"max_epochs": 50}, 1),
        "should_stop": ([Stop()], {"max_epochs": 50}, 1),
    }[ending]
    record, callback = Record(), finetuned(3)
    trainer = make_trainer(tmp_path, record, *others, callback, **options)
    trainer.fit(model := Net(), train_data(), val_data())
    assert trainer.global_step == steps + 3 * 6
    first = -(-steps // 6)
    assert record.epochs == [first, first + 1, first + 2]
    assert (trainer.max_epochs, trainer.max_steps) == (options["max_epochs"], options.get("max_steps", -1))
    assert trainer.should_stop == (ending not in ("max_steps", "max_steps only"))
    assert pruned_by_half(model)
    assert list(callback.metrics) == ["dense", "pruned", "finetuned"]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but `Trainer.barebones=True.`")
@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"accumulate_grad_batches": 4}, 12),
        ({"limit_train_batches": 2, "limit_val_batches": 0}, 4),
        ({"precision": "bf16-true"}, 12),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, 12),
        ({"gradient_clip_val": 0.1}, 12),
        ({"reload_dataloaders_every_n_epochs": 1}, 12),
        ({"enable_progress_bar": True}, 12),
        ({"fast_dev_run": True}, 2),
        ({"barebones": True}, 12),
    ],
    ids=str,
)
def test_further_epochs_under_trainer_options(tmp_path, options, batches):
    if options.get("barebones"):
        quiet = ("logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        options = options | dict.fromkeys(quiet)
    record, callback = Record(), finetuned()
    make_trainer(tmp_path, record, callback, **options).fit(model := Net(), train_data(), val_data())
    assert [zero for _, _, zero in record.rows] == [True] * batches
    assert not equal_states(copy_state(model), record.pruned)
    assert (tmp_path / "nettrim/pruned.ckpt").exists() == (not {"fast_dev_run", "barebones"} & set(options))


def test_nothing_is_trained_or_pruned_without_batches(tmp_path):
    with pytest.warns(UserWarning, match="trained nothing"):
        make_trainer(tmp_path, finetuned(), limit_train_batches=0).fit(model := Net(), train_data(), val_data())
    assert sparsities(model.state_dict()) == [0.0] * 3


class TwoOptimizers(Net):
    """Manual optimization with an optimizer of the first layer, one of the others, and a scheduler that ends."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        first = torch.optim.AdamW(self.fc1.parameters(), lr=0.02)
        others = torch.optim.SGD([*self.fc2.parameters(), *self.fc3.parameters()], lr=0.05, momentum=0.9)
        return [first, others], [lr_scheduler.OneCycleLR(first, 0.02, total_steps=12)]


def test_several_optimizers_in_manual_optimization(tmp_path):
    record, callback = Record(), finetuned()
    make_trainer(tmp_path, record, callback).fit(model := TwoOptimizers(), train_data(), val_data())
    assert [zero for _, _, zero in record.rows] == [True] * 12
    assert all(not torch.equal(model.state_dict()[name], record.pruned[name]) for name in WEIGHTS)
    highest = max(rates[0] for _, rates, _ in record.before)
    assert record.rates == [[0.1 * highest, 0.05]] * 12


# --- learning rates


class Scheduled(Net):
    """Trained by AdamW with a scheduler, which is stepped 12 times in two epochs."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        make = {
            "OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=12),
            "CosineAnnealingLR": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 12),
            "LinearLR": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 12),
            "ReduceLROnPlateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=9.0),
        }
        scheduler = {"scheduler": make[self.name](), "interval": "step"}
        if self.name == "ReduceLROnPlateau":
            scheduler |= {"interval": "epoch", "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


@pytest.mark.parametrize("lr", [None, 0.003])
@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR", "LinearLR", "ReduceLROnPlateau"])
def test_schedulers_stand_still_and_the_rate_is_constant(tmp_path, name, lr):
    class Rates(Callback):
        """Records the rate at the end of the training, and the number of steps of the scheduler."""

        def __init__(self):
            self.ends, self.steps = [], []

        def on_train_end(self, trainer, pl_module):
            self.ends.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.steps.append(trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"])

    record, ends, callback = Record(), Rates(), finetuned(finetune_lr=lr)
    trainer = make_trainer(tmp_path, record, ends, callback)
    trainer.fit(Scheduled(name), train_data(), val_data())
    highest = max(rates[0] for _, rates, _ in record.before)
    expected = max(ends.ends[0], 0.1 * highest) if lr is None else lr
    assert record.rates == [[expected]] * 12
    assert ends.steps[0] == ends.steps[1]
    assert trainer.optimizers[0].param_groups[0]["lr"] == ends.ends[0]
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == name
    saved = torch.load(callback.folder / "pruned.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == ends.ends[0]


def test_rates_that_are_tensors_change_in_place(tmp_path):
    class TensorRate(Net):
        def configure_optimizers(self):
            self.rate = torch.tensor(0.02)
            return torch.optim.AdamW(self.parameters(), lr=self.rate)

    class Inside(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append((float(pl_module.rate), trainer.optimizers[0].param_groups[0]["lr"] is pl_module.rate))

    seen = []
    make_trainer(tmp_path, Inside(), finetuned(finetune_lr=0.5)).fit(model := TensorRate(), train_data(), val_data())
    assert seen == [(float(torch.tensor(0.02)), True)] * 12 + [(0.5, True)] * 12
    assert model.rate == torch.tensor(0.02)


# --- resuming


class Interrupt(Callback):
    """Raises in the n-th batch."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


@pytest.mark.parametrize("options", [{}, {"max_steps": 9, "max_epochs": 50}], ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize("at", ["after pruning", "after an epoch"])
def test_an_interrupted_fit_is_resumed_to_the_same_network(tmp_path, at, options):
    def saver(name):
        return ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{epoch}")

    def trainer(name, *callbacks):
        more = {"enable_checkpointing": True, "logger": CSVLogger(tmp_path, name)}
        return make_trainer(tmp_path, *callbacks, saver(name), **more, **options)

    torch.manual_seed(0)
    whole = finetuned(3)
    (full := trainer("whole", whole)).fit(reference := Scheduled("OneCycleLR"), train_data(), val_data())

    torch.manual_seed(0)
    broken = finetuned(3)
    steps = 9 if options else 12
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer("broken", broken, Interrupt(steps + (0 if at == "after pruning" else 9))).fit(
            Scheduled("OneCycleLR"), train_data(), val_data()
        )
    path = broken.folder / "pruned.ckpt" if at == "after pruning" else tmp_path / "broken/epoch=2.ckpt"

    torch.manual_seed(1)
    record, again = Record(), finetuned(3)
    (later := trainer("later", record, again)).fit(
        model := Scheduled("OneCycleLR"), train_data(), val_data(), ckpt_path=path
    )
    assert equal_states(copy_state(model), copy_state(reference))
    assert record.epochs == ([2, 3, 4] if at == "after pruning" else [3, 4])
    assert later.global_step == full.global_step == steps + 18
    assert (later.max_epochs, later.max_steps) == (full.max_epochs, full.max_steps)
    assert again.metrics == whole.metrics
    assert equal_states(again.masks, whole.masks)
    assert again.result.notes == whole.result.notes
    assert [each.local_error for each in again.result.reports] == [each.local_error for each in whole.result.reports]
    files = [callback.folder / "report.json" for callback in (whole, again)]
    one, other = (json.loads(file.read_text()) for file in files)
    assert one["layers"][0].keys() == other["layers"][0].keys()
    assert one["metrics"] == other["metrics"]
    one, other = (torch.load(callback.folder / "pruned.ckpt", weights_only=True) for callback in (whole, again))
    assert equal_states(one["state_dict"], other["state_dict"])
    assert one["optimizer_states"][0]["param_groups"] == other["optimizer_states"][0]["param_groups"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.parametrize("step", [9, 12, 15, 24])
def test_a_fit_is_resumed_from_a_checkpoint_of_any_step(tmp_path, step):
    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make_trainer(tmp_path, finetuned(), saver, enable_checkpointing=True).fit(Net(), train_data(), val_data())
    again = finetuned()
    trainer = make_trainer(tmp_path, again)
    trainer.fit(model := Net(), train_data(), val_data(), ckpt_path=tmp_path / f"steps/step={step}.ckpt")
    assert (trainer.global_step, trainer.current_epoch) == (24, 4)
    assert list(again.metrics) == ["dense", "pruned", "finetuned"]
    assert pruned_by_half(model)
    assert sparsities(load_state(again.folder / "pruned.ckpt")) == [0.5] * 3


def test_a_network_that_is_pruned_further_is_fine_tuned_again(tmp_path):
    first = finetuned()
    make_trainer(tmp_path, first).fit(MetricsNet())
    record, further = Record(), finetuned(1, sparsity=0.75)
    trainer = make_trainer(tmp_path, record, further, max_epochs=5)
    trainer.fit(model := MetricsNet(), ckpt_path=first.folder / "pruned.ckpt")
    assert sparsities(model.state_dict()) == [0.75] * 3
    assert trainer.current_epoch == 6
    assert list(further.metrics) == ["dense", "pruned", "finetuned"]


def test_a_finished_network_is_trained_as_in_any_later_fit(tmp_path):
    callback = finetuned()
    make_trainer(tmp_path, callback).fit(model := Net(), train_data(), val_data())
    result, before = callback.result, copy_state(model)
    for duplicate in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        assert equal_states(duplicate(callback).masks, callback.masks)
    (trainer := make_trainer(tmp_path, callback)).fit(model, train_data(), val_data())
    assert trainer.global_step == 12
    assert callback.result is result
    assert not equal_states(copy_state(model), before)
    assert pruned_by_half(model)


# --- other options of the callback


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune_epochs": -1}, "finetune_epochs: expected an integer >= 0, got -1"),
        ({"finetune_epochs": 1.5}, "finetune_epochs: expected an integer >= 0, got 1.5"),
        ({"finetune_epochs": "2"}, "finetune_epochs: expected an integer >= 0, got '2'"),
        ({"finetune_epochs": True}, "finetune_epochs: expected an integer >= 0, got True"),
        ({"finetune_epochs": None}, "finetune_epochs: expected an integer >= 0, got None"),
        ({"finetune_epochs": 2, "enforce": False}, "finetune_epochs=2: expected enforce=True with it"),
        ({"finetune_epochs": 2, "finetune_lr": 0.0}, "finetune_lr: expected a number > 0 or None, got 0.0"),
        ({"finetune_epochs": 2, "finetune_lr": float("nan")}, "finetune_lr: expected a number > 0 or None, got nan"),
        ({"finetune_epochs": 2, "finetune_lr": "1e-3"}, "finetune_lr: expected a number > 0 or None, got '1e-3'"),
        ({"finetune_lr": 0.1}, "finetune_lr=0.1: expected finetune_epochs with it, got 0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_construction_in_one_line(options, message):
    with pytest.raises(MisconfigurationException, match=f"^NetTrim: {message}[^\n]*$"):
        half(**options)


def test_a_dry_run_and_a_search_without_result_are_not_fine_tuned(tmp_path):
    watch, planned = Watch(), finetuned(dry_run=True)
    (trainer := make_trainer(tmp_path, watch, planned)).fit(model := Net(), train_data(), val_data())
    assert trainer.global_step == 12
    assert equal_states(copy_state(model), watch.trained)

    watch = Watch()
    none = finetuned(sparsity=None, max_drop=0.0, monitor="val_loss", mode="min")
    (trainer := make_trainer(tmp_path, watch, none)).fit(model := Net(), train_data(), val_data())
    assert none.result.sparsity == 0
    assert trainer.global_step == 12
    assert equal_states(copy_state(model), watch.trained)
    assert list(none.metrics) == ["dense", "pruned"]


def test_without_compare_and_save_nothing_is_measured_or_written(tmp_path):
    record, callback = Record(), finetuned(compare=False, save=False)
    make_trainer(tmp_path, record, callback).fit(model := Net(), train_data(), val_data())
    assert callback.metrics == {}
    assert not list(tmp_path.iterdir())
    assert record.epochs == [2, 3]
    assert pruned_by_half(model)


def test_the_best_weights_are_pruned_and_fine_tuned(tmp_path):
    best, record = ModelCheckpoint(tmp_path / "best", monitor="epoch_number"), Record()
    callback = finetuned(checkpoint="best")
    make_trainer(tmp_path, record, callback, best, enable_checkpointing=True, max_epochs=3).fit(model := MetricsNet())
    dense = load_state(tmp_path / "best/epoch=0-step=6.ckpt")
    for name in WEIGHTS:
        kept = record.pruned[name] != 0
        assert torch.equal(record.pruned[name][kept], dense[name][kept])
        assert torch.equal(model.state_dict()[name] != 0, kept)
    assert record.epochs == [3, 4]


def test_max_drop_is_about_the_network_before_the_epochs(tmp_path):
    callback = finetuned(sparsity=None, max_drop=0.3, monitor="val_acc")
    torch.manual_seed(0)
    make_trainer(tmp_path, callback, max_epochs=6).fit(MetricsNet())
    assert callback.result.sparsity > 0
    chosen = max((each for each in callback.result.trials if each.within), key=lambda trial: trial.sparsity)
    assert chosen.sparsity > 0
    assert callback.metrics["pruned"]["val_acc_epoch"] == pytest.approx(chosen.metric)


def test_a_validate_does_not_fine_tune(tmp_path, dense_checkpoint):
    callback = finetuned()
    make_trainer(tmp_path, callback).validate(model := Net(), datamodule=Data(), ckpt_path=dense_checkpoint)
    dense = load_state(dense_checkpoint)
    for name in WEIGHTS:
        assert torch.equal(model.state_dict()[name][callback.masks[name]], dense[name][callback.masks[name]])
    assert list(callback.metrics) == ["dense", "pruned"]


def test_an_error_in_a_further_epoch_restores_the_trainer(tmp_path):
    callback = finetuned()
    trainer = make_trainer(tmp_path, callback, Interrupt(15))
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(Scheduled("OneCycleLR"), train_data(), val_data())
    assert (trainer.max_epochs, trainer.min_epochs) == (2, 0)
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == "OneCycleLR"
    assert sparsities(load_state(callback.folder / "pruned.ckpt")) == [0.5] * 3
    assert (callback.folder / "dense.ckpt").exists()


# --- other callbacks


OTHERS = {
    "EMA": lambda: EMAWeightAveraging(decay=0.8),
    "WeightAveraging": WeightAveraging,
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "EarlyStopping": lambda: EarlyStopping("val_loss", patience=1),
    "ModelCheckpoint": lambda: ModelCheckpoint(monitor="val_loss", save_last=True),
    "LearningRateMonitor": LearningRateMonitor,
    "ModelPruning": lambda: ModelPruning("l1_unstructured", amount=0.2, make_pruning_permanent=True),
}


@pytest.mark.parametrize("first", [True, False], ids=["NetTrim first", "NetTrim last"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_zeros_and_files_beside_another_callback(tmp_path, other, first):
    callback, beside = finetuned(), other()
    callbacks = [callback, beside] if first else [beside, callback]
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, *callbacks, saver, logger=logger, enable_checkpointing=True, max_epochs=3)
    before = list(trainer.callbacks)
    trainer.fit(model := MetricsNet())
    assert sorted(trainer.callbacks, key=before.index) == before
    own = model.state_dict()
    masks = callback.masks
    assert all(not bool(own[name][~masks[name]].any()) for name in WEIGHTS)
    assert all(int(masks[name].sum()) <= masks[name].numel() // 2 for name in WEIGHTS)
    assert all(torch.equal(value, own[name]) for name, value in load_state(callback.folder / "pruned.ckpt").items())
    for epoch in (3, 4):
        saved = load_state(tmp_path / f"saved/epoch={epoch}.ckpt")
        assert all(not bool(saved[name][~masks[name]].any()) for name in WEIGHTS)
    (again,) = trainer.validate(model, verbose=False)
    assert again["val_loss"] == callback.metrics["finetuned"]["val_loss"]
    assert callback.metrics["finetuned"]["val_loss"] != callback.metrics["pruned"]["val_loss"]
    if isinstance(beside, LearningRateMonitor):
        assert "lr-AdamW" in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize("other", ["EMA", "WeightAveraging", "SWA"])
def test_a_fit_beside_averages_is_resumed_to_the_same_network(tmp_path, other):
    def trainer(name, *callbacks):
        saver = ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{epoch}")
        return make_trainer(tmp_path, *callbacks, OTHERS[other](), saver, enable_checkpointing=True)

    torch.manual_seed(0)
    trainer("whole", whole := finetuned(3)).fit(reference := MetricsNet())
    resumed = finetuned(3)
    trainer("later", resumed).fit(model := MetricsNet(), ckpt_path=tmp_path / "whole/epoch=3.ckpt")
    for name in WEIGHTS:
        assert torch.equal(model.state_dict()[name], reference.state_dict()[name])
    assert resumed.metrics["finetuned"]["val_loss"] == whole.metrics["finetuned"]["val_loss"]


# --- whole units


class Normalized(Net):
    """8-16-12-3 with a BatchNorm after the first layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return self.fc3(self.fc2(self.norm(self.fc1(x)).relu()).relu())


def test_removed_units_stay_removed_and_the_compact_network_is_the_fine_tuned_one(tmp_path, capsys):
    pruned = NetTrim(pattern="units", sparsity=0.5)
    torch.manual_seed(0)
    make_trainer(tmp_path, pruned).fit(model := Normalized(), train_data(), val_data())
    before, x = compact(model, torch.randn(8, 8), batch_sizes=()).report, torch.randn(16, 8)
    printed = capsys.readouterr().out.count("units kept:")

    callback = NetTrim(pattern="units", sparsity=0.5, finetune_epochs=3)
    torch.manual_seed(0)
    make_trainer(tmp_path, callback).fit(model := Normalized(), train_data(), val_data())
    assert equal_states(callback.masks, pruned.masks)
    after = compact(model, torch.randn(8, 8), batch_sizes=()).report
    assert after.units == before.units
    assert after.removed == before.removed
    loaded = Normalized.load_from_checkpoint(callback.folder / "pruned.ckpt")
    assert equal_modules(loaded, copy_state(model))
    small = load_compact(copy.deepcopy(loaded), callback.folder / "compact.safetensors").eval()
    torch.testing.assert_close(small(x), loaded.eval()(x), rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().out.count("units kept:") == printed


def test_the_compact_network_is_written_after_a_resumed_fit(tmp_path):
    def callback():
        return NetTrim(pattern="units", sparsity=0.5, finetune_epochs=2)

    with pytest.raises(RuntimeError, match="interrupted"):
        make_trainer(tmp_path, broken := callback(), Interrupt(14)).fit(Normalized(), train_data(), val_data())
    assert not (broken.folder / "compact.safetensors").exists()
    trainer = make_trainer(tmp_path, again := callback())
    trainer.fit(model := Normalized(), train_data(), val_data(), ckpt_path=broken.folder / "pruned.ckpt")
    assert again.folder != broken.folder
    small = load_compact(Normalized(), again.folder / "compact.safetensors").eval()
    torch.testing.assert_close(small(x := torch.randn(4, 8)), model.eval()(x), rtol=1e-5, atol=1e-6)


# --- real data


class Digits(pl.LightningModule):
    """64-128-64-10 on handwritten digits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.layers(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def digits():
    """1 200 images to train on and 597 to validate on."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = ((x[part], y[part]) for part in (order[:1200], order[1200:]))
    train, val = (TensorDataset(*part) for part in parts)
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=597)


def test_the_accuracy_of_a_very_sparse_network_rises(tmp_path):
    pl.seed_everything(0, verbose=False)
    callback = NetTrim(sparsity=0.97, allocate="uniform", num_samples=1200, finetune_epochs=5)
    make_trainer(tmp_path, callback, max_epochs=6).fit(Digits(), *digits())
    dense, pruned, tuned = (side["val_acc"] for side in callback.metrics.values())
    assert dense > tuned > pruned
    assert callback.result.sparsity == pytest.approx(0.97, abs=1e-3)
