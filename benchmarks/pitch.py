"""One-shot pruning of a 1-D convolutional network that estimates the pitch of synthetic tones, by every method."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.clock import Clock
from benchmarks.training import train_or_load
from lightning_nettrim import Magnitude, SparseGPT, trim

BINS, CENTS, LOWEST = 360, 20, 32.7
"""Number of pitches, the interval between two of them in cents, and the lowest in Hz."""

RATE, SAMPLES, HARMONICS = 16_000, 1024, 12
"""Sampling rate in Hz, samples of a frame, and partial tones of a tone."""

METHODS: dict[str, dict] = {
    "ours": {},
    "ours, uniform": {"allocate": "uniform"},
    "magnitude + refit": {"solver": Magnitude(), "allocate": "magnitude"},
    "magnitude + refit, uniform": {"solver": Magnitude(), "allocate": "uniform"},
    "SparseGPT (this package)": {"solver": SparseGPT(), "refit": False, "allocate": "uniform"},
}
"""Options of `trim` for each method; the statistics of BatchNorms are re-estimated in all of them."""


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Args:
        out: folder of the results and of the trained weights.
        epochs: number of training epochs.
        samples: number of calibration frames.
        budgets: sparsities.
        methods: names of methods; all, if there are none.
    """

    out: Path = Path("runs") / "benchmarks"
    epochs: int = 4
    samples: int = 4096
    budgets: tuple[float, ...] = (0.5, 0.8)
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """The network pruned by one method.

    Attributes:
        budget: requested sparsity.
        method: name of the method.
        sparsity: fraction of zeros among the weights of all layers.
        accuracy: frames whose pitch is estimated within 50 cents, in percent.
        error: ‖y_pruned − y‖/‖y‖ of the network's output on new frames.
        seconds: time to prune the network.
    """

    budget: float
    method: str
    sparsity: float
    accuracy: float
    error: float
    seconds: float

    def __str__(self) -> str:
        """One line of the log."""
        return f"{self.budget:5} {self.method:28} {self.accuracy:6.2f} %  {self.error:.4f}  {self.seconds:7.2f} s"


class Tones(pl.LightningDataModule):
    """Frames of harmonic tones with noise, and the bins of their pitches.

    Args:
        frames: number of frames to train on.
        new: number of frames to evaluate on.
    """

    def __init__(self, frames: int = 32_768, new: int = 4096) -> None:
        super().__init__()
        self.train, self.held_out = TensorDataset(*tones(frames, seed=0)), TensorDataset(*tones(new, seed=1))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of frames and bins."""
        return DataLoader(self.train, 128, shuffle=True, drop_last=True)


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``(count, SAMPLES)`` frames of mean zero and variance one, and ``(count,)`` bins."""
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(BINS, (count,), generator=generator)
    pitch = LOWEST * 2 ** (bins * CENTS / 1200)
    time, frames = torch.arange(SAMPLES) / RATE, torch.zeros(count, SAMPLES)
    for harmonic in range(1, HARMONICS + 1):
        amplitude = torch.rand(count, 1, generator=generator) / harmonic
        amplitude[harmonic * pitch >= RATE / 2] = 0  # no aliases
        phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
        frames += amplitude * torch.sin(2 * math.pi * harmonic * pitch[:, None] * time + phase)
    frames += 0.1 * torch.rand(count, 1, generator=generator) * torch.randn(count, SAMPLES, generator=generator)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True), bins


class PitchNetwork(pl.LightningModule):
    """Six 1-D convolutions, each followed by a ReLU, a BatchNorm and a pooling, and a linear layer.

    0.49 M weights; most layers have many inputs and few outputs: 8192 × 16, 1024 × 16, 2048 × 64.

    References:
        Kim, Salamon, Li, Bello, "CREPE: A Convolutional Representation for Pitch Estimation", ICASSP 2018, Section 2.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 128, 16, 16, 16, 32, 64)
        stages: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip(channels, channels[1:], strict=False)):
            conv = nn.Conv1d(inputs, outputs, 64, padding="same") if i else nn.Conv1d(inputs, outputs, 512, 4, 254)
            stages += [conv, nn.ReLU(), nn.BatchNorm1d(outputs), nn.MaxPool1d(2)]
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(256, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """``(P, SAMPLES)`` frames to ``(P, BINS)`` logits."""
        return self.classifier(self.stages(frames.unsqueeze(1)).flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the binary cross entropy to bins blurred by 25 cents."""
        frames, bins = batch
        distance = CENTS * (torch.arange(BINS, device=bins.device) - bins[:, None])
        return nn.functional.binary_cross_entropy_with_logits(self(frames), torch.exp(-0.5 * (distance / 25) ** 2))

    def configure_optimizers(self) -> dict:
        """Adam, with one cycle of the learning rate over the whole fit."""
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 2e-3, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rows(settings: Settings) -> Iterator[Row]:
    """The dense network, then every budget and method."""
    data = Tones()
    pl.seed_everything(0, verbose=False)
    dense = train_or_load(PitchNetwork(), data, settings.out / f"pitch-{settings.epochs}.pt", settings.epochs)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    frames = data.train.tensors[0][order[: settings.samples]]
    reference = logits(dense, data)
    yield Row(0.0, "dense", 0.0, accuracy(reference, data), 0.0, 0.0)
    for budget in settings.budgets:
        for method in settings.methods or METHODS:
            pruned, clock = copy.deepcopy(dense), Clock()
            result = trim(pruned, frames.split(256), sparsity=budget, **METHODS[method])
            seconds, output = clock.read(), logits(pruned, data)
            error = float((output - reference).norm() / reference.norm())
            yield Row(budget, method, result.sparsity, accuracy(output, data), error, seconds)


def logits(model: nn.Module, data: Tones) -> Tensor:
    """The output of a network on the new frames."""
    with torch.no_grad():
        return torch.cat([model.eval()(part) for part in data.held_out.tensors[0].split(256)])


def accuracy(output: Tensor, data: Tones) -> float:
    """Frames whose pitch is estimated within 50 cents, in percent."""
    distance = CENTS * (output.argmax(1) - data.held_out.tensors[1]).abs()
    return 100 * float((distance <= 50).double().mean())


def table(rows: Sequence[Row]) -> str:
    """One line for each row, with the ratio of its time to that of SparseGPT if it was run."""
    lines = [f"{'budget':>6} {'method':28} {'sparsity':>8} {'accuracy':>8} {'error':>7} {'seconds':>8}  ratio"]
    peers = {row.budget: row.seconds for row in rows if row.method == "SparseGPT (this package)"}
    for row in rows:
        ratio = f"{row.seconds / peers[row.budget]:6.2f}" if row.budget in peers else ""
        text = f"{row.budget:6.2f} {row.method:28} {row.sparsity:8.2%} {row.accuracy:8.2f} {row.error:7.4f}"
        lines.append(f"{text} {row.seconds:8.2f} {ratio}".rstrip())
    return "\n".join(lines)
