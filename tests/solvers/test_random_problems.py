"""Two hundred random problems: the defaults reach an interior-point solver's optimum on every one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from problems import VARIANTS, layer, optimum

from lightning_nettrim import ADMM, Status, solve
from lightning_nettrim.core.certificate import violation

pytestmark = pytest.mark.slow


def draw(seed):
    """A variant from the table with a random size, radius and scale."""
    choose = random.Random(seed)
    options = dict(choose.choice(list(VARIANTS.values())))
    options.setdefault("N", choose.randint(16, 40))
    options.setdefault("P", choose.choice([options["N"] // 2 + 1, 60, 150, 400]))
    options.setdefault("M", choose.randint(2, 10))
    options.setdefault("gain", choose.choice([0.01, 0.03, 0.1, 0.2, 0.4, 0.7]))
    options.setdefault("scale", 10.0 ** choose.uniform(-4, 4))
    return layer(**options, seed=seed)


@pytest.mark.parametrize("seed", range(200))
def test_the_defaults_reach_the_optimum(seed):
    problem = draw(seed)
    best = optimum(problem)
    solution = solve(problem, ADMM())
    assert solution.status == Status.CONVERGED
    assert float(solution.objective) == pytest.approx(best, rel=1e-3, abs=1e-9)
    assert float(violation(problem, solution.W)) <= 1e-3

    tensors = {n: getattr(problem, n) for n in ("X", "Y", "W", "epsilon", "V", "penalty", "offset")}
    single = replace(problem, **{n: t if t is None else t.float() for n, t in tensors.items()})
    solution = solve(single, ADMM())
    assert solution.status == Status.CONVERGED
    assert float(solution.gap) <= 5e-3
    assert float(violation(problem, solution.W.double())) <= 5e-3
    assert torch.isfinite(solution.bound)
