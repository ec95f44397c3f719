"""NetTrim together with other callbacks, in both orders: what is pruned, and what files contain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from trainers import (
    LIGHTNING_WARNINGS,
    WEIGHTS,
    MetricsNet,
    Net,
    Watch,
    half,
    load_state,
    make_trainer,
    sparsities,
    train_data,
    val_data,
)

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside"),
    pytest.mark.filterwarnings("ignore:SWA is initializing after swa_start"),
    pytest.mark.filterwarnings("ignore:NetTrim. the network has .* exact zeros in 3 weights"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler"),
]


def averaging(name, **options):
    """A callback that old versions of Lightning do not have."""
    if not hasattr(lightning_callbacks, name):
        pytest.skip(f"this version of Lightning has no {name}")
    return getattr(lightning_callbacks, name)(**options)


def ema():
    return averaging("EMAWeightAveraging", decay=0.8)


def average():
    return averaging("WeightAveraging", avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new)


def swa():
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)


def early_stopping():
    return EarlyStopping("val_loss", patience=1)


def learning_rate_finder():
    return LearningRateFinder(num_training_steps=4, early_stop_threshold=None)


def batch_size_finder():
    return BatchSizeFinder(max_trials=1, init_val=16, steps_per_trial=1)


def model_pruning(permanent=True):
    return ModelPruning("l1_unstructured", amount=0.2, make_pruning_permanent=permanent, use_global_unstructured=True)


OTHERS = {
    "EMA": ema,
    "WeightAveraging": average,
    "SWA": swa,
    "EarlyStopping": early_stopping,
    "LearningRateFinder": learning_rate_finder,
    "BatchSizeFinder": batch_size_finder,
    "ModelPruning": model_pruning,
    "ModelPruning, not permanent": lambda: model_pruning(False),
    "ModelCheckpoint": lambda: ModelCheckpoint(monitor="val_loss", save_last=True),
    "two loggers": lambda: None,
}


@pytest.mark.parametrize("first", [True, False], ids=["NetTrim first", "NetTrim last"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_zeros_in_memory_in_the_file_and_after_a_reload(tmp_path, other, first):
    callback, beside = half(), other()
    callbacks = [callback, beside] if first else [beside, callback]
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")] if beside is None else False
    trainer = make_trainer(
        tmp_path,
        *filter(None, callbacks),
        logger=loggers,
        enable_checkpointing=isinstance(beside, ModelCheckpoint),
        max_epochs=3,
    )
    trainer.fit(model := MetricsNet())
    file = callback.folder / "pruned.ckpt"
    own = model.state_dict()
    effective = {name: own.get(name, own.get(f"{name}_orig")) for name in WEIGHTS}
    expected = [0.5] * 3 if not isinstance(beside, ModelPruning) else sparsities(effective)  # ModelPruning may add some
    assert sparsities(effective) == expected
    assert min(expected) == 0.5
    saved = load_state(file)
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)
    if not isinstance(beside, ModelPruning):  # which prunes after every validation
        (again,) = trainer.validate(model, verbose=False)
        assert again["val_loss"] == callback.metrics["pruned"]["val_loss"]
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert all(torch.equal(value, own[name]) for name, value in load_state(tmp_path / "later.ckpt").items())
    if not any("_orig" in name for name in own):
        reloaded = MetricsNet.load_from_checkpoint(file, map_location="cpu")
        assert sparsities(reloaded.state_dict()) == expected
        (metrics,) = make_trainer(tmp_path).validate(reloaded, verbose=False)
        assert metrics["val_loss"] == pytest.approx(callback.metrics["pruned"]["val_loss"])
    assert json.loads((callback.folder / "report.json").read_text())["total"]["sparsity"] >= 0.5
    assert not (callback.folder / "dense.ckpt").exists()


@pytest.mark.parametrize("first", [True, False], ids=["NetTrim first", "NetTrim last"])
@pytest.mark.parametrize("other", [ema, average, swa])
def test_the_averaged_weights_are_pruned(tmp_path, other, first):
    torch.manual_seed(0)
    plain = MetricsNet()
    make_trainer(tmp_path, other(), max_epochs=3).fit(plain)
    torch.manual_seed(0)
    callback, model = half(), MetricsNet()
    make_trainer(tmp_path, *([callback, other()] if first else [other(), callback]), max_epochs=3).fit(model)
    for name in WEIGHTS:
        kept = model.state_dict()[name] != 0
        assert torch.equal(model.state_dict()[name][kept], plain.state_dict()[name][kept])
        assert callback.masks[name].sum() == kept.sum() == kept.numel() // 2


@pytest.mark.parametrize("first", [True, False], ids=["NetTrim first", "NetTrim last"])
@pytest.mark.parametrize("other", [ema, average, swa])
@pytest.mark.parametrize("resumed", [True, False])
def test_fine_tuning_under_averaging_keeps_the_zeros(tmp_path, other, first, resumed):
    make_trainer(tmp_path, pruned := half()).fit(MetricsNet())
    file, again, best = pruned.folder / "pruned.ckpt", half(), ModelCheckpoint(tmp_path / "best", save_top_k=-1)
    model = MetricsNet() if resumed else MetricsNet.load_from_checkpoint(file, map_location="cpu")
    callbacks = [again, other(), best] if first else [other(), again, best]
    make_trainer(tmp_path, *callbacks, enable_checkpointing=True, max_epochs=5).fit(
        model, ckpt_path=file if resumed else None
    )
    before, after = load_state(file), model.state_dict()
    for name in WEIGHTS:
        assert bool((after[name][before[name] == 0] == 0).all())
        assert not torch.equal(after[name], before[name])
    written = list((tmp_path / "best").iterdir())
    assert written
    for path in written:
        assert all(bool((load_state(path)[name][before[name] == 0] == 0).all()) for name in WEIGHTS)


# --- the two validations, of the dense and of the pruned network


def test_other_callbacks_are_not_called_in_the_two_validations(tmp_path):
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


def test_callback_metrics_are_those_of_the_training(tmp_path):
    seen = []
    for callbacks in ([], [half()]):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, *callbacks)
        trainer.fit(MetricsNet())
        seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert seen[0] == seen[1]
