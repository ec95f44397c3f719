"""LeNet-300-100 on MNIST, trained and pruned by its recipe."""

from __future__ import annotations

import copy
import json

import lightning.pytorch as pl
import pytest
import torch
from mnist import MARKS, ROOT, accuracy
from mnist import run as run_recipe

from lightning_nettrim import Magnitude, NetTrim, SparseGPT, Wanda, trim
from recipes.models import MLP

pytestmark = MARKS


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder that the recipe's own command has written, with fewer epochs and samples."""
    folder = tmp_path_factory.mktemp("mnist")
    arguments = {"class_path": "lightning_nettrim.NetTrim", "init_args": {"num_samples": 4096}}
    (folder / "delta.yaml").write_text(json.dumps({"trainer": {"callbacks": [arguments]}}))
    configs = [ROOT / "recipes" / "mnist_lenet300.yaml", folder / "delta.yaml"]
    run_recipe(configs, folder, "--trainer.max_epochs=14")
    return folder / "mnist_lenet300" / "version_0" / "nettrim"


def pruned_and_dense(run):
    """The pruned network, and a dense one from the last checkpoint before it."""
    pruned = MLP.load_from_checkpoint(run / "pruned.ckpt", map_location="cpu")
    (checkpoint,) = (run.parent / "checkpoints").glob("*.ckpt")
    return pruned, MLP.load_from_checkpoint(checkpoint, map_location="cpu")


def test_the_recipe_prunes_seven_tenths_for_two_tenths_of_a_point(run, data):
    report = json.loads((run / "report.json").read_text())
    pruned, dense = pruned_and_dense(run)
    assert accuracy(dense, data) >= 0.982
    assert accuracy(pruned, data) >= accuracy(dense, data) - 0.002
    assert report["metrics"]["dense"]["val_acc"] == pytest.approx(accuracy(dense, data), abs=1e-6)
    assert report["metrics"]["pruned"]["val_acc"] == pytest.approx(accuracy(pruned, data), abs=1e-6)
    weights = [layer.weight for layer in pruned.children()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros >= 0.7 * sum(weight.numel() for weight in weights)
    assert report["total"]["sparsity"] == pytest.approx(zeros / sum(weight.numel() for weight in weights))
    assert [int((weight == 0).sum()) for weight in weights] == [layer["zeros"] for layer in report["layers"]]


def test_every_layer_is_certified(run):
    report = json.loads((run / "report.json").read_text())
    assert len(report["layers"]) == 3
    for layer in report["layers"]:
        assert layer["status"] == "CONVERGED"
        assert 0 < layer["bound"] <= layer["objective"]
        assert 0 <= layer["duality_gap"] <= 1e-3
        assert layer["violation"] <= 1e-3
    assert 0 < report["total"]["end_to_end_error"] <= report["total"]["end_to_end_bound"]


def test_the_bound_holds_in_both_schemes_and_cascade_is_closer(run, data):
    _, dense = pruned_and_dense(run)
    images, _ = data.train.tensors
    held_out = data.held_out.tensors[0]
    results, networks = {}, {}
    for scheme in ("parallel", "cascade"):
        networks[scheme] = copy.deepcopy(dense)
        results[scheme] = trim(networks[scheme], images.split(500), epsilon=0.3, scheme=scheme, num_samples=2000)
        assert 0 < results[scheme].end_to_end_error <= results[scheme].end_to_end_bound
        assert results[scheme].sparsity >= 0.85
        with torch.no_grad():
            change = float((networks[scheme](held_out) - dense(held_out)).norm() / dense(held_out).norm())
        assert change <= 0.3
    assert results["cascade"].end_to_end_error < results["parallel"].end_to_end_error


def test_nine_tenths_are_zeros_within_two_tenths_of_a_point(run, data, tmp_path):
    _, dense = pruned_and_dense(run)
    before = accuracy(dense, data)
    callback = NetTrim(max_drop=0.002, monitor="val_acc")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[callback], **quiet)
    trainer.validate(dense, data, verbose=False)
    saved = MLP.load_from_checkpoint(tmp_path / "nettrim/pruned.ckpt", map_location="cpu")
    weights = [layer.weight for layer in saved.children()]
    assert accuracy(saved, data) >= before - 0.002 - 1e-6
    assert sum(int((w == 0).sum()) for w in weights) >= 0.9 * sum(w.numel() for w in weights)
    assert len(callback.result.trials) >= 3


def test_at_a_sparsity_it_beats_the_baselines(run, data):
    _, dense = pruned_and_dense(run)
    images, _ = data.train.tensors
    accuracies, errors = {}, {}
    for name, options in {
        "allocated": {"allocate": "global"},
        "uniform": {},
        "magnitude": {"solver": Magnitude()},
        "Wanda": {"solver": Wanda()},
        "SparseGPT": {"solver": SparseGPT()},
    }.items():
        network = copy.deepcopy(dense)
        arguments = {"sparsity": 0.95, "allocate": "uniform", "num_samples": 3000} | options
        result = trim(network, images.split(500), **arguments)
        accuracies[name] = accuracy(network, data)
        errors[name] = [report.local_error for report in result.reports]
        zeros = sum(int((layer.weight == 0).sum()) for layer in network.children())
        assert zeros == round(0.95 * 266200)
    assert accuracies["allocated"] >= accuracy(dense, data) - 0.005
    assert (
        accuracies["allocated"]
        > accuracies["uniform"]
        > max(accuracies[n] for n in ("magnitude", "Wanda", "SparseGPT"))
    )
    for name in ("magnitude", "Wanda", "SparseGPT"):
        assert all(ours < theirs for ours, theirs in zip(errors["uniform"], errors[name], strict=True))


def test_two_of_four(run, data):
    _, dense = pruned_and_dense(run)
    images, _ = data.train.tensors
    network = copy.deepcopy(dense)
    trim(network, images.split(500), pattern="2:4", ignore=["fc3"], num_samples=5000)
    for layer in (network.fc1, network.fc2):
        assert bool(((layer.weight.reshape(-1, 4) != 0).sum(1) == 2).all())
    assert accuracy(network, data) >= accuracy(dense, data) - 0.003
