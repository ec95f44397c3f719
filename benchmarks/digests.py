"""Digests of pruned networks: ``python -m benchmarks.digests`` prints them, to compare two versions of the package.

Six small networks are pruned in five configurations each, on one thread. Two versions compute the same weights, to the
bit, where they print the same lines on the same machine.
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
"""Arguments of `trim`."""


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 8))


def lenet5() -> nn.Module:
    """Two convolutions with max-pooling, two linear layers."""
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
    """Patches, two transformer layers, a linear head."""

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
    """Convolutions in groups, one of them depthwise and followed by LeakyReLU."""
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


def pruned(make: Callable[[], nn.Module], shape: Sequence[int], arguments: dict[str, Any], share: slice) -> str:
    """The digest of a network that is pruned on a share of the batches."""
    torch.manual_seed(0)
    model = make()
    batches = [torch.randn(64, *shape) for _ in range(8)]
    model(torch.cat(batches))  # running statistics
    model.eval()
    probe = torch.cat(batches[:2])
    with torch.no_grad():
        dense = model(probe)
    if "max_drop" in arguments:

        def metric() -> float:
            with torch.no_grad():
                return float((model(probe) - dense).norm() + dense.norm())

        arguments = arguments | {"metric": metric}
    if arguments.get("pattern") == "2:4":
        arguments = arguments | {"ignore": _indivisible(model)}
    result = trim(model, batches[share], num_samples=256, **arguments)
    fingerprint = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        fingerprint.update(name.encode())
        fingerprint.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{fingerprint.hexdigest()[:20]} {result.sparsity:.4f}"


def _indivisible(model: nn.Module) -> list[str] | None:
    """Layers whose number of inputs is no multiple of four."""
    names = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        matrix = isinstance(module, nn.Linear | nn.Conv2d) and isinstance(weight, Tensor)
        if matrix and weight[0].numel() % 4 and not name.endswith("out_proj"):
            names.append(name)
    return names or None


def _process(rank: int, folder: str, names: list[str]) -> None:
    """One of two processes, with every other batch."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in names:
        found = pruned(mlp, (32,), CONFIGURATIONS[name] | {"distributed": True}, slice(rank, None, 2))
        if rank == 0:
            (Path(folder) / name.replace(":", "_")).write_text(found, encoding="utf-8")
    distributed.destroy_process_group()


def lines() -> Iterator[str]:
    """One line for each network and configuration."""
    for network, (make, shape) in NETWORKS.items():
        for name, arguments in CONFIGURATIONS.items():
            yield f"{network:14} {name:22} {pruned(make, shape, arguments, slice(None))}"
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (folder, [*CONFIGURATIONS]), nprocs=2)
        for name in CONFIGURATIONS:
            found = (Path(folder) / name.replace(":", "_")).read_text(encoding="utf-8")
            yield f"{'two processes':14} {name:22} {found}"


def main() -> None:
    """Print all lines, or compare them with those of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument("--compare", type=Path, help="file with the output of another version")
    expected = vars(parser.parse_args())["compare"]
    torch.set_num_threads(1)
    found = []
    for line in lines():
        print(line, flush=True)
        found.append(line)
    if expected is not None:
        before = expected.read_text(encoding="utf-8").splitlines()
        differ = [line for line in found if line not in before]
        print(f"{len(found) - len(differ)} of {len(found)} lines are the same")
        raise SystemExit(bool(differ))


if __name__ == "__main__":
    main()
