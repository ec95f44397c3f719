"""Results as text, as JSON, and as objects."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from networks import mlp, mlp_batches

from lightning_nettrim import LayerReport, Magnitude, PruningResult, SkippedLayer, Trial, trim
from lightning_nettrim.pruning.report_json import SCHEMA_VERSION, to_json
from lightning_nettrim.pruning.results import aligned, comparison, layer_table

UNCERTIFIED = {"objective": None, "bound": None, "duality_gap": None, "violation": None, "status": None}


def report(name="fc1", **changes):
    fields = {
        "name": name, "type": "Linear", "shape": (3, 4), "sparsity": 0.75, "zeros": 9, "local_error": 0.05,
        "end_to_end_error": 0.06, "objective": 2.0, "bound": 1.9, "duality_gap": 0.05, "violation": 0.0,
        "epsilon": 0.1, "pattern": "unstructured", "steps": 25, "seconds": 1.5, "status": "CONVERGED",
    }  # fmt: skip
    return LayerReport(**(fields | changes))


def result(*reports, **changes):
    fields = {
        "reports": reports, "skipped": (SkippedLayer("conv", "Conv2d is not supported: only Linear is", 12),),
        "masks": {"fc1.weight": torch.ones(3, 4) > 0}, "sparsity": 0.75, "model_sparsity": 0.7,
        "end_to_end_error": 0.06, "end_to_end_bound": None, "output_distance": 3.0, "output_norm": 50.0, "seconds": 2.0,
    }  # fmt: skip
    return PruningResult(**(fields | changes))


# --- JSON


def test_json_has_every_field_and_no_value_that_json_lacks():
    written = to_json(result(report(), report("fc2", objective=math.nan)), {"dense": {"acc": 0.9}}, {"a": object}, {})
    again = json.loads(json.dumps(written, allow_nan=False))
    assert set(again) == {
        "schema_version", "layers", "skipped", "total", "recovery", "trials", "notes", "metrics", "arguments",
        "versions",
    }  # fmt: skip
    assert again["schema_version"] == SCHEMA_VERSION == 1
    assert again["layers"][0]["shape"] == [3, 4]
    assert again["layers"][1]["objective"] is None
    assert again["skipped"] == [{"name": "conv", "reason": "Conv2d is not supported: only Linear is", "weights": 12}]
    assert again["total"]["end_to_end_error"] == 0.06
    assert again["total"]["end_to_end_bound"] is None
    assert again["total"]["sparsity"] == 0.75
    assert again["metrics"]["dense"]["acc"] == 0.9


def test_json_of_a_pruned_network_has_its_numbers():
    pruned = trim(mlp(), mlp_batches(), epsilon=0.2)
    again = json.loads(json.dumps(to_json(pruned, {}, {}, {}), allow_nan=False))
    assert again["schema_version"] == SCHEMA_VERSION
    assert again["total"] == pruned.total()
    assert [layer["local_error"] for layer in again["layers"]] == [report.local_error for report in pruned.reports]
    assert again["layers"][-1]["end_to_end_error"] == again["total"]["end_to_end_error"]


def test_the_totals_are_the_numbers_of_the_whole_network():
    assert result(report(), peak_memory=0.5).total() == {
        "sparsity": 0.75, "model_sparsity": 0.7, "end_to_end_error": 0.06, "end_to_end_bound": None,
        "output_distance": 3.0, "output_norm": 50.0, "seconds": 2.0, "peak_memory": 0.5,
    }  # fmt: skip


# --- text


def test_scalars_are_the_known_numbers():
    assert report().scalars() == {
        "sparsity": 0.75, "local_error": 0.05, "end_to_end_error": 0.06, "duality_gap": 0.05, "violation": 0.0,
        "steps": 25.0, "seconds": 1.5,
    }  # fmt: skip
    assert report(memory=0.5).scalars()["memory"] == 0.5
    assert "duality_gap" not in report(**UNCERTIFIED).scalars()


def test_the_line_of_a_layer():
    start = "fc1: sparsity 75.0%, local error 5.00%"
    assert report().line() == f"{start}, duality gap 5.0e-02, 25 steps, 1.5 s, CONVERGED"
    assert report(**UNCERTIFIED).line() == f"{start}, 25 steps, 1.5 s"
    assert report(memory=0.25, fallback="left dense, because of NaN").line().endswith(
        "1.5 s, 0.25 GiB, CONVERGED; left dense, because of NaN"
    )  # fmt: skip


def test_the_table_has_layers_totals_and_reasons():
    text = result(report(), report("a.long.name", duality_gap=None, violation=None)).table()
    head, rule, first, second, total, skipped = text.splitlines()
    assert len(head) == len(rule) == len(first) == len(second)
    assert first.startswith("fc1 ")
    assert "–" in second
    assert "sparsity of the pruned layers 75.00%, of the whole model 70.00%; end-to-end error 0.0600;" in total
    assert skipped == "skipped conv: Conv2d is not supported: only Linear is"


def test_columns_that_no_layer_has_are_left_out():
    certified, other = layer_table([report()]).splitlines()[0], layer_table([report(**UNCERTIFIED)]).splitlines()[0]
    titles = ["layer", "weight shape", "zeros", "sparsity", "local error", "end-to-end error"]
    assert certified.split("  ")[0].strip() == "layer"
    assert [title for title in (*titles, "duality gap", "violation", "steps", "seconds", "status")
            if title not in certified] == []  # fmt: skip
    assert [title for title in (*titles, "steps", "seconds") if title not in other] == []
    assert [title for title in ("duality gap", "violation", "status") if title in other] == []
    assert "status" in layer_table([report(), report(**UNCERTIFIED)])
    assert "status" in layer_table([])


def test_the_table_has_bound_memory_fallbacks_notes_and_trials():
    lines = result(
        report(fallback="left dense, because of NaN"), end_to_end_bound=0.08, peak_memory=0.5, notes=("a note",),
        trials=(Trial(0.0, 0.9, True), Trial(0.9, 0.8, False)),
    ).table().splitlines()  # fmt: skip
    assert "end-to-end error 0.0600 (certified: at most 0.0800); 2.0 s; peak of additional memory 0.50 GiB" in lines[3]
    assert lines[4:8] == [
        "fc1: left dense, because of NaN",
        "a note",
        "trial at sparsity 0.00%: metric 0.9000, within the drop",
        "trial at sparsity 90.00%: metric 0.8000, not within the drop",
    ]


def test_a_comparison_has_the_difference_of_common_metrics():
    lines = comparison({"dense": {"acc": 0.98, "only": 1.0}, "pruned": {"acc": 0.97}}).splitlines()
    assert len(lines) == 3
    assert lines[2].split() == ["acc", "0.9800", "0.9700", "-0.0100"]


def test_a_comparison_of_several_networks_has_the_difference_of_the_last_one():
    sides = {"dense": {"acc": 0.98}, "pruned": {"acc": 0.9}, "finetuned": {"acc": 0.97}}
    head, _, row = comparison(sides).splitlines()
    assert head.split() == ["metric", "dense", "pruned", "finetuned", "difference"]
    assert row.split() == ["acc", "0.9800", "0.9000", "0.9700", "-0.0100"]


def test_columns_are_aligned():
    assert aligned([("a", "bb"), ("ccc", "d")]) == "a    bb\n---  --\nccc   d"


# --- objects


def test_results_can_be_copied_and_pickled():
    pruned = trim(mlp(), mlp_batches(), sparsity=0.5, allocate="uniform", solver=Magnitude())
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert other.reports == pruned.reports
        assert all(torch.equal(other.masks[name], mask) for name, mask in pruned.masks.items())


def test_the_result_of_a_dry_run_has_no_layers():
    dry = PruningResult.of_dry_run((SkippedLayer("conv", "ignored"),))
    assert dry.reports == ()
    assert dry.masks == {}
    assert dry.end_to_end_error == dry.output_distance == pytest.approx(0)
    assert "skipped conv: ignored" in str(dry)
