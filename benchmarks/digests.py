"""Digests of pruned networks, to compare two versions of the package: ``python -m benchmarks.digests``.

Five small networks, and one of them in two processes, are pruned in five configurations each, on one thread. If two
versions print the same lines on the same machine, their pruned weights are bitwise identical.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from lightning_nettrim import ADMM, SparseGPT, Wanda, trim

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sparsity, global": {"sparsity": 0.7},
    "epsilon, parallel": {"epsilon": 0.1, "solver": ADMM(max_steps=200), "scheme": "parallel"},
    "2:4, SparseGPT": {"pattern": "2:4", "solver": SparseGPT(), "allocate": "uniform", "refit": False},
    "epsilon, Wanda": {"epsilon": 0.3, "solver": Wanda(), "importance": "equal", "penalize_bias": True},
    "max_drop, magnitude": {"max_drop": 0.2, "relative": True, "mode": "min", "allocate": "magnitude"},
}
"""Options of `trim` for each configuration."""


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 8))


def lenet5() -> nn.Module:
    """Two convolutions with max-pooling and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        """ReLU(x + BN(conv(ReLU(BN(conv(x))))))."""
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def resnet() -> nn.Module:
    """A convolution and two residual blocks with BatchNorm."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)]
    return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(), Block(), *head)


class ViT(nn.Module):
    """A patch embedding, two transformer layers and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 16, 4, stride=4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


def grouped() -> nn.Module:
    """Grouped convolutions, one of them depthwise, with LeakyReLU, ReLU6 and ReLU."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8),
    )  # fmt: skip


IMAGES = (4, 12, 12)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (32,)),
    "LeNet-5": (lenet5, IMAGES),
    "ResNet": (resnet, IMAGES),
    "ViT": (ViT, IMAGES),
    "grouped": (grouped, IMAGES),
}


def prune_and_digest(make: Callable[[], nn.Module], shape: Sequence[int], options: dict[str, Any], shard: slice) -> str:
    """Prune a network on a shard of the batches and return its digest and its sparsity.

    Args:
        make: makes the network.
        shape: shape of an input.
        options: options of `trim`.
        shard: the batches of this process.
    """
    torch.manual_seed(0)
    model = make()
    batches = [torch.randn(64, *shape) for _ in range(8)]
    model(torch.cat(batches))  # sets the running statistics of BatchNorm
    model.eval()
    inputs = torch.cat(batches[:2])
    with torch.no_grad():
        dense = model(inputs)
    if "max_drop" in options:

        def metric() -> float:
            with torch.no_grad():
                return float((model(inputs) - dense).norm() + dense.norm())

        options = options | {"metric": metric}
    if options.get("pattern") == "2:4":
        options = options | {"ignore": _layers_indivisible_by_four(model)}
    result = trim(model, batches[shard], num_samples=256, **options)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{digest.hexdigest()[:20]} {result.sparsity:.4f}"


def _layers_indivisible_by_four(model: nn.Module) -> list[str] | None:
    """Names of the layers whose number of inputs is not a multiple of four; ``None`` if there are none."""
    names = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(module, nn.Linear | nn.Conv2d) and isinstance(weight, Tensor)
        if is_matrix and weight[0].numel() % 4 and not name.endswith("out_proj"):
            names.append(name)
    return names or None


def _process(rank: int, folder: str, names: list[str]) -> None:
    """Prune in one of two processes, on every second batch; process 0 writes the digests."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in names:
        digest = prune_and_digest(mlp, (32,), CONFIGURATIONS[name] | {"distributed": True}, slice(rank, None, 2))
        if rank == 0:
            (Path(folder) / name.replace(":", "_")).write_text(digest, encoding="utf-8")
    distributed.destroy_process_group()


def lines() -> Iterator[str]:
    """One line for each network and configuration."""
    for network, (make, shape) in NETWORKS.items():
        for name, options in CONFIGURATIONS.items():
            yield f"{network:14} {name:22} {prune_and_digest(make, shape, options, slice(None))}"
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (folder, [*CONFIGURATIONS]), nprocs=2)
        for name in CONFIGURATIONS:
            digest = (Path(folder) / name.replace(":", "_")).read_text(encoding="utf-8")
            yield f"{'two processes':14} {name:22} {digest}"


def main() -> None:
    """Print all lines and, with ``--compare``, compare them with those of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument(
        "--compare", type=Path, help="file with the output of another version; exit code 1 if a line differs"
    )
    expected = vars(parser.parse_args())["compare"]
    torch.set_num_threads(1)
    printed = []
    for line in lines():
        print(line, flush=True)
        printed.append(line)
    if expected is not None:
        expected_lines = expected.read_text(encoding="utf-8").splitlines()
        differing = [line for line in printed if line not in expected_lines]
        print(f"{len(printed) - len(differing)} of {len(printed)} lines are identical")
        raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
