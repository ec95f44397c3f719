"""The dense networks: trained from a fixed seed, kept in a cache, and judged on the test images."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import nn

from recipes.data import MNIST

Model = TypeVar("Model", bound=pl.LightningModule)


def trained(model: Model, data: pl.LightningDataModule, path: Path, epochs: int) -> Model:
    """The model after so many epochs, read from the file where it was trained before."""
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, limit_val_batches=0, **quiet).fit(model, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def accuracy(model: nn.Module, data: MNIST) -> float:
    """On the test images, in percent."""
    images, labels = data.held_out.tensors
    with torch.no_grad():
        answers = torch.cat([model.eval()(part).argmax(1) for part in images.split(1000)])
    return 100 * float((answers == labels).double().mean())
