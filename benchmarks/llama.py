"""Pruning without retraining: the small Llama of the recipe by every method, judged by its loss on held-out text."""

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
from benchmarks.training import trained
from lightning_nettrim import Magnitude, SparseGPT, Wanda, trim
from recipes.text import Topics

RECIPE = Path(__file__).parents[1] / "recipes" / "text_llama.yaml"

METHODS: dict[str, dict] = {
    "ours": {},
    "ours, uniform": {"allocate": "uniform"},
    "magnitude": {"solver": Magnitude(), "refit": False, "allocate": "uniform"},
    "magnitude + refit": {"solver": Magnitude(), "allocate": "uniform"},
    "Wanda (here)": {"solver": Wanda(), "refit": False, "allocate": "uniform", "pattern": "per_neuron"},
    "SparseGPT (here)": {"solver": SparseGPT(), "refit": False, "allocate": "uniform"},
}
"""Arguments of `trim`; all but the first have the same sparsity in each layer."""


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Args:
        out: folder of the results and of the trained weights.
        epochs: of training; those of the recipe if not given.
        samples: calibration windows, of the training part.
        budgets: sparsities.
    """

    out: Path = Path("runs") / "benchmarks"
    epochs: int | None = None
    samples: int = 512
    budgets: tuple[float, ...] = (0.5, 0.7)


@dataclass(frozen=True)
class Row:
    """The network pruned by one method.

    Attributes:
        budget: sparsity.
        method: by what.
        zeros: fraction of zeros among the weights that are pruned.
        loss: on the held-out text, in nats per character.
        seconds: to prune it.
    """

    budget: float
    method: str
    zeros: float
    loss: float
    seconds: float

    def __str__(self) -> str:
        """One line."""
        return f"{self.budget:5} {self.method:20} {self.loss:7.4f} nats/char  {self.seconds:7.2f} s"


def rows(settings: Settings) -> Iterator[Row]:
    """Every budget and method in turn."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    data: Topics = _made(recipe["data"])
    data.setup("fit")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    windows = data.train.tensors[0][order[: settings.samples]]
    dense = network(recipe, data, settings)
    yield Row(0.0, "dense", 0.0, loss(dense, data), 0.0)
    (options,) = (callback["init_args"] for callback in recipe["trainer"]["callbacks"])
    chosen = {key: options[key] for key in ("targets", "ignore")}
    for budget in settings.budgets:
        for method, arguments in METHODS.items():
            pruned, clock = copy.deepcopy(dense), Clock()
            result = trim(pruned, windows.split(64), sparsity=budget, **chosen, **arguments)
            seconds = clock.read()
            yield Row(budget, method, result.sparsity, loss(pruned, data), seconds)


def network(recipe: dict, data: Topics, settings: Settings) -> pl.LightningModule:
    """The network of the recipe, trained as it says, read from the cache where it was trained before."""
    pl.seed_everything(recipe["seed_everything"], verbose=False)
    epochs = settings.epochs or recipe["trainer"]["max_epochs"]
    return trained(_made(recipe["model"]), data, settings.out / f"llama-{epochs}.pt", epochs)


def _made(entry: dict) -> Any:
    """The object of a ``class_path`` with its ``init_args``."""
    module, _, kind = entry["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), kind)(**entry.get("init_args", {}))


def loss(model: nn.Module, data: Topics) -> float:
    """Cross entropy on the held-out text, in nats per character."""
    ids, next_ids = data.held_out.tensors
    with torch.no_grad():
        logits = torch.cat([model.eval()(part) for part in ids.split(256)])
    return float(nn.functional.cross_entropy(logits.flatten(0, 1).double(), next_ids.flatten()))


def table(rows: Sequence[Row]) -> str:
    """A line for each row, with how far its loss is above that of the dense network."""
    (dense,) = (row.loss for row in rows if row.method == "dense")
    lines = [f"{'budget':>6} {'method':20} {'zeros':>8} {'nats/char':>9} {'increase':>8} {'seconds':>8}"]
    for row in rows:
        text = f"{row.budget:6.2f} {row.method:20} {row.zeros:8.2%} {row.loss:9.4f} {row.loss - dense:8.4f}"
        lines.append(f"{text} {row.seconds:8.2f}")
    return "\n".join(lines)
