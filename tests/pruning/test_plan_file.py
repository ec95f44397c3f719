"""The plan as a file: written by a dry run, edited, read back."""

from __future__ import annotations

import pytest
import torch
import yaml
from networks import copied_state, equal_states, mlp_batches, wide_mlp

from lightning_nettrim import trim


def test_a_plan_is_read_back_and_prunes_to_the_same_network(tmp_path):
    options = {"ignore": ["4"], "per_layer": {"2": {"pattern": "1:2"}}}
    model = wide_mlp()
    before = copied_state(model)
    dry = trim(model, mlp_batches(), sparsity=0.6, dry_run=True, **options)
    assert equal_states(model, before)
    assert dry.reports == ()
    path = tmp_path / "plan.yaml"
    path.write_text(dry.plan)
    one, other = wide_mlp(), wide_mlp()
    result = trim(one, mlp_batches(), sparsity=0.6, **options)
    trim(other, mlp_batches(), plan=path)
    assert result.plan == dry.plan
    assert equal_states(other, one)
    assert torch.equal(other[4].weight, wide_mlp()[4].weight)


def test_a_plan_names_what_follows_each_layer_and_what_is_skipped():
    plan = yaml.safe_load(trim(wide_mlp(), mlp_batches(), sparsity=0.6, dry_run=True, ignore=["4"]).plan)
    assert {name: row["followed_by"] for name, row in plan["layers"].items()} == {"0": "ReLU", "2": "ReLU"}
    assert plan["layers"]["0"]["shape"] == [30, 20]
    assert plan["skipped"] == {"4": "ignored"}


def test_an_edited_plan_is_followed(tmp_path):
    dry = yaml.safe_load(trim(wide_mlp(), mlp_batches(), sparsity=0.6, dry_run=True).plan)
    dry["layers"]["0"]["sparsity"] = 0.25
    del dry["layers"]["2"]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(dry))
    model = wide_mlp()
    result = trim(model, mlp_batches(), plan=path)
    assert [report.name for report in result.reports] == ["0", "4"]
    assert result.reports[0].sparsity == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: {'9': {sparsity: 0.5}}", "plan: expected layers of this model, got '9'"),
        ("layers: {'0': {sparsity: 0.5, shape: [3, 3]}}", r"plan: 0: expected shape \[30, 20\], got \[3, 3\]"),
        ("layers: {'0': {sparsity: 1.5}}", "sparsity: expected .* got 1.5"),
        ("layers: {'0': {amount: 0.5}}", "per_layer: expected the options .* got .'amount'"),
        ("layers: [", "plan: expected a plan.yaml"),
        ("{}", "plan: expected a plan.yaml"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(tmp_path, text, message):
    path, model = tmp_path / "plan.yaml", wide_mlp()
    path.write_text(text)
    before = copied_state(model)
    with pytest.raises(ValueError, match=message):
        trim(model, mlp_batches(), plan=path)
    assert equal_states(model, before)


def test_other_selections_beside_a_plan_are_refused(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("layers: {'0': {sparsity: 0.5}}")
    with pytest.raises(ValueError, match="plan: expected no targets, ignore or per_layer beside it"):
        trim(wide_mlp(), mlp_batches(), plan=path, ignore=["2"])
