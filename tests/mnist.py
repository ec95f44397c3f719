"""What the tests on MNIST share: running a recipe, the accuracy of its network, and warnings of other packages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainers import CLI_WARNINGS

from lightning_nettrim.cli import main

ROOT = Path(__file__).parents[1]

MARKS = [pytest.mark.slow, *CLI_WARNINGS]


def accuracy(model, data):
    """Accuracy on the held-out images."""
    images, labels = data.held_out.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def run(configs, folder, *options, command="fit"):
    """Run a command on a recipe; its logs and files go into a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["nettrim"])
        arguments = [part for config in configs for part in ("--config", str(config))]
        main([command, *arguments, f"--trainer.logger.init_args.save_dir={folder}", *options])
