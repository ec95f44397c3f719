"""One-shot pruning of the small Llama of the recipe by every method, evaluated by its loss on held-out text."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import nn

from benchmarks.clock import Clock
from benchmarks.training import train_or_load
from lightning_nettrim import Distillation, Magnitude, SparseGPT, Wanda, trim
from recipes.text import Topics

RECIPE = Path(__file__).parents[1] / "recipes" / "text_llama.yaml"

METHODS: dict[str, dict] = {
    "ours": {},
    "ours, uniform": {"allocate": "uniform"},
    "magnitude": {"solver": Magnitude(), "refit": False, "allocate": "uniform"},
    "magnitude + refit": {"solver": Magnitude(), "allocate": "uniform"},
    "Wanda (this package)": {"solver": Wanda(), "refit": False, "allocate": "uniform", "pattern": "per_neuron"},
    "SparseGPT (this package)": {"solver": SparseGPT(), "refit": False, "allocate": "uniform"},
}
METHODS |= {
    f"{name}, recovered": METHODS[name] | {"recover": Distillation()}
    for name in ("ours", "magnitude + refit", "SparseGPT (this package)", "Wanda (this package)")
}
METHODS["ours, recovered by blocks"] = {"recover": Distillation(scope="block")}
"""Options of `trim` for each method; all but those of this package's default have the same sparsity in each layer."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        out: folder of the results and of the trained weights.
        epochs: number of training epochs; ``None`` is that of the recipe.
        samples: number of calibration windows, from the training text.
        budgets: sparsities.
        methods: names of methods; all, if there are none.
    """

    out: Path = Path("runs") / "benchmarks"
    epochs: int | None = None
    samples: int = 512
    budgets: tuple[float, ...] = (0.5, 0.7)
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """The network pruned by one method.

    Attributes:
        budget: requested sparsity.
        method: name of the method.
        sparsity: fraction of zeros among the weights of the pruned layers.
        loss: cross entropy on the held-out text, in nats per character.
        seconds: time to prune the network.
    """

    budget: float
    method: str
    sparsity: float
    loss: float
    seconds: float

    def __str__(self) -> str:
        """One line of the log."""
        return f"{self.budget:5} {self.method:35} {self.loss:7.4f} nats/char  {self.seconds:7.2f} s"


def rows(settings: Settings) -> Iterator[Row]:
    """The dense network, then every budget and method."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    data: Topics = _instantiate(recipe["data"])
    data.setup("fit")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    windows = data.train.tensors[0][order[: settings.samples]]
    dense = network(recipe, data, settings)
    yield Row(0.0, "dense", 0.0, loss(dense, data), 0.0)
    (options,) = (callback["init_args"] for callback in recipe["trainer"]["callbacks"])
    layers = {key: options[key] for key in ("targets", "ignore")}
    for budget in settings.budgets:
        for method in settings.methods or METHODS:
            pruned, clock = copy.deepcopy(dense), Clock()
            result = trim(pruned, windows.split(64), sparsity=budget, **layers, **METHODS[method])
            seconds = clock.read()
            yield Row(budget, method, result.sparsity, loss(pruned, data), seconds)


def network(recipe: dict, data: Topics, settings: Settings) -> pl.LightningModule:
    """The network of the recipe, trained with its seed and number of epochs, or loaded from the cache."""
    pl.seed_everything(recipe["seed_everything"], verbose=False)
    epochs = settings.epochs or recipe["trainer"]["max_epochs"]
    return train_or_load(_instantiate(recipe["model"]), data, settings.out / f"llama-{epochs}.pt", epochs)


def _instantiate(entry: dict) -> Any:
    """The object of a ``class_path`` with its ``init_args``."""
    module, _, name = entry["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**entry.get("init_args", {}))


def loss(model: nn.Module, data: Topics) -> float:
    """Cross entropy on the held-out text, in nats per character."""
    ids, next_ids = data.held_out.tensors
    with torch.no_grad():
        logits = torch.cat([model.eval()(part) for part in ids.split(256)])
    return float(nn.functional.cross_entropy(logits.flatten(0, 1).double(), next_ids.flatten()))


def table(rows: Sequence[Row]) -> str:
    """One line for each row, with the increase of the loss over that of the dense network."""
    (dense,) = (row.loss for row in rows if row.method == "dense")
    lines = [f"{'budget':>6} {'method':35} {'sparsity':>8} {'nats/char':>9} {'increase':>8} {'seconds':>8}"]
    for row in rows:
        text = f"{row.budget:6.2f} {row.method:35} {row.sparsity:8.2%} {row.loss:9.4f} {row.loss - dense:8.4f}"
        lines.append(f"{text} {row.seconds:8.2f}")
    return "\n".join(lines)
