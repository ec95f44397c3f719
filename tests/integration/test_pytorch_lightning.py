"""The callback in the Trainer of the package `pytorch_lightning`, whose classes differ from those of `lightning`."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from trainers import LAYERS, LIGHTNING_WARNINGS, copy_state, equal_states, load_state, pruned_by_half, samples

pl = pytest.importorskip("pytorch_lightning")

from pytorch_lightning import callbacks, loggers  # noqa: E402

from lightning_nettrim import Cardinality, Magnitude, NetTrim  # noqa: E402

pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.integration]


class Net(pl.LightningModule):
    """8-16-12-3 with a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return self.fc3(self.fc2(self.norm(self.fc1(x)).relu()).relu())

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(scores, batch[1]))
        self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def loader(seed):
    return DataLoader(samples(96, seed), batch_size=16)


def make_trainer(path, *own, **options):
    """A Trainer of `pytorch_lightning`."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"logger": False, "max_epochs": 2, "log_every_n_steps": 1} | quiet
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=path, callbacks=list(own), **(defaults | options))


def half(**options):
    return NetTrim(
        **({"sparsity": 0.5, "allocate": "uniform", "num_samples": 96, "solver": Cardinality(max_steps=30)} | options)
    )


def test_a_fit_prunes_and_a_later_validation_keeps_the_pruned_network(tmp_path):
    callback, module = half(), Net()
    own = make_trainer(tmp_path, callback)
    own.fit(module, loader(1), loader(2))
    assert pruned_by_half(module)
    assert [report.name for report in callback.result.reports] == list(LAYERS)
    assert equal_states(load_state(tmp_path / "nettrim/pruned.ckpt"), copy_state(module))
    assert json.loads((tmp_path / "nettrim/report.json").read_text())["metrics"] == callback.metrics
    assert callback.metrics["pruned"] != callback.metrics["dense"]

    before = copy_state(module)
    assert own.validate(module, loader(2), verbose=False) == [callback.metrics["pruned"]]
    (tested,) = own.test(module, loader(2), verbose=False)
    assert tested["test_loss"] == pytest.approx(callback.metrics["pruned"]["val_loss"])
    assert equal_states(before, copy_state(module))
    loaded = Net()
    loaded.load_state_dict(load_state(tmp_path / "nettrim/pruned.ckpt"))
    assert make_trainer(tmp_path).validate(loaded, loader(2), verbose=False) == [callback.metrics["pruned"]]


def test_zeros_stay_zero_in_a_second_fit(tmp_path):
    callback, module = half(), Net()
    make_trainer(tmp_path, callback).fit(module, loader(1), loader(2))
    before, masks = copy_state(module), {name: mask.clone() for name, mask in callback.masks.items()}
    make_trainer(tmp_path, callback).fit(module, loader(1), loader(2))
    after = copy_state(module)
    assert not torch.equal(before["fc1.weight"], after["fc1.weight"])
    assert all(not bool(after[name][~mask].any()) for name, mask in masks.items())
    assert pruned_by_half(module)


def test_a_validate_prunes_a_dense_checkpoint(tmp_path):
    own = make_trainer(tmp_path)
    own.fit(Net(), loader(1), loader(2))
    own.save_checkpoint(tmp_path / "dense.ckpt")

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(1)

        def val_dataloader(self):
            return loader(2)

    callback, module = half(), Net()
    pruning = make_trainer(tmp_path, callback)
    metrics = pruning.validate(module, datamodule=Data(), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    assert metrics == [callback.metrics["pruned"]]
    assert pruned_by_half(module)
    dense = make_trainer(tmp_path).validate(Net(), loader(2), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    assert dense == [callback.metrics["dense"]]


def test_the_sparsest_network_within_a_drop_is_found(tmp_path):
    callback, module = half(sparsity=None, max_drop=0.1, monitor="val_acc"), Net()
    make_trainer(tmp_path, callback, max_epochs=6).fit(module, loader(1), loader(2))
    assert len(callback.result.trials) > 2
    assert callback.metrics["pruned"]["val_acc"] >= callback.metrics["dense"]["val_acc"] - 0.1


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_dense_and_pruned_are_sibling_runs_of_the_logger(tmp_path, kind):
    if kind == "TensorBoardLogger":
        pytest.importorskip("tensorboard")
    logger = getattr(loggers, kind)(tmp_path)
    callback = half()
    make_trainer(tmp_path, callback, logger=logger).fit(Net(), loader(1), loader(2))
    for side in ("dense", "pruned"):
        assert list((tmp_path / logger.name / f"version_{logger.version}" / side).iterdir())
    assert callback.folder == tmp_path / logger.name / f"version_{logger.version}" / "nettrim"


AVERAGING = [name for name in ("EMAWeightAveraging", "WeightAveraging") if hasattr(callbacks, name)]


@pytest.mark.parametrize("first", [True, False], ids=["NetTrim first", "NetTrim last"])
@pytest.mark.parametrize("name", AVERAGING)
def test_the_averaged_weights_are_pruned(tmp_path, name, first):
    seen, average = [], getattr(callbacks, name)()

    class Watch(callbacks.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(copy_state(pl_module))

    class WatchAgain(Watch):
        """Another class, so that Lightning accepts two of them."""

    pruning, module = half(solver=Magnitude(), refit=False, recalibrate_batchnorm=False), Net()
    others = [Watch(), average, WatchAgain()]
    make_trainer(tmp_path, *([pruning, *others] if first else [*others, pruning])).fit(module, loader(1), loader(2))
    assert pruned_by_half(module)
    last, averaged = seen
    assert not torch.equal(last["fc1.weight"], averaged["fc1.weight"])
    for key, value in copy_state(module).items():
        kept = pruning.masks.get(key, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value[kept], averaged[key][kept]), key
    assert equal_states(load_state(tmp_path / "nettrim/pruned.ckpt"), copy_state(module))
