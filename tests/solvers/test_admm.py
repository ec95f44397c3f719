"""ADMM for the convex program, against an independent solver and by its certificate."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from problems import VARIANTS, layer, optimum
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_nettrim import ADMM, LayerProblem, Status, solve
from lightning_nettrim.core.certificate import violation

each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@each_variant
def test_reaches_the_optimum_of_an_interior_point_solver(options):
    problem = layer(**options)
    solution = solve(problem, ADMM(atol=1e-4, max_steps=10_000))
    best = optimum(problem)
    assert solution.status == Status.CONVERGED
    assert float(solution.objective) == pytest.approx(best, rel=1e-3, abs=1e-9)
    assert float(violation(problem, solution.W)) <= 1e-4
    assert float(solution.bound) <= best * (1 + 1e-6) + 1e-9


@each_variant
def test_single_precision_is_certified(options):
    problem = layer(**options, dtype=torch.float32)
    solution = solve(problem, ADMM())
    assert solution.status == Status.CONVERGED
    assert abs(float(solution.gap)) <= 1e-3
    assert float(violation(problem, solution.W)) <= 1e-3
    assert solution.W.dtype == torch.float32


def test_the_defaults_are_accurate_to_a_tenth_of_a_percent():
    problem = layer(P=500, N=40, M=20, bias=True)
    solution = solve(problem, ADMM())
    assert float(solution.objective) == pytest.approx(optimum(problem), rel=1e-3)
    norm = problem.Y.norm()
    assert float(violation(problem, solution.W) * problem.epsilon / norm) <= 1e-4


def test_the_certificate_is_that_of_the_weights():
    problem = layer(bias=True)
    solution = solve(problem, ADMM())
    torch.testing.assert_close(solution.objective, problem.objective(solution.W), rtol=0, atol=0)
    torch.testing.assert_close(solution.violation, violation(problem, solution.W), rtol=0, atol=0)
    assert solution.objective >= solution.bound
    assert (solution.W == 0).sum() > 0.3 * solution.W.numel()


@pytest.mark.parametrize("options", [{"bias": True}, {"per_neuron": True}, {"relu": False}, {"cascade": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_bitwise_equal_to_its_members(options, dtype):
    gains = ((0, 0.02), (1, 0.1), (2, 0.7))
    members = [layer(P=300, N=50, M=16, seed=seed, gain=gain, dtype=dtype, **options) for seed, gain in gains]
    solver = ADMM(check_every=5)
    batched = solve(stack(members), solver)
    alone = [solve(member, solver) for member in members]
    assert batched.steps.tolist() == [int(s.steps) for s in alone]
    assert batched.steps.unique().numel() > 1
    for name in ("W", "objective", "bound", "violation"):
        assert torch.equal(getattr(batched, name), torch.stack([getattr(s, name) for s in alone])), name


def stack(members):
    """Problems of one shape as a batch."""
    names = [n for n in ("X", "Y", "W", "epsilon", "Omega", "V") if getattr(members[0], n) is not None]
    tensors = {n: torch.stack([getattr(m, n) for m in members]) for n in names}
    return LayerProblem(**tensors, penalty=members[0].penalty)


def test_two_batch_dimensions_and_one_x_for_several_radii():
    member = layer(bias=True)
    gains = torch.tensor([[0.05, 0.1, 0.2], [0.3, 0.4, 0.5]], dtype=torch.float64)
    names = ("X", "Y", "W", "Omega")
    shared = {n: getattr(member, n).expand(2, 3, *getattr(member, n).shape) for n in names}
    problem = LayerProblem(**shared, epsilon=gains * member.Y.norm(), penalty=member.penalty)
    batched = solve(problem, ADMM())
    assert batched.W.shape == (2, 3, *member.W.shape)
    assert batched.status.eq(Status.CONVERGED).all()
    one = solve(replace(member, epsilon=gains[1, 0] * member.Y.norm()), ADMM())
    torch.testing.assert_close(batched.W[1, 0], one.W, rtol=1e-6, atol=1e-9)


def test_a_batch_of_layers_with_balls_per_neuron():
    members = [layer(seed=seed, per_neuron=True, M=4) for seed in (0, 1)]
    batch = stack(members)
    batched = solve(batch, ADMM())
    for objective, member in zip(batched.objective, members, strict=True):
        assert float(objective) == pytest.approx(optimum(member), rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("options", [{"bias": True}, {"relu": False}, {"cascade": True, "bias": True}])
def test_a_sparsity_is_exact(sparsity, options):
    problem = replace(layer(**options), epsilon=None, sparsity=sparsity)
    solution = solve(problem, ADMM())
    prunable = solution.W[(problem.lambdas > 0).squeeze(-1)]
    assert int((prunable == 0).sum()) == round(sparsity * prunable.numel())
    assert int((prunable != 0).sum()) == problem.nonzeros
    assert solution.status == Status.CONVERGED


def test_a_sparsity_is_exact_in_each_member_of_a_batch():
    members = [layer(seed=seed) for seed in (0, 1)]
    X, Y, W, Omega = (torch.stack([getattr(m, name) for m in members]) for name in ("X", "Y", "W", "Omega"))
    solution = solve(LayerProblem(X, Y, W, Omega=Omega, sparsity=0.7), ADMM())
    assert (solution.W != 0).sum((-2, -1)).tolist() == [round(0.3 * 480)] * 2


def test_a_larger_radius_gives_more_zeros_and_a_smaller_norm():
    problem = layer()
    solutions = [solve(replace(problem, epsilon=gain * problem.Y.norm()), ADMM()) for gain in (0.05, 0.2, 0.6)]
    zeros = [int((s.W == 0).sum()) for s in solutions]
    norms = [float(s.objective) for s in solutions]
    assert zeros == sorted(zeros)
    assert norms == sorted(norms, reverse=True)


def test_too_few_steps_are_reported():
    solution = solve(layer(), ADMM(max_steps=10))
    assert solution.status == Status.MAX_STEPS
    assert int(solution.steps) == 10
    assert torch.isfinite(solution.gap)


def test_an_infeasible_program_is_reported():
    X = torch.ones(4, 1, dtype=torch.float64)
    Y = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    problem = LayerProblem(X, Y, torch.ones(1, 1, dtype=X.dtype), epsilon=torch.tensor(0.1, dtype=X.dtype))
    assert solve(problem, ADMM(max_steps=20_000)).status == Status.INFEASIBLE


def test_an_overflow_is_reported_and_returns_the_trained_weights():
    problem = layer(dtype=torch.float32, scale=1e30)
    solution = solve(problem, ADMM())
    assert solution.status == Status.NONFINITE
    assert torch.equal(solution.W, problem.W)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_steps": 0}, "max_steps"), ({"rtol": 0.0}, "rtol"), ({"relaxation": 2.0}, "relaxation")],
)
def test_invalid_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ADMM(**arguments)


def replace_input_blocks(monkeypatch, input_blocks):
    """Make all modules that a solve uses read the inputs in given blocks."""
    for module in ("core.problem", "core.streaming", "solvers.admm"):
        monkeypatch.setattr(f"lightning_nettrim.{module}.input_blocks", input_blocks)


@each_variant
def test_blocks_of_rows_give_the_same_solution(options, monkeypatch):
    problem = layer(**options)
    whole = solve(problem, ADMM())

    def input_blocks(X, device):
        for start in range(0, X.shape[-2], 37):
            rows = slice(start, min(start + 37, X.shape[-2]))
            yield rows, X[..., rows, :]

    replace_input_blocks(monkeypatch, input_blocks)
    monkeypatch.setattr("lightning_nettrim.core.streaming.BLOCK", 1000)
    blocked = solve(problem, ADMM())
    assert blocked.status == Status.CONVERGED
    assert float(blocked.objective) == pytest.approx(float(whole.objective), rel=1e-6, abs=1e-12)


def test_coarse_products_are_certified_as_well(monkeypatch):
    """Emulated by rounding X to 8 bits within the steps, where accelerators round to 11."""
    problem, within = layer(bias=True, gain=0.05, dtype=torch.float32), []

    @contextmanager
    def coarse_products(allowed):
        within.append(allowed)
        yield
        within.pop()

    def input_blocks(X, device):
        yield slice(None), X.bfloat16().float() if within else X

    monkeypatch.setattr("lightning_nettrim.solvers.admm.coarse_products", coarse_products)
    replace_input_blocks(monkeypatch, input_blocks)
    solution = solve(problem, ADMM(tf32=True))
    assert solution.status == Status.CONVERGED
    assert float(solution.objective) == pytest.approx(optimum(problem), rel=1e-3)


def test_an_exception_in_a_step_restores_the_precision(monkeypatch):
    def input_blocks(X, device):
        yield slice(None), X
        raise RuntimeError("stop")

    problem, before = layer(dtype=torch.float32), torch.get_float32_matmul_precision()
    replace_input_blocks(monkeypatch, input_blocks)
    with pytest.raises(RuntimeError, match="stop"):
        solve(problem, ADMM(tf32=True))
    assert torch.get_float32_matmul_precision() == before


class AllocationMeter(TorchDispatchMode):
    """Records the operators that are called and the peak size of all tensors that are allocated."""

    def __init__(self):
        super().__init__()
        self.called, self.alive, self.now, self.peak = set(), set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.overloadpacket)
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        if storage._cdata in self.alive:
            return
        self.alive.add(storage._cdata)
        size, key = storage.nbytes(), storage._cdata
        self.now, self.peak = self.now + size, max(self.peak, self.now + size)

        def freed():
            self.now -= size
            self.alive.discard(key)

        weakref.finalize(storage, freed)


def test_a_step_neither_synchronizes_nor_allocates_tensors_of_the_size_of_y():
    problem = layer(P=3000, N=20, M=40, bias=True, dtype=torch.float32).flattened()
    solver = ADMM()
    state = solver.init(problem)
    state = solver.adapt(problem, state, None)
    with torch.no_grad(), AllocationMeter() as meter:
        solver.step(problem, state)
    synchronizing = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero}
    assert not meter.called & synchronizing
    assert meter.peak < 0.2 * problem.Y.nbytes


def test_a_solve_needs_at_most_five_buffers_of_the_size_of_y(monkeypatch):
    monkeypatch.setattr("lightning_nettrim.core.streaming.BLOCK", 2**12)
    problem = layer(P=6000, N=20, M=60, bias=True, dtype=torch.float32)
    with AllocationMeter() as meter:
        solve(problem, ADMM(max_steps=60))
    assert meter.peak <= 5 * problem.Y.nbytes
