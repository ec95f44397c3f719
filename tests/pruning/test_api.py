"""`trim` and `check_pruning`: forms of input, determinism, and a model that is unchanged after any error."""

from __future__ import annotations

import copy
import gc
import logging
import os
from dataclasses import dataclass
from pathlib import Path

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
)
from torch import nn

from lightning_nettrim import (
    ADMM,
    CalibrationSource,
    Cardinality,
    LayerProblem,
    Magnitude,
    PruningConfig,
    Solution,
    Solver,
    prune_model,
    trim,
)
from lightning_nettrim.pruning.api import check_pruning

QUICK = ADMM(rtol=1e-2, atol=1e-2)
MIB = 2**20


@dataclass(frozen=True)
class FailingSolver(Solver):
    """Solves by magnitude, but raises an error for layers with a given number of outputs."""

    error: type[BaseException] = RuntimeError
    outputs: int = 16

    def solve(self, problem: LayerProblem, warm=None) -> Solution:
        if problem.Y.shape[-1] == self.outputs:
            raise self.error("planned")
        return Magnitude().solve(problem)


# --- input and output


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x, 0), lambda x: [x, x], lambda x: {"input": x, "y": 1}])
def test_forms_of_batches(form):
    model = mlp()
    trim(model, (form(x) for x in mlp_batches()), sparsity=0.5, allocate="uniform", solver=Magnitude())
    assert int((model[0].weight == 0).sum()) == 300


def test_batches_can_be_passed_by_a_function():
    model = mlp()
    wrapped = [{"nested": [x]} for x in mlp_batches()]
    options = {"sparsity": 0.5, "allocate": "uniform"}
    trim(model, wrapped, forward=lambda model, batch: model(batch["nested"][0]), **options)
    plain = mlp()
    trim(plain, mlp_batches(), **options)
    assert equal_states(model, plain)


def test_trim_and_prune_model_prune_to_the_same_network():
    one, other = mlp(), mlp()
    options = {"sparsity": 0.6, "allocate": "magnitude"}
    result = trim(one, mlp_batches(), **options)
    same = prune_model(other, CalibrationSource(mlp_batches()), PruningConfig(**options))
    assert equal_states(one, other)
    assert same.end_to_end_error == result.end_to_end_error
    assert same.plan == result.plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = mlp(dtype)
    result = trim(model, mlp_batches(dtype=dtype), sparsity=0.5, allocate="uniform", solver=QUICK)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert [report.sparsity for report in result.reports] == [0.5] * 3


def test_the_model_can_still_be_trained_and_stays_in_its_modes():
    model = mlp()
    model[1].eval()
    with torch.inference_mode():
        trim(model, mlp_batches(), sparsity=0.5, allocate="uniform", solver=QUICK)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert count_hooks(model) == 0
    model(mlp_batches()[0]).sum().backward()
    assert model[0].weight.grad is not None


def test_a_dry_run_returns_a_plan_and_changes_nothing():
    model = mlp()
    before = copied_state(model)
    result = trim(model, mlp_batches(), sparsity=0.6, allocate="epsilon", dry_run=True, ignore=["4"])
    assert equal_states(model, before)
    assert result.reports == ()
    assert "sparsity" in result.plan
    assert [layer.name for layer in result.skipped] == ["4"]


# --- random numbers


def test_the_same_seed_gives_the_same_network_and_another_seed_another():
    networks = []
    for seed in (0, 0, 1):
        model = mlp()
        trim(model, mlp_batches(), epsilon=0.2, num_samples=100, seed=seed, solver=QUICK)
        networks.append(model)
    assert equal_states(networks[0], networks[1])
    assert not torch.equal(networks[0][0].weight, networks[2][0].weight)


def test_global_random_numbers_are_not_touched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model, data = mlp(), mlp_batches()
    torch.manual_seed(5)
    trim(model, data, epsilon=0.3, solver=QUICK)
    assert torch.equal(torch.rand(3), expected)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of sparsity, epsilon, max_drop, plan"),
        ({"sparsity": 1.0}, "sparsity: expected .*got 1.0"),
        ({"epsilon": 0.1, "targets": ["3"]}, "targets: '3' matches no layer"),
        ({"epsilon": 0.1, "per_layer": {"9": {"epsilon": 0.2}}}, "per_layer: '9' matches no layer"),
        ({"epsilon": 0.1, "ignore": ["Linear"]}, "at least one layer to prune, got none"),
        ({"pattern": "2:3"}, "0: pattern '2:3': expected a multiple of 3 inputs, got 20"),
        ({"max_drop": 0.1}, "max_drop, metric: expected both or none of them, got one"),
        ({"sparsity": 0.1, "metric": float}, "max_drop, metric: expected both or none of them, got one"),
        ({"max_drop": 0.1, "metric": float, "per_layer": {"Linear": {"sparsity": 0.5}}}, "a layer without a budget"),
        ({"max_drop": 0.1, "metric": float, "dry_run": True}, "dry_run: .* got max_drop"),
        ({"sparsity": 0.5, "per_layer": {"Linear": {"max_sparsity": 0.4}}}, "weights to be kept .* got 572"),
        ({"plan": "nowhere.yaml"}, "plan: expected a plan.yaml .* got nowhere.yaml"),
    ],
)
def test_unusable_arguments_leave_the_model_unchanged(arguments, message):
    model = mlp()
    before = copied_state(model)
    with pytest.raises(ValueError, match=message):
        trim(model, mlp_batches(), **arguments)
    assert equal_states(model, before)
    assert count_hooks(model) == 0


UNUSABLE_BATCHES = [
    ([], "loader is empty"),
    (iter(()), "generator is exhausted"),
    ([torch.rand(4, 3)], r"expected batches that Sequential.forward takes, got inputs of shapes \[\(4, 3\)\]"),
    ([torch.full((40, 20), torch.nan)], "0: expected finite activations"),
    ([torch.rand(40, 20), torch.full((40, 20), torch.inf)], "0: expected finite activations"),
]


@pytest.mark.parametrize(("data", "message"), UNUSABLE_BATCHES)
def test_unusable_batches_leave_the_model_unchanged(data, message):
    model = mlp()
    before = copied_state(model)
    with pytest.raises(ValueError, match=message):
        trim(model, data, epsilon=0.1)
    assert equal_states(model, before)
    assert count_hooks(model) == 0


def test_a_layer_whose_activations_overflow_is_named():
    model = mlp()
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    before = copied_state(model)
    with pytest.raises(ValueError, match="2: expected finite activations"):
        trim(model, mlp_batches(), epsilon=0.1)
    assert equal_states(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize(("outputs", "name"), [(30, "0"), (16, "2"), (4, "4")])
def test_an_error_gives_every_layer_its_trained_weights_and_is_logged(error, scheme, outputs, name, caplog):
    model = mlp()
    before = copied_state(model)
    with caplog.at_level(logging.WARNING), pytest.raises(error):
        trim(
            model, mlp_batches(), sparsity=0.5, allocate="uniform", solver=FailingSolver(error, outputs), scheme=scheme
        )  # fmt: skip
    assert equal_states(model, before)
    assert count_hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert f"{error.__name__} while solving {name}: all of 0, 2, 4 have their trained weights again" in caplog.text


# --- the check before training


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"epsilon": 0.1}, {"max_drop": 0.1}], ids=str)
def test_the_check_changes_nothing(options):
    model = mlp()
    before = copied_state(model)
    check_pruning(model, CalibrationSource(mlp_batches()), PruningConfig(**options))
    assert equal_states(model, before)
    assert count_hooks(model) == 0
    assert all(module.training for module in model.modules())


def test_the_check_solves_the_smallest_layer_only():
    source = CalibrationSource(mlp_batches())
    check_pruning(mlp(), source, PruningConfig(sparsity=0.6, solver=FailingSolver(outputs=16)))
    with pytest.raises(RuntimeError, match="planned"):
        check_pruning(mlp(), source, PruningConfig(max_drop=0.6, solver=FailingSolver(outputs=4)))


@pytest.mark.parametrize(("data", "message"), UNUSABLE_BATCHES)
def test_the_check_refuses_unusable_batches(data, message):
    model = mlp()
    before = copied_state(model)
    with pytest.raises(ValueError, match=message):
        check_pruning(model, CalibrationSource(data), PruningConfig(epsilon=0.1))
    assert equal_states(model, before)
    assert count_hooks(model) == 0


# --- resources


def resident_memory() -> int:
    """Resident memory of this process in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory from /proc")
def test_fifty_calls_leak_nothing():
    x, dense = conv2d_inputs()[:200], conv2d_network()
    model = copy.deepcopy(dense)

    def once(i: int) -> tuple[int, int, int, int]:
        model.load_state_dict(dense.state_dict())
        allocate, solver = "uniform" if i % 5 else "global", Cardinality(max_steps=2)
        trim(model, x.split(50), sparsity=0.7, num_samples=200, max_rows=200, allocate=allocate, solver=solver)
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return tensors, count_hooks(model), resident_memory(), len(os.listdir("/proc/self/fd"))

    gc.collect()
    gc.freeze()  # leaves out the objects that are there already
    try:
        tensors, hooks, memory, files = zip(*(once(i) for i in range(50)), strict=True)
    finally:
        gc.unfreeze()
    assert len(set(tensors[2:])) == 1
    assert set(hooks) == {0}
    assert len(set(files[2:])) == 1
    assert max(memory[25:]) - max(memory[5:25]) < 8 * MIB


class TwoInputs(nn.Module):
    """Multiplies the response of its layer by a second input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(20, 8)

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu() * factor


@pytest.mark.parametrize("form", [lambda x, f: (x, f, 0), lambda x, f: {"factor": f, "label": 0, "x": x}])
def test_batches_of_several_inputs(form):
    model = TwoInputs()
    result = trim(model, [form(x, x[:, :1]) for x in mlp_batches()], sparsity=0.5)
    assert [report.name for report in result.reports] == ["layer"]
    assert int((model.layer.weight == 0).sum()) == 80
