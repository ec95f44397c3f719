"""Bounded memory: what waits on a shelf, what is measured, what happens where memory does not suffice."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_nettrim import ADMM, Cardinality, trim
from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.memory_model import (
    MIN_ROWS,
    max_rows_within,
    recording_bytes,
    recording_groups,
    solving_bytes,
)
from lightning_nettrim.calibration.reference import ReferenceOutputs
from lightning_nettrim.calibration.sampling import sample_inputs
from lightning_nettrim.layers import find_layers
from lightning_nettrim.pruning.pruner import Pruner
from lightning_nettrim.runtime.memory import GIB, MemoryMeter, available_memory, retry_with_less
from lightning_nettrim.runtime.offload import TensorStore

MIB = 2**20


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 4)
    ).eval()


X = torch.randn(1200, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned(**options):
    model = network()
    return model, trim(
        model,
        X.split(100),
        **({"sparsity": 0.6, "num_samples": 1000, "max_rows": 1000, "allocate": "uniform"} | options),
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("offload", ["device", "cpu", "disk"])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_where_samples_wait_changes_nothing(offload, scheme):
    assert same(pruned(offload=offload, scheme=scheme)[0], pruned(scheme=scheme)[0])


@pytest.mark.parametrize(("offload", "room"), [("disk", float("inf")), ("cpu", 1000.0)])
def test_what_is_on_disk_comes_back_and_its_files_go(tmp_path, monkeypatch, offload, room):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = TensorStore(offload, room)
    tensors = [torch.randn(100, 3), torch.arange(100), torch.ones(100, dtype=torch.bool), torch.ones(2).bfloat16()]
    kept = store.put(tensors)
    assert store.size == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert all(torch.equal(a, b) for a, b in zip(kept.load(), tensors, strict=True))
    del kept
    gc.collect()
    assert not list(tmp_path.rglob("*.safetensors"))
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_shelf_knows_what_it_holds():
    store = TensorStore("cpu", 1000)
    kept = [store.put([torch.ones(100)]) for _ in range(2)]
    assert store.size == 800
    kept.pop()
    gc.collect()
    assert store.size == 400


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_memory_is_handed_back_from_time_to_time(monkeypatch, offload):
    moved = []
    monkeypatch.setattr("lightning_nettrim.shelf.RELEASE", 4000)
    monkeypatch.setattr("lightning_nettrim.shelf.release", lambda: moved.append(len(put) + len(read)))
    store, put, read = TensorStore(offload), [], []
    for _ in range(10):
        put.append(store.put([torch.ones(200)]))
    assert moved == [5]
    moved.clear()
    for kept in put:
        read += kept.load()
    assert moved == ([] if offload == "cpu" else [10, 15])  # a file is a little longer than what is in it
    assert all(torch.equal(t, torch.ones(200)) for t in read)


def test_another_offload_is_refused():
    with pytest.raises(ValueError, match="offload: expected 'device' or 'cpu' or 'disk', got 'gpu'"):
        pruned(offload="gpu")
    with pytest.raises(ValueError, match="max_memory: expected > 0"):
        pruned(max_memory=0)
    with pytest.raises(ValueError, match="on_failure: expected 'magnitude' or 'dense'"):
        pruned(on_failure="ignore")


def test_held_batches_are_the_same_in_halves():
    model = network()
    held = sample_inputs(model, X.split(100), 500, 0)
    halves = held.with_smaller_batches()
    assert len(halves) == 2 * len(held)
    one, other = (torch.cat([replay.batch for replay in batches]) for batches in (held, halves))
    assert torch.equal(one, other)
    assert max(len(replay.batch) for replay in halves.with_smaller_batches()) <= 25


METERED = """
import torch
from lightning_nettrim.calibration.memory_model import Meter
meter = Meter(torch.device("cpu"))
laps = [meter.lap()]
block = torch.ones(64 * 2**20 // 4)
del block
print(*laps, meter.lap(), meter.lap(), meter.peak)
"""


HELD = """
import torch
from lightning_nettrim.calibration.memory_model import Meter
from lightning_nettrim.calibration.sampling import sample_inputs
meter = Meter(torch.device("cpu"))
held = hold(torch.nn.Identity(), (torch.ones(32, 3 * 224 * 224) for _ in range(40)), 1280, 0)
print(meter.lap())
"""


def measured(script):
    """The bytes that a process of its own prints, in MiB: nothing of other tests is given back meanwhile."""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return [int(word) / MIB for word in printed.split()]


def test_holes_between_held_inputs_are_handed_back():
    (peak,) = measured(HELD)
    assert 735 <= peak < 1.4 * 735


def test_the_meter_sees_what_was_used_and_given_back():
    before, used, after, peak = measured(METERED)
    assert before < 8
    assert 60 < used < 80
    assert after < 16
    assert peak == used
    assert free(torch.device("cpu")) > 100 * MIB


def test_rows_and_layers_are_chosen_by_what_fits():
    layers, _ = find_layers(network())
    rows = dict.fromkeys(layers, 8192)
    assert recording_groups(layers, rows, float("inf")) == [[*layers]]
    assert recording_groups(layers, rows, 0.0) == [[name] for name in layers]
    for layer in layers.values():
        assert max_rows_within(layer, 8192, float("inf")) == 8192
        assert max_rows_within(layer, 8192, 0.0) == MIN_ROWS
        room = solving_bytes(layer, 3000)
        few = max_rows_within(layer, 8192, room)
        assert (
            max(recording_bytes(layer, few, True), recording_bytes(layer, few, False), solving_bytes(layer, few))
            <= room
        )


def test_little_memory_means_fewer_rows_and_says_so(monkeypatch):
    monkeypatch.setattr("lightning_nettrim.trained.rows_within", lambda layer, rows, room: 500)
    model, result = pruned()
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)
    assert "0: 500 of 1000 rows fit into max_memory" in result.notes


def out_of_memory(patch, owner, name, times, error):
    """Make a function fail so many times."""
    function, failures = getattr(owner, name), []

    def failing(*args, **kwargs):
        if len(failures) < times:
            failures.append(1)
            raise error
        return function(*args, **kwargs)

    patch.setattr(owner, name, failing)


STAGES = [
    (ReferenceOutputs, "record"),
    (Activations, "tapes"),
    (Pruner, "pose"),
    (ReferenceOutputs, "distances"),
    (Cardinality, "solve"),
]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage[1])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_out_of_memory_goes_on_with_less(stage, error, allocate, monkeypatch, caplog):
    out_of_memory(monkeypatch, *stage, 2, error)
    model, result = pruned(allocate=allocate)
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)
    assert "out of memory while" in caplog.text
    assert any("out of memory while" in note for note in result.notes)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage[1])
def test_out_of_memory_for_good_leaves_the_network_dense(stage, monkeypatch):
    out_of_memory(monkeypatch, *stage, 10**9, ERRORS[0])
    model = network()
    with pytest.raises(torch.OutOfMemoryError):
        trim(model, X.split(100), sparsity=0.6, num_samples=1000, max_rows=1000)
    assert same(model, network())
    assert not any(module._forward_hooks for module in model.modules())


def test_other_errors_are_not_taken_for_want_of_memory():
    attempts = []

    def attempt():
        attempts.append(1)
        raise RuntimeError("shapes do not agree")

    with pytest.raises(RuntimeError, match="shapes"):
        retry_with_less(attempt, lambda: None)
    assert len(attempts) == 1


@pytest.mark.parametrize(
    ("options", "trouble"),
    [
        ({"sparsity": 0.7}, "nan"),
        ({"sparsity": 0.7}, "linalg"),
        ({"epsilon": 0.2}, "nan"),
        ({"epsilon": 0.2}, "linalg"),
        ({"epsilon": 0.2}, "unconverged"),
    ],
    ids=str,
)
@pytest.mark.parametrize("on_failure", ["magnitude", "dense"])
def test_a_failed_solve_falls_back(options, trouble, on_failure, monkeypatch):
    solver = Cardinality if "sparsity" in options else ADMM
    solve, budget = solver.solve, {"epsilon": None, "sparsity": None} | options

    def failing(self, problem, warm=None):
        if problem.W.shape[-1] != 20:
            return solve(self, problem, warm)
        if trouble == "linalg":
            raise torch.linalg.LinAlgError("no convergence")
        solution = solve(self, problem, warm)
        if trouble == "nan":
            solution.W.fill_(torch.nan)
        else:
            solution.W.zero_()
            solution.status.fill_(1)
        return solution

    monkeypatch.setattr(solver, "solve", failing)
    trained = network()
    model, result = pruned(**budget, on_failure=on_failure, importance="equal", refit=False)
    (report,) = [row for row in result.reports if row.fallback]
    assert report.name == "4"
    assert report.fallback in result.table()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    weight = model[4].weight
    reason = {"nan": "answered NaN or Inf", "linalg": "failed: no convergence", "unconverged": "did not converge"}
    assert f"for the solve {reason[trouble]}" in report.fallback
    if on_failure == "dense":
        assert report.fallback.startswith("left dense")
        assert torch.equal(weight, trained[4].weight)
    else:
        assert report.fallback.startswith("by magnitude and refit")
        kept = weight != 0
        assert kept.sum() < weight.numel()
        assert trained[4].weight[kept].abs().min() >= trained[4].weight[~kept].abs().max()
    others = [row for row in result.reports if row.name != "4"]
    assert all(row.zeros > 0 for row in others)


@pytest.mark.slow
def test_fifty_prunes_leak_nothing():
    x, dense = X[:200], network()
    model = copy.deepcopy(dense)

    def once(i):
        model.load_state_dict(dense.state_dict())
        allocate, solver = "uniform" if i % 5 else "global", Cardinality(steps=20)
        trim(model, x.split(50), sparsity=0.7, num_samples=200, max_rows=200, allocate=allocate, solver=solver)
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return tensors, hooks, MemoryMeter(torch.device("cpu"))._base, len(os.listdir("/proc/self/fd"))

    runs = [once(i) for i in range(50)]
    tensors, hooks, memory, files = zip(*runs, strict=True)
    assert len(set(tensors[2:])) == 1
    assert set(hooks) == {0}
    assert len(set(files[2:])) == 1
    assert max(memory[25:]) - max(memory[5:25]) < 8 * MIB


@pytest.mark.slow
def test_a_limit_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3000, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    batches = (torch.randn(256, 3000) for _ in range(64))
    result = trim(model, batches, sparsity=0.8, num_samples=16384, max_memory=0.75, allocate="uniform")
    assert result.peak_memory is not None
    assert result.peak_memory <= 1.2 * 0.75
    assert 0 < max(row.memory for row in result.reports) * GIB <= 1.2 * 0.75 * GIB
