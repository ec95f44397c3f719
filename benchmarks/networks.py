"""One-shot pruning of the networks of the recipes by every method, and of LeNet-5 in comparison with ALPS."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clock import Clock
from benchmarks.oneshot import THOROUGH
from benchmarks.peers import Unavailable, alps
from benchmarks.peers.clones import PruneLayer
from benchmarks.training import accuracy, train_or_load
from lightning_nettrim import Cardinality, Distillation, Magnitude, SparseGPT, Wanda, trim
from recipes.data import MNIST
from recipes.models import LeNet5

RECIPES = Path(__file__).parents[1] / "recipes"

METHODS: dict[str, dict] = {
    "ours": {},
    "ours, uniform": {"allocate": "uniform"},
    "magnitude": {"solver": Magnitude(), "refit": False, "allocate": "magnitude"},
    "magnitude, uniform": {"solver": Magnitude(), "refit": False, "allocate": "uniform"},
    "magnitude + refit": {"solver": Magnitude(), "allocate": "magnitude"},
    "Wanda (this package)": {"solver": Wanda(), "refit": False, "allocate": "uniform", "pattern": "per_neuron"},
    "SparseGPT (this package)": {"solver": SparseGPT(), "refit": False, "allocate": "uniform"},
}
METHODS |= {
    f"{name}, recovered": METHODS[name] | {"recover": Distillation()}
    for name in ("ours", "magnitude + refit", "SparseGPT (this package)", "Wanda (this package)")
}
METHODS["ours, recovered by blocks"] = {"recover": Distillation(scope="block")}
"""Options of `trim` for each method; the statistics of BatchNorms are re-estimated in all of them."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        data: folder of MNIST; ``None`` is ``$NETTRIM_DATA`` or ``./data``.
        out: folder of the results and of the trained weights.
        alps: folder of a clone of github.com/mazumder-lab/ALPS.
        networks: names of recipes, ``mnist_<name>.yaml``.
        epochs: number of training epochs; ``None`` is that of the recipe.
        samples: number of calibration images.
        budgets: sparsities.
        methods: names of methods; all, if there are none.
    """

    data: str | None = None
    out: Path = Path("runs") / "benchmarks"
    alps: Path | None = None
    networks: tuple[str, ...] = ("lenet5", "resnet", "vit")
    epochs: int | None = None
    samples: int = 4096
    budgets: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One network pruned by one method.

    Attributes:
        network: name of its recipe.
        budget: requested sparsity.
        method: name of the method.
        sparsity: fraction of zeros among the weights of the pruned layers.
        accuracy: on the test images, in percent.
        seconds: time to prune the network.
        end_to_end_errors: ‖Y_pruned − Y‖/‖Y‖ of each layer in the pruned network, on the test images, separated by
            spaces; empty if they were not measured.
    """

    network: str
    budget: float
    method: str
    sparsity: float
    accuracy: float
    seconds: float
    end_to_end_errors: str = ""

    def __str__(self) -> str:
        """One line of the log."""
        return f"{self.network:8} {self.budget:5} {self.method:35} {self.accuracy:6.2f} %  {self.seconds:6.2f} s"


def rows(settings: Settings) -> Iterator[Row]:
    """Every network, budget and method, then LeNet-5 with the same sparsity in each layer, compared with ALPS."""
    data = MNIST(settings.data)
    data.prepare_data()
    data.setup("fit")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    images = data.train.tensors[0][order[: settings.samples]]
    for name in settings.networks:
        dense = network(name, data, settings)
        yield Row(name, 0.0, "dense", 0.0, accuracy(dense, data), 0.0)
        for budget in settings.budgets:
            for method in settings.methods or METHODS:
                pruned, clock = copy.deepcopy(dense), Clock()
                result = trim(pruned, images.split(256), sparsity=budget, **METHODS[method])
                yield Row(name, budget, method, result.sparsity, accuracy(pruned, data), clock.read())
        if name == "lenet5" and not settings.methods:
            yield from _compare_with_alps(dense, images, data, settings)


def network(name: str, data: MNIST, settings: Settings) -> pl.LightningModule:
    """The network of a recipe, trained with its seed and number of epochs, or loaded from the cache."""
    recipe = yaml.safe_load((RECIPES / f"mnist_{name}.yaml").read_text(encoding="utf-8"))
    module, _, class_name = recipe["model"]["class_path"].rpartition(".")
    pl.seed_everything(recipe["seed_everything"], verbose=False)
    model = getattr(importlib.import_module(module), class_name)(**recipe["model"].get("init_args", {}))
    epochs = settings.epochs or recipe["trainer"]["max_epochs"]
    return train_or_load(model, data, settings.out / f"{name}-{epochs}.pt", epochs)


def _compare_with_alps(dense: LeNet5, images: Tensor, data: MNIST, settings: Settings) -> Iterator[Row]:
    """LeNet-5 by this package and by ALPS, with the same sparsity in every layer."""
    for budget in settings.budgets:
        for method, solver in (("ours, per layer", Cardinality()), ("ours, thorough", THOROUGH)):
            pruned, clock = copy.deepcopy(dense), Clock()
            result = trim(pruned, images.split(256), sparsity=budget, allocate="uniform", solver=solver)
            yield _evaluate(method, pruned, dense, budget, result.sparsity, clock.read(), data)
        try:
            prune = alps.method(settings.alps)
        except Unavailable as reason:
            print(f"{alps.NAME} skipped: {reason}")
            return
        pruned, clock = copy.deepcopy(dense), Clock()
        _prune_with_peer(pruned, images, budget, prune)
        sparsities = [(layer.weight == 0).sum() / layer.weight.numel() for layer in pruned.children()]
        yield _evaluate(alps.NAME, pruned, dense, budget, float(max(sparsities)), clock.read(), data)


def _prune_with_peer(model: LeNet5, images: Tensor, sparsity: float, prune: PruneLayer) -> None:
    """Prune layer after layer on the activations of the pruned network.

    A convolution is pruned as a linear layer, on the unfolded patches of its input.
    """
    x = images.unsqueeze(1)
    with torch.no_grad():
        for layer in model.children():
            conv = isinstance(layer, nn.Conv2d)
            X = F.unfold(x, layer.kernel_size).mT.flatten(0, 1) if conv else x.flatten(1)
            linear = nn.Linear(X.shape[1], len(layer.weight))
            linear.weight.copy_(layer.weight.flatten(1))
            linear.bias.copy_(layer.bias)
            prune(linear, X, sparsity, None)
            layer.weight.copy_(linear.weight.reshape(layer.weight.shape))
            x = layer(x if conv else x.flatten(1)).relu()
            x = F.max_pool2d(x, 2) if conv else x


def _evaluate(
    method: str, pruned: LeNet5, dense: LeNet5, budget: float, sparsity: float, seconds: float, data: MNIST
) -> Row:
    """The row of a pruned LeNet-5, computed from its weights alone."""
    x = y = data.held_out.tensors[0].unsqueeze(1)
    errors = []
    with torch.no_grad():
        for pruned_layer, dense_layer in zip(pruned.children(), dense.children(), strict=True):
            conv = isinstance(pruned_layer, nn.Conv2d)
            x, y = pruned_layer(x if conv else x.flatten(1)), dense_layer(y if conv else y.flatten(1))
            if len(errors) < 3:
                x, y = x.relu(), y.relu()
            errors.append(float((x - y).norm() / y.norm()))
            x, y = (F.max_pool2d(x, 2), F.max_pool2d(y, 2)) if conv else (x, y)
    text = " ".join(f"{error:.4f}" for error in errors)
    return Row("lenet5", budget, method, sparsity, accuracy(pruned, data), seconds, text)


def table(rows: Sequence[Row]) -> str:
    """One line for each row, with the ratios of the end-to-end errors to those of ALPS if both were measured."""
    head = f"{'network':8} {'budget':>6} {'method':35} {'sparsity':>8} {'accuracy':>8} {'seconds':>8}"
    lines = [f"{head}  end-to-end errors, ratios to ALPS"]
    peers = {row.budget: row for row in rows if row.method == alps.NAME}
    for row in rows:
        ratios = ""
        if row.end_to_end_errors and row.budget in peers and row.method != alps.NAME:
            pairs = zip(row.end_to_end_errors.split(), peers[row.budget].end_to_end_errors.split(), strict=True)
            ratios = "  " + " ".join(f"{float(e) / float(t):.2f}" for e, t in pairs)
        text = f"{row.network:8} {row.budget:6.2f} {row.method:35} {row.sparsity:8.2%} {row.accuracy:8.2f}"
        lines.append(f"{text} {row.seconds:8.2f}  {row.end_to_end_errors}{ratios}".rstrip())
    return "\n".join(lines)
