"""The callback in a Trainer: what it prunes, shows, writes and keeps, and what it leaves as it was."""

import copy
import json
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_nettrim import ADMM, Magnitude, NetTrim, Solver

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

ROOT = Path(__file__).parents[1]
WEIGHTS = ["fc1.weight", "fc2.weight", "fc3.weight"]


class Net(pl.LightningModule):
    """8-16-12-3, ReLU between, trained by AdamW."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.fc3(self.dropout(self.fc2(self.fc1(x).relu()).relu()))

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch), prog_bar=True, on_epoch=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


def samples(P, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(P, 8, generator=generator)
    return TensorDataset(x, (x[:, :3] + x[:, 3:6].relu()).argmax(1))


def train_data():
    return DataLoader(samples(96, 1), batch_size=16)


def val_data(seed=2):
    return DataLoader(samples(48, seed), batch_size=16)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return train_data()

    def val_dataloader(self):
        return val_data()


def make_trainer(path, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"logger": False, "max_epochs": 2, "log_every_n_steps": 1} | quiet
    return pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=path, callbacks=list(callbacks), **(defaults | options)
    )


def half(**options):
    """Half of each layer by magnitude: quick."""
    return NetTrim(**({"sparsity": 0.5, "allocate": "uniform", "solver": Magnitude(), "refit": False} | options))


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def zeros(model):
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() == 0 for name in WEIGHTS}


def pruned_by_half(model):
    return all(mask.float().mean() == 0.5 for mask in zeros(model).values())


class Watch(Callback):
    """Keeps what the network is like and what hooks are called; stands before the pruning callback."""

    def __init__(self):
        self.calls = []
        self.trained = None

    def on_train_end(self, trainer, pl_module):
        self.trained = state(pl_module)

    def on_validation_start(self, trainer, pl_module):
        self.calls.append("start")

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.calls.append("batch")

    def on_validation_epoch_end(self, trainer, pl_module):
        self.calls.append("epoch")

    def on_validation_end(self, trainer, pl_module):
        self.calls.append("end")

    def on_exception(self, trainer, pl_module, exception):
        self.calls.append(trainer.state.stage)


def validated(path, model, **options):
    return make_trainer(path, **options).validate(model, val_data(), verbose=False)


# --- a fit


def test_fit_prunes_and_writes_checkpoint_and_report(tmp_path):
    watch, callback, model = Watch(), NetTrim(epsilon=0.1), Net()
    make_trainer(tmp_path, watch, callback).fit(model, train_data(), val_data())
    after, result = state(model), callback.result

    assert [report.name for report in result.reports] == ["fc1", "fc2", "fc3"]
    assert 0.05 < result.sparsity < 1
    for name in WEIGHTS:
        assert torch.equal(after[name] != 0, callback.masks[name])
    assert after.keys() == watch.trained.keys()
    assert all(after[name].shape == watch.trained[name].shape for name in after)

    report = json.loads((tmp_path / "nettrim/report.json").read_text())
    assert set(report) == {"layers", "skipped", "total", "trials", "notes", "metrics", "arguments", "versions"}
    assert report["total"]["sparsity"] == result.sparsity
    assert report["arguments"]["epsilon"] == 0.1
    assert report["arguments"]["solver"]["class_path"].endswith("ADMM")
    assert set(report["versions"]) == {"lightning_nettrim", "torch", "lightning"}
    assert report["metrics"] == callback.metrics
    checkpoint = torch.load(tmp_path / "nettrim/pruned.ckpt", weights_only=True)
    assert same(checkpoint["state_dict"], after)

    assert validated(tmp_path, model) == [callback.metrics["pruned"]]
    model.load_state_dict(watch.trained)
    assert validated(tmp_path, model) == [callback.metrics["dense"]]
    assert callback.metrics["dense"] != callback.metrics["pruned"]


def test_fit_leaves_modes_and_dropout_alone(tmp_path):
    model = Net(dropout=0.5)
    make_trainer(tmp_path, half()).fit(model, train_data(), val_data())
    assert all(module.training for module in model.modules())


def test_nothing_is_saved_or_compared_if_not_asked_for(tmp_path):
    callback, model = half(save=False, compare=False), Net()
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    assert pruned_by_half(model)
    assert callback.metrics == {}
    assert not list(tmp_path.iterdir())


def test_second_fit_of_the_same_callback_prunes_a_new_model(tmp_path):
    callback = half()
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Net()
        make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
        assert pruned_by_half(model)
        assert all(torch.equal(callback.masks[name], ~mask) for name, mask in zeros(model).items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_of_the_callback_work_and_carry_the_masks(tmp_path, duplicate):
    callback, model = duplicate(half()), Net()
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    assert pruned_by_half(model)
    again = duplicate(callback)
    assert same(again.masks, callback.masks)
    assert again.result.total() == callback.result.total()
    make_trainer(tmp_path, again).fit(model, train_data(), val_data())
    assert same(again.masks, callback.masks)
    assert pruned_by_half(model)


# --- loggers


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_overlays_dense_and_pruned(tmp_path):
    callback, logger = half(solver=ADMM()), TensorBoardLogger(tmp_path)
    make_trainer(tmp_path, callback, logger=logger).fit(Net(), train_data(), val_data())
    main, dense, pruned = (read_events(Path(logger.log_dir, part)) for part in ("", "dense", "pruned"))
    for run, side in ((dense, "dense"), (pruned, "pruned")):
        assert run.Scalars("val_loss")[-1].value == pytest.approx(callback.metrics[side]["val_loss"], rel=1e-6)
    assert dense.Scalars("val_loss")[-1].step == pruned.Scalars("val_loss")[-1].step
    assert len(main.Scalars("val_loss")) == 2
    tags = main.Tags()
    for layer in ("fc1", "fc2", "fc3"):
        assert main.Scalars(f"nettrim/{layer}/sparsity")[0].value == 0.5
        assert {f"nettrim/{layer}/{key}" for key in ("relative_error", "steps", "seconds")} <= set(tags["scalars"])
    assert "nettrim/total/sparsity" in tags["scalars"]
    assert "nettrim/table/text_summary" in tags["tensors"]
    assert dense.Tags()["histograms"] == pruned.Tags()["histograms"]
    assert dense.Tags()["histograms"] == [f"nettrim/fc{i}/weight" for i in (1, 2, 3)]
    assert (Path(logger.log_dir) / "nettrim/pruned.ckpt").exists()


def test_csv_logger_gets_sibling_runs(tmp_path):
    callback, logger = half(), CSVLogger(tmp_path)
    make_trainer(tmp_path, callback, logger=logger).fit(Net(), train_data(), val_data())
    for side in ("dense", "pruned"):
        head, row = (Path(logger.log_dir) / side / "metrics.csv").read_text().splitlines()
        assert float(dict(zip(head.split(","), row.split(","), strict=True))["val_loss"]) == pytest.approx(
            callback.metrics[side]["val_loss"]
        )
    assert "nettrim/fc1/sparsity" in (Path(logger.log_dir) / "metrics.csv").read_text()


class Recorder(Logger):
    """A logger without folders; ``experiment`` is what a module may use directly."""

    name, version = "recorder", 0

    def __init__(self, root):
        super().__init__()
        self.root, self.experiment, self.rows = str(root), [], []

    @property
    def save_dir(self):
        return self.root

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


class Drawing(Net):
    """A module that uses its logger's experiment directly."""

    def on_validation_epoch_end(self):
        self.logger.experiment.append("drawn")


def test_logger_of_another_kind_gets_prefixed_metrics(tmp_path):
    callback, logger = half(), Recorder(tmp_path)
    make_trainer(tmp_path, callback, logger=logger, num_sanity_val_steps=0).fit(Drawing(), train_data(), val_data())
    logged = {key: value for row in logger.rows for key, value in row.items()}
    assert logged["dense/val_loss"] == callback.metrics["dense"]["val_loss"]
    assert logged["pruned/val_loss"] == callback.metrics["pruned"]["val_loss"]
    assert logged["nettrim/fc1/sparsity"] == 0.5
    assert sum("val_loss" in row for row in logger.rows) == 2
    assert logger.experiment == ["drawn", "drawn"]


# --- the user's own callbacks


def test_other_callbacks_see_nothing_of_the_two_passes(tmp_path):
    seen = []
    for extra in ([], [half()]):
        torch.manual_seed(0)
        watch, stop = Watch(), EarlyStopping("val_loss", patience=5)
        best = ModelCheckpoint(tmp_path / str(len(extra)), monitor="val_loss", save_top_k=-1, filename="{epoch}")
        trainer = make_trainer(
            tmp_path, watch, stop, *extra, best, enable_checkpointing=True, max_epochs=3, logger=CSVLogger(tmp_path)
        )
        callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
        trainer.fit(Net(), train_data(), val_data())
        assert sorted(trainer.callbacks, key=callbacks.index) == callbacks
        assert trainer.callbacks[-1] is [*extra, best][0]
        assert trainer.loggers == loggers
        scores = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
        seen.append((watch.calls, stop.state_dict(), scores))
    assert seen[0] == seen[1]
    assert len(seen[1][2]) == 3


def test_progress_bar_takes_no_part_in_the_two_passes(tmp_path):
    class Bar(TQDMProgressBar):
        validations = 0

        def on_validation_start(self, trainer, pl_module):
            self.validations += 1
            super().on_validation_start(trainer, pl_module)

    bar = Bar()
    make_trainer(tmp_path, half(), bar, enable_progress_bar=True, num_sanity_val_steps=0).fit(
        Net(), train_data(), val_data()
    )
    assert bar.validations == 2


class Fragile(Net):
    """Raises in the validation of a pruned network."""

    def validation_step(self, batch, batch_idx):
        if not self.fc1.weight.all():
            raise RuntimeError("pruned")
        super().validation_step(batch, batch_idx)


def test_all_is_put_back_if_the_pruned_validation_raises(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, watch, half(), logger=CSVLogger(tmp_path))
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    verbose = trainer.fit_loop.epoch_loop.val_loop.verbose
    with pytest.raises(RuntimeError, match="pruned"):
        trainer.fit(Fragile(), train_data(), val_data())
    assert trainer.callbacks == callbacks
    assert trainer.loggers == loggers
    assert trainer.fit_loop.epoch_loop.val_loop.verbose == verbose
    assert watch.calls[-1] == RunningStage.TRAINING


# --- pruning by a validation


@pytest.fixture
def dense(tmp_path):
    """The checkpoint of a dense network trained without the callback."""
    trainer = make_trainer(tmp_path)
    trainer.fit(Net(), train_data(), val_data())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    return tmp_path / "dense.ckpt"


@pytest.mark.parametrize("calibration", ["train", "val"])
@pytest.mark.parametrize("compare", [True, False])
def test_validate_prunes_a_dense_checkpoint(tmp_path, dense, calibration, compare):
    callback, model = half(calibration=calibration, compare=compare, solver=ADMM()), Net(dropout=0.5)
    trainer = make_trainer(tmp_path, callback)
    metrics = trainer.validate(model, datamodule=Data(), ckpt_path=dense, verbose=False)
    assert pruned_by_half(model)
    assert validated(tmp_path, model) == metrics == [callback.metrics["pruned"]]
    if compare:
        reference = make_trainer(tmp_path).validate(Net(), val_data(), ckpt_path=dense, verbose=False)
        assert reference == [callback.metrics["dense"]]
    assert json.loads((tmp_path / "nettrim/report.json").read_text())["metrics"] == callback.metrics
    assert all(module.training for module in model.modules())


def test_calibration_data_are_those_asked_for(tmp_path, dense):
    seen = {}
    for calibration in ("train", "val"):
        model = Net()
        callback = half(calibration=calibration, sparsity=0.3, solver=ADMM(), refit=True)
        make_trainer(tmp_path, callback).validate(model, datamodule=Data(), ckpt_path=dense, verbose=False)
        seen[calibration] = state(model)
    fallback = Net()
    trainer = make_trainer(tmp_path, half(sparsity=0.3, solver=ADMM(), refit=True))
    with pytest.warns(UserWarning, match="no train_dataloader"):
        trainer.validate(fallback, val_data(), ckpt_path=dense, verbose=False)
    assert not same(seen["train"], seen["val"])
    assert same(seen["val"], state(fallback))


def test_limits_hold_for_the_train_data_of_a_validate(tmp_path, dense):
    class Counted(Data):
        taken = 0

        def train_dataloader(self):
            for batch in train_data():
                self.taken += 1
                yield batch

    data = Counted()
    trainer = make_trainer(tmp_path, half(), limit_train_batches=3)
    trainer.validate(Net(), datamodule=data, ckpt_path=dense, verbose=False)
    assert data.taken == 3


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


def test_validate_after_fit_keeps_the_pruned_network(tmp_path):
    callback, model = half(), Net()
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model, train_data(), val_data())
    before, result = state(model), callback.result
    assert trainer.validate(model, val_data(), verbose=False) == [callback.metrics["pruned"]]
    assert callback.result is result
    assert same(state(model), before)


def test_validate_of_another_model_after_a_fit_prunes_that_on_its_own_data(tmp_path):
    callback = half(calibration="val")
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(Net(), train_data(), [val_data(), val_data(3)])
    other = Net()
    metrics = trainer.validate(other, val_data(), verbose=False)
    assert pruned_by_half(other)
    assert metrics == [callback.metrics["pruned"]]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_validation_with_persistent_workers_is_complete(tmp_path, dense):
    loader = DataLoader(samples(48, 2), batch_size=16, num_workers=1, persistent_workers=True)
    metrics = make_trainer(tmp_path, half(calibration="val")).validate(
        model := Net(), loader, ckpt_path=dense, verbose=False
    )
    assert metrics == validated(tmp_path, model)


@pytest.mark.parametrize("keep", [True, False])
def test_a_network_pruned_by_validate_can_be_trained_further(tmp_path, keep):
    callback, model = half(), Net(dropout=0.1)
    with pytest.warns(UserWarning, match="no train_dataloader"):
        make_trainer(tmp_path, callback).validate(model, val_data(), verbose=False)
    before = state(model)
    make_trainer(tmp_path, *([callback] if keep else [])).fit(model, train_data(), val_data())
    after = state(model)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert keep == all(bool((after[name][before[name] == 0] == 0).all()) for name in WEIGHTS)


def test_a_checkpoint_pruned_by_validate_can_be_trained_further(tmp_path, dense):
    callback, model = half(), Net()
    make_trainer(tmp_path, callback).validate(Net(), datamodule=Data(), ckpt_path=dense, verbose=False)
    resumed, watch = half(), Watch()
    trainer = make_trainer(tmp_path, watch, resumed)
    trainer.fit(model, datamodule=Data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt")
    assert trainer.global_step == 12
    assert resumed.result is None
    assert all(torch.equal(mask, ~callback.masks[name]) for name, mask in zeros(model).items())


# --- the trap: a fit, then validate() or test() without a model


@pytest.mark.filterwarnings("ignore:`.*ckpt_path=None.*` was called without a model")
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_warns_if_the_dense_checkpoint_is_loaded_after_a_fit(tmp_path, verb):
    callback, model = half(), Net()
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    trainer = make_trainer(tmp_path, callback, best, enable_checkpointing=True)
    trainer.fit(model, train_data(), val_data())
    with pytest.warns(UserWarning, match="dense network") as caught:
        getattr(trainer, verb)(dataloaders=val_data())
    (message,) = (str(each.message) for each in caught if "dense network" in str(each.message))
    assert f"trainer.{verb}(model) right after the fit" in message
    assert str(tmp_path / "nettrim/pruned.ckpt") in message
    assert best.best_model_path in message
    getattr(trainer, verb)(model, val_data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt")
    assert pruned_by_half(model)


def test_test_of_the_pruned_network_is_silent(tmp_path):
    callback, model = half(), Net()
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model, train_data(), val_data())
    (metrics,) = trainer.test(model, val_data(), verbose=False)
    assert metrics["test_loss"] == pytest.approx(callback.metrics["pruned"]["val_loss"])


# --- zeros in a later fit


def test_resumed_fit_keeps_every_zero_and_moves_the_rest(tmp_path):
    first, model = half(), Net()
    make_trainer(tmp_path, first).fit(model, train_data(), val_data())
    before = state(model)
    model, again = Net(), half()
    make_trainer(tmp_path, again, max_epochs=4).fit(
        model, train_data(), val_data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt"
    )
    after = state(model)
    for name in WEIGHTS:
        assert torch.equal(after[name] != 0, first.masks[name])
        moved = (after[name] != before[name])[first.masks[name]]
        assert moved.float().mean() > 0.9
    assert again.result is None


def test_zeros_hold_in_every_validation_and_checkpoint_of_a_later_fit(tmp_path):
    seen = []

    class Count(Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append(pruned_by_half(pl_module))

    callback, model = half(), Net()
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    best = ModelCheckpoint(tmp_path / "later", every_n_train_steps=1, save_top_k=-1)
    make_trainer(tmp_path, callback, Count(), best, enable_checkpointing=True).fit(model, train_data(), val_data())
    assert seen == [True] * 3
    paths = list((tmp_path / "later").iterdir())
    assert len(paths) == 12
    for path in paths:
        saved = torch.load(path, weights_only=True)
        assert all(torch.equal(saved["state_dict"][name] != 0, callback.masks[name]) for name in WEIGHTS)


def test_second_fit_of_the_pruned_model_keeps_its_zeros(tmp_path):
    callback, model = half(), Net()
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    before, result = state(model), callback.result
    make_trainer(tmp_path, callback).fit(model, train_data(), val_data())
    assert callback.result is result
    assert all(torch.equal(state(model)[name] == 0, before[name] == 0) for name in WEIGHTS)
    assert not same(state(model), before)


def test_zeros_are_not_kept_without_enforce(tmp_path):
    make_trainer(tmp_path, half()).fit(Net(), train_data(), val_data())
    watch, again, model = Watch(), half(enforce=False, sparsity=0.75), Net()
    make_trainer(tmp_path, watch, again, max_epochs=4).fit(
        model, train_data(), val_data(), ckpt_path=tmp_path / "nettrim/pruned.ckpt"
    )
    assert not any((watch.trained[name] == 0).any() for name in WEIGHTS)
    assert again.result.sparsity == 0.75


def test_checkpoint_loads_where_the_package_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from recipes.models import MLP

    model = MLP(sizes=[8, 16, 3])
    make_trainer(tmp_path, half()).fit(model, train_data(), val_data())
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    code = (
        "import sys, torch\n"
        "sys.modules['lightning_nettrim'] = None\n"
        "from recipes.models import MLP\n"
        "path, out = sys.argv[1:]\n"
        "model = MLP.load_from_checkpoint(path).eval()\n"
        "x = torch.linspace(-1, 1, 32).reshape(4, 8)\n"
        "torch.save({'state': model.state_dict(), 'y': model(x).detach()}, out)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "nettrim/pruned.ckpt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert same(loaded["state"], state(model))
    assert torch.equal(loaded["y"], model.eval()(x).detach())


# --- kinds of trainers, data and models


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


class Stream(IterableDataset):
    """Samples without a length: one pass, or no end."""

    def __init__(self, endless):
        self.endless = endless

    def __iter__(self):
        for index in count():
            if index == 96 and not self.endless:
                return
            yield samples(96, 1)[index % 96]


@pytest.mark.parametrize("endless", [True, False])
def test_calibrates_on_an_iterable_dataset(tmp_path, endless):
    callback, model = half(), Net()
    trainer = make_trainer(tmp_path, callback, max_steps=4, max_epochs=-1)
    trainer.fit(model, DataLoader(Stream(endless), batch_size=16), val_data())
    assert pruned_by_half(model)


def test_calibrates_a_validate_on_an_endless_stream(tmp_path, dense):
    class Streamed(Data):
        def train_dataloader(self):
            return DataLoader(Stream(True), batch_size=16)

    model = Net()
    make_trainer(tmp_path, half(num_samples=32)).validate(model, datamodule=Streamed(), ckpt_path=dense, verbose=False)
    assert pruned_by_half(model)


def test_validates_an_iterable_dataset(tmp_path, dense):
    model = Net()
    loader = DataLoader(Stream(False), batch_size=16)
    make_trainer(tmp_path, half(calibration="val")).validate(model, loader, ckpt_path=dense, verbose=False)
    assert pruned_by_half(model)


class Several(Net):
    """Trains on a list or a dict of batches."""

    def loss(self, batch):
        if isinstance(batch, dict):
            batch = list(batch.values())
        return sum(map(super().loss, batch)) if isinstance(batch[0], list | tuple) else super().loss(batch)


@pytest.mark.parametrize("collect", [list, lambda loaders: dict(zip("ab", loaders, strict=True))], ids=["list", "dict"])
def test_several_train_loaders(tmp_path, collect):
    callback, model = half(), Several()
    loaders = collect([train_data(), DataLoader(samples(64, 5), batch_size=8)])
    make_trainer(tmp_path, callback).fit(model, loaders, val_data())
    assert pruned_by_half(model)


def test_several_val_loaders(tmp_path):
    callback, model, loaders = half(calibration="val"), Net(), [val_data(), val_data(3)]
    make_trainer(tmp_path, callback).fit(model, train_data(), loaders)
    assert set(callback.metrics["pruned"]) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}
    again = make_trainer(tmp_path).validate(model, loaders, verbose=False)
    assert callback.metrics["pruned"] == again[0] | again[1]


class Named(Net):
    """Takes batches that are dicts; ``forward`` names two of their keys."""

    def forward(self, x, scale):
        return super().forward(x * scale)

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch["x"], batch["scale"]), batch["label"])


def test_dict_batches(tmp_path):
    rows = [{"x": x, "scale": torch.ones(1), "label": y} for x, y in samples(64, 1)]
    callback, model = half(), Named()
    loader = DataLoader(rows, batch_size=16)
    make_trainer(tmp_path, callback).fit(model, loader, loader)
    assert pruned_by_half(model)


class Transferred(Net):
    """Batches take their form only in the module's own transfer hooks."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch["data"]


def test_calibration_batches_pass_the_transfer_hooks(tmp_path):
    rows = [{"data": row} for row in samples(64, 1)]
    callback, model = half(), Transferred()
    loader = DataLoader(rows, batch_size=16)
    make_trainer(tmp_path, callback).fit(model, loader, loader)
    assert pruned_by_half(model)


class Blind(Net):
    """Has no validation at all."""

    validation_step = pl.LightningModule.validation_step


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("model", [Blind, Net])
def test_no_validation_loop(tmp_path, model):
    callback, model = half(), model()
    make_trainer(tmp_path, callback).fit(model, train_data())
    assert pruned_by_half(model)
    assert callback.metrics == {"dense": {}, "pruned": {}}
    assert (tmp_path / "nettrim/report.json").exists()


# --- a dry run


def check_plan(path):
    plan = yaml.safe_load((path / "nettrim/plan.yaml").read_text())
    assert list(plan["layers"]) == ["fc1", "fc2"]
    assert plan["layers"]["fc1"] == {
        "sparsity": 0.5,
        "pattern": "unstructured",
        "refit": False,
        "shape": [16, 8],
        "follows": "ReLU",
    }
    assert plan["skipped"] == {"fc3": "ignored"}
    assert {file.name for file in (path / "nettrim").iterdir()} == {"plan.yaml"}


def test_dry_run_of_a_fit_changes_nothing_and_writes_the_plan(tmp_path):
    watch, callback, model = Watch(), half(dry_run=True, ignore=["fc3"]), Net()
    make_trainer(tmp_path, watch, callback).fit(model, train_data(), val_data())
    assert same(state(model), watch.trained)
    assert callback.result is None
    check_plan(tmp_path)


def test_dry_run_of_a_validate_changes_nothing_and_writes_the_plan(tmp_path, dense):
    callback, model = half(dry_run=True, ignore=["fc3"]), Net()
    metrics = make_trainer(tmp_path, callback).validate(model, datamodule=Data(), ckpt_path=dense, verbose=False)
    assert same(state(model), torch.load(dense, weights_only=True)["state_dict"])
    assert metrics == validated(tmp_path, model)
    check_plan(tmp_path)


def test_a_plan_is_written_edited_and_read_back(tmp_path):
    model = Net()
    make_trainer(tmp_path, half(dry_run=True, allocate="global")).fit(model, train_data(), val_data())
    path = tmp_path / "nettrim/plan.yaml"
    plan = yaml.safe_load(path.read_text())
    plan["layers"]["fc2"]["sparsity"] = 0.25
    path.write_text(yaml.safe_dump(plan))
    callback = NetTrim(plan=str(path), solver=Magnitude(), refit=False)
    make_trainer(tmp_path, callback).validate(model, datamodule=Data(), verbose=False)
    sparsities = [plan["layers"][name]["sparsity"] for name in ("fc1", "fc2", "fc3")]
    assert [report.sparsity for report in callback.result.reports] == pytest.approx(sparsities)


# --- a tolerance


class Scored(Net):
    """Logs its accuracy."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("fit", [True, False])
def test_the_sparsest_network_within_the_drop(tmp_path, fit):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callback, model = NetTrim(max_drop=0.1, monitor="val_acc"), Scored()
    trainer = make_trainer(tmp_path, callback, logger=logger, max_epochs=8)
    if fit:
        trainer.fit(model, train_data(), val_data())
    else:
        make_trainer(tmp_path, max_epochs=8).fit(model, train_data(), val_data())
        trainer.validate(model, datamodule=Data(), verbose=False)
    trials = callback.result.trials
    assert trials[0].sparsity == 0
    assert callback.result.sparsity == pytest.approx(max(t.sparsity for t in trials if t.within), abs=2e-3)
    assert callback.metrics["pruned"]["val_acc"] >= callback.metrics["dense"]["val_acc"] - 0.1
    saved = Scored.load_from_checkpoint(tmp_path / "run/nettrim/pruned.ckpt")
    (metrics,) = make_trainer(tmp_path).validate(saved, val_data(), verbose=False)
    assert metrics["val_acc"] == pytest.approx(callback.metrics["pruned"]["val_acc"])
    curve = read_events(tmp_path / "run").Scalars("nettrim/trials/val_acc")
    assert [e.step for e in curve] == sorted(round(1e4 * t.sparsity) for t in trials)
    report = json.loads((tmp_path / "run/nettrim/report.json").read_text())
    assert len(report["trials"]) == len(trials)


def test_a_metric_that_is_not_logged_is_named_and_nothing_is_pruned(tmp_path):
    model = Scored()
    before = state(model)
    with pytest.raises(MisconfigurationException, match="monitor: expected one of .* val_acc, got 'accuracy'"):
        make_trainer(tmp_path, NetTrim(max_drop=0.1, monitor="accuracy")).fit(model, train_data(), val_data())
    assert same(state(model), before)


def test_a_tolerance_needs_validation_data_before_training(tmp_path):
    model = Net()
    before = state(model)
    with pytest.raises(MisconfigurationException, match="monitor='val_loss' expected validation data"):
        make_trainer(tmp_path, NetTrim(max_drop=0.1, monitor="val_loss"), limit_val_batches=0).fit(
            model, train_data(), val_data()
        )
    assert same(state(model), before)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of sparsity, epsilon, max_drop, plan and an n:m pattern, got none"),
        ({"epsilon": 0.1, "sparsity": 0.5}, "got sparsity=0.5 and epsilon=0.1"),
        ({"epsilon": 0.0}, "epsilon: .* got 0.0"),
        ({"epsilon": -1.0}, "epsilon: .* got -1.0"),
        ({"epsilon": float("nan")}, "epsilon: .* got nan"),
        ({"sparsity": 1.0}, "sparsity: .* got 1.0"),
        ({"sparsity": -0.1}, "sparsity: .* got -0.1"),
        ({"epsilon": 0.1, "scheme": "serial"}, "scheme: .* got 'serial'"),
        ({"max_drop": 0.1}, "expected max_drop and monitor together, got 0.1 and None"),
        ({"epsilon": 0.1, "monitor": "val_acc"}, "expected max_drop and monitor together, got None and 'val_acc'"),
        ({"max_drop": 0.1, "monitor": "val_acc", "mode": "least"}, "mode: .* got 'least'"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "pattern: .* got '4:2'"),
        ({"epsilon": 0.1, "calibration": "test"}, "calibration: .* got 'test'"),
        ({"epsilon": 0.1, "num_samples": 3}, "num_samples: .* got 3"),
        ({"epsilon": 0.1, "per_layer": {"fc1": {"epsilon": -2.0}}}, "epsilon: .* got -2.0"),
        ({"epsilon": 0.1, "per_layer": {"fc1": {"amount": 0.5}}}, "per_layer: .* got .'amount'"),
    ],
    ids=str,
)
def test_refuses_arguments_at_construction(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        NetTrim(**arguments)


@pytest.mark.parametrize("argument", ["targets", "ignore", "per_layer"])
def test_refuses_a_key_that_matches_nothing_before_training(tmp_path, argument):
    watch, model = Watch(), Net()
    keys = {"fcc1": {"sparsity": 0.1}} if argument == "per_layer" else ["fcc1"]
    before = state(model)
    with pytest.raises(MisconfigurationException, match=f"{argument}: 'fcc1' matches no layer.*'fc1'"):
        make_trainer(tmp_path, watch, half(**{argument: keys})).fit(model, train_data(), val_data())
    assert same(state(model), before)
    with pytest.raises(MisconfigurationException, match=f"{argument}: 'fcc1' matches no layer.*'fc1'"):
        make_trainer(tmp_path, half(**{argument: keys})).validate(model, datamodule=Data())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_refuses_validation_data_that_are_not_there_before_training(tmp_path):
    model = Net()
    before = state(model)
    with pytest.raises(MisconfigurationException, match="calibration='val' expected validation data"):
        make_trainer(tmp_path, half(calibration="val")).fit(model, train_data())
    assert same(state(model), before)


def test_refuses_two_of_its_kind(tmp_path):
    class Other(NetTrim):
        """Another state key, so that Lightning itself does not mind."""

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `NetTrim`"):
        make_trainer(tmp_path, half(), half())
    with pytest.raises(MisconfigurationException, match="expected one NetTrim in a Trainer, got several"):
        make_trainer(tmp_path, half(), Other(epsilon=0.1)).fit(Net(), train_data(), val_data())


@dataclass(frozen=True)
class Breaking(Solver):
    """Prunes all layers but the second, of 16 inputs, where it raises."""

    interrupt: bool = False

    def solve(self, problem):
        if problem.X.shape[-1] != 17:
            return Magnitude().solve(problem)
        raise KeyboardInterrupt if self.interrupt else RuntimeError("broken")


@pytest.mark.filterwarnings("ignore:.*while solving")
@pytest.mark.parametrize("interrupt", [True, False])
@pytest.mark.parametrize("fit", [True, False])
def test_a_broken_solve_leaves_everything_as_trained(tmp_path, dense, interrupt, fit):
    watch, callback, model = Watch(), half(solver=Breaking(interrupt)), Net()
    trainer = make_trainer(tmp_path, watch, callback, logger=CSVLogger(tmp_path))
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    handler = signal.getsignal(signal.SIGINT)
    start = trainer.fit if fit else partial(trainer.validate, ckpt_path=dense)
    try:
        with pytest.raises(SystemExit if interrupt else RuntimeError):
            start(model, datamodule=Data())
    finally:
        signal.signal(signal.SIGINT, handler)
    trained = watch.trained if fit else torch.load(dense, weights_only=True)["state_dict"]
    assert same(state(model), trained)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert trainer.callbacks == callbacks
    assert trainer.loggers == loggers
    assert callback.result is None
    assert callback.masks == {}
    written = sorted(path.name for path in (Path(trainer.log_dir) / "nettrim").iterdir() if path.name != "running")
    assert written == (["dense.ckpt", "layers"] if fit else ["layers"])
    if fit:
        assert same(torch.load(Path(trainer.log_dir) / "nettrim/dense.ckpt", weights_only=True)["state_dict"], trained)
    make_trainer(tmp_path, half()).fit(model.train(), train_data(), val_data())
    assert pruned_by_half(model)
