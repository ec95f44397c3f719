"""Whole units removed from the networks of the recipes, by this package and by Torch-Pruning's criteria."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import lenet, networks
from benchmarks.clock import Clock
from benchmarks.training import accuracy
from lightning_nettrim import Coreset, compact, trim
from recipes.data import MNIST

STEPS = 200
"""Steps in which Torch-Pruning removes units, until the budget is reached."""

IMPORTANCE: dict[str, Callable[[], Any]] = {
    "group magnitude": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "BN scale": torch_pruning.importance.BNScaleImportance,
    "Taylor": torch_pruning.importance.GroupTaylorImportance,
    "Hessian": torch_pruning.importance.GroupHessianImportance,
    "random": torch_pruning.importance.RandomImportance,
}
"""Criteria of Torch-Pruning."""

SELECTIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "coreset": {"select": Coreset()},
    "coreset, no data": {
        "select": Coreset(beta=1.0, inputs="synthetic"), "scheme": "parallel", "recalibrate_batchnorm": False,
    },
}  # fmt: skip
"""Selections of this package, with their options."""

METHODS = (*SELECTIONS, *(f"{name}, {where}" for name in IMPORTANCE for where in ("uniform", "global")))
"""Torch-Pruning's criteria with the same fraction of units in each group, and ranked over all groups."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        data: folder of MNIST; ``None`` is ``$NETTRIM_DATA`` or ``./data``.
        out: folder of the results and of the trained weights.
        networks: names of recipes, ``mnist_<name>.yaml``, or ``lenet300``.
        samples: number of calibration images.
        budgets: fractions of the multiply-accumulates that are left.
        finetune: epochs of fine-tuning after pruning; 0 is none.
        methods: names of methods; all, if there are none.
    """

    data: str | None = None
    out: Path = Path("runs") / "benchmarks"
    networks: tuple[str, ...] = ("lenet300", "lenet5", "resnet", "vit")
    samples: int = 4096
    budgets: tuple[float, ...] = (0.5, 0.3, 0.15)
    finetune: int = 1
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One network by one method.

    Attributes:
        network: name of its recipe.
        budget: requested fraction of the multiply-accumulates.
        method: name of the method.
        macs: fraction that is left.
        parameters: fraction of the parameters that is left.
        accuracy: on the test images, in percent, without retraining.
        finetuned: the same after fine-tuning; empty without.
        seconds: time to prune the network.
    """

    network: str
    budget: float
    method: str
    macs: float
    parameters: float
    accuracy: float
    finetuned: str
    seconds: float

    def __str__(self) -> str:
        """One line of the log."""
        return (
            f"{self.network:8} {self.budget:5} {self.method:25} {self.macs:6.1%} of the MACs {self.accuracy:6.2f} %"
            f" {self.finetuned:>6} {self.seconds:6.2f} s"
        )


def rows(settings: Settings) -> Iterator[Row]:
    """Every network, budget and method."""
    data = MNIST(settings.data)
    data.prepare_data()
    data.setup("fit")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: settings.samples]
    images, labels = (tensor[order] for tensor in data.train.tensors)
    for name in settings.networks:
        dense = _network(name, data, settings)
        yield Row(name, 1.0, "dense", 1.0, 1.0, accuracy(dense, data), "", 0.0)
        macs, parameters = torch_pruning.utils.count_ops_and_params(dense, images[:1])
        for budget in settings.budgets:
            for method in settings.methods or METHODS:
                pruned, clock = copy.deepcopy(dense), Clock()
                if method in SELECTIONS:
                    trim(pruned, images.split(256), pattern="units", macs=budget, **SELECTIONS[method])
                    seconds = clock.read()
                    pruned = compact(pruned, images[:2], batch_sizes=()).model
                else:
                    _prune_by_torch_pruning(pruned, images, labels, method, budget)
                    seconds = clock.read()
                left, left_parameters = torch_pruning.utils.count_ops_and_params(pruned, images[:1])
                own = accuracy(pruned, data)
                tuned = f"{_finetuned(pruned, data, settings.finetune):.2f}" if settings.finetune else ""
                yield Row(name, budget, method, left / macs, left_parameters / parameters, own, tuned, seconds)


def _network(name: str, data: MNIST, settings: Settings) -> pl.LightningModule:
    if name == "lenet300":
        return lenet.network(data, settings.out, epochs=20)
    return networks.network(name, data, networks.Settings(settings.data, settings.out))


def _prune_by_torch_pruning(model: nn.Module, images: Tensor, labels: Tensor, method: str, budget: float) -> None:
    """Remove units by a criterion, until the budget is reached; BatchNorm statistics are computed again."""
    torch.manual_seed(0)
    criterion, where = method.split(", ")
    importance, example = IMPORTANCE[criterion](), images[:1]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    heads = {module: module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    pruner = torch_pruning.pruner.BasePruner(
        model.eval(), example, importance=importance, global_pruning=where == "global", pruning_ratio=0.98,
        max_pruning_ratio=0.98, iterative_steps=STEPS, ignored_layers=[last], num_heads=heads,
    )  # fmt: skip
    total, _ = torch_pruning.utils.count_ops_and_params(model, example)
    if criterion == "Taylor":
        F.cross_entropy(model(images), labels).backward()
    if criterion == "Hessian":
        model.zero_grad()
        importance.zero_grad()
        for loss in F.cross_entropy(model(images[:256]), labels[:256], reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
    for _ in range(STEPS):
        pruner.step()
        if torch_pruning.utils.count_ops_and_params(model, example)[0] <= budget * total:
            break
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for part in images.split(256) if norms else ():
            model.train()(part)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


def _finetuned(model: nn.Module, data: MNIST, epochs: int) -> float:
    """The accuracy after fine-tuning with labels: Adam, cosine from 1e-3, batches of 128, the same for all methods."""
    images, labels = data.train.tensors
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images), generator=generator).split(128)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return accuracy(model, data)


def table(rows: Sequence[Row]) -> str:
    """One line for each row."""
    head = f"{'network':8} {'budget':>6} {'method':25} {'MACs':>7} {'parameters':>10}"
    head += f" {'accuracy':>8} {'tuned':>6} {'s':>7}"
    return "\n".join(
        [
            head,
            *(
                f"{row.network:8} {row.budget:6.2f} {row.method:25} {row.macs:7.1%} {row.parameters:10.1%}"
                f" {row.accuracy:8.2f} {row.finetuned:>6} {row.seconds:7.2f}"
                for row in rows
            ),
        ]
    )
