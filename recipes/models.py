"""Small classifiers as LightningModules; nothing here knows of pruning."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.functional import accuracy

Batch = tuple[Tensor, Tensor]


class MLP(pl.LightningModule):
    """A fully connected classifier, ReLU between its layers, trained by Adam with a one-cycle learning rate.

    Args:
        sizes: inputs, hidden neurons of each layer, classes; 784-300-100-10 is LeNet-300-100.
        lr: largest learning rate of the cycle.
        weight_decay: of Adam.
    """

    def __init__(self, sizes: list[int], lr: float = 3e-3, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sizes, self.lr, self.weight_decay = sizes, lr, weight_decay
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
            self.add_module(f"fc{i}", nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(P, ...)`` images to ``(P, classes)`` logits."""
        *hidden, last = self.children()
        x = x.flatten(1)
        for layer in hidden:
            x = layer(x).relu()
        return last(x)

    def training_step(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, batch: Batch, stage: str) -> None:
        x, y = batch
        logits = self(x)
        acc = accuracy(logits, y, task="multiclass", num_classes=self.sizes[-1])
        self.log(f"{stage}_acc", acc, prog_bar=True, batch_size=len(y))
        self.log(f"{stage}_loss", nn.functional.cross_entropy(logits, y), batch_size=len(y))

    def validation_step(self, batch: Batch) -> None:
        """Accuracy and loss."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch) -> None:
        """Accuracy and loss."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch) -> Tensor:
        """Class numbers."""
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> dict:
        """Adam, one cycle over the whole fit."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
