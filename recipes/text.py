"""The text of Python's documentation, and a small Llama on characters, without any code for pruning."""

from __future__ import annotations

from collections import Counter

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from recipes.data import InMemoryDataModule

Batch = tuple[Tensor, Tensor]


class Topics(InMemoryDataModule):
    """The texts of Python's ``help()``, from the standard library: no download; the last tenth is held out.

    A batch is ``(ids, next_ids)``, two int64 tensors ``(B, T)``; ``next_ids`` is shifted by one character. Training
    windows start at random positions; their number per epoch is that of the windows that cover the training part once.
    Held-out windows do not overlap and are in order.

    Args:
        length: T, the number of characters of a window.
        batch_size: number of windows of a training batch.
        symbols: number of ids; id 0 stands for all characters except the ``symbols - 1`` most frequent ones of the
            training part.
    """

    def __init__(self, length: int = 64, batch_size: int = 32, symbols: int = 128) -> None:
        super().__init__(batch_size)
        self.length, self.symbols = length, symbols

    def setup(self, stage: str) -> None:
        """Load the text, split it and divide it into windows."""
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics))
        split = len(text) - len(text) // 10
        self.alphabet = "".join(sorted(c for c, _ in Counter(text[:split]).most_common(self.symbols - 1)))
        self.train = self._windows(text[:split], stride=1)
        self.held_out = self._windows(text[split:], stride=self.length)

    def _windows(self, text: str, stride: int) -> TensorDataset:
        number = {c: i for i, c in enumerate(self.alphabet, start=1)}
        windows = torch.tensor([number.get(c, 0) for c in text]).unfold(0, self.length + 1, stride)  # a view
        return TensorDataset(windows[:, :-1], windows[:, 1:])

    def train_dataloader(self) -> DataLoader:
        """Training batches of random windows; no window occurs twice in an epoch."""
        order = RandomSampler(self.train, num_samples=-(-len(self.train) // self.length))
        return DataLoader(self.train, batch_size=None, sampler=BatchSampler(order, self.batch_size, drop_last=False))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding: rotate the pairs (x_i, x_{i + d/2}) at position t by the angle t·10000^(−2i/d).

    Args:
        x: ``(..., T, d)``, d even.

    Returns:
        The rotated values, ``(..., T, d)``.

    References:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864.
    """
    length, d = x.shape[-2:]
    frequencies = 10000.0 ** (-2 * torch.arange(d // 2, device=x.device) / d)
    angles = torch.outer(torch.arange(length, device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding; its four linear layers have no bias.

    Args:
        dim: number of features of a token.
        heads: number of attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, dim)`` to the same shape."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The feed-forward network down(silu(gate(x)) · up(x)), without bias.

    Args:
        dim: number of features of a token.
        hidden: number of hidden neurons.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, dim)`` to the same shape."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A block of Llama with pre-normalization: self-attention, then a feed-forward network.

    Args:
        dim: number of features of a token.
        heads: number of attention heads.
        hidden: number of hidden neurons of the feed-forward network.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5)
        self.feed_forward = SwiGLU(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, dim)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class CharLlama(pl.LightningModule):
    """A small character-level Llama, trained by AdamW with a one-cycle learning rate.

    Args:
        symbols: number of ids.
        dim: number of features of a token.
        depth: number of blocks.
        heads: number of attention heads.
        hidden: number of hidden neurons of the feed-forward network of a block.
        lr: maximum learning rate of the cycle.
        weight_decay: weight decay of AdamW.

    References:
        Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv:2302.13971.
    """

    def __init__(
        self,
        symbols: int = 128,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        hidden: int = 352,
        lr: float = 5e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay = lr, weight_decay
        self.embed = nn.Embedding(symbols, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, symbols, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``(B, T)`` ids to ``(B, T, symbols)`` logits of the next id."""
        return self.head(self.norm(self.blocks(self.embed(ids))))

    def _loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy over all characters, in nats."""
        ids, next_ids = batch
        return nn.functional.cross_entropy(self(ids).flatten(0, 1), next_ids.flatten())

    def training_step(self, batch: Batch) -> Tensor:
        """Compute the cross entropy."""
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Log the cross entropy."""
        self.log("val_loss", self._loss(batch), prog_bar=True, batch_size=len(batch[0]))

    def test_step(self, batch: Batch) -> None:
        """Log the cross entropy."""
        self.log("test_loss", self._loss(batch), batch_size=len(batch[0]))

    def predict_step(self, batch: Batch) -> Tensor:
        """Predict the next ids."""
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> dict:
        """AdamW, with one cycle of the learning rate over the whole fit."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
