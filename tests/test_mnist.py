"""The main job on real data: LeNet-300-100 on MNIST, by its recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_nettrim import Magnitude, NetTrim, SparseGPT, Wanda, trim
from lightning_nettrim.cli import main
from recipes.models import MLP, LeNet5, ResNet, ViT

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning per type"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4[.\d]* and will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


def accuracy(model, data):
    images, labels = data.held_out.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder that the recipe's own command has written."""
    folder = tmp_path_factory.mktemp("mnist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["nettrim"])
        config = str(ROOT / "recipes" / "mnist_lenet300.yaml")
        main(["fit", "--config", config, "--trainer.logger.init_args.save_dir", str(folder)])
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
    assert 0 < report["total"]["discrepancy"] <= report["total"]["discrepancy_bound"]


def test_parallel_keeps_its_bound_and_cascade_is_closer(run, data):
    _, dense = pruned_and_dense(run)
    images, _ = data.train.tensors
    held_out = data.held_out.tensors[0]
    results, networks = {}, {}
    for scheme in ("parallel", "cascade"):
        networks[scheme] = copy.deepcopy(dense)
        results[scheme] = trim(networks[scheme], images.split(500), epsilon=0.3, scheme=scheme, num_samples=2000)
        assert 0 < results[scheme].discrepancy <= results[scheme].discrepancy_bound
        assert results[scheme].sparsity >= 0.85
        with torch.no_grad():
            change = float((networks[scheme](held_out) - dense(held_out)).norm() / dense(held_out).norm())
        assert change <= 0.3
    assert results["cascade"].discrepancy < results["parallel"].discrepancy


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
        arguments = {"sparsity": 0.95, "allocate": "uniform", "num_samples": 5000} | options
        result = trim(network, images.split(500), **arguments)
        accuracies[name] = accuracy(network, data)
        errors[name] = [report.relative_error for report in result.reports]
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


@pytest.fixture(scope="module", params=["lenet5", "resnet", "vit"])
def recipe(request, data, tmp_path_factory):
    """A recipe, shortened to three epochs, 2048 samples and two blocks of the transformer.

    Its name, its folder, its pruned and its dense network.
    """
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    arguments = {"class_path": "lightning_nettrim.NetTrim", "init_args": {"num_samples": 2048}}
    (folder / "delta.yaml").write_text(json.dumps({"trainer": {"callbacks": [arguments]}}))
    configs = [str(ROOT / "recipes" / f"mnist_{name}.yaml"), str(folder / "delta.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["nettrim"])
        options = ["--trainer.max_epochs=3", f"--trainer.logger.init_args.save_dir={folder}"]
        options += ["--model.init_args.depth=2"] if name == "vit" else []
        main(["fit", *(part for config in configs for part in ("--config", config)), *options])
    version = folder / f"mnist_{name}" / "version_0"
    kind = {"lenet5": LeNet5, "resnet": ResNet, "vit": ViT}[name]
    (checkpoint,) = (version / "checkpoints").glob("*.ckpt")
    networks = (kind.load_from_checkpoint(p, map_location="cpu") for p in (version / "nettrim/pruned.ckpt", checkpoint))
    return name, version / "nettrim", *networks


EXPECTED = {"lenet5": (0.9, 0.98, 0.003), "resnet": (0.8, 0.98, 0.01), "vit": (0.5, 0.95, 0.005)}
"""Zeros, the least accuracy of the dense network after three epochs, and how much lower the pruned one may be."""


def test_convolutions_norms_and_attention_are_pruned_by_their_recipes(recipe, data):
    name, folder, pruned, dense = recipe
    zeros, least, drop = EXPECTED[name]
    report = json.loads((folder / "report.json").read_text())
    weights = {key: pruned.get_parameter(key) for key in _weights_of(report, pruned)}
    assert set(weights) == {k for k, p in pruned.named_parameters() if p.ndim > 1} - {"token", "positions"}
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(zeros * total)
    assert accuracy(dense, data) >= least
    assert accuracy(pruned, data) >= accuracy(dense, data) - drop
    assert report["metrics"]["pruned"]["val_acc"] == pytest.approx(accuracy(pruned, data), abs=1e-6)


def test_they_beat_the_baselines_at_the_same_total(recipe, data):
    name, _, pruned, dense = recipe
    images, zeros = data.train.tensors[0][:2048], EXPECTED[name][0]
    ours = accuracy(pruned, data)
    for solver, options in (
        (Magnitude(), {"refit": False, "allocate": "magnitude"}),
        (Wanda(), {"refit": False, "allocate": "uniform", "pattern": "per_neuron"}),
        (SparseGPT(), {"refit": False, "allocate": "uniform"}),
    ):
        network = copy.deepcopy(dense)
        trim(network, images.split(256), sparsity=zeros, solver=solver, **options)
        assert accuracy(network, data) < ours


def _weights_of(report, model):
    """Names of the weights of the reported layers."""
    known = dict(model.named_parameters())
    for layer in report["layers"]:
        yield next(key for key in (f"{layer['name']}.weight", f"{layer['name']}_weight") if key in known)
