"""Networks that FSDP2 divides among two processes: what each process of a part of the tests does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_nettrim import Cardinality, Distillation, Magnitude, NetTrim, trim
from lightning_nettrim.runtime.sharded import full, is_sharded

SAMPLES = 256
STEPS = 30
RECOVERY = Distillation(max_steps=8, check_every=4, lr=3e-3)
REFUSED = ({}, {"distributed": True, "recover": Distillation(scope="block")})
"""Options of `trim` that a divided network does not allow."""


@dataclass(frozen=True)
class WithDividedWeights(Cardinality):
    """Counts the solves during which all parameters of a network are divided."""

    network: ClassVar[nn.Module]
    count: ClassVar[int] = 0

    def solve(self, problem, warm=None):
        """Solve as `Cardinality`."""
        assert all(is_sharded(parameter) for parameter in self.network.parameters())
        type(self).count += 1
        return super().solve(problem, warm)


class Block(nn.Module):
    """Self-attention and two Linear layers, each with a LayerNorm before and a residual sum after."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the same shape."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(self.up(self.norms[1](x)).relu())


class Network(nn.Module):
    """A Linear layer, two blocks, a convolution with a BatchNorm, and a head, the same in every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.blocks = nn.Linear(5, 8), nn.ModuleList(Block() for _ in range(2))
        self.conv, self.norm, self.head = nn.Conv1d(8, 9, 3), nn.BatchNorm1d(9, momentum=0.0), nn.Linear(9, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3)`` from ``(batch, tokens, 5)``."""
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.conv(x.mT)).relu().mean(-1))


def shard(network: Network, mesh: distributed.device_mesh.DeviceMesh | None = None) -> Network:
    """Divide a network: the first block as a whole, of the second one each layer, and what remains."""
    second = network.blocks[1]
    for module in (network.blocks[0], second.attention, second.up, second.down, second, network):
        fully_shard(module, mesh=mesh)
    return network


def inputs() -> Tensor:
    """``(SAMPLES, 4, 5)`` normal inputs."""
    return torch.randn(SAMPLES, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loader() -> DataLoader:
    """Data that a DistributedSampler distributes row by row."""
    return DataLoader(TensorDataset(inputs()), batch_size=64)


class Module(pl.LightningModule):
    """A network in Lightning; training changes no parameters, as its batches depend on the number of processes.

    Args:
        division: ``"fsdp"`` over the data-parallel processes, ``"world"`` over all, ``"tensor"`` or ``"none"``.
    """

    def __init__(self, division: str) -> None:
        super().__init__()
        self.division, self.network = division, Network()

    def configure_model(self) -> None:
        """Divide the network."""
        if any(is_sharded(parameter) for parameter in self.parameters()):
            return
        if self.division == "tensor":
            parallelize_module(self.network.head, self.device_mesh["tensor_parallel"], ColwiseParallel())
        elif self.division != "none":
            shard(self.network, self.device_mesh["data_parallel"] if self.division == "fsdp" else None)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the network."""
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(folder: Path, part: str, *callbacks: pl.Callback) -> pl.Trainer:
    """A trainer of a part, with its own run."""
    strategies = {
        "single": "auto",
        "ddp": "ddp",
        "fsdp": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        "file": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False),
        "world": ModelParallelStrategy(),
        "tensor": ModelParallelStrategy(),
    }
    return pl.Trainer(
        accelerator="cpu", devices=1 if part == "single" else 2, strategy=strategies[part],
        max_epochs=1, callbacks=[*callbacks], logger=CSVLogger(folder, name="run"), enable_progress_bar=False,
        default_root_dir=folder,
    )  # fmt: skip


def module_of(part: str) -> Module:
    """The module of a part."""
    return Module({"single": "none", "ddp": "none", "file": "fsdp"}.get(part, part))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, gathered."""
    return {name: full(value).clone() for name, value in model.state_dict().items()}


def fit(folder: Path, part: str) -> None:
    """What a process of a Trainer does: its results for the tests that use this part."""
    if part == "tensor":
        trainer(folder, part, NetTrim(sparsity=0.5)).fit(module_of(part), loader(), loader())
        return
    results = {} if part == "ddp" else pruned(folder, part)
    if part in ("ddp", "fsdp", "file"):
        results |= recovered(folder, part)
    torch.save(results, folder / f"{os.environ.get('LOCAL_RANK', 0)}.pt")


def pruned(folder: Path, part: str) -> dict[str, Any]:
    """Fit and prune, and read the checkpoint."""
    callback = NetTrim(sparsity=0.5, allocate="uniform", solver=Cardinality(max_steps=STEPS), num_samples=SAMPLES)
    saver = ModelCheckpoint(monitor="val_loss", save_last=True)
    run, model = trainer(folder, part, callback, saver), module_of(part)
    run.fit(model, loader(), loader())
    assert is_sharded(model) == (part != "single")
    results = {"uniform": whole_state(model), "metrics": callback.metrics, "masks": callback.masks}
    path = callback.folder / "pruned.ckpt"
    results["is_folder"] = path.is_dir()

    later, model = NetTrim(sparsity=0.5, allocate="uniform", num_samples=SAMPLES), module_of(part)
    again = trainer(folder, part, later)
    (results["read"],) = again.validate(model, loader(), ckpt_path=str(path), verbose=False)
    results["loaded"], results["pruned_again"] = whole_state(model), later.result is not None
    return results


def recovered(folder: Path, part: str) -> dict[str, Any]:
    """Fit and prune with global allocation and a recovery."""
    best = NetTrim(
        sparsity=0.7, solver=Magnitude(), refit=False, recover=RECOVERY, num_samples=SAMPLES, checkpoint="best"
    )
    model = module_of(part)
    run = trainer(folder, part, best, ModelCheckpoint(monitor="val_loss"))
    run.fit(model, loader(), loader())
    return {"recovered": whole_state(model), "recovery": best.result.recovery.steps}


def fine_tune(folder: Path) -> None:
    """Fit, prune and train on, and resume that after its first epoch."""
    found = []
    for path in (None, folder / "saved/epoch=1.ckpt"):
        callback = NetTrim(sparsity=0.5, allocate="uniform", num_samples=SAMPLES, finetune_epochs=2, finetune_lr=0.01)
        saver = ModelCheckpoint(folder / "saved" if path is None else folder / "later", "{epoch}", save_top_k=-1)
        run, model = trainer(folder, "fsdp", callback, saver), module_of("fsdp")
        run.fit(model, loader(), loader(), ckpt_path=path)
        found.append(
            {
                "state": whole_state(model), "masks": callback.masks, "metrics": callback.metrics,
                "steps": run.global_step, "file": str(callback.folder / "pruned.ckpt"), "limit": run.max_epochs,
            }
        )  # fmt: skip
    torch.save(found, folder / f"{run.global_rank}.pt")


def uneven_batches(rank: int) -> list[Tensor]:
    """All inputs, of which process 0 has three quarters in batches of another size."""
    return [*inputs()[:192].split(48)] if rank == 0 else [*inputs()[192:].split(32)]


def failing_batches(rank: int) -> Iterator[Tensor]:
    """Batches whose reading fails in process 1."""
    yield inputs()[:16]
    if rank == 1:
        raise OSError("the disk is gone")


class FailsInProcess1(nn.Module):
    """A network whose third forward pass fails in process 1, before its parameters are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.calls = Network(), 0

    def forward(self, x: Tensor) -> Tensor:
        """The output of the network."""
        self.calls += 1
        if self.calls == 3 and distributed.get_rank() == 1:
            raise ValueError("a value is out of range")
        return self.network(x)


def trim_in(rank: int, folder: Path, part: str) -> None:
    """What one process of ``trim`` does."""
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    arguments = {"sparsity": 0.5, "allocate": "uniform", "num_samples": SAMPLES}
    if part == "uneven":
        WithDividedWeights.network = model = shard(Network())
        trim(model, uneven_batches(rank), distributed=True, solver=WithDividedWeights(max_steps=STEPS), **arguments)
        torch.save((whole_state(model), WithDividedWeights.count), folder / f"{rank}.pt")
        return
    model = FailsInProcess1() if part == "forward" else Network()
    shard(model.network if part == "forward" else model)
    batches = failing_batches(rank) if part == "loader" else [*inputs().split(32)]
    before, found = whole_state(model), []
    for options in REFUSED if part == "refused" else ({"distributed": True},):
        try:
            trim(model, batches, **arguments, **options)
        except (OSError, RuntimeError, ValueError) as error:
            unchanged = part == "forward" or all(
                torch.equal(value, before[name]) for name, value in whole_state(model).items()
            )
            found.append((f"{type(error).__name__}: {error}", unchanged))
    torch.save(found, folder / f"{rank}.pt")
    if part == "forward":
        os._exit(0)  # the other process may be waiting for this one
