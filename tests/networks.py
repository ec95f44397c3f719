"""Small networks with calibration data, and what the tests compare of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_nettrim.calibration.activations import Activations
from lightning_nettrim.calibration.batch import evaluation_mode
from lightning_nettrim.calibration.sampling import sample_inputs
from lightning_nettrim.calibration.tracing import trace_forward
from lightning_nettrim.layers import find_layers
from lightning_nettrim.layers.folding import FoldedLayer


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """20-30-16-4 with ReLUs, the same in every call: 600 + 480 + 64 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def wide_mlp() -> nn.Sequential:
    """20-30-20-26 with ReLUs, the same in every call: 600 + 600 + 520 weights.

    No layer has so few weights that Cardinality takes more steps.
    """
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 26))


def mlp_batches(count: int = 10, size: int = 50, width: int = 20, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Batches for `mlp` and `wide_mlp`, uniform in [0, 1)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, width, generator=generator).to(dtype) for _ in range(count)]


def conv2d_network() -> nn.Sequential:
    """Conv2d, BatchNorm and two Linear layers "0", "4" and "6", the same in every call: 54 + 4320 + 80 weights."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 4)
    ).eval()


def conv2d_inputs(count: int = 1200) -> Tensor:
    """Normal inputs for `conv2d_network`."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def conv1d_network() -> nn.Sequential:
    """Conv1d, BatchNorm and two Linear layers "1", "5" and "7", the same in every call: 576 + 768 + 576 weights.

    No layer has so few weights that Cardinality takes more steps.
    """
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 48, 3), nn.BatchNorm1d(48), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 72),
    ).eval()  # fmt: skip


def conv1d_inputs(count: int = 300) -> Tensor:
    """Normal inputs for `conv1d_network`."""
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_states(one: nn.Module, other: nn.Module | Mapping[str, Tensor]) -> bool:
    """Whether a network has, bit by bit, the parameters and buffers of another one or of a state dict."""
    state, others = one.state_dict(), other.state_dict() if isinstance(other, nn.Module) else other
    return list(state) == list(others) and all(torch.equal(state[name], others[name]) for name in state)


def count_hooks(model: nn.Module) -> int:
    """Number of forward hooks and forward pre-hooks of all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def outputs(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The outputs for all batches, in the model's modes."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


class ConvBlock(nn.Module):
    """conv → norm (→ + shortcut) → activation → head, with a BatchNorm whose statistics are not those of its inputs.

    Args:
        residual: whether the output of a second convolution is added.
        activation: function applied to the sum.
        bias: whether the first convolution has a bias.
        affine: whether the BatchNorm has a scale and a shift.
    """

    def __init__(
        self,
        residual: bool,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        bias: bool = False,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.residual, self.activation = residual, activation
        self.conv, self.norm = nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine)
        self.shortcut, self.head = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 3)
            if affine:
                self.norm.weight.copy_(torch.tensor([1.0, -0.7, 2.0, -1.5, 0.3, 0.9]))
                self.norm.bias.normal_()

    def response(self, x: Tensor) -> Tensor:
        """The response of ``conv``: after the BatchNorm, the sum and the activation."""
        y = self.norm(self.conv(x))
        return self.activation(y + self.shortcut(x) if self.residual else y)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the head."""
        return self.head(self.response(x))


class AttentionNetwork(nn.Module):
    """Attention with 4 heads, a residual sum and a Linear head.

    Args:
        cross: whether the keys and values are other tokens than the queries.
        options: of the attention.
    """

    def __init__(self, cross: bool = False, **options: bool) -> None:
        super().__init__()
        self.cross = cross
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the head."""
        memory = x[:, :3] if self.cross else x
        return self.head(x + self.attention(x, memory, memory, need_weights=False)[0])


class SharedLayers(nn.Module):
    """One convolution at two resolutions, and two Linear modules with the same weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        """The output of the second Linear module."""
        x = self.conv(torch.max_pool2d(self.conv(x).relu(), 2)).relu()
        return self.b(self.a(x.mean((2, 3))).relu()).relu()


def activations_of(model: nn.Module, batches: Iterable[Tensor], rows: int = 10**5) -> Activations:
    """The activations of all layers of a model on all inputs."""
    calibration_set, layers = sample_inputs(model, batches, 10**5, 0), find_layers(model)[0]
    with evaluation_mode(model):
        contexts = trace_forward(model, layers, calibration_set).contexts
    layers = {name: layers[name] for name in contexts}
    folded = {name: FoldedLayer.create(layer, contexts[name], model, False) for name, layer in layers.items()}
    return Activations(model, layers, contexts, folded, calibration_set, dict.fromkeys(layers, rows), 0)
