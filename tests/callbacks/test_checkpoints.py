"""Checkpoints of pruned networks: what they contain, where they can be loaded, and which ones are refused."""

import importlib
import sys

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_processes
from trainers import (
    LIGHTNING_WARNINGS,
    MetricsNet,
    copy_state,
    equal_states,
    half,
    load_state,
    make_trainer,
    sparsities,
    train_data,
    val_data,
)

from recipes.models import MLP

pytestmark = LIGHTNING_WARNINGS


def load_without_the_package(path, out, x):
    """Load a checkpoint in a process in which no module of the package can be imported, and save what it computes."""
    for name in ["lightning_nettrim", *sys.modules]:
        if name.split(".")[0] == "lightning_nettrim":
            sys.modules[name] = None
    with pytest.raises(ImportError):
        importlib.import_module("lightning_nettrim.pruning")
    model = MLP.load_from_checkpoint(path).eval()
    torch.save({"state": model.state_dict(), "y": model(x).detach()}, out)


@pytest.mark.slow
def test_checkpoint_loads_where_the_package_is_not_installed(tmp_path):
    model = MLP(sizes=[8, 16, 3])
    make_trainer(tmp_path, half()).fit(model, train_data(), val_data())
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    files = tmp_path / "nettrim/pruned.ckpt", tmp_path / "out.pt"
    (finished,) = run_processes(load_without_the_package, [(*files, x)], tmp_path)
    assert finished.returncode == 0, finished.printed
    loaded = torch.load(files[1], weights_only=True)
    assert equal_states(loaded["state"], copy_state(model))
    assert torch.equal(loaded["y"], model.eval()(x).detach())


def test_a_checkpoint_that_is_not_pruned_is_an_error(tmp_path):
    class ReplacesWeights(MetricsNet):
        def on_save_checkpoint(self, checkpoint):
            if bool((self.fc1.weight == 0).any()):
                checkpoint["state_dict"]["fc1.weight"] = torch.ones(16, 8)

    model, callback = ReplacesWeights(), half()
    with pytest.raises(RuntimeError, match="pruned.ckpt: expected zeros where fc1.weight was pruned"):
        make_trainer(tmp_path, callback).fit(model)
    assert model.ended == ["train", "fit"]
    assert sparsities(load_state(tmp_path / "nettrim/dense.ckpt")) == [0.0] * 3


@pytest.mark.parametrize("saver", [None, ModelCheckpoint, lambda: ModelCheckpoint(monitor="val_loss", save_top_k=0)])
def test_the_best_weights_need_a_checkpoint_callback_with_a_monitor(tmp_path, saver):
    callbacks = [half(checkpoint="best"), *([] if saver is None else [saver()])]
    match = "checkpoint='best':? expected a ModelCheckpoint with a monitor"
    with pytest.raises(MisconfigurationException, match=match):
        make_trainer(tmp_path, *callbacks, enable_checkpointing=saver is not None).fit(MetricsNet())
