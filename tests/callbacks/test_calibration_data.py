"""The data that are calibrated on: train or validation loaders of any kind, within the limits of the trainer."""

from itertools import count

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from trainers import (
    LIGHTNING_WARNINGS,
    Data,
    Net,
    copy_state,
    equal_states,
    half,
    make_trainer,
    pruned_by_half,
    samples,
    train_data,
    val_data,
)

from lightning_nettrim import ADMM

pytestmark = LIGHTNING_WARNINGS


def test_calibration_data_are_the_requested_ones(tmp_path, dense_checkpoint):
    states = {}
    for calibration in ("train", "val"):
        model = Net()
        callback = half(calibration=calibration, sparsity=0.3, solver=ADMM(), refit=True)
        trainer = make_trainer(tmp_path, callback)
        trainer.validate(model, datamodule=Data(), ckpt_path=dense_checkpoint, verbose=False)
        states[calibration] = copy_state(model)
    fallback = Net()
    trainer = make_trainer(tmp_path, half(sparsity=0.3, solver=ADMM(), refit=True))
    with pytest.warns(UserWarning, match="expected a train_dataloader .* got none"):
        trainer.validate(fallback, val_data(), ckpt_path=dense_checkpoint, verbose=False)
    assert not equal_states(states["train"], states["val"])
    assert equal_states(states["val"], copy_state(fallback))


def test_limits_apply_to_the_train_data_of_a_validate(tmp_path, dense_checkpoint):
    class CountsBatches(Data):
        taken = 0

        def train_dataloader(self):
            for batch in train_data():
                self.taken += 1
                yield batch

    data = CountsBatches()
    trainer = make_trainer(tmp_path, half(), limit_train_batches=3)
    trainer.validate(Net(), datamodule=data, ckpt_path=dense_checkpoint, verbose=False)
    assert data.taken == 3


# --- loaders


class Stream(IterableDataset):
    """Samples without a length: one pass, or endless."""

    def __init__(self, endless):
        self.endless, self.data = endless, samples(96, 1)

    def __iter__(self):
        for index in count():
            if index == 96 and not self.endless:
                return
            yield self.data[index % 96]


@pytest.mark.parametrize("endless", [True, False])
def test_calibrates_on_an_iterable_dataset(tmp_path, endless):
    callback, model = half(), Net()
    trainer = make_trainer(tmp_path, callback, max_steps=4, max_epochs=-1)
    trainer.fit(model, DataLoader(Stream(endless), batch_size=16), val_data())
    assert pruned_by_half(model)


def test_calibrates_a_validate_on_an_endless_stream(tmp_path, dense_checkpoint):
    class Streamed(Data):
        def train_dataloader(self):
            return DataLoader(Stream(True), batch_size=16)

    model = Net()
    trainer = make_trainer(tmp_path, half(num_samples=32))
    trainer.validate(model, datamodule=Streamed(), ckpt_path=dense_checkpoint, verbose=False)
    assert pruned_by_half(model)


def test_validates_an_iterable_dataset(tmp_path, dense_checkpoint):
    model = Net()
    loader = DataLoader(Stream(False), batch_size=16)
    make_trainer(tmp_path, half(calibration="val")).validate(model, loader, ckpt_path=dense_checkpoint, verbose=False)
    assert pruned_by_half(model)


class SeveralBatches(Net):
    """Trains on a list or a dict of batches."""

    def loss(self, batch):
        if isinstance(batch, dict):
            batch = list(batch.values())
        return sum(map(super().loss, batch)) if isinstance(batch[0], list | tuple) else super().loss(batch)


@pytest.mark.parametrize("collect", [list, lambda loaders: dict(zip("ab", loaders, strict=True))], ids=["list", "dict"])
def test_several_train_loaders(tmp_path, collect):
    callback, model = half(), SeveralBatches()
    loaders = collect([train_data(), DataLoader(samples(64, 5), batch_size=8)])
    make_trainer(tmp_path, callback).fit(model, loaders, val_data())
    assert pruned_by_half(model)


def test_several_val_loaders(tmp_path):
    callback, model, loaders = half(calibration="val"), Net(), [val_data(), val_data(3)]
    make_trainer(tmp_path, callback).fit(model, train_data(), loaders)
    assert set(callback.metrics["pruned"]) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}
    again = make_trainer(tmp_path).validate(model, loaders, verbose=False)
    assert callback.metrics["pruned"] == again[0] | again[1]


# --- batches


class DictBatches(Net):
    """Batches are dicts; ``forward`` names two of their keys."""

    def forward(self, x, scale):
        return super().forward(x * scale)

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch["x"], batch["scale"]), batch["label"])


def test_dict_batches(tmp_path):
    rows = [{"x": x, "scale": torch.ones(1), "label": y} for x, y in samples(64, 1)]
    callback, model = half(), DictBatches()
    loader = DataLoader(rows, batch_size=16)
    make_trainer(tmp_path, callback).fit(model, loader, loader)
    assert pruned_by_half(model)


class TransferHook(Net):
    """Batches have the form of the step only after the module's transfer hook."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch["data"]


def test_transfer_hooks_are_applied_to_calibration_batches(tmp_path):
    rows = [{"data": row} for row in samples(64, 1)]
    callback, model = half(), TransferHook()
    loader = DataLoader(rows, batch_size=16)
    make_trainer(tmp_path, callback).fit(model, loader, loader)
    assert pruned_by_half(model)
