"""The error of coresets of one layer's neurons against their size, beside draws with replacement and other choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.layer_cost import exponents
from lightning_nettrim.solvers.coreset import inclusion_probabilities, sample_of_fixed_size

INPUTS, OUTPUTS = 32, 10
"""Inputs of each neuron, and outputs of the layer that reads the neurons."""

POINTS = 2000
"""Inputs within the unit ball on which the error is measured, and as many for the refit."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        out: folder of the results.
        neurons: number of ReLU neurons.
        sizes: numbers of neurons in a coreset.
        seeds: number of samples over which errors are averaged.
    """

    out: Path = Path("runs") / "benchmarks"
    neurons: int = 4000
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    seeds: int = 100


@dataclass(frozen=True)
class Row:
    """One method at one size.

    Attributes:
        method: how neurons are chosen.
        size: number of different neurons.
        error: root of the mean squared error over the seeds, relative to the response of all neurons.
        bias: norm of the mean error over the seeds, relative to the same.
    """

    method: str
    size: int
    error: float
    bias: float

    def __str__(self) -> str:
        """One line of the log."""
        return f"{self.method:34} {self.size:6d} {self.error:8.4f} {self.bias:8.4f}"


def rows(settings: Settings) -> Iterator[Row]:
    """Every method and size."""
    generator = torch.Generator().manual_seed(0)
    P = torch.randn(settings.neurons, INPUTS, generator=generator, dtype=torch.float64)
    P *= torch.rand(settings.neurons, 1, generator=generator, dtype=torch.float64) ** 2
    W = torch.rand(settings.neurons, OUTPUTS, generator=generator, dtype=torch.float64)
    x, others = (_within_ball(generator) for _ in range(2))
    features, exact = (x @ P.T).relu(), (x @ P.T).relu() @ W
    s = P.norm(dim=1) * W.amax(1)

    def refitted(kept: Tensor) -> Tensor:
        own = (others @ P.T).relu()
        return features[:, kept] @ torch.linalg.lstsq(own[:, kept], own @ W).solution

    def largest(size: int, seed: int) -> Tensor:
        return s.topk(size).indices

    methods: dict[str, tuple[Callable[[int, int], Tensor], int]] = {
        "importance, fixed size": (lambda size, seed: features @ _fixed_size(s, size, seed, W), settings.seeds),
        "importance, with replacement": (lambda size, seed: features @ _replaced(s, size, seed, W), settings.seeds),
        "uniform, fixed size": (
            lambda size, seed: features @ _fixed_size(torch.ones_like(s), size, seed, W),
            settings.seeds,
        ),
        "largest sensitivities": (lambda size, seed: features[:, largest(size, seed)] @ W[largest(size, seed)], 1),
        "largest sensitivities, refit": (lambda size, seed: refitted(largest(size, seed)), 1),
    }
    for method, (respond, seeds) in methods.items():
        for size in settings.sizes:
            errors = torch.stack([respond(size, seed) - exact for seed in range(seeds)]) / exact.norm()
            error = errors.square().sum((1, 2)).mean().sqrt()
            yield Row(method, size, float(error), float(errors.mean(0).norm()))


def _within_ball(generator: torch.Generator) -> Tensor:
    """Random inputs with norms up to 1."""
    x = torch.randn(POINTS, INPUTS, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True) * torch.rand(POINTS, 1, generator=generator, dtype=torch.float64)


def _fixed_size(s: Tensor, size: int, seed: int, W: Tensor) -> Tensor:
    """The weights of a sample of this package."""
    p = inclusion_probabilities(s, size)
    kept = sample_of_fixed_size(p, torch.Generator().manual_seed(seed))
    return W * (kept / p).unsqueeze(1)


def _replaced(s: Tensor, size: int, seed: int, W: Tensor) -> Tensor:
    """The weights of Mussay et al.: draws with replacement until there are so many different neurons."""
    p, generator = s / s.sum(), torch.Generator().manual_seed(seed)
    draws = torch.multinomial(p, 40 * size + 1000, replacement=True, generator=generator)
    seen, count = set[int](), 0
    for neuron in draws.tolist():
        seen.add(neuron)
        count += 1
        if len(seen) == size:
            break
    counts = torch.bincount(draws[:count], minlength=len(s))
    return W * (counts / (count * p)).unsqueeze(1)


def table(rows: Sequence[Row]) -> str:
    """The exponents of the errors."""
    lines = [f"{'method':34} {'exponent of the error':>22}"]
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        exponent, _ = exponents([row.size for row in own], [row.error for row in own])
        lines.append(f"{method:34} {exponent:22.2f}")
    return "\n".join(lines)
