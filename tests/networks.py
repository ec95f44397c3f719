"""Small networks with calibration data, and what the tests compare of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """20-30-16-4 with ReLUs, the same in every call: 600 + 480 + 64 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def mlp_batches(
    count: int = 10, size: int = 50, width: int = 20, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Batches for `mlp`, uniform in [0, 1)."""
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
    """Conv1d, BatchNorm and two Linear layers "1", "5" and "7", the same in every call: 18 + 720 + 80 weights."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 4),
    ).eval()  # fmt: skip


def conv1d_inputs(count: int = 300) -> Tensor:
    """Normal inputs for `conv1d_network`."""
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(0))


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
