"""The search for the sparsest network within a drop of the metric: on known metrics, and by pruning."""

from __future__ import annotations

import logging

import pytest
from networks import copied_state, count_hooks, equal_states, mlp_batches, outputs, wide_mlp

from lightning_nettrim import trim
from lightning_nettrim.pruning.results import Trial
from lightning_nettrim.pruning.search import MAX_DENSITY, MIN_DENSITY, search_sparsity

# --- known metrics


def search(used, **options):
    """The search where the drop that a density uses is known; the metric is that drop."""
    return search_sparsity(
        lambda sparsity: Trial(sparsity, used(1 - sparsity), used(1 - sparsity) <= 1), lambda metric: metric, **options
    )


@pytest.mark.parametrize("limit", [0.003, 0.02, 0.07, 0.1, 0.3, 0.45])
def test_the_lowest_density_within_the_drop_is_found_where_the_drop_jumps(limit):
    trials = search(lambda density: 0.0 if density >= limit else float("inf"))
    best = max(trial.sparsity for trial in trials if trial.within)
    assert limit <= 1 - best <= 1.3 * limit
    assert len(trials) <= 9


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("limit", [0.01, 0.03, 0.07, 0.2, 0.4])
def test_few_trials_find_it_where_the_drop_is_smooth(limit, exponent):
    trials = search(lambda density: (limit / density) ** exponent)
    best = max(trial.sparsity for trial in trials if trial.within)
    assert limit <= 1 - best <= 1.12 * limit
    assert len(trials) <= 5


def test_if_no_trial_is_within_the_drop_the_search_ends_at_the_largest_density():
    trials = search(lambda density: 100.0)
    assert not any(trial.within for trial in trials)
    assert 1 - trials[-1].sparsity == pytest.approx(MAX_DENSITY)


def test_if_all_trials_are_within_the_drop_the_search_ends_at_the_smallest_density():
    trials = search(lambda density: -1.0)
    assert all(trial.within for trial in trials)
    assert 1 - trials[-1].sparsity == pytest.approx(MIN_DENSITY)


def test_a_metric_that_is_not_a_number_is_beyond_the_drop():
    trials = search(lambda density: 0.5 if density > 0.2 else float("nan"))
    assert 1 - max(trial.sparsity for trial in trials if trial.within) <= 1.3 * 0.2


def test_the_search_stays_within_its_limits_and_its_number_of_trials():
    trials = search(lambda density: 0.15 / density, limits=(0.08, 0.3))
    assert all(0.08 <= 1 - trial.sparsity <= 0.3 for trial in trials)
    assert len(search(lambda density: float(density < 0.15) * 9, max_trials=3)) == 3


# --- by pruning


def similarity(model, data):
    """A metric of a network: one minus the relative distance of its centered outputs from those it has now."""
    dense = outputs(model, data)
    dense = dense - dense.mean(0)
    return lambda: 1 - float((outputs(model, data) - outputs(model, data).mean(0) - dense).norm() / dense.norm())


def test_the_sparsest_network_within_the_drop_is_found():
    model, data, reported = wide_mlp(), mlp_batches(), []
    metric = similarity(model, data)
    result = trim(model, data, max_drop=0.3, metric=metric, on_trial=reported.append)
    assert metric() >= 0.7
    within = [trial for trial in result.trials if trial.within]
    assert within[0].sparsity == 0.0
    assert within[0].metric == 1.0
    best = max(trial.sparsity for trial in within)
    assert best > 0.3
    assert result.sparsity == pytest.approx(best, abs=1e-3)
    assert list(result.trials[1:]) == reported
    assert any(not trial.within for trial in result.trials)
    assert "sparsity" in result.plan


def test_a_drop_can_be_relative_and_a_metric_smaller_for_better_networks():
    model, data = wide_mlp(), mlp_batches()
    dense = outputs(model, data)

    def loss():
        return 10 + float((outputs(model, data) - dense).norm() / dense.norm())

    result = trim(model, data, max_drop=0.01, metric=loss, mode="min", relative=True)
    assert loss() <= 10.1
    assert all(trial.within == (trial.metric <= 10.1) for trial in result.trials)
    assert result.sparsity > 0.2


def test_if_no_network_is_within_the_drop_the_model_is_as_trained():
    model, data = wide_mlp(), mlp_batches()
    before = copied_state(model)
    result = trim(model, data, max_drop=0.0, metric=lambda: float(equal_states(model, before)))
    assert equal_states(model, before)
    assert result.sparsity == 0
    assert [trial.within for trial in result.trials] == [True] + [False] * (len(result.trials) - 1)


def test_the_layers_of_the_result_are_reported_once():
    model, data, reported = wide_mlp(), mlp_batches(), []
    metric = similarity(model, data)
    result = trim(model, data, max_drop=0.3, metric=metric, allocate="uniform", on_layer=reported.append)
    assert tuple(reported) == result.reports


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_an_interrupted_search_leaves_the_model_as_trained(error, when, caplog):
    model = wide_mlp()
    before, calls = copied_state(model), []

    def metric():
        calls.append(None)
        if len(calls) > when:
            raise error("planned")
        return 1.0

    with caplog.at_level(logging.WARNING), pytest.raises(error, match="planned"):
        trim(model, mlp_batches(), max_drop=0.1, metric=metric)
    assert equal_states(model, before)
    assert count_hooks(model) == 0
    assert "have their trained weights again" in caplog.text
