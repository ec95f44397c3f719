"""What the tests on MNIST share: running a recipe, the accuracy of its network, and warnings of other packages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_nettrim.cli import main

ROOT = Path(__file__).parents[1]

MARKS = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning per type"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4[.\d]* and will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


def accuracy(model, data):
    """Accuracy on the held-out images."""
    images, labels = data.held_out.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def fit(configs, folder, *options):
    """Run the command of a recipe; its logs and files go into a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["nettrim"])
        arguments = [part for config in configs for part in ("--config", str(config))]
        main(["fit", *arguments, f"--trainer.logger.init_args.save_dir={folder}", *options])
