"""The layers of LeNet-300-100, trained on MNIST from a fixed seed, as problems of Net-Trim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch

from benchmarks.training import train_or_load
from lightning_nettrim import LayerProblem
from recipes.data import MNIST
from recipes.models import MLP

EPOCHS = 3


def network(data: MNIST, cache: Path, seed: int = 0, epochs: int = EPOCHS) -> MLP:
    """The trained network 784-300-100-10.

    Args:
        data: the training data.
        cache: folder of the trained weights.
        seed: seed of the training.
        epochs: number of training epochs.
    """
    pl.seed_everything(seed, verbose=False)
    return train_or_load(MLP([784, 300, 100, 10]), data, cache / f"lenet-{seed}-{epochs}.pt", epochs)


def layers(root: str | None, samples: int, cache: Path) -> list[LayerProblem]:
    """The problems of the three layers in float32, without an epsilon.

    The bias is the last row of ``W``, for an input that is always one. It is penalized like the weights, because no
    other solver can leave it unpenalized, and all must solve the same problem.

    Args:
        root: folder of MNIST; ``None`` is ``$NETTRIM_DATA`` or ``./data``.
        samples: P; the first P training images are used.
        cache: folder of the trained weights.
    """
    data = MNIST(root)
    data.prepare_data()
    data.setup("fit")
    *hidden, last = network(data, cache).children()
    x, problems = data.train.tensors[0][:samples].flatten(1), []
    with torch.no_grad():
        for layer in (*hidden, last):
            X = torch.cat([x, torch.ones(len(x), 1)], 1)
            W = torch.cat([layer.weight.T, layer.bias[None]]).contiguous()
            XW = X @ W
            x = XW if layer is last else XW.relu()
            problems.append(LayerProblem(X, x, W, Omega=None if layer is last else x > 0))
    return problems


def problem(
    layer: int, relative_epsilon: float, samples: int, root: str | None, cache: Path, neurons: int | None = None
) -> LayerProblem:
    """The problem of one layer at ε = relative_epsilon · ‖Y‖_F.

    Args:
        layer: 1, 2 or 3.
        relative_epsilon: radius relative to the norm of the response.
        samples: P.
        root: folder of MNIST.
        cache: folder of the trained weights.
        neurons: number of outputs, the first ones of the layer; ``None`` is all.
    """
    whole = layers(root, samples, cache)[layer - 1]
    Y, W = whole.Y[:, :neurons].contiguous(), whole.W[:, :neurons].contiguous()
    Omega = None if whole.Omega is None else whole.Omega[:, :neurons].contiguous()
    return replace(whole, Y=Y, W=W, Omega=Omega, epsilon=relative_epsilon * torch.linalg.matrix_norm(Y))
