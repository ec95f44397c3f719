"""Pruning with the weights in files equals pruning in memory, to the bit, with one block loaded at a time."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_nettrim import ADMM, Magnitude, trim


class Residual(nn.Module):
    """x + W₂ ReLU(W₁ x), as a tensor or in a tuple, scaled by an argument that the model computes for each block."""

    def __init__(self, width: int, in_tuple: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.in_tuple = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), in_tuple

    def forward(self, x: Tensor, *, scale: tuple[Tensor, float]):
        x = x + scale[0] * scale[1] * self.down(torch.relu(self.up(x)))
        return (x, None) if self.in_tuple else x


class Network(nn.Module):
    """A stem, residual blocks and a head, with a buffer that is not saved."""

    def __init__(self, blocks: int = 3, width: int = 24, in_tuple: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(20, width), nn.ReLU())
        self.blocks = nn.ModuleList(Residual(width, in_tuple) for _ in range(blocks))
        self.head = nn.Linear(width, 26)
        self.register_buffer("scale", torch.full((1,), 0.5, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x, scale=(self.scale, 1.0 + i))
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


class NormalizedBlock(nn.Module):
    """BatchNorm, ReLU, Linear: the BatchNorm reads what the block before has computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.norm(x)) + x)


def batches(count: int = 10, width: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(50, width, generator=generator) for _ in range(count)]


def saved(make, tmp_path):
    """A network in memory, the same one on the meta device, and the file of its weights."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    with torch.device("meta"):
        on_meta = make().eval()
    return model, on_meta, tmp_path / "dense.safetensors"


def check_equal(make, data, tmp_path, **options):
    """Prune in memory and from the file, and compare weights and reports."""
    model, on_meta, weights = saved(make, tmp_path)
    output = tmp_path / "pruned.safetensors"
    options = {"allocate": "uniform"} | options
    in_memory = trim(model, data, **options)
    result = trim(on_meta, data, weights=weights, output=output, **options)
    pruned = load_file(output)
    assert list(pruned) == list(load_file(weights))
    for name, value in model.state_dict().items():
        assert torch.equal(pruned[name], value), name
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert [report.name for report in result.reports] == [report.name for report in in_memory.reports]
    for own, other in zip(result.reports, in_memory.reports, strict=True):
        assert (own.zeros, own.sparsity, own.shape) == (other.zeros, other.sparsity, other.shape)
        assert own.local_error == pytest.approx(other.local_error, rel=1e-6)
        assert own.end_to_end_error == pytest.approx(other.end_to_end_error, rel=1e-6)
    for name in ("sparsity", "model_sparsity", "end_to_end_error", "output_distance", "output_norm"):
        assert getattr(result, name) == pytest.approx(getattr(in_memory, name), rel=1e-6), name
    assert result.plan == in_memory.plan
    assert result.skipped == in_memory.skipped
    return result


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("in_tuple", [False, True])
def test_weights_and_reports_equal_those_of_pruning_in_memory(scheme, in_tuple, tmp_path):
    result = check_equal(lambda: Network(in_tuple=in_tuple), batches(), tmp_path, sparsity=0.6, scheme=scheme)
    assert [report.name for report in result.reports][:3] == ["stem.0", "blocks.0.up", "blocks.0.down"]
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("refit", [True, False])
def test_batchnorms_before_the_first_layer_of_a_block_are_reestimated(scheme, refit, tmp_path):
    options = {"sparsity": 0.5, "scheme": scheme, "solver": Magnitude(), "refit": refit}
    check_equal(lambda: nn.Sequential(*(NormalizedBlock(20) for _ in range(3))), batches(), tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.2, "solver": ADMM(max_steps=50)},
        {"pattern": "2:4", "solver": Magnitude()},
        {"sparsity": 0.5, "num_samples": 100, "max_rows": 64, "offload": "disk", "solver": Magnitude()},
        {"sparsity": 0.5, "ignore": ["head"], "per_layer": {"stem.0": {"sparsity": 0.2}}, "solver": Magnitude()},
        {"sparsity": 0.5, "importance": "equal", "penalize_bias": True, "solver": Magnitude()},
    ],
    ids=["epsilon", "2:4", "samples", "layers", "bias"],
)
def test_options_have_the_same_effect_as_in_memory(options, tmp_path):
    check_equal(Network, batches(), tmp_path, **options)
