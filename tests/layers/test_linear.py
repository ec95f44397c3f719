"""Linear layers as matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_nettrim.layers.linear import Linear, TransposedLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_times_the_matrix_are_the_output(bias, dtype):
    module, x = nn.Linear(5, 3, bias=bias, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    layer = Linear("fc", module, bias="bias" if bias else None)
    W, X = layer.matrix(), layer.to_rows(x, bias)
    assert W.dtype == X.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        (X @ W)[0].to(dtype), module(x).detach(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2
    )
    parameters = layer.to_parameters(W)
    assert list(parameters) == layer.written_names == ["fc.weight", "fc.bias"][: 1 + bias]
    for name, value in parameters.items():
        assert torch.equal(value.to(dtype), getattr(module, name[3:]))


def test_the_matrix_is_a_copy():
    module = nn.Linear(3, 3, bias=False)
    Linear("fc", module, bias=None).matrix().zero_()
    assert module.weight.count_nonzero() == 9


def test_leading_dimensions_are_rows():
    module, x = nn.Linear(5, 3), torch.randn(2, 4, 5)
    layer, output = Linear("fc", module), module(x)
    call = layer.observe((), {"input": x}, output)
    positions = torch.tensor([1, 6])
    assert (call.count, call.shape, call.tensor) == (8, (2, 4), output)
    assert torch.equal(call.inputs(positions), x.reshape(8, 5)[positions])
    assert torch.equal(call.outputs(positions), output.detach().reshape(8, 3)[positions])


def test_masks_of_torch_prune_are_part_of_the_weights():
    module = nn.Linear(4, 3)
    trained = module.weight.detach().clone()
    prune.custom_from_mask(module, "weight", torch.eye(3, 4))
    ((name, layer),) = Linear.from_module("fc", module)
    assert name == layer.name == "fc"
    assert layer.written_names == ["fc.weight_orig", "fc.bias", "fc.weight_mask"]
    W = layer.matrix()
    assert torch.equal(W[0, :4].mT, trained * torch.eye(3, 4))
    W[0, 0, 0] = 0
    written = layer.to_parameters(W)
    assert torch.equal(written["fc.weight_mask"], (torch.eye(3, 4) - torch.eye(3, 4)[:, :1] * torch.eye(1, 4)))


def test_a_transposed_linear_layer_has_its_inputs_first():
    class Conv1D(nn.Module):
        """As in Hugging Face's GPT-2."""

        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    module, x = Conv1D(), torch.randn(7, 5)
    layer = TransposedLinear("fc", module)
    assert (layer.inputs, layer.outputs) == (5, 3)
    torch.testing.assert_close((layer.to_rows(x, True) @ layer.matrix())[0], module(x).detach())
    written = layer.to_parameters(layer.matrix())
    assert torch.equal(written["fc.weight"], module.weight)
    call = layer.observe((), {"x": x}, module(x))
    assert torch.equal(call.inputs(torch.arange(7)), x)
