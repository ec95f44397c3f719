"""What each process of the tests of distributed pruning does; a part is "cases", "errors" or "exit"."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_nettrim import ADMM, Cardinality, Distillation, LayerProblem, Magnitude, Solution, SparseGPT, Wanda, trim

SAMPLES = 1024


@dataclass(frozen=True)
class ExitingSolver(Cardinality):
    """Ends process 1 while it solves the layer with a given number of outputs."""

    outputs: int = 0

    def solve(self, problem: LayerProblem, warm: Any = None) -> Solution:
        """Solve, or exit."""
        if problem.Y.shape[-1] == self.outputs and distributed.get_rank() == 1:
            os._exit(7)
        return super().solve(problem, warm)


FEW_STEPS = Cardinality(max_steps=20)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp sparsity": ("mlp", {"sparsity": 0.7, "allocate": "uniform", "solver": FEW_STEPS}),
    "mlp parallel 2:4": ("mlp", {"sparsity": 0.5, "pattern": "2:4", "scheme": "parallel", "solver": FEW_STEPS}),
    "mlp epsilon": ("mlp", {"epsilon": 0.1, "solver": ADMM(tf32=True)}),
    "mlp sparsest within epsilon": ("mlp", {"epsilon": 0.3, "solver": Wanda()}),
    "mlp convex": ("mlp", {"sparsity": 0.5, "allocate": "uniform", "solver": ADMM(rtol=1e-2)}),
    "mlp wanda": (
        "mlp",
        {"sparsity": 0.5, "pattern": "per_neuron", "allocate": "uniform", "solver": Wanda(), "refit": False},
    ),
    "mlp sparsegpt": ("mlp", {"sparsity": 0.5, "allocate": "uniform", "solver": SparseGPT(), "refit": False}),
    "mlp max_drop": ("mlp", {"max_drop": 0.05, "mode": "min", "allocate": "uniform", "solver": FEW_STEPS}),
    "conv sparsity": ("conv", {"sparsity": 0.5, "allocate": "uniform", "solver": FEW_STEPS}),
    "mlp units": ("mlp", {"sparsity": 0.5, "pattern": "units"}),
    "conv units": ("conv", {"macs": 0.5, "pattern": "units"}),
    "conv epsilon": ("conv", {"epsilon": 0.2, "solver": ADMM(rtol=1e-2, atol=1e-2)}),
}


RECOVERED: dict[str, tuple[str, dict[str, Any]]] = {
    "conv recovered": (
        "conv",
        {"sparsity": 0.7, "allocate": "uniform", "solver": Magnitude(), "recover": Distillation(max_steps=40)},
    ),
    "mlp recovered by blocks": (
        "mlp",
        {
            "sparsity": 0.7,
            "allocate": "uniform",
            "solver": Magnitude(),
            "recover": Distillation(scope="block", max_steps=40),
        },
    ),
}
"""Cases that depend on which inputs are in one batch, and therefore on the number of processes."""


class DifferentPaths(nn.Module):
    """Its first layer is followed by a ReLU in process 0 and by a tanh in others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.rank = nn.Linear(24, 8).double(), nn.Linear(8, 4).double(), rank

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        return self.second(self.first(x).relu() if self.rank == 0 else self.first(x).tanh())


class FailingForward(nn.Module):
    """Raises an error in process 1 from its twelfth call on, when layers are recorded, for too large batches.

    Args:
        rank: of this process.
        error: to raise.
        largest: size of the largest batch that raises nothing.
    """

    def __init__(self, rank: int, error: Exception, largest: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.rank, self.calls = nn.Linear(24, 8).double(), nn.Linear(8, 4).double(), rank, 0
        self.error, self.largest = error, largest

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        self.calls += 1
        if self.rank == 1 and self.calls > 11 and len(x) > self.largest:
            raise self.error
        return self.second(self.first(x).relu())


def network(kind: str) -> nn.Module:
    """A network in double precision, the same in every process."""
    torch.manual_seed(0)
    if kind == "mlp":
        layers = [nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)]
    else:
        layers = [
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
        ]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.2, 0.4)
                module.bias.fill_(1.0)  # the weights of channels that are nearly dead would be arbitrary
    return model


def batches(kind: str, rank: int, count: int) -> list[Tensor]:
    """Every ``count``-th row of the data, as a DistributedSampler has it."""
    generator = torch.Generator().manual_seed(1)
    shape = (24,) if kind == "mlp" else (1, 10, 10)
    data = torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)
    return list(data[rank::count].split(64))


def prune_case(case: str, rank: int = 0, count: int = 1) -> tuple[nn.Module, dict[str, float]]:
    """A network pruned on the rows of this process, and the numbers of its report except time and memory."""
    kind, arguments = (CASES | RECOVERED)[case]
    model = network(kind)
    data = batches(kind, rank, count)
    arguments = {**arguments, "num_samples": SAMPLES * 100, "distributed": count > 1}
    if "max_drop" in arguments:  # each process has a metric of its own
        dense, inputs = network(kind), torch.cat(batches(kind, 0, 1))
        arguments["metric"] = lambda: (
            1 + float((model(inputs) - dense(inputs)).detach().square().mean()) + 0.3 * (rank - (count - 1) / 2)
        )
    result = trim(model, data, **arguments)
    own = ("seconds", "peak_memory")
    totals = {key: value for key, value in result.total().items() if value is not None and key not in own}
    errors = {report.name: report.local_error for report in result.reports}
    if result.recovery is not None:
        errors["before recovery"] = result.recovery.end_to_end_error_before
    return model, totals | errors


def run_cases(rank: int, count: int) -> dict[str, Any]:
    """Pruned networks and their numbers by case."""
    results = {}
    for case in CASES | RECOVERED:
        model, numbers = prune_case(case, rank, count)
        results[case] = model.state_dict(), numbers
    return results


def run_errors(rank: int, count: int) -> dict[str, Any]:
    """The message of each error, and the result of a run in which memory runs out in one process."""
    results: dict[str, Any] = {}
    data, model = batches("mlp", rank, count), network("mlp")
    small = FailingForward(rank, MemoryError("full"), largest=len(data[0]) - 1)
    results["out of memory once"] = trim(small, data, sparsity=0.5, distributed=True).notes, small.state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def attempt(model: nn.Module, data: list[Tensor] = data) -> str:
        try:
            trim(model, data, sparsity=0.5, distributed=True)
        except (ValueError, RuntimeError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    results["nan"] = attempt(model, [data[0] / (1 - rank), *data[1:]])
    results["no batches"] = attempt(model, data[: 10 * (1 - rank)])
    results["wrapped"] = attempt(nn.parallel.DistributedDataParallel(model))
    results["forward"] = attempt(FailingForward(rank, RuntimeError("broken")))
    results["out of memory"] = attempt(FailingForward(rank, MemoryError("full")))
    results["different paths"] = attempt(DifferentPaths(rank))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    other = network("mlp")
    other[2].weight.data.add_(1e-7)
    results["different weights"] = attempt(model if rank else other)
    return results


def main(folder: Path, rank: int, count: int, part: str) -> None:
    """Run a part and write its results to the folder."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    if part == "exit":
        solver = ExitingSolver(outputs=16)
        trim(
            network("mlp"), batches("mlp", rank, count), sparsity=0.5, allocate="uniform", solver=solver,
            distributed=True,
        )  # fmt: skip
    results = {"cases": run_cases, "errors": run_errors}[part](rank, count)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()
