"""Dense networks: trained from a fixed seed, cached in a file, evaluated on the test images."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import nn

from recipes.data import MNIST

Model = TypeVar("Model", bound=pl.LightningModule)


def train_or_load(model: Model, data: pl.LightningDataModule, path: Path, epochs: int) -> Model:
    """Train the model, or load its weights if the file exists.

    Args:
        model: the untrained model, changed in place.
        data: the training data.
        path: file of the trained weights; it is written after training.
        epochs: number of training epochs.

    Returns:
        The model in evaluation mode.
    """
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, limit_val_batches=0, **quiet).fit(model, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def accuracy(model: nn.Module, data: MNIST) -> float:
    """Accuracy on the test images, in percent."""
    images, labels = data.held_out.tensors
    with torch.no_grad():
        predictions = torch.cat([model.eval()(part).argmax(1) for part in images.split(1000)])
    return 100 * float((predictions == labels).double().mean())
