"""Small classifiers as LightningModules, without any code for pruning."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.functional import accuracy

Batch = tuple[Tensor, Tensor]


class _Classifier(pl.LightningModule):
    """Base class of the classifiers: cross entropy, Adam with a one-cycle learning rate, accuracy.

    A subclass sets `lr` and `weight_decay`, and maps ``(P, ...)`` images to ``(P, classes)`` logits.
    """

    lr: float
    weight_decay: float

    def training_step(self, batch: Batch) -> Tensor:
        """Compute the cross entropy."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, batch: Batch, stage: str) -> None:
        """Log accuracy and loss."""
        x, y = batch
        logits = self(x)
        acc = accuracy(logits, y, task="multiclass", num_classes=logits.shape[-1])
        self.log(f"{stage}_acc", acc, prog_bar=True, batch_size=len(y))
        self.log(f"{stage}_loss", nn.functional.cross_entropy(logits, y), batch_size=len(y))

    def validation_step(self, batch: Batch) -> None:
        """Log accuracy and loss."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch) -> None:
        """Log accuracy and loss."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch) -> Tensor:
        """Predict the classes."""
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> dict:
        """Adam, with one cycle of the learning rate over the whole fit."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MLP(_Classifier):
    """A fully connected classifier with ReLU between its layers.

    Args:
        sizes: number of inputs, of neurons in each hidden layer, and of classes; 784-300-100-10 is LeNet-300-100.
        lr: maximum learning rate of the cycle.
        weight_decay: weight decay of Adam.
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


class LeNet5(_Classifier):
    """LeNet-5 as in Caffe, 20-50-500-10: two 5 × 5 convolutions with ReLU and 2 × 2 max-pooling, two linear layers.

    Args:
        lr: maximum learning rate of the cycle.
        weight_decay: weight decay of Adam.
    """

    def __init__(self, lr: float = 3e-3, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay = lr, weight_decay
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, 28, 28)`` images to ``(P, 10)`` logits."""
        x = nn.functional.max_pool2d(self.conv1(x.unsqueeze(1)).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Block(nn.Module):
    """A residual block: two 3 × 3 convolutions with batch normalization, a shortcut, and a ReLU after their sum.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        stride: stride of the first convolution. If input and output differ in shape, the shortcut is a 1 × 1
            convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(P, inputs, H, W)`` to ``(P, outputs, H / stride, W / stride)``."""
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


class ResNet(_Classifier):
    """A small residual network: three stages at 14 × 14, 7 × 7 and 4 × 4 pixels, average pooling, a linear layer.

    Args:
        width: number of channels of the first stage; it doubles with each stage.
        blocks: number of blocks per stage.
        lr: maximum learning rate of the cycle.
        weight_decay: weight decay of Adam.
    """

    def __init__(self, width: int = 16, blocks: int = 1, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay = lr, weight_decay
        self.conv1 = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for i, stride in enumerate((1, 2, 2)):
            inputs, outputs = (width << i) // stride, width << i
            rest = (Block(outputs, outputs) for _ in range(blocks - 1))
            self.add_module(f"stage{i + 1}", nn.Sequential(Block(inputs, outputs, stride), *rest))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, 28, 28)`` images to ``(P, 10)`` logits."""
        x = self.bn1(self.conv1(x.unsqueeze(1))).relu()
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))


class Encoder(nn.Module):
    """A transformer encoder block with pre-normalization: self-attention, then a feed-forward network.

    Args:
        dim: number of features of a token.
        heads: number of attention heads.
        hidden: number of hidden neurons of the feed-forward network.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, tokens, dim)`` to the same shape."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class ViT(_Classifier):
    """A small vision transformer with a class token and learned positions.

    Args:
        patch: height and width of a patch in pixels, a divisor of 28.
        dim: number of features of a token.
        depth: number of blocks.
        heads: number of attention heads.
        hidden: number of hidden neurons of the feed-forward network of a block.
        lr: maximum learning rate of the cycle.
        weight_decay: weight decay of Adam.
    """

    def __init__(
        self,
        patch: int = 7,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        hidden: int = 128,
        lr: float = 3e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay = lr, weight_decay
        self.embed = nn.Conv2d(1, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Encoder(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, 28, 28)`` images to ``(P, 10)`` logits."""
        patches = self.embed(x.unsqueeze(1)).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])
