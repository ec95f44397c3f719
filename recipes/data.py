"""Images of handwritten digits as LightningDataModules that are kept in memory."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset


class InMemoryDataModule(pl.LightningDataModule):
    """Tensors of inputs and targets: one part for training, one for validation, test and prediction.

    Attributes:
        train: training data.
        held_out: data for validation, test and prediction.
    """

    train: TensorDataset
    held_out: TensorDataset

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def _loader(self, data: TensorDataset, shuffle: bool) -> DataLoader:
        order = RandomSampler(data) if shuffle else SequentialSampler(data)
        size = self.batch_size if shuffle else 1000
        return DataLoader(data, batch_size=None, sampler=BatchSampler(order, size, drop_last=False))

    def train_dataloader(self) -> DataLoader:
        """Training batches, shuffled."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Held-out batches, in order."""
        return self._loader(self.held_out, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """Held-out batches, in order."""
        return self._loader(self.held_out, shuffle=False)

    def predict_dataloader(self) -> DataLoader:
        """Held-out batches, in order."""
        return self._loader(self.held_out, shuffle=False)


class Digits(InMemoryDataModule):
    """The 1 797 digits of 8 × 8 pixels that are part of scikit-learn: no download; every fifth image is held out.

    Args:
        batch_size: batch size of the training data.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__(batch_size)

    def setup(self, stage: str) -> None:
        """Load the images and split them."""
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        images, labels = torch.tensor(x, dtype=torch.float32) / 8 - 1, torch.tensor(y, dtype=torch.long)
        held_out = torch.arange(len(labels)) % 5 == 0
        self.train = TensorDataset(images[~held_out], labels[~held_out])
        self.held_out = TensorDataset(images[held_out], labels[held_out])


class MNIST(InMemoryDataModule):
    """MNIST by torchvision: 60 000 training images; the 10 000 test images are held out, also for validation.

    Args:
        root: folder of the data, which are downloaded if missing; ``None`` is ``$NETTRIM_DATA`` or ``./data``.
        batch_size: batch size of the training data.
    """

    def __init__(self, root: str | None = None, batch_size: int = 128) -> None:
        super().__init__(batch_size)
        self.root = Path(root or os.environ.get("NETTRIM_DATA", "./data"))

    def prepare_data(self) -> None:
        """Download missing files."""
        from torchvision import datasets

        for train in (True, False):
            datasets.MNIST(self.root, train=train, download=True)

    def setup(self, stage: str) -> None:
        """Load both parts and normalize the pixels to zero mean and unit variance."""
        from torchvision import datasets

        def read(train: bool) -> TensorDataset:
            data = datasets.MNIST(self.root, train=train)
            pixels: Tensor = data.data.float() / 255
            return TensorDataset((pixels - 0.1307) / 0.3081, data.targets)

        self.train, self.held_out = read(True), read(False)
