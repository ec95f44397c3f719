"""A solver, a layer type, a pattern, an allocation and a command outside the package, and a module that uses them."""

import math
from dataclasses import dataclass
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nettrim import Allocation, Layer, LayerProblem, Pattern, Solution, Solver, register_layer
from lightning_nettrim.cli import Command
from lightning_nettrim.core.prox import project_pattern


@dataclass(frozen=True)
class EnergySolver(Solver):
    """Keep the weights with the largest |W|^power·‖X‖."""

    uses_folded_layer: ClassVar[bool] = False
    power: float = 1.0

    def solve(self, problem: LayerProblem, warm=None) -> Solution:
        score = problem.W.abs().pow(self.power) * torch.linalg.vector_norm(problem.X, dim=-2).unsqueeze(-1)
        return Solution.uncertified(project_pattern(problem, problem.W, score))


class Scaled(nn.Module):
    """y = x·kernel / √N."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.kernel / math.sqrt(len(self.kernel))


class ScaledLayer(Layer):
    """The scaled kernel as a matrix."""

    is_plain_matrix: ClassVar[bool] = True

    @classmethod
    def from_module(cls, path, module):
        yield path, cls(path, module, weight="kernel", bias=None)

    @property
    def name(self):
        return self.path

    @property
    def inputs(self):
        return len(self.parameter)

    def observe(self, args, kwargs, output):
        (x,) = args
        return self.token_call(x, output)

    def to_matrix(self, weight):
        return weight.unsqueeze(0) / math.sqrt(self.inputs)

    def from_matrix(self, W):
        return W[0] * math.sqrt(self.inputs)


register_layer(Scaled, ScaledLayer)


@dataclass(frozen=True)
class WholeInputs(Pattern):
    """All weights of ``count`` consecutive inputs."""

    count: int = 1

    @property
    def name(self):
        return f"inputs_by_{self.count}"

    def block(self, N, M):
        return M, self.count

    def num_sets(self, N, M):
        return 1


@dataclass(frozen=True)
class DenseFirst(Allocation):
    """The first layer stays dense."""

    def allocate(self, session, sparsity):
        sizes = session.shared_sizes()
        first, *others = sizes
        share = sparsity * sum(sizes.values()) / sum(sizes[name] for name in others)
        kept = {name: round((1 - share) * sizes[name]) for name in others}
        return session.budgets_keeping({first: sizes[first]} | kept)


class Count(Command):
    """Counts parameters."""

    name = "count"

    def run(self, trainer, model, datamodule, digits: int = 0) -> None:
        """Print the number of parameters.

        Args:
            digits: digits after the decimal point.
        """
        print(f"{sum(p.numel() for p in model.parameters()):.{digits}f} parameters, {type(datamodule).__name__}")


class ScaledNet(pl.LightningModule):
    """8-16-12-3 with Scaled layers and ReLUs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Scaled(8, 16), nn.ReLU(), Scaled(16, 12), nn.ReLU(), Scaled(12, 3))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RandomData(pl.LightningDataModule):
    """Random inputs and classes."""

    def _loader(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(96, 8, generator=generator)
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=32)

    def train_dataloader(self):
        return self._loader(0)

    def val_dataloader(self):
        return self._loader(1)
