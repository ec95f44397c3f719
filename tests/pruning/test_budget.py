"""The budget of one layer: its numbers, its pattern, and options that replace the common ones."""

from __future__ import annotations

import pytest
from networks import mlp, mlp_batches

from lightning_nettrim import Blocks, Budget, NOfM, PerNeuron, Unstructured, trim
from lightning_nettrim.pruning.budget import override, sets_budget


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "epsilon, sparsity: expected one of them for a layer, got epsilon=None and sparsity=None"),
        ({"epsilon": 0.1, "sparsity": 0.1}, "expected one of them for a layer, got epsilon=0.1 and sparsity=0.1"),
        ({"epsilon": 0.0}, "epsilon: expected > 0.*got 0.0"),
        ({"epsilon": float("inf")}, "epsilon: expected > 0.*got inf"),
        ({"sparsity": 1.0}, r"sparsity: expected a fraction of zeros in \[0, 1\), got 1.0"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "expected no other budget than its own sparsity 0.5, got sparsity=0.4"),
        ({"epsilon": 0.4, "pattern": "2:4"}, "expected no other budget than its own sparsity 0.5, got epsilon=0.4"),
        ({"sparsity": 0.5, "min_sparsity": 0.6, "max_sparsity": 0.5}, "expected 0 ≤ min ≤ max ≤ 1, got 0.6 and 0.5"),
        ({"sparsity": 0.5, "max_sparsity": 1.5}, "expected 0 ≤ min ≤ max ≤ 1, got 0.0 and 1.5"),
        ({"sparsity": 0.5, "pattern": "rows"}, "pattern: expected .* got 'rows'"),
    ],
)
def test_numbers_outside_their_ranges_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Budget(**numbers)


def test_patterns_are_parsed_and_set_their_own_sparsity():
    assert Budget(pattern="2:4") == Budget(sparsity=0.5, pattern=NOfM(2, 4))
    assert Budget(pattern="1:4").sparsity == 0.75
    assert Budget(sparsity=0.0, pattern="2:4").sparsity == 0.0  # dense in a search
    assert Budget(sparsity=0.3, pattern="4x2").pattern == Blocks(4, 2)


def test_options_of_a_layer_replace_the_common_ones():
    common = Budget(epsilon=0.1, refit=False, min_sparsity=0.2)
    assert override(common, {}) == common
    assert override(common, {"sparsity": 0.5}) == Budget(sparsity=0.5, refit=False, min_sparsity=0.2)
    assert override(common, {"refit": True}) == Budget(epsilon=0.1, min_sparsity=0.2)
    assert override(common, {"pattern": "2:4"}) == Budget(None, 0.5, False, NOfM(2, 4), 0.2)
    assert override(Budget(sparsity=0.5), {"pattern": "per_neuron"}) == Budget(sparsity=0.5, pattern=PerNeuron())
    with pytest.raises(ValueError, match=r"per_layer: expected the options epsilon, .*, got \['amount'\]"):
        override(common, {"amount": 0.2})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"refit": False, "min_sparsity": 0.1}, False),
        ({"pattern": "neuron"}, False),
        ({"pattern": Unstructured()}, False),
        ({"pattern": "2:4"}, True),
        ({"sparsity": 0.5}, True),
        ({"epsilon": 0.1}, True),
    ],
    ids=str,
)
def test_only_an_epsilon_a_sparsity_and_an_n_of_m_pattern_set_a_budget(options, expected):
    assert sets_budget(options) == expected


def test_a_pattern_can_belong_to_one_layer():
    model = mlp()
    result = trim(model, mlp_batches(), sparsity=0.6, allocate="uniform", per_layer={"2": {"pattern": "1:2"}})
    assert [report.sparsity for report in result.reports] == [0.6, 0.5, pytest.approx(0.6, abs=0.01)]
    assert (model[2].weight.reshape(16, 15, 2) != 0).sum(-1).eq(1).all()
