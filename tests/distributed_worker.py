"""What each process of tests/test_ranks.py does: ``python ranked.py <folder> <rank> <count> <part>``."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

from lightning_nettrim import ADMM, Cardinality, LayerProblem, Solution, SparseGPT, Wanda, path, refit, trim
from lightning_nettrim.runtime.distributed import TorchProcessGroup

SAMPLES = 1024


@dataclass(frozen=True)
class Dying(Cardinality):
    """Ends process 1 on the spot, in the middle of the layer with so many outputs."""

    outputs: int = 0

    def solve(self, problem: LayerProblem, warm=None) -> Solution:
        if problem.Y.shape[-1] == self.outputs and distributed.get_rank() == 1:
            os._exit(7)
        return super().solve(problem, warm)


CASES = {
    "mlp sparsity": ("mlp", {"sparsity": 0.7, "allocate": "uniform"}),
    "mlp parallel 2:4": ("mlp", {"sparsity": 0.5, "pattern": "2:4", "scheme": "parallel"}),
    "mlp epsilon": ("mlp", {"epsilon": 0.1, "solver": ADMM(tf32=True)}),
    "mlp fewest": ("mlp", {"epsilon": 0.3, "solver": Wanda()}),
    "mlp convex": ("mlp", {"sparsity": 0.5, "allocate": "uniform", "solver": ADMM(rtol=1e-2)}),
    "mlp wanda": (
        "mlp",
        {"sparsity": 0.5, "pattern": "per_neuron", "allocate": "uniform", "solver": Wanda(), "refit": False},
    ),
    "mlp sparsegpt": ("mlp", {"sparsity": 0.5, "allocate": "uniform", "solver": SparseGPT(), "refit": False}),
    "mlp max_drop": ("mlp", {"max_drop": 0.05, "mode": "min", "allocate": "uniform"}),
    "conv sparsity": ("conv", {"sparsity": 0.5, "allocate": "uniform"}),
    "conv epsilon": ("conv", {"epsilon": 0.2, "solver": ADMM(rtol=1e-2, atol=1e-2)}),
}


class Choosing(nn.Module):
    """Goes on from its first layer by a ReLU in process 0 only."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.rank = nn.Linear(24, 8).double(), nn.Linear(8, 4).double(), rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The response."""
        return self.second(self.first(x).relu() if self.rank == 0 else self.first(x).tanh())


class Failing(nn.Module):
    """Raises in process 1 from its twelfth call on, when layers are recorded, at batches of more than so many."""

    def __init__(self, rank: int, error: Exception, most: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.rank, self.calls = nn.Linear(24, 8).double(), nn.Linear(8, 4).double(), rank, 0
        self.error, self.most = error, most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The response."""
        self.calls += 1
        if self.rank == 1 and self.calls > 11 and len(x) > self.most:
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
                module.bias.fill_(1.0)  # channels that are nearly dead would leave weights free
    return model


def batches(kind: str, rank: int, count: int) -> list[torch.Tensor]:
    """Every ``count``-th row of the data, as a DistributedSampler has it."""
    generator = torch.Generator().manual_seed(1)
    shape = (24,) if kind == "mlp" else (1, 10, 10)
    data = torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)
    return list(data[rank::count].split(64))


def trimmed(case: str, rank: int = 0, count: int = 1) -> tuple[nn.Module, dict[str, float]]:
    """A network pruned on this process's rows, and what its report says but for the time."""
    kind, arguments = CASES[case]
    model = network(kind)
    given = batches(kind, rank, count)
    arguments = {**arguments, "num_samples": SAMPLES * 100, "distributed": count > 1}
    if "max_drop" in arguments:  # each process has a metric of its own
        whole, answers = network(kind), torch.cat(batches(kind, 0, 1))
        arguments["metric"] = lambda: (
            1 + float((model(answers) - whole(answers)).detach().square().mean()) + 0.3 * (rank - (count - 1) / 2)
        )
    result = trim(model, given, **arguments)
    own = ("seconds", "peak_memory")
    totals = {key: value for key, value in result.total().items() if value is not None and key not in own}
    errors = {row.name: row.relative_error for row in result.reports}
    return model, totals | errors | {"discrepancy": result.discrepancy}


def linear_problem(rank: int = 0, count: int = 1) -> LayerProblem:
    """A linear layer with offset on this process's rows, fewer than its inputs in each of two processes."""
    generator = torch.Generator().manual_seed(2)
    X, R = (torch.randn(31, n, generator=generator, dtype=torch.float64)[rank::count] for n in (20, 6))
    W = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    return LayerProblem(X, X @ W + R, W, epsilon=torch.tensor(2.0, dtype=torch.float64), sparsity=0.5, offset=R)


def main(folder: Path, rank: int, count: int, part: str) -> None:
    """Run one part and leave what came of it in the folder."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    if part == "die":
        trim(network("mlp"), batches("mlp", rank, count), sparsity=0.5, allocate="uniform", solver=Dying(outputs=16),
             distributed=True)  # fmt: skip
    found: dict[str, object] = {}
    for case in CASES:
        model, totals = trimmed(case, rank, count)
        found[case] = model.state_dict(), totals
    processes = TorchProcessGroup.of(model)
    problem = linear_problem(rank, count)
    problem = LayerProblem(**{**vars(problem), "ranks": processes})
    found["path"] = [solution.W for solution in path(problem, [4.0, 2.0])]
    found["refit"] = refit(problem, problem.W * (problem.W.abs() > 0.5))
    found["cardinality"] = Cardinality().solve(problem).W
    wrong, model = batches("mlp", rank, count), network("mlp")
    short = Failing(rank, MemoryError("full"), most=len(wrong[0]) - 1)
    found["short"] = trim(short, wrong, sparsity=0.5, distributed=True).notes, short.state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    failures = {
        "nan": lambda: trim(model, [wrong[0] / (1 - rank), *wrong[1:]], sparsity=0.5, distributed=True),
        "empty": lambda: trim(model, wrong[: 10 * (1 - rank)], sparsity=0.5, distributed=True),
        "wrapped": lambda: trim(nn.parallel.DistributedDataParallel(model), wrong, sparsity=0.5, distributed=True),
        "forward": lambda: trim(Failing(rank, RuntimeError("broken")), wrong, sparsity=0.5, distributed=True),
        "full": lambda: trim(Failing(rank, MemoryError("full")), wrong, sparsity=0.5, distributed=True),
        "differ": lambda: trim(Choosing(rank), wrong, sparsity=0.5, distributed=True),
        "weights": lambda: trim(network("mlp") if rank else model, wrong, sparsity=0.5, distributed=True),
    }
    for name, fail in failures.items():
        if name == "weights":
            model[2].weight.data.add_(1e-7)
        try:
            fail()
        except (ValueError, RuntimeError, MemoryError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        if name != "weights":
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
