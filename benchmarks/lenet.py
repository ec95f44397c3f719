"""The instance: the layers of LeNet-300-100, trained on MNIST from a fixed seed, as Net-Trim programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch

from benchmarks.training import trained
from lightning_nettrim import LayerProblem
from recipes.data import MNIST
from recipes.models import MLP

EPOCHS = 3


def network(data: MNIST, cache: Path, seed: int = 0, epochs: int = EPOCHS) -> MLP:
    """784-300-100-10 after some epochs, read from the cache where it was trained before."""
    pl.seed_everything(seed, verbose=False)
    return trained(MLP([784, 300, 100, 10]), data, cache / f"lenet-{seed}-{epochs}.pt", epochs)


def layers(root: str | None, samples: int, cache: Path) -> list[LayerProblem]:
    """The three programs, without a radius, in float32.

    The bias is the last row of ``W``, on a column of ones, and is penalized like the rest: no peer can leave it free,
    so that all solve one program.

    Args:
        root: folder of MNIST; ``$NETTRIM_DATA`` or ``./data`` if not given.
        samples: P, the first so many training images.
        cache: folder of the trained weights.
    """
    data = MNIST(root)
    data.prepare_data()
    data.setup("fit")
    *hidden, last = network(data, cache).children()
    x, programs = data.train.tensors[0][:samples].flatten(1), []
    with torch.no_grad():
        for layer in (*hidden, last):
            X = torch.cat([x, torch.ones(len(x), 1)], 1)
            W = torch.cat([layer.weight.T, layer.bias[None]]).contiguous()
            XW = X @ W
            x = XW if layer is last else XW.relu()
            programs.append(LayerProblem(X, x, W, Omega=None if layer is last else x > 0))
    return programs


def problem(
    layer: int, gain: float, samples: int, root: str | None, cache: Path, neurons: int | None = None
) -> LayerProblem:
    """One layer's program at ε = gain ‖Y‖_F.

    Args:
        layer: 1, 2 or 3.
        gain: radius relative to the response.
        samples: P.
        root: folder of MNIST.
        cache: folder of the trained weights.
        neurons: only the first so many outputs; all if not given.
    """
    whole = layers(root, samples, cache)[layer - 1]
    Y, W = whole.Y[:, :neurons].contiguous(), whole.W[:, :neurons].contiguous()
    Omega = None if whole.Omega is None else whole.Omega[:, :neurons].contiguous()
    return replace(whole, Y=Y, W=W, Omega=Omega, epsilon=gain * torch.linalg.matrix_norm(Y))
