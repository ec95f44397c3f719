"""Recipes of real architectures on MNIST: a convolutional network, a residual network and a transformer."""

from __future__ import annotations

import copy
import json

import pytest
from mnist import MARKS, ROOT, accuracy, run

from lightning_nettrim import Magnitude, SparseGPT, Wanda, load_compact, trim
from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.pruning.units.costs import count_macs
from recipes.models import LeNet5, ResNet, ViT

pytestmark = MARKS


EPOCHS = {"lenet5": 1, "resnet": 2, "vit": 3}
KINDS = {"lenet5": LeNet5, "resnet": ResNet, "vit": ViT}


@pytest.fixture(scope="module")
def delta(tmp_path_factory):
    """The path of a configuration with 1024 calibration samples."""
    path = tmp_path_factory.mktemp("delta") / "delta.yaml"
    arguments = {"class_path": "lightning_nettrim.NetTrim", "init_args": {"num_samples": 1024}}
    path.write_text(json.dumps({"trainer": {"callbacks": [arguments]}}))
    return path


@pytest.fixture(scope="module")
def folder_of(delta, tmp_path_factory):
    """A function that returns the folder of a recipe, which runs once, with few epochs and two blocks of the ViT."""
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            depth = ["--model.init_args.depth=2"] if name == "vit" else []
            run(
                [ROOT / "recipes" / f"mnist_{name}.yaml", delta], folder, f"--trainer.max_epochs={EPOCHS[name]}", *depth
            )
            found[name] = folder / f"mnist_{name}" / "version_0"
        return found[name]

    return of


def checkpoint_of(folder):
    """The checkpoint of the dense network."""
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    return checkpoint


@pytest.fixture(params=KINDS)
def recipe(request, data, folder_of):
    """The name of a recipe, its folder, its pruned and its dense network."""
    name, folder = request.param, folder_of(request.param)
    files = folder / "nettrim/pruned.ckpt", checkpoint_of(folder)
    return name, folder / "nettrim", *(KINDS[name].load_from_checkpoint(file, map_location="cpu") for file in files)


EXPECTED = {"lenet5": (0.9, 0.98, 0.003), "resnet": (0.8, 0.98, 0.01), "vit": (0.5, 0.95, 0.005)}
"""Sparsity, minimum accuracy of the dense network after so few epochs, and maximum drop of the pruned network."""


def test_convolutions_and_attention_are_pruned_by_their_recipes(recipe, data):
    name, folder, pruned, dense = recipe
    sparsity, min_accuracy, max_drop = EXPECTED[name]
    report = json.loads((folder / "report.json").read_text())
    weights = {key: pruned.get_parameter(key) for key in weights_of(report, pruned)}
    assert set(weights) == {k for k, p in pruned.named_parameters() if p.ndim > 1} - {"token", "positions"}
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(sparsity * total)
    assert accuracy(dense, data) >= min_accuracy
    assert accuracy(pruned, data) >= accuracy(dense, data) - max_drop
    assert report["metrics"]["pruned"]["val_acc"] == pytest.approx(accuracy(pruned, data), abs=1e-6)


def test_recipes_have_a_higher_accuracy_than_the_baselines_at_the_same_sparsity(recipe, data):
    name, _, pruned, dense = recipe
    images, sparsity = data.train.tensors[0][:1024], EXPECTED[name][0]
    ours = accuracy(pruned, data)
    for solver, options in (
        (Magnitude(), {"refit": False, "allocate": "magnitude"}),
        (Wanda(), {"refit": False, "allocate": "uniform", "pattern": "per_neuron"}),
        (SparseGPT(), {"refit": False, "allocate": "uniform"}),
    ):
        network = copy.deepcopy(dense)
        trim(network, images.split(256), sparsity=sparsity, solver=solver, **options)
        assert accuracy(network, data) < ours


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_the_recipe_of_units_writes_a_network_of_half_the_operations(data, delta, folder_of, tmp_path):
    """On the dense network of the other recipe of this network, which is trained by the same options."""
    options = f"--ckpt_path={checkpoint_of(folder_of('resnet'))}"
    run([ROOT / "recipes/mnist_units.yaml", delta], tmp_path, options, command="validate")
    version = tmp_path / "mnist_units" / "version_0"
    pruned = ResNet.load_from_checkpoint(version / "nettrim/pruned.ckpt", map_location="cpu").eval()
    small = load_compact(ResNet(), version / "nettrim/compact.safetensors").eval()
    batch = CalibrationBatch(data.train.tensors[0][:2])
    (_, before), (_, after) = (count_macs(model, batch, {}) for model in (pruned, small))
    assert 0.45 * before < after <= 0.5 * before
    report = json.loads((version / "nettrim/report.json").read_text())
    dense = report["metrics"]["dense"]["val_acc"]
    assert dense >= 0.98
    assert accuracy(small, data) == pytest.approx(accuracy(pruned, data), abs=2e-4)
    assert accuracy(small, data) >= dense - 0.01


def weights_of(report, model):
    """Names of the weights of the reported layers."""
    known = dict(model.named_parameters())
    for layer in report["layers"]:
        yield next(key for key in (f"{layer['name']}.weight", f"{layer['name']}_weight") if key in known)
