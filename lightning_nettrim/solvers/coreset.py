"""Data-independent coresets of the neurons that a layer reads: sampling by sensitivity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 1e-3
"""No neuron has a smaller sensitivity than this fraction of the mean, so that its factor is bounded."""


def inclusion_probabilities(sensitivities: Tensor, count: int) -> Tensor:
    r"""``(n,)``: π = min(1, c·s) with Σπ = count, in float64.

    Args:
        sensitivities: ``(n,)`` s ≥ 0.
        count: number of neurons in a sample, at most n.
    """
    s = sensitivities.double()
    s = s.clamp(min=LEAST * float(s.mean())) if float(s.sum()) > 0 else torch.ones_like(s)
    certain = torch.zeros_like(s, dtype=torch.bool)
    while True:
        left = count - int(certain.sum())
        rest = s.masked_fill(certain, 0)
        probabilities = (left * rest / rest.sum().clamp(min=torch.finfo(s.dtype).tiny)).masked_fill(certain, 1)
        more = (probabilities >= 1) & ~certain
        if not bool(more.any()):
            return probabilities
        certain |= more


def sample_of_fixed_size(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    r"""``(n,)`` bool: a sample of exactly Σπ neurons, each of which is in it with its own probability.

    The pivotal method: two neurons with fractional probabilities compete until one of them is certain. The estimator
    Σ w(q)φ(q)/π(q) over the sample is unbiased, as with draws with replacement, of which a fixed number of different
    neurons would be biased: the number of draws then depends on them. The indicators are negatively associated, so
    that the bounds for independent draws hold.

    Args:
        probabilities: ``(n,)`` π in [0, 1] with an integer sum.
        generator: of the random numbers.

    References:
        Deville, Tillé, "Unequal probability sampling without replacement through a splitting method", Biometrika 1998.
    """
    values = probabilities.double().cpu().tolist()
    chosen = [value == 1 for value in values]
    order = [i for i in torch.randperm(len(values), generator=generator).tolist() if 0 < values[i] < 1]
    draws = torch.rand(len(order), generator=generator, dtype=torch.float64).tolist()
    current, rest = -1, 0.0  # the neuron that competes with the next one, and its probability
    for i, draw in zip(order, draws, strict=True):
        a, b = rest, values[i]
        if current < 0:
            current, rest = i, b
        elif a + b < 1:
            current, rest = (i if draw * (a + b) < b else current), a + b
        else:
            winner = i if draw * (2 - a - b) < 1 - a else current
            chosen[winner], current, rest = True, i if winner == current else current, a + b - 1
    if current >= 0 and rest > 0.5:  # it is 0 or 1 up to rounding
        chosen[current] = True
    return torch.tensor(chosen)


def theorem_size(total: float, dimension: int, error: float, failure: float) -> int:
    r"""⌈t/ε²·(d·log t + log 1/δ)⌉: neurons for an error of at most ε, with a probability of at least 1 − δ.

    The error is that of Σ w(p)φ(pᵀx), additive, for all inputs x within the radius. The theorem leaves a constant
    factor open, which is taken as 1.

    Args:
        total: t, the sum of the sensitivities.
        dimension: d, the number of weights of a neuron.
        error: ε.
        failure: δ.

    References:
        Mussay, Osadchy, Braverman, Zhou, Feldman, "Data-Independent Neural Pruning via Coresets", ICLR 2020, Theorem 7.
    """
    return max(1, math.ceil(_size_at_error_one(total, dimension, failure) / error**2))


def theorem_error(total: float, dimension: int, count: int, failure: float) -> float:
    """The ε for which `theorem_size` is ``count``."""
    return math.sqrt(_size_at_error_one(total, dimension, failure) / count)


def _size_at_error_one(total: float, dimension: int, failure: float) -> float:
    """t·(d·log t + log 1/δ), where log t is at least 0."""
    return total * (dimension * math.log(max(total, 1)) + math.log(1 / failure))
