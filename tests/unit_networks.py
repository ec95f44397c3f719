"""Networks whose units are coupled in different ways, and what can be counted of them."""

from __future__ import annotations

import torch
from networks import conv2d_network, mlp
from torch import Tensor, nn


class Residual(nn.Module):
    """Two residual blocks of convolutions with BatchNorm, one with a shortcut; the head averages positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.bn_a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.shortcut, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, 1, H, W)`` to ``(P, 4)``."""
        x = self.bn(self.stem(x)).relu()
        x = (self.b(self.bn_a(self.a(x)).relu()) + x).relu()
        x = (self.d(self.c(x).relu()) + self.shortcut(x)).relu()
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, 1, H, W)`` to ``(P, 4)``."""
        x = self.pointwise(self.depthwise(self.first(x).relu()).relu()).relu()
        return self.head(x.amax((2, 3)))


class Grouped(nn.Module):
    """A bottleneck block with a grouped convolution, as in ResNeXt and RegNet, and squeeze-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.bn = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3, groups=2), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.last, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, 1, H, W)`` to ``(P, 4)``."""
        x = self.bn(self.grouped(self.first(x).relu())).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.last(x).relu().mean((2, 3)))


class Concatenation(nn.Module):
    """Two branches side by side, read by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.joint = nn.Linear(20, 10), nn.Linear(20, 6), nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, 20)`` to ``(P, 4)``."""
        x = torch.cat([self.left(x).relu(), self.right(x).tanh()], 1)
        return self.head(self.joint(x).relu())


class Gated(nn.Module):
    """A gated feed-forward block: two layers compute each hidden unit together."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(20, 16), nn.Linear(20, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(P, 20)`` to ``(P, 4)``."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def built(kind: type[nn.Module]) -> nn.Module:
    """A network with random weights and running statistics, the same in every call, in evaluation mode."""
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
    return model.eval()


NETWORKS = {
    "chain": (mlp, (20,)),
    "flatten": (conv2d_network, (1, 8, 8)),
    "residual": (lambda: built(Residual), (1, 8, 8)),
    "depthwise": (lambda: built(Depthwise), (1, 8, 8)),
    "grouped": (lambda: built(Grouped), (1, 8, 8)),
    "concatenation": (lambda: built(Concatenation), (20,)),
    "gated": (lambda: built(Gated), (20,)),
}
"""Each with the shape of an input."""


def network(name: str, count: int = 512) -> tuple[nn.Module, Tensor]:
    """A network of `NETWORKS` and normal inputs."""
    make, shape = NETWORKS[name]
    return make(), torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
