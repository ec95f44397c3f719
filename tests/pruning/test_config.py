"""Options: `trim` and `NetTrim` mirror `PruningConfig`, which checks each of them."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, FrozenInstanceError, fields

import pytest

from lightning_nettrim import (
    ADMM,
    Cardinality,
    Magnitude,
    NetTrim,
    PruningConfig,
    SparseGPT,
    UniformAllocation,
    Unstructured,
    Wanda,
    trim,
)
from lightning_nettrim.pruning.config import DEFAULT_ROWS

MIRRORS = {"trim": (trim, trim), "NetTrim": (NetTrim.__init__, NetTrim)}


def help_texts(documented):
    """``{option: text}`` of the section ``Args:`` of a docstring, with single spaces between words."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(documented), re.MULTILINE | re.DOTALL).group(1)
    entries = re.split(r"^ {4}(?=\w+: )", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in (entry.split(":", 1) for entry in entries if entry.strip())}


@pytest.mark.parametrize("mirror", MIRRORS)
def test_signatures_have_every_option_with_its_default_and_annotation(mirror):
    parameters = inspect.signature(MIRRORS[mirror][0]).parameters
    for option in fields(PruningConfig):
        assert option.default is not MISSING
        assert parameters[option.name].default == option.default, option.name
        assert type(parameters[option.name].default) is type(option.default), option.name
        assert parameters[option.name].annotation == option.type, option.name


@pytest.mark.parametrize("mirror", MIRRORS)
def test_signatures_have_the_options_in_the_same_order(mirror):
    options = [option.name for option in fields(PruningConfig)]
    assert [name for name in inspect.signature(MIRRORS[mirror][0]).parameters if name in options] == options


@pytest.mark.parametrize("mirror", MIRRORS)
def test_docstrings_have_the_same_help_text_for_every_option(mirror):
    texts, own = help_texts(PruningConfig), help_texts(MIRRORS[mirror][1])
    assert list(texts) == [option.name for option in fields(PruningConfig)]
    for name, text in texts.items():
        assert text
        assert own[name] == text, name


@pytest.mark.parametrize("mirror", MIRRORS)
def test_docstrings_describe_every_parameter(mirror):
    function, documented = MIRRORS[mirror]
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    assert list(help_texts(documented)) == parameters


def test_options_are_collected_from_arguments_and_cannot_be_changed():
    config = PruningConfig.from_arguments({**vars(PruningConfig(sparsity=0.5)), "model": None, "seed": 3})
    assert config == PruningConfig(sparsity=0.5, seed=3)
    with pytest.raises(FrozenInstanceError):
        config.seed = 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of sparsity, epsilon, max_drop, plan"),
        ({"epsilon": 0.1, "sparsity": 0.5}, "got sparsity=0.5 and epsilon=0.1"),
        ({"epsilon": 0.0}, "epsilon: expected > 0.*got 0.0"),
        ({"epsilon": -1.0}, "epsilon: expected > 0.*got -1.0"),
        ({"epsilon": float("nan")}, "epsilon: expected > 0"),
        ({"sparsity": 1.0}, "sparsity: expected .*got 1.0"),
        ({"sparsity": -0.1}, "sparsity: expected .*got -0.1"),
        ({"epsilon": 0.1, "scheme": "serial"}, "scheme: expected 'cascade' or 'parallel', got 'serial'"),
        ({"epsilon": 0.1, "num_samples": 5}, "num_samples: expected at least 32, got 5"),
        ({"epsilon": 0.1, "max_rows": 31}, "max_rows: expected at least 32, got 31"),
        ({"sparsity": "0.5"}, "sparsity: expected a number, got '0.5'"),
        ({"epsilon": 0.1, "max_memory": "3"}, "max_memory: expected a number, got '3'"),
        ({"sparsity": 0.5, "max_memory": 0}, "max_memory: expected > 0"),
        ({"sparsity": 0.5, "offload": "gpu"}, "offload: expected 'device' or 'cpu' or 'disk', got 'gpu'"),
        ({"sparsity": 0.5, "on_failure": "ignore"}, "on_failure: expected 'magnitude' or 'dense'"),
        ({"epsilon": 0.1, "per_layer": {"0": {"amount": 0.2}}}, r"per_layer: .*got \['amount'\]"),
        (
            {"epsilon": 0.1, "per_layer": {"0": {"epsilon": 0.2, "sparsity": 0.2}}},
            "epsilon, sparsity: expected one of them for a layer, got epsilon=0.2 and sparsity=0.2",
        ),
        (
            {"sparsity": 0.4, "pattern": "2:4"},
            "pattern '2:4': expected no other budget than its own sparsity 0.5, got sparsity=0.4",
        ),
        (
            {"epsilon": 0.4, "pattern": "2:4"},
            "pattern '2:4': expected no other budget than its own sparsity 0.5, got epsilon=0.4",
        ),
        ({"sparsity": 0.5, "solver": "Wanda"}, r"solver: expected a Solver, such as Cardinality\(\), got 'Wanda'"),
        ({"epsilon": 0.4, "pattern": "neuron"}, "pattern 'neuron': expected a sparsity, got epsilon=0.4"),
        ({"sparsity": 0.5, "pattern": "rows"}, "pattern: expected .* got 'rows'"),
        ({"sparsity": 0.5, "pattern": "neuron", "penalize_bias": True}, "penalize_bias: expected a pattern of single"),
        ({"sparsity": 0.5, "allocate": "best"}, "allocate: expected 'uniform' or .* got 'best'"),
        ({"sparsity": 0.5, "importance": "high"}, "importance: expected 'outgoing' or 'equal', got 'high'"),
        ({"max_drop": 0.1, "sparsity": 0.5}, "max_drop: expected no epsilon, sparsity or n:m pattern"),
        ({"max_drop": 0.1, "pattern": "2:4"}, "max_drop: expected no epsilon, sparsity or n:m pattern"),
        ({"max_drop": -0.1}, "max_drop: expected ≥ 0 .* got -0.1"),
        ({"max_drop": 0.1, "mode": "up"}, "mode: expected 'max' or 'min', got 'up'"),
        ({"sparsity": 0.5, "per_layer": {"0": {"min_sparsity": 0.9, "max_sparsity": 0.1}}}, "0 ≤ min ≤ max"),
        ({"sparsity": 0.5, "plan": "plan.yaml"}, "plan: expected no epsilon, sparsity or max_drop beside it"),
    ],
)
def test_unusable_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**arguments)


def test_the_default_solver_is_cardinality_at_a_sparsity_and_admm_at_an_epsilon():
    config = PruningConfig(sparsity=0.5)
    assert config.solver_for(None) == Cardinality()
    assert config.solver_for(0.1) == ADMM()
    assert PruningConfig(sparsity=0.5, solver=Wanda()).solver_for(0.1) == Wanda()


@pytest.mark.parametrize("solver", [Cardinality(), Magnitude(), Wanda(), SparseGPT()], ids=repr)
def test_methods_without_a_convex_program_take_an_epsilon_with_a_pattern(solver):
    assert PruningConfig(epsilon=0.1, pattern="per_neuron", solver=solver).budget.epsilon == 0.1


def test_the_common_budget_has_sparsity_zero_where_a_search_or_a_plan_determines_it():
    assert PruningConfig(sparsity=0.5, refit=False).budget.sparsity == 0.5
    assert PruningConfig(pattern="2:4").budget.sparsity == 0.5
    searched = PruningConfig(max_drop=0.1, pattern="neuron").budget
    assert (searched.sparsity, searched.pattern.name) == (0.0, "neuron")
    planned = PruningConfig(plan="plan.yaml", refit=False).budget
    assert (planned.sparsity, planned.pattern, planned.refit) == (0.0, Unstructured(), False)


def test_the_limit_of_rows_follows_the_number_of_samples():
    assert PruningConfig(sparsity=0.5, num_samples=100).rows_limit == DEFAULT_ROWS
    assert PruningConfig(sparsity=0.5, num_samples=2 * DEFAULT_ROWS).rows_limit == 2 * DEFAULT_ROWS
    assert PruningConfig(sparsity=0.5, max_rows=64).rows_limit == 64


def test_allocations_and_patterns_can_be_objects():
    config = PruningConfig(sparsity=0.5, allocate=UniformAllocation(), pattern=Unstructured())
    assert config.allocate == UniformAllocation()
    assert config.budget.pattern == Unstructured()
