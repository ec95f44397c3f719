"""Pruning without retraining: LeNet-300-100 on MNIST by every method, judged from its weights alone."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import lenet
from benchmarks.clock import Clock
from benchmarks.peers import Unavailable, alps, sparsegpt, wanda
from benchmarks.peers.clones import Prune
from benchmarks.training import accuracy
from lightning_nettrim import Cardinality, Magnitude, Solver, SparseGPT, Wanda, trim
from recipes.data import MNIST

LAST = 0.6
"""Sparsity of the last layer where it is not an allocation that decides."""

THOROUGH = Cardinality(steps=720, parts=2)


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Args:
        data: folder of MNIST; ``$NETTRIM_DATA`` or ``./data`` if not given.
        out: folder of the results and of the trained weights.
        alps: folder of a clone of github.com/mazumder-lab/ALPS.
        sparsegpt: folder of a clone of github.com/IST-DASLab/sparsegpt.
        wanda: folder of a clone of github.com/locuslab/wanda.
        seeds: networks trained.
        epochs: of their training.
        samples: calibration images.
        budgets: sparsities, or patterns n:m.
    """

    data: str | None = None
    out: Path = Path("runs") / "benchmarks"
    alps: Path | None = None
    sparsegpt: Path | None = None
    wanda: Path | None = None
    seeds: int = 3
    epochs: int = 20
    samples: int = 5000
    budgets: tuple[str, ...] = ("0.5", "0.7", "0.8", "0.9", "0.95", "0.97", "0.98", "2:4")


@dataclass(frozen=True)
class Row:
    """One network pruned by one method.

    Attributes:
        seed: of the network.
        budget: sparsity or pattern.
        method: by what.
        zeros: fraction of zeros among all weights.
        accuracy: on the test images, in percent.
        error1, error2, error3: ‖answer − trained answer‖ / ‖trained answer‖ of each layer in the pruned network.
        seconds: to prune the network.
    """

    seed: int
    budget: str
    method: str
    zeros: float
    accuracy: float
    error1: float
    error2: float
    error3: float
    seconds: float

    def __str__(self) -> str:
        """One line."""
        return f"seed {self.seed}  {self.budget:5} {self.method:22} {self.accuracy:6.2f} %  {self.seconds:6.2f} s"


Method = Callable[[nn.Module, Tensor, str], float]
"""Prunes a network in place, with these images, to a budget, and returns the seconds."""


def rows(settings: Settings) -> Iterator[Row]:
    """Every seed, budget and method in turn; what is not here is skipped with a message."""
    data = MNIST(settings.data)
    data.prepare_data()
    data.setup("fit")
    for seed in range(settings.seeds):
        dense = lenet.network(data, settings.out, seed, settings.epochs)
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        images = data.train.tensors[0][order[: settings.samples]].flatten(1)
        yield judge(dense, dense, images, data, seed, "0", "dense", 0.0)
        for budget in settings.budgets:
            for name, method in _methods(settings, seed, budget).items():
                network = copy.deepcopy(dense)
                seconds = method(network, images, budget)
                yield judge(network, dense, images, data, seed, budget, name, seconds)


def _methods(settings: Settings, seed: int, budget: str) -> dict[str, Method]:
    """The methods for a budget, by name."""
    methods: dict[str, Method] = {
        "ours": partial(_ours, solver=Cardinality()),
        "ours, thorough": partial(_ours, solver=THOROUGH),
        "magnitude": partial(_ours, solver=Magnitude(), refit=False),
        "magnitude + refit": partial(_ours, solver=Magnitude()),
        "Wanda (here)": partial(_ours, solver=Wanda(), refit=False, pattern="per_neuron"),
        "SparseGPT (here)": partial(_ours, solver=SparseGPT(), refit=False),
    }
    if ":" not in budget:
        methods["ours, allocated"] = partial(_ours, solver=Cardinality(), allocate="global")
        methods["ours, per neuron"] = partial(_ours, solver=Cardinality(), pattern="per_neuron")
        methods["SparseGPT, per neuron"] = partial(_ours, solver=SparseGPT(), refit=False, pattern="per_neuron")
    for peer, clone in ((alps, settings.alps), (sparsegpt, settings.sparsegpt), (wanda, settings.wanda)):
        try:
            methods[peer.NAME] = partial(_theirs, prune=peer.method(clone))
        except Unavailable as reason:
            if seed == 0 and budget == settings.budgets[0]:
                print(f"{peer.NAME} skipped: {reason}")
    return methods


def _ours(
    network: nn.Module,
    images: Tensor,
    budget: str,
    solver: Solver,
    refit: bool = True,
    pattern: str = "unstructured",
    allocate: str = "uniform",
) -> float:
    """By `trim`: a cascade towards the trained responses."""
    if ":" in budget:
        chosen = {"pattern": budget, "ignore": ["fc3"]}
    elif allocate == "uniform":
        chosen = {"sparsity": float(budget), "pattern": pattern, "per_layer": {"fc3": {"sparsity": LAST}}}
    else:
        chosen = {"sparsity": float(budget)}
    clock = Clock()
    trim(network, [images], num_samples=len(images), solver=solver, refit=refit, allocate=allocate, **chosen)
    return clock.read()


def _theirs(network: nn.Module, images: Tensor, budget: str, prune: Prune) -> float:
    """Layer after layer on the pruned network's signals, each towards what its trained weights answer there."""
    clock, X = Clock(), images
    *hidden, last = network.children()
    for layer in (*hidden, last):
        if ":" not in budget:
            prune(layer, X, LAST if layer is last else float(budget), None)
        elif layer is not last:
            n, m = map(int, budget.split(":"))
            prune(layer, X, 1 - n / m, (n, m))
        with torch.no_grad():
            X = layer(X).relu()
    return clock.read()


def judge(
    network: nn.Module,
    dense: nn.Module,
    images: Tensor,
    data: MNIST,
    seed: int,
    budget: str,
    method: str,
    seconds: float,
) -> Row:
    """The row of a pruned network, from its weights alone."""
    errors, x, y = [], images, images
    with torch.no_grad():
        *hidden, last = zip(network.children(), dense.children(), strict=True)
        for ours, trained in (*hidden, last):
            x, y = ours(x), trained(y)
            if ours is not last[0]:
                x, y = x.relu(), y.relu()
            errors.append(float((x - y).norm() / y.norm()))
    weights = [layer.weight for layer in network.children()]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return Row(seed, budget, method, zeros, accuracy(network, data), *errors, seconds)


def table(rows: Sequence[Row]) -> str:
    """Means over the seeds, a line for each budget and method, beside ALPS where it is there."""
    head = f"{'budget':7} {'method':22} {'zeros':>7} {'accuracy':>9} {'errors of the layers':>23} {'seconds':>8}"
    lines = [f"{head}  against ALPS: points, errors and seconds over its own"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.budget, row.method), []).append(row)
    for (budget, method), group in groups.items():
        zeros, right, seconds, *errors = _means(group)
        text = f"{budget:7} {method:22} {zeros:7.2%} {right:9.2f} {' '.join(f'{e:7.4f}' for e in errors)}"
        text += f" {seconds:8.2f}"
        peer = groups.get((budget, alps.NAME))
        if peer and method != alps.NAME:
            _, other, wall, *theirs = _means(peer)
            ratios = " ".join(f"{e / t:5.2f}" if t else "    –" for e, t in zip(errors, theirs, strict=True))
            text += f" {right - other:+6.2f} {ratios} {seconds / wall:5.2f}"
        lines.append(text)
    return "\n".join(lines)


def _means(group: Sequence[Row]) -> list[float]:
    names = ("zeros", "accuracy", "seconds", "error1", "error2", "error3")
    return [statistics.fmean(getattr(row, name) for row in group) for name in names]
