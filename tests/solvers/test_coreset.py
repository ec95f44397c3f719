"""Samples of neurons by sensitivity: their probabilities, their size, unbiasedness and the rate of their error."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nettrim.solvers.coreset import (
    inclusion_probabilities,
    sample_of_fixed_size,
    theorem_error,
    theorem_size,
)


def sensitivities(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).abs().double() ** 2


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100])
def test_probabilities_are_proportional_up_to_one_and_have_the_sum(count):
    s = sensitivities(100)
    p = inclusion_probabilities(s, count)
    assert float(p.sum()) == pytest.approx(count, rel=1e-12)
    assert float(p.amax()) <= 1
    proportional = (p < 1) & (s > 1e-3 * s.mean())
    ratios = (p / s)[proportional]
    assert torch.allclose(ratios, ratios[:1].expand_as(ratios), rtol=1e-12)
    assert bool((p[s.argsort()].diff() >= 0).all())  # those that are certain have the largest sensitivities


def test_neurons_without_influence_fill_up_the_sample():
    p = inclusion_probabilities(torch.tensor([0.0, 0.0, 3.0, 0.0]), 3)
    assert float(p.sum()) == pytest.approx(3)
    assert float(p[2]) == 1
    assert torch.equal(inclusion_probabilities(torch.zeros(4), 2), torch.full((4,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 5, 20, 39])
def test_samples_have_their_size_and_neurons_their_probabilities(count):
    p = inclusion_probabilities(sensitivities(40), count)
    draws = torch.stack([sample_of_fixed_size(p, torch.Generator().manual_seed(i)) for i in range(4000)])
    assert bool((draws.sum(1) == count).all())
    deviation = (p * (1 - p) / len(draws)).sqrt()
    assert bool(((draws.double().mean(0) - p).abs() <= 4.5 * deviation).all())


def test_a_sample_depends_on_the_seed_alone():
    p = inclusion_probabilities(sensitivities(40), 9)
    first, again, other = (sample_of_fixed_size(p, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def estimates(count, draws, n=2000, d=8):
    """Responses of a layer that reads a sample of ReLU neurons, and that of all of them."""
    generator = torch.Generator().manual_seed(3)
    P, w = torch.randn(n, d, generator=generator).double(), torch.rand(n, 3, generator=generator).double()
    x = torch.randn(d, generator=generator).double()
    x /= x.norm()
    neurons = (P @ x).relu()
    s = w.abs().amax(1) * P.norm(dim=1)
    p = inclusion_probabilities(s, count)
    masks = torch.stack([sample_of_fixed_size(p, torch.Generator().manual_seed(i)) for i in range(draws)])
    return (masks / p * neurons) @ w, neurons @ w


def test_the_reweighted_response_is_unbiased():
    found, exact = estimates(60, 1500)
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - exact).abs() <= 4 * error).all())
    assert bool((error < 0.02 * exact).all())  # so that a bias would be seen


def test_the_error_falls_with_the_square_root_of_the_size():
    counts = [16, 32, 64, 128]
    errors = []
    for count in counts:
        found, exact = estimates(count, 400)
        errors.append(float((found - exact).square().mean().sqrt()))
    x, y = (torch.tensor([math.log(value) for value in values]) for values in (counts, errors))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-0.5, rel=0.15)


@pytest.mark.parametrize(("total", "dimension", "error", "failure"), [(3.0, 10, 0.5, 0.1), (40.0, 3, 2.0, 0.01)])
def test_the_size_of_the_theorem_is_that_of_its_error(total, dimension, error, failure):
    size = theorem_size(total, dimension, error, failure)
    assert theorem_error(total, dimension, size, failure) <= error < theorem_error(total, dimension, size - 1, failure)
    assert size == math.ceil(total / error**2 * (dimension * math.log(total) + math.log(1 / failure)))
