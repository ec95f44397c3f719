"""A fit with NetTrim under Lightning's ``ddp``: ``python ddp_worker.py <folder> <devices> <part>``, or `main`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nettrim import Cardinality, NetTrim

SAMPLES = 256


@dataclass(frozen=True)
class ExitsInProcess1(Cardinality):
    """Ends process 1 while it solves the layer with a given number of outputs."""

    outputs: int = 0

    def solve(self, problem, warm=None):
        if problem.Y.shape[-1] == self.outputs and distributed.get_rank() == 1:
            os._exit(7)
        return super().solve(problem, warm)


class Net(pl.LightningModule):
    """12-16-8-3 with a BatchNorm; training changes no parameters, as its batches depend on the number of processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        )
        self.layers[1].momentum = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean())

    def train_dataloader(self):
        return loader()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader() -> DataLoader:
    """Data that a DistributedSampler distributes row by row."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(SAMPLES, 12, generator=generator, dtype=torch.float64))
    return DataLoader(data, batch_size=64)


def trainer(folder: Path, devices: int, name: str, callback: NetTrim) -> pl.Trainer:
    """A trainer with one callback and its own run."""
    return pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", precision="64-true",
        max_epochs=1, callbacks=[callback], logger=CSVLogger(folder, name=name), enable_progress_bar=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip


def main(folder: Path, devices: int, part: str) -> None:
    """Fit and prune; each process writes its network into the folder."""
    arguments = {
        "prune": {"sparsity": 0.6},
        "finetune": {"sparsity": 0.6, "finetune_epochs": 2, "finetune_lr": 0.05},
        "exit": {"sparsity": 0.5, "allocate": "uniform", "solver": ExitsInProcess1(outputs=8)},
    }[part]
    callback = NetTrim(**arguments, num_samples=SAMPLES)
    model = Net()
    run = trainer(folder, devices, "run", callback)
    run.fit(model, loader(), loader())
    torch.save((model.state_dict(), callback.metrics), folder / f"{run.global_rank}.pt")
    if part == "finetune":
        torch.save((callback.masks, run.global_step), folder / f"masks_{run.global_rank}.pt")
        return
    planned = NetTrim(sparsity=0.6, dry_run=True, num_samples=SAMPLES)
    trainer(folder, devices, "planned", planned).validate(Net(), loader())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
