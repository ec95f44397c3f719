"""Nothing leaves the device within a step; the host waits only where this table says, on CUDA tensors without a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from fake_cuda import CUDA, CudaTensor, cuda_with_values, fake_cuda, on_cuda, without_values
from problems import layer

from lightning_nettrim import ADMM, Cardinality, LayerProblem, Magnitude, refit, solve
from lightning_nettrim.solvers.cardinality import STEPS_PER_RHO, Spectrum, compute_spectrum

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="this version of torch has no CUDA tensors without a driver",
)
OPTIONS = {
    "free bias": {"bias": True},
    "linear": {"relu": False},
    "balls per neuron": {"per_neuron": True, "bias": True},
    "two bounds": {"bounds": (0.0, 0.7)},
    "cascade": {"cascade": True, "residual": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def stack(members):
    """Problems of one shape as a batch."""
    names = ("X", "Y", "W", "epsilon", "Omega")
    return LayerProblem(**{n: torch.stack([getattr(m, n) for m in members]) for n in names}, penalty=members[0].penalty)


def without_values_of(state):
    """A state of the same shapes on CUDA, without values."""
    return type(state)(*(torch.empty(t.shape, dtype=t.dtype, device=CUDA) for t in state))


@each_option
@pytest.mark.parametrize("tf32", [False, True])
def test_a_step_and_a_certificate_of_admm_stay_on_the_device(options, tf32):
    problem, solver = layer(dtype=torch.float32, **options).flattened(), ADMM(tf32=tf32)
    initial = solver.init(problem)
    with fake_cuda() as record:
        on_device, state = without_values(problem), without_values_of(initial)
        assert on_device.free_rows.device == CUDA  # its size depends on data: a symbol
        record.found.clear()
        state = solver.step(on_device, state)
        assert {t.device for t in state} == {CUDA}
        assert [tuple(t.shape) for t in state] == [tuple(t.shape) for t in initial]
        assert not record.found
        state = solver.adapt(on_device, state, torch.ones(1, device=CUDA))
        assert not record.found


@each_option
def test_a_certificate_stays_on_the_device(options):
    problem, solver = layer(dtype=torch.float32, **options).flattened(), ADMM()
    with cuda_with_values() as record:
        problem = on_cuda(problem)
        state = solver.init(problem)
        solver.certify(problem, state)
        record.found.clear()
        certificate = solver.certify(problem, solver.step(problem, state))
    assert not record.found
    assert certificate.bound.device == CUDA


def test_cardinality_reads_each_time_rho_grows_if_its_support_may_settle(monkeypatch):
    monkeypatch.setattr("lightning_nettrim.solvers.cardinality.MIN_BLOCKS_TO_SETTLE", 0)
    problem = replace(layer(dtype=torch.float32), sparsity=0.8, epsilon=None).flattened()
    spectrum = compute_spectrum(problem)
    with cuda_with_values() as record:
        W, steps = Cardinality()._run(on_cuda(problem), Spectrum(*map(CudaTensor, spectrum)))
    assert torch.equal(W.values, Cardinality()._run(problem, spectrum)[0])
    assert record.found["solvers.cardinality._run", "read"] == -(-steps // STEPS_PER_RHO) > 1
    assert steps < Cardinality().max_steps


@each_option
def test_the_steps_of_cardinality_stay_on_the_device(options):
    problem = replace(layer(dtype=torch.float32, **options), sparsity=0.8, epsilon=None).flattened()
    spectrum, found = compute_spectrum(problem), Counter()
    with cuda_with_values() as record:
        on_device = on_cuda(problem)
        assert on_device.kept_blocks == problem.kept_blocks
        assert torch.equal(on_device.free_rows.values, problem.free_rows)
        found.update(record.found)
        W, _ = Cardinality(max_steps=30)._run(on_device, Spectrum(*map(CudaTensor, spectrum)))
        record.found.subtract(found)
    assert set(record.found.values()) == {0}
    assert W.device == CUDA


SETUP = {
    ("core.validation._check_tensors", "read"): 5,
    ("core.validation._check_numbers", "read"): 2,
    ("core.problem.free_rows", "shape"): 1,
    ("core.problem.penalized_rows", "shape"): 1,
}
"""Before the first step of a problem with a free bias: values are checked, rows are counted."""


def record_of(problem, work):
    """What ``work`` records, and its result, equal to that on the CPU."""
    with cuda_with_values() as record:
        result = work(on_cuda(problem))
    expected = work(problem)
    assert torch.equal(result.W.values, expected.W)
    return record.found, expected


def test_a_solve_of_admm_reads_once_in_each_evaluation_of_the_certificate():
    found, solution = record_of(layer(dtype=torch.float32, bias=True), lambda p: solve(p, ADMM()))
    factor = {("solvers.admm._factor", "factorization"): 1, ("solvers.admm._mean_energy", "factorization"): 1}
    evaluations = {("solvers.base.iterate", "to host"): int(solution.steps) // 25}
    assert found == SETUP | factor | evaluations


def test_problems_of_a_batch_that_end_early_are_dropped_by_indices_from_the_host():
    gains = ((0, 0.02), (1, 0.1), (2, 0.7))
    members = [layer(dtype=torch.float32, bias=True, seed=seed, gain=gain) for seed, gain in gains]
    found, solution = record_of(stack(members), lambda p: solve(p, ADMM()))
    evaluations = solution.steps // 25
    drops = len(evaluations.unique()) - 1
    assert found == SETUP | {
        ("core.problem.free_rows", "shape"): 1 + drops,
        ("solvers.admm._factor", "factorization"): 3,
        ("solvers.admm._mean_energy", "factorization"): 1,
        ("solvers.base.iterate", "to host"): int(evaluations.max()),
        ("solvers.base._indices", "to device"): 2 * drops,
    }
    assert drops > 0


REFIT = {
    ("solvers.refitting._conjugate_gradients", "read"),
    ("solvers.refitting._descend", "read"),
    ("solvers.refitting.refit", "read"),
}


def test_a_solve_of_cardinality_reads_before_its_steps_and_in_its_comparison_with_magnitude():
    problem = replace(layer(dtype=torch.float32, bias=True), sparsity=0.8, epsilon=None)
    found, _ = record_of(problem, lambda p: solve(p, Cardinality()))
    comparison = {("solvers.cardinality._better_of_magnitude", "read"), *REFIT}
    assert set(found) - comparison == set(SETUP) | {("solvers.cardinality.compute_spectrum", "factorization")}
    assert comparison <= set(found)
    assert found["solvers.cardinality.compute_spectrum", "factorization"] == 2
    assert found["core.problem.free_rows", "shape"] == 1


def test_a_refit_reads_in_each_direction_and_halving():
    problem = replace(layer(dtype=torch.float32, bias=True), sparsity=0.8, epsilon=None)
    magnitude = solve(problem, Magnitude())
    with cuda_with_values() as record:
        W = refit(on_cuda(problem), CudaTensor(magnitude.W))
    assert torch.equal(W.values, refit(problem, magnitude.W))
    assert set(record.found) == REFIT
