"""The search for the sparsest network within a drop, on metrics that are known."""

from __future__ import annotations

import pytest

from lightning_nettrim.pruning.search import MAX_DENSITY, MIN_DENSITY, sparsest


@pytest.mark.parametrize("limit", [0.003, 0.02, 0.07, 0.1, 0.3, 0.45])
def test_finds_the_density_from_which_on_the_metric_holds(limit):
    trials = sparsest(lambda sparsity: float(1 - sparsity >= limit), lambda metric: metric == 1)
    best = max(trial.sparsity for trial in trials if trial.within)
    assert limit <= 1 - best <= 1.2 * limit
    assert len(trials) <= 9


def test_none_within_is_an_answer():
    trials = sparsest(lambda sparsity: 0.0, lambda metric: metric > 0)
    assert not any(trial.within for trial in trials)
    assert 1 - trials[-1].sparsity == pytest.approx(MAX_DENSITY)


def test_all_within_ends_at_the_sparsest():
    trials = sparsest(lambda sparsity: 1.0, lambda metric: metric > 0)
    assert all(trial.within for trial in trials)
    assert 1 - trials[-1].sparsity == pytest.approx(MIN_DENSITY)
