"""LightningModules, data, trainers and callbacks that the tests of callbacks, command line and integrations share."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nettrim import Magnitude, NetTrim

LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]
"""Warnings of Lightning about tests that are as small as these, for ``pytestmark``."""

NO_VALIDATION_DATA = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

CLI_WARNINGS = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning per type"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4[.\d]* and will be removed:DeprecationWarning"),
]
"""The same of the command line."""

LAYERS = ("fc1", "fc2", "fc3")
WEIGHTS = [f"{layer}.weight" for layer in LAYERS]


# --- data


def samples(count, seed):
    """8 inputs, 3 classes."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :3] + x[:, 3:6].relu()).argmax(1))


def train_data(seed=1):
    """6 batches of 16."""
    return DataLoader(samples(96, seed), batch_size=16)


def val_data(seed=2):
    """3 batches of 16."""
    return DataLoader(samples(48, seed), batch_size=16)


class Data(pl.LightningDataModule):
    """`train_data` and `val_data`."""

    def train_dataloader(self):
        return train_data()

    def val_dataloader(self):
        return val_data()


# --- modules


class Net(pl.LightningModule):
    """8-16-12-3 with ReLUs, trained by AdamW."""

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


class MetricsNet(pl.LightningModule):
    """8-16-12-3 with its own data; logs its accuracy by step and by epoch, and its best accuracy so far."""

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
        self.log("val_best_float", self.best)
        self.log("epoch_number", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

    def on_train_end(self):
        self.ended.append("train")

    def on_fit_end(self):
        self.ended.append("fit")

    def train_dataloader(self):
        return DataLoader(samples(96, 1), batch_size=self.batch_size)

    def val_dataloader(self):
        return val_data()


# --- trainers and callbacks


def make_trainer(path, *callbacks, **options):
    """A Trainer on the CPU with two epochs, without a logger, checkpoints and output."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"logger": False, "max_epochs": 2, "log_every_n_steps": 1} | quiet
    return pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=path, callbacks=list(callbacks), **(defaults | options)
    )


def half(**options):
    """NetTrim with half of the weights of each layer by magnitude, which takes little time."""
    return NetTrim(**({"sparsity": 0.5, "allocate": "uniform", "solver": Magnitude(), "refit": False} | options))


def validate(path, model, **options):
    """The metrics of a model on `val_data` in a Trainer without callbacks."""
    return make_trainer(path, **options).validate(model, val_data(), verbose=False)


class Watch(Callback):
    """Records the weights at the end of training and the hooks of validations; placed before NetTrim."""

    def __init__(self):
        self.calls = []
        self.trained = None

    def on_train_end(self, trainer, pl_module):
        self.trained = copy_state(pl_module)

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


class EndHooks(Callback):
    """Records the weights at the end of training and the hooks that are called at the end of a fit."""

    def __init__(self):
        self.calls = []
        self.trained = None

    def on_train_end(self, trainer, pl_module):
        self.calls.append("train_end")
        self.trained = copy_state(pl_module)

    def on_fit_end(self, trainer, pl_module):
        self.calls.append("fit_end")

    def teardown(self, trainer, pl_module, stage):
        self.calls.append("teardown")


# --- states


def copy_state(model):
    """Copies of the parameters and buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal_states(one, other):
    """Whether two states have the same names and the same values."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load_state(path):
    """The weights of a checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=False)["state_dict"]


def zeros(model):
    """Where the weights of `LAYERS` are zero, by name."""
    return {name: model.get_parameter(name).detach() == 0 for name in WEIGHTS}


def sparsities(state):
    """Fraction of zeros of each weight of `LAYERS` in a state."""
    return [float((state[name] == 0).float().mean()) for name in WEIGHTS]


def pruned_by_half(model):
    """Whether exactly half of each weight is zero."""
    return sparsities(model.state_dict()) == [0.5] * 3


def has_hooks(model):
    """Whether any module has a forward hook."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def read_events(folder, **size_guidance):
    """The TensorBoard events of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance=size_guidance or None).Reload()
