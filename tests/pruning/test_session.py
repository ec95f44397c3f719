"""The calibration session: what it records and keeps, and how it does with less memory."""

from __future__ import annotations

import logging

import pytest
import torch
from networks import (
    conv2d_inputs,
    conv2d_network,
    copied_state,
    count_hooks,
    equal_states,
    mlp,
    mlp_batches,
    outputs,
)
from torch import nn

from lightning_nettrim import Budget, CalibrationSource, Cardinality, PruningConfig, trim
from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.memory_model import MIN_ROWS, max_rows_within, solving_bytes
from lightning_nettrim.pruning.session import with_fewer_rows, with_smaller_batches
from lightning_nettrim.pruning.session_setup import calibrate, start_session
from lightning_nettrim.runtime.memory import GIB
from lightning_nettrim.runtime.run_context import RunContext

X = conv2d_inputs()


def session_of(model, batches, **options):
    config = PruningConfig(**({"sparsity": 0.5, "num_samples": 1000, "max_rows": 1000} | options))
    return calibrate(model, CalibrationSource(batches), config)


def pruned(**options):
    model = conv2d_network()
    own = {"sparsity": 0.6, "num_samples": 1000, "max_rows": 1000, "allocate": "uniform"}
    return model, trim(model, X.split(100), **(own | options))


def test_a_session_records_the_trained_responses_and_changes_nothing():
    model, data = mlp(torch.float64), mlp_batches(dtype=torch.float64)
    before = copied_state(model)
    session = session_of(model, data)
    assert equal_states(model, before)
    assert count_hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert session.last == "4"
    assert session.reference.rows == {"0": 500, "2": 500, "4": 500}
    for name, end in (("0", 2), ("2", 4), ("4", 5)):
        trained = outputs(model[:end], data)
        assert session.reference.norms[name] == pytest.approx(float(trained.norm()), rel=1e-9)
        assert float(session.reference[name].norm()) == pytest.approx(float(trained.norm()), rel=1e-9)


def test_a_session_has_the_numbers_of_prunable_weights():
    session = session_of(mlp(), mlp_batches(), per_layer={"2": {"epsilon": 0.1}, "4": {"max_sparsity": 0.75}})
    assert session.sizes() == {"0": 600, "2": 480, "4": 64}
    assert session.shared_sizes() == {"0": 600, "4": 64}
    assert session.kept_bounds() == {"0": (1, 600), "4": (16, 64)}
    budgets = session.budgets_keeping({"0": 150})
    assert budgets == session.plan.budgets | {"0": Budget(sparsity=0.75)}
    assert session.prunable_parameters == ["0.weight", "2.weight", "4.weight"]
    with_bias = session_of(mlp(), mlp_batches(), penalize_bias=True)
    assert with_bias.sizes() == {"0": 630, "2": 496, "4": 68}
    assert "0.bias" in with_bias.prunable_parameters


def test_trained_weights_and_snapshots_are_restored():
    model = conv2d_network()
    trained = copied_state(model)
    session = session_of(model, X.split(100))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        model[1].running_var.mul_(3)
    changed, snapshot = copied_state(model), session.snapshot()
    session.restore()
    assert equal_states(model, trained)
    session.restore(snapshot)
    assert equal_states(model, changed)


def test_an_error_in_a_session_restores_the_trained_weights_and_is_logged(caplog):
    model = mlp()
    before, session = copied_state(model), session_of(model, mlp_batches())
    session.run.progress.activity = "testing"

    def change_and_interrupt():
        with session.restored_on_error(), torch.no_grad():
            model[2].weight.zero_()
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        change_and_interrupt()
    assert equal_states(model, before)
    assert "KeyboardInterrupt while testing: all of 0, 2, 4 have their trained weights again" in caplog.text


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_where_samples_are_stored_changes_nothing(scheme):
    expected, _ = pruned(scheme=scheme)
    for offload in ("device", "cpu", "disk"):
        assert equal_states(pruned(offload=offload, scheme=scheme)[0], expected), offload


# --- less memory


def test_little_memory_means_fewer_rows_and_a_note(monkeypatch):
    monkeypatch.setattr("lightning_nettrim.pruning.session_setup.max_rows_within", lambda layer, rows, available: 500)
    model, result = pruned()
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)
    assert "0: 500 of 1000 rows fit into max_memory" in result.notes


def test_the_rows_of_each_layer_are_those_that_fit_into_the_available_memory():
    model = conv2d_network()
    whole = session_of(model, X.split(100))
    available = solving_bytes(whole.plan.layers["4"], 600)
    run = RunContext(available=available)
    session = start_session(model, whole.config, whole.plan, whole.activations.calibration_set, run)
    fitting = {name: max_rows_within(layer, 1000, available) for name, layer in whole.plan.layers.items()}
    assert MIN_ROWS <= fitting["4"] < 1000
    assert session.reference.rows == session.activations.rows == fitting
    assert run.notes == [f"{name}: {n} of 1000 rows fit into max_memory" for name, n in fitting.items() if n < 1000]


def test_smaller_batches_have_the_same_inputs():
    session = session_of(conv2d_network(), X.split(100))
    smaller = with_smaller_batches(session)
    sets = [s.activations.calibration_set for s in (session, smaller)]
    assert len(sets[1]) == 2 * len(sets[0])
    assert torch.equal(*(torch.cat([batch.batch for batch in calibration_set]) for calibration_set in sets))
    assert smaller.reference is session.reference
    assert session.run.notes == ["out of memory while recording the responses of the trained network: half the inputs"
                                 " at a time"]  # fmt: skip


@pytest.mark.parametrize("names", [("4",), ()])
def test_fewer_rows_are_recorded_again_with_the_trained_weights(names):
    model = conv2d_network()
    session = session_of(model, X.split(100), importance="equal")
    trained = session.reference["4"]
    with torch.no_grad():
        model[4].weight.zero_()
    now = copied_state(model)
    with evaluation_mode(model):
        reduced = with_fewer_rows(session, *names)
    assert equal_states(model, now)
    expected = {"0": 1000, "4": 500, "6": 1000} if names else {"0": 500, "4": 500, "6": 500}
    assert reduced.reference.rows == expected
    norm = float(reduced.reference["4"].square().mean().sqrt())
    assert norm == pytest.approx(float(trained.square().mean().sqrt()), rel=0.1)  # of other rows of the same responses
    assert session.reference.rows == {"0": 1000, "4": 1000, "6": 1000}
    assert f"half the rows of {'4' if names else 'all layers'}" in session.run.notes[0]


@pytest.mark.slow
def test_a_limit_of_memory_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3000, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    batches = (torch.randn(256, 3000) for _ in range(64))
    solver = Cardinality(max_steps=10)  # the memory does not depend on the number of steps
    result = trim(model, batches, sparsity=0.8, num_samples=16384, max_memory=0.75, allocate="uniform", solver=solver)
    assert result.peak_memory is not None
    assert result.peak_memory <= 1.2 * 0.75
    assert 0 < max(row.memory for row in result.reports) * GIB <= 1.2 * 0.75 * GIB
