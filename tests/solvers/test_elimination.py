"""Elimination of inputs: increases and weights against independent least squares, the ReLU against the refit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import layer

from lightning_nettrim import refit
from lightning_nettrim.solvers.elimination import Reader, eliminate, without_inputs


def problem(**options):
    """A layer with 40 inputs and a bias as a batch of one, with a linear response unless ``relu`` is given."""
    own = layer(**{"bias": True, "relu": False, "cascade": options.pop("cascade", False), "epsilon": None} | options)
    return replace(own, epsilon=None).flattened()


def units(size):
    """40 inputs in units of a size, not in order."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    return order.reshape(-1, size)


def least_squares(problem, rows):
    """The smallest squared error of an independent solver with some inputs only, and its weights."""
    X = problem.X[0][:, rows]
    W = torch.linalg.lstsq(X, problem.center[0]).solution
    return (X @ W - problem.center[0]).square().sum(0), W


@pytest.mark.parametrize("size", [1, 4])
def test_the_first_unit_is_the_one_with_the_smallest_increase_of_the_error(size):
    own, rows = problem(), units(size)
    kept = torch.ones(41, dtype=torch.bool)
    alone = [least_squares(own, kept.index_fill(0, unit, False))[0].sum() for unit in rows]
    (stage,) = eliminate([Reader(own, rows, torch.ones(12))], [len(rows) - 1])
    assert int(stage.kept.logical_not().nonzero()) == int(torch.stack(alone).argmin())


def test_each_removal_is_the_best_one_after_those_before():
    own, rows = problem(), units(4)
    kept = torch.ones(41, dtype=torch.bool)
    stages = eliminate([Reader(own, rows, torch.ones(12))], range(9, 3, -1))
    removed = torch.zeros(10, dtype=torch.bool)
    for stage in stages:
        alone = {
            i: float(least_squares(own, kept.index_fill(0, unit, False))[0].sum())
            for i, unit in enumerate(rows)
            if not removed[i]
        }
        best = min(alone, key=alone.get)
        assert not stage.kept[best]
        assert int(stage.kept.sum()) == len(rows) - int(removed.sum()) - 1
        removed, kept = ~stage.kept, kept.index_fill(0, rows[best], False)


def test_weights_are_the_least_squares_solution_of_the_kept_inputs():
    own, rows = problem(), units(4)
    *_, stage = eliminate([Reader(own, rows, torch.ones(12))], [7, 5, 3])
    kept = torch.ones(41, dtype=torch.bool)
    kept[rows[~stage.kept].flatten()] = False
    (W,) = stage.solutions
    torch.testing.assert_close(W[0, kept], least_squares(own, kept)[1], rtol=0, atol=1e-5)
    assert not W[0, ~kept].any()


def test_two_readers_choose_together_by_the_sum_of_their_weighted_errors():
    first, second, rows = problem(), problem(seed=1), units(4)
    weights = torch.full((12,), 0.1, dtype=torch.float64), torch.full((12,), 0.3, dtype=torch.float64)
    kept = torch.ones(41, dtype=torch.bool)
    losses = [
        sum(
            float((w * least_squares(p, kept.index_fill(0, unit, False))[0]).sum())
            for p, w in zip((first, second), weights, strict=True)
        )
        for unit in rows
    ]
    (stage,) = eliminate([Reader(first, rows, weights[0]), Reader(second, rows, weights[1])], [9])
    assert int(stage.kept.logical_not().nonzero()) == losses.index(min(losses))


def test_units_that_only_outputs_without_weight_read_are_removed_first():
    own, rows = problem(), units(4)
    W = own.W.clone()
    W[:, rows[[2, 5]].flatten(), 1:] = 0  # only output 0 reads the units 2 and 5
    own = replace(own, W=W, Y=own.X @ W)
    weights = torch.ones(12).index_fill(0, torch.tensor([0]), 0)
    (stage,) = eliminate([Reader(own, rows, weights)], [8])
    assert stage.kept.logical_not().nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("variant", [{}, {"cascade": True}, {"positive": True}, {"residual": True}])
def test_the_response_after_a_relu_is_nearly_as_good_as_the_refit_can_make_it(variant):
    own = problem(relu=True, P=400, **variant)
    own = replace(own, V=None)
    removed = torch.arange(0, 40, 4)
    W = without_inputs(own, removed)
    assert not W[0, removed].any()
    start = own.W.clone()
    start[:, removed] = 0
    best = refit(own, start, max_steps=60, cg_steps=60, rtol=1e-9)
    gained, possible = own.distance(start) - own.distance(W), own.distance(start) - own.distance(best)
    assert gained > 0.9 * possible > 0


def test_after_a_relu_the_stage_is_better_than_the_linear_fit():
    own, rows = replace(problem(relu=True, P=400), V=None), units(4)
    (stage,) = eliminate([Reader(own, rows, torch.ones(12))], [6])
    kept = torch.ones(41, dtype=torch.bool)
    kept[rows[~stage.kept].flatten()] = False
    linear = torch.zeros_like(own.W)
    linear[0, kept] = torch.linalg.lstsq(own.X[0][:, kept], own.X[0] @ own.W[0]).solution
    assert own.distance(stage.solutions[0]) < own.distance(linear)
