"""A Llama whose weights are on disk and exceed the memory limit: its checkpoint, and its pruning block by block."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_nettrim import PruningResult, trim
from lightning_nettrim.runtime.memory import GIB
from recipes.text import CharLlama

WINDOWS, LENGTH, BATCH = 32, 64, 8
"""Number of random calibration windows, their length, and the number of windows of a batch."""


def llama(dim: int, depth: int) -> CharLlama:
    """The Llama of the recipe on the meta device; 1.30 GiB with 1024 features and 24 blocks."""
    with torch.device("meta"):
        return CharLlama(dim=dim, depth=depth, heads=max(dim // 64, 1), hidden=211 * dim // 64)


def save_random_weights(model: nn.Module, folder: Path) -> float:
    """Write a checkpoint of random weights, one file per block; returns its size in GiB."""
    files: dict[str, list[str]] = {}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for name in shapes:
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "outside"
        files.setdefault(f"{part}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        save_file({name: _random(shapes[name], generator) for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return 4 * sum(shape.numel() for shape in shapes.values()) / GIB


def prune(limit: float, dim: int, depth: int, scheme: str) -> tuple[PruningResult, float]:
    """Prune 80 % of the weights of a Llama within ``max_memory=limit``; the result, and the GiB of its weights."""
    model = llama(dim, depth)
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(128, (WINDOWS, LENGTH), generator=generator).split(BATCH)
    with tempfile.TemporaryDirectory() as folder:
        weights, output = Path(folder) / "dense", Path(folder) / "pruned"
        weights.mkdir()
        size = save_random_weights(model, weights)
        result = trim(
            model, windows, sparsity=0.8, allocate="uniform", max_memory=limit, scheme=scheme, ignore=["head"],
            weights=weights, output=output,
        )  # fmt: skip
    return result, size


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A matrix with entries of variance 1/N; ones for a norm."""
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)
