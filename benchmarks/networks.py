"""Pruning without retraining: the networks of the recipes by every method, and LeNet-5 layer by layer against ALPS."""

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
from benchmarks.peers.clones import Prune
from benchmarks.training import accuracy, trained
from lightning_nettrim import Cardinality, Magnitude, SparseGPT, Wanda, trim
from recipes.data import MNIST
from recipes.models import LeNet5

RECIPES = Path(__file__).parents[1] / "recipes"

METHODS: dict[str, dict] = {
    "ours": {},
    "ours, uniform": {"allocate": "uniform"},
    "magnitude": {"solver": Magnitude(), "refit": False, "allocate": "magnitude"},
    "magnitude, uniform": {"solver": Magnitude(), "refit": False, "allocate": "uniform"},
    "magnitude + refit": {"solver": Magnitude(), "allocate": "magnitude"},
    "Wanda (here)": {"solver": Wanda(), "refit": False, "allocate": "uniform", "pattern": "per_neuron"},
    "SparseGPT (here)": {"solver": SparseGPT(), "refit": False, "allocate": "uniform"},
}
"""Arguments of `trim`; those without refit get their BatchNorms re-estimated as they go."""


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Args:
        data: folder of MNIST; ``$NETTRIM_DATA`` or ``./data`` if not given.
        out: folder of the results and of the trained weights.
        alps: folder of a clone of github.com/mazumder-lab/ALPS.
        networks: names of recipes, ``mnist_<name>.yaml``.
        epochs: of training; those of the recipe if not given.
        samples: calibration images.
        budgets: sparsities.
    """

    data: str | None = None
    out: Path = Path("runs") / "benchmarks"
    alps: Path | None = None
    networks: tuple[str, ...] = ("lenet5", "resnet", "vit")
    epochs: int | None = None
    samples: int = 4096
    budgets: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Row:
    """One network pruned by one method.

    Attributes:
        network: name of its recipe.
        budget: sparsity.
        method: by what.
        zeros: fraction of zeros among the weights that are pruned.
        accuracy: on the test images, in percent.
        seconds: to prune it.
        errors: ‖answer − trained answer‖ / ‖trained answer‖ of each layer on the test images, where it was measured.
    """

    network: str
    budget: float
    method: str
    zeros: float
    accuracy: float
    seconds: float
    errors: str = ""

    def __str__(self) -> str:
        """One line."""
        return f"{self.network:8} {self.budget:5} {self.method:22} {self.accuracy:6.2f} %  {self.seconds:6.2f} s"


def rows(settings: Settings) -> Iterator[Row]:
    """Every network, budget and method in turn, then LeNet-5 at equal budgets per layer."""
    data = MNIST(settings.data)
    data.prepare_data()
    data.setup("fit")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    images = data.train.tensors[0][order[: settings.samples]]
    for name in settings.networks:
        dense = network(name, data, settings)
        yield Row(name, 0.0, "dense", 0.0, accuracy(dense, data), 0.0)
        for budget in settings.budgets:
            for method, arguments in METHODS.items():
                pruned, clock = copy.deepcopy(dense), Clock()
                result = trim(pruned, images.split(256), sparsity=budget, **arguments)
                yield Row(name, budget, method, result.sparsity, accuracy(pruned, data), clock.read())
        if name == "lenet5":
            yield from _layer_by_layer(dense, images, data, settings)


def network(name: str, data: MNIST, settings: Settings) -> pl.LightningModule:
    """The network of a recipe, trained as it says, read from the cache where it was trained before."""
    recipe = yaml.safe_load((RECIPES / f"mnist_{name}.yaml").read_text(encoding="utf-8"))
    module, _, kind = recipe["model"]["class_path"].rpartition(".")
    pl.seed_everything(recipe["seed_everything"], verbose=False)
    model = getattr(importlib.import_module(module), kind)(**recipe["model"].get("init_args", {}))
    epochs = settings.epochs or recipe["trainer"]["max_epochs"]
    return trained(model, data, settings.out / f"{name}-{epochs}.pt", epochs)


def _layer_by_layer(dense: LeNet5, images: Tensor, data: MNIST, settings: Settings) -> Iterator[Row]:
    """Ours and ALPS with the same zeros in every layer, ALPS fed with the unfolded patches of the same images."""
    for budget in settings.budgets:
        for method, solver in (("ours, per layer", Cardinality()), ("ours, thorough", THOROUGH)):
            pruned, clock = copy.deepcopy(dense), Clock()
            result = trim(pruned, images.split(256), sparsity=budget, allocate="uniform", solver=solver)
            yield _judged(method, pruned, dense, budget, result.sparsity, clock.read(), data)
        try:
            prune = alps.method(settings.alps)
        except Unavailable as reason:
            print(f"{alps.NAME} skipped: {reason}")
            return
        pruned, clock = copy.deepcopy(dense), Clock()
        _theirs(pruned, images, budget, prune)
        zeros = [(layer.weight == 0).sum() / layer.weight.numel() for layer in pruned.children()]
        yield _judged(alps.NAME, pruned, dense, budget, float(max(zeros)), clock.read(), data)


def _theirs(model: LeNet5, images: Tensor, sparsity: float, prune: Prune) -> None:
    """Layer after layer on the pruned network's signals, a convolution as a Linear of its patches."""
    x = images.unsqueeze(1)
    with torch.no_grad():
        for layer in model.children():
            conv = isinstance(layer, nn.Conv2d)
            X = F.unfold(x, layer.kernel_size).mT.flatten(0, 1) if conv else x.flatten(1)
            flat = nn.Linear(X.shape[1], len(layer.weight))
            flat.weight.copy_(layer.weight.flatten(1))
            flat.bias.copy_(layer.bias)
            prune(flat, X, sparsity, None)
            layer.weight.copy_(flat.weight.reshape(layer.weight.shape))
            x = layer(x if conv else x.flatten(1)).relu()
            x = F.max_pool2d(x, 2) if conv else x


def _judged(
    method: str, pruned: LeNet5, dense: LeNet5, budget: float, zeros: float, seconds: float, data: MNIST
) -> Row:
    """The row of a pruned LeNet-5, from its weights alone."""
    x = y = data.held_out.tensors[0].unsqueeze(1)
    errors = []
    with torch.no_grad():
        for ours, theirs in zip(pruned.children(), dense.children(), strict=True):
            conv = isinstance(ours, nn.Conv2d)
            x, y = ours(x if conv else x.flatten(1)), theirs(y if conv else y.flatten(1))
            if len(errors) < 3:
                x, y = x.relu(), y.relu()
            errors.append(float((x - y).norm() / y.norm()))
            x, y = (F.max_pool2d(x, 2), F.max_pool2d(y, 2)) if conv else (x, y)
    text = " ".join(f"{error:.4f}" for error in errors)
    return Row("lenet5", budget, method, zeros, accuracy(pruned, data), seconds, text)


def table(rows: Sequence[Row]) -> str:
    """A line for each row, with the errors of the layers over those of ALPS where both were measured."""
    lines = [
        f"{'network':8} {'budget':>6} {'method':20} {'zeros':>8} {'accuracy':>8} {'seconds':>8}  errors, over ALPS's"
    ]
    peers = {row.budget: row for row in rows if row.method == alps.NAME}
    for row in rows:
        ratios = ""
        if row.errors and row.budget in peers and row.method != alps.NAME:
            pairs = zip(row.errors.split(), peers[row.budget].errors.split(), strict=True)
            ratios = "  " + " ".join(f"{float(e) / float(t):.2f}" for e, t in pairs)
        text = f"{row.network:8} {row.budget:6.2f} {row.method:20} {row.zeros:8.2%} {row.accuracy:8.2f}"
        lines.append(f"{text} {row.seconds:8.2f}  {row.errors}{ratios}".rstrip())
    return "\n".join(lines)
