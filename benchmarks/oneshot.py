"""One-shot pruning of LeNet-300-100 on MNIST by every method, evaluated from the pruned weights alone."""

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
from benchmarks.peers.clones import PruneLayer
from benchmarks.training import accuracy
from lightning_nettrim import Cardinality, Magnitude, Solver, SparseGPT, Wanda, trim
from recipes.data import MNIST

LAST_LAYER_SPARSITY = 0.6
"""Sparsity of the last layer in all methods with a given sparsity per layer."""

THOROUGH = Cardinality(max_steps=720, row_parts=2)


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        data: folder of MNIST; ``None`` is ``$NETTRIM_DATA`` or ``./data``.
        out: folder of the results and of the trained weights.
        alps: folder of a clone of github.com/mazumder-lab/ALPS.
        sparsegpt: folder of a clone of github.com/IST-DASLab/sparsegpt.
        wanda: folder of a clone of github.com/locuslab/wanda.
        seeds: number of networks.
        epochs: number of training epochs.
        samples: number of calibration images.
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
        seed: seed of the network.
        budget: requested sparsity or pattern.
        method: name of the method.
        sparsity: fraction of zeros among the weights of all layers.
        accuracy: on the test images, in percent.
        end_to_end_error_1, end_to_end_error_2, end_to_end_error_3: ‖Y_pruned − Y‖/‖Y‖ of each layer in the pruned
            network, on the calibration images.
        seconds: time to prune the network.
    """

    seed: int
    budget: str
    method: str
    sparsity: float
    accuracy: float
    end_to_end_error_1: float
    end_to_end_error_2: float
    end_to_end_error_3: float
    seconds: float

    def __str__(self) -> str:
        """One line of the log."""
        return f"seed {self.seed}  {self.budget:5} {self.method:24} {self.accuracy:6.2f} %  {self.seconds:6.2f} s"


Method = Callable[[nn.Module, Tensor, str], float]
"""Prunes a network in place, ``method(network, images, budget)``, and returns the seconds."""


def rows(settings: Settings) -> Iterator[Row]:
    """Every seed, budget and method; peers that are not available are skipped with a message."""
    data = MNIST(settings.data)
    data.prepare_data()
    data.setup("fit")
    for seed in range(settings.seeds):
        dense = lenet.network(data, settings.out, seed, settings.epochs)
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        images = data.train.tensors[0][order[: settings.samples]].flatten(1)
        yield evaluate(dense, dense, images, data, seed, "0", "dense", 0.0)
        for budget in settings.budgets:
            for name, method in _methods(settings, seed, budget).items():
                network = copy.deepcopy(dense)
                seconds = method(network, images, budget)
                yield evaluate(network, dense, images, data, seed, budget, name, seconds)


def _methods(settings: Settings, seed: int, budget: str) -> dict[str, Method]:
    """The methods for a budget, by name."""
    methods: dict[str, Method] = {
        "ours": partial(_prune_with_trim, solver=Cardinality()),
        "ours, thorough": partial(_prune_with_trim, solver=THOROUGH),
        "magnitude": partial(_prune_with_trim, solver=Magnitude(), refit=False),
        "magnitude + refit": partial(_prune_with_trim, solver=Magnitude()),
        "Wanda (this package)": partial(_prune_with_trim, solver=Wanda(), refit=False, pattern="per_neuron"),
        "SparseGPT (this package)": partial(_prune_with_trim, solver=SparseGPT(), refit=False),
    }
    if ":" not in budget:
        per_neuron = partial(_prune_with_trim, pattern="per_neuron")
        methods["ours, allocated"] = partial(_prune_with_trim, solver=Cardinality(), allocate="global")
        methods["ours, per neuron"] = partial(per_neuron, solver=Cardinality())
        methods["SparseGPT, per neuron"] = partial(per_neuron, solver=SparseGPT(), refit=False)
    for peer, clone in ((alps, settings.alps), (sparsegpt, settings.sparsegpt), (wanda, settings.wanda)):
        try:
            methods[peer.NAME] = partial(_prune_with_peer, prune=peer.method(clone))
        except Unavailable as reason:
            if seed == 0 and budget == settings.budgets[0]:
                print(f"{peer.NAME} skipped: {reason}")
    return methods


def _prune_with_trim(
    network: nn.Module,
    images: Tensor,
    budget: str,
    solver: Solver,
    refit: bool = True,
    pattern: str = "unstructured",
    allocate: str = "uniform",
) -> float:
    """Prune by `trim` with the scheme ``cascade``; returns the seconds."""
    if ":" in budget:
        options = {"pattern": budget, "ignore": ["fc3"]}
    elif allocate == "uniform":
        per_layer = {"fc3": {"sparsity": LAST_LAYER_SPARSITY}}
        options = {"sparsity": float(budget), "pattern": pattern, "per_layer": per_layer}
    else:
        options = {"sparsity": float(budget)}
    clock = Clock()
    trim(network, [images], num_samples=len(images), solver=solver, refit=refit, allocate=allocate, **options)
    return clock.read()


def _prune_with_peer(network: nn.Module, images: Tensor, budget: str, prune: PruneLayer) -> float:
    """Prune layer after layer with a peer, each on the activations of the pruned network; returns the seconds.

    The targets of a layer are the responses of its trained weights to these activations.
    """
    clock, X = Clock(), images
    *hidden, last = network.children()
    for layer in (*hidden, last):
        if ":" not in budget:
            prune(layer, X, LAST_LAYER_SPARSITY if layer is last else float(budget), None)
        elif layer is not last:
            n, m = map(int, budget.split(":"))
            prune(layer, X, 1 - n / m, (n, m))
        with torch.no_grad():
            X = layer(X).relu()
    return clock.read()


def evaluate(
    network: nn.Module,
    dense: nn.Module,
    images: Tensor,
    data: MNIST,
    seed: int,
    budget: str,
    method: str,
    seconds: float,
) -> Row:
    """The row of a pruned network, computed from its weights alone."""
    errors, x, y = [], images, images
    with torch.no_grad():
        *hidden, last = zip(network.children(), dense.children(), strict=True)
        for pruned, trained in (*hidden, last):
            x, y = pruned(x), trained(y)
            if pruned is not last[0]:
                x, y = x.relu(), y.relu()
            errors.append(float((x - y).norm() / y.norm()))
    weights = [layer.weight for layer in network.children()]
    sparsity = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return Row(seed, budget, method, sparsity, accuracy(network, data), *errors, seconds)


def table(rows: Sequence[Row]) -> str:
    """Means over the seeds, one line for each budget and method, compared with ALPS if it was run."""
    head = f"{'budget':7} {'method':24} {'sparsity':>8} {'accuracy':>9} {'end-to-end errors':>23} {'seconds':>8}"
    lines = [f"{head}  compared with ALPS: points of accuracy, ratios of errors and of seconds"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.budget, row.method), []).append(row)
    for (budget, method), group in groups.items():
        sparsity, percent, seconds, *errors = _means(group)
        text = f"{budget:7} {method:24} {sparsity:8.2%} {percent:9.2f} {' '.join(f'{e:7.4f}' for e in errors)}"
        text += f" {seconds:8.2f}"
        peer = groups.get((budget, alps.NAME))
        if peer and method != alps.NAME:
            _, peer_percent, peer_seconds, *peer_errors = _means(peer)
            ratios = " ".join(f"{e / t:5.2f}" if t else "    –" for e, t in zip(errors, peer_errors, strict=True))
            text += f" {percent - peer_percent:+6.2f} {ratios} {seconds / peer_seconds:5.2f}"
        lines.append(text)
    return "\n".join(lines)


def _means(group: Sequence[Row]) -> list[float]:
    errors = ("end_to_end_error_1", "end_to_end_error_2", "end_to_end_error_3")
    return [
        statistics.fmean(getattr(row, name) for row in group) for name in ("sparsity", "accuracy", "seconds", *errors)
    ]
