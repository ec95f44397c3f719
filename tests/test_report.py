"""The report as text and as JSON."""

from __future__ import annotations

import json
import math

import torch

from lightning_nettrim.pruning.results import LayerReport, PruningResult, SkippedLayer, aligned, as_json, comparison


def report(name="fc1", **changes):
    fields = {
        "name": name, "type": "Linear", "shape": (3, 4), "sparsity": 0.75, "zeros": 9, "relative_error": 0.05,
        "discrepancy": 0.06, "objective": 2.0, "bound": 1.9, "duality_gap": 0.05, "violation": 0.0, "epsilon": 0.1,
        "pattern": "unstructured",         "steps": 25, "seconds": 1.5, "status": "CONVERGED",
    }  # fmt: skip
    return LayerReport(**(fields | changes))


def result(*reports):
    skipped = (SkippedLayer("conv", "Conv2d is not supported: only Linear is", 12),)
    return PruningResult(reports, skipped, {"fc1.weight": torch.ones(3, 4) > 0}, 0.75, 0.7, 3.0, None, 50.0, 2.0)


def test_json_holds_every_field_and_nothing_that_json_lacks():
    written = as_json(result(report(), report("fc2", objective=math.nan)), {"dense": {"acc": 0.9}}, {"a": object}, {})
    again = json.loads(json.dumps(written, allow_nan=False))
    assert set(again) == {"layers", "skipped", "total", "trials", "notes", "metrics", "arguments", "versions"}
    assert again["layers"][0]["shape"] == [3, 4]
    assert again["layers"][1]["objective"] is None
    assert again["skipped"] == [{"name": "conv", "reason": "Conv2d is not supported: only Linear is", "weights": 12}]
    assert again["total"]["end_to_end_bound"] is None
    assert again["total"]["sparsity"] == 0.75
    assert again["metrics"]["dense"]["acc"] == 0.9


def test_scalars_leave_out_what_is_not_known():
    assert "duality_gap" in report().scalars()
    assert "duality_gap" not in report(duality_gap=None, violation=None).scalars()


def test_the_table_names_layers_totals_and_reasons():
    text = result(report(), report("a.long.name", duality_gap=None, violation=None)).table()
    head, rule, first, second, total, skipped = text.splitlines()
    assert len(head) == len(rule) == len(first) == len(second)
    assert first.startswith("fc1 ")
    assert "–" in second
    assert "75.00% zeros" in total
    assert skipped == "skipped conv: Conv2d is not supported: only Linear is"


def test_comparison_shows_the_difference_of_common_metrics():
    lines = comparison({"acc": 0.98, "only": 1.0}, {"acc": 0.97}).splitlines()
    assert len(lines) == 3
    assert lines[2].split() == ["acc", "0.9800", "0.9700", "-0.0100"]


def test_columns_are_aligned():
    assert aligned([("a", "bb"), ("ccc", "d")]) == "a    bb\n---  --\nccc   d"
