"""The plan: which layers are pruned, and the reasons for those that are left dense."""

from __future__ import annotations

import torch
from networks import copied_state, mlp, mlp_batches
from torch import nn

from lightning_nettrim import Budget, Magnitude, SkippedLayer, trim
from lightning_nettrim.calibration.sampling import sample_inputs
from lightning_nettrim.pruning.plan import LayerSelection, coverage_warning, make_plan, zero_budgets


def plan_of(model, batches, **selection):
    common = selection.pop("common", Budget(sparsity=0.5))
    return make_plan(model, sample_inputs(model, batches, 500, 0), LayerSelection(common, **selection))


def test_targets_and_ignored_layers():
    model = mlp()
    before = copied_state(model)
    options = {"sparsity": 0.5, "allocate": "uniform", "solver": Magnitude()}
    result = trim(model, mlp_batches(), targets=["2", "4"], ignore=["4"], **options)
    assert [report.name for report in result.reports] == ["2"]
    assert {layer.name: layer.reason for layer in result.skipped} == {"0": "not among the targets", "4": "ignored"}
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[4].weight, before["4.weight"])


def test_a_layer_that_is_never_called_is_named():
    model = mlp()
    model[0].register_module("spare", nn.Linear(3, 3))
    result = trim(model, mlp_batches(), sparsity=0.5, allocate="uniform", solver=Magnitude())
    assert [(layer.name, layer.reason) for layer in result.skipped] == [("0.spare", "never called in the forward pass")]


def test_a_plan_has_layers_in_order_of_execution_with_their_budgets():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(8, 2), nn.Linear(20, 8)

        def forward(self, x):
            return self.second(self.first(x).relu())

    plan = plan_of(Reversed(), mlp_batches(), per_layer={"second": {"sparsity": 0.25}})
    assert list(plan.layers) == list(plan.budgets) == ["first", "second"]
    assert [budget.sparsity for budget in plan.budgets.values()] == [0.5, 0.25]
    assert plan.shared == ("first",)
    assert plan.rows == {"first": 500, "second": 500}
    assert str(plan.contexts["first"]) == "ReLU"


def test_layers_with_an_n_of_m_pattern_do_not_share_the_sparsity():
    plan = plan_of(mlp(), mlp_batches(), per_layer={"0": {"pattern": "2:4"}, "4": {"pattern": "neuron"}})
    assert plan.shared == ("2", "4")
    assert plan.budgets["0"].sparsity == 0.5


def test_zero_budgets_leave_every_layer_dense_in_its_pattern():
    plan = plan_of(mlp(), mlp_batches(), common=Budget(epsilon=0.1, refit=False), per_layer={"0": {"pattern": "2:4"}})
    budgets = zero_budgets(plan)
    assert [budget.sparsity for budget in budgets.values()] == [0.0] * 3
    assert [budget.epsilon for budget in budgets.values()] == [None] * 3
    assert [budget.refit for budget in budgets.values()] == [False] * 3
    assert budgets["0"].pattern.name == "2:4"


class Products(nn.Module):
    """A Linear layer, and a product with a parameter of its own."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own_weight, self.layer = nn.Parameter(torch.randn(20, 20)), nn.Linear(20, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x @ self.own_weight)


def test_a_product_without_a_layer_is_skipped_with_its_reason():
    plan = plan_of(Products(10), mlp_batches())
    reason = "Products multiplies by its own parameter own_weight, for which there is no layer type"
    assert plan.skipped == (SkippedLayer("", reason, 400),)


def test_a_warning_tells_which_weights_cannot_be_pruned():
    text = coverage_warning(plan_of(Products(10), mlp_batches()))
    assert text.startswith("only 33% of the values in weight matrices are in layers that can be pruned ((the model): ")
    assert not coverage_warning(plan_of(Products(20), mlp_batches()))
    assert not coverage_warning(plan_of(mlp(), mlp_batches(), ignore=["0", "2"]))  # by choice


def test_the_warning_is_among_the_notes_of_the_result():
    result = trim(Products(10), mlp_batches(), sparsity=0.5, allocate="uniform")
    assert any(note.startswith("only 33% of the values") for note in result.notes)
    assert not trim(Products(20), mlp_batches(), sparsity=0.5, allocate="uniform").notes
