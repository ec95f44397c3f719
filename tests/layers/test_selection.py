"""Which layers are pruned, by which keys, and their matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_nettrim.layers import Linear, check_model, find_layers, match_options


def network():
    encoder = nn.Sequential(nn.Bilinear(2, 3, 2), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 2), "names": nn.Embedding(5, 4)})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matrix_and_rows_answer_as_the_layer(bias, dtype):
    module, x = nn.Linear(5, 3, bias=bias, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    layer = Linear("fc", module, bias="bias" if bias else None)
    W, X = layer.matrix(), layer.to_rows(x, bias)
    assert W.dtype == X.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        (X @ W)[0].to(dtype), module(x).detach(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2
    )
    back = layer.to_parameters(W)
    assert list(back) == ["fc.weight", "fc.bias"][: 1 + bias]
    for name, value in back.items():
        assert torch.equal(value.to(dtype), getattr(module, name[3:]))


def test_a_matrix_is_a_copy():
    module = nn.Linear(3, 3, bias=False)
    Linear("fc", module, bias=None).matrix().zero_()
    assert module.weight.count_nonzero() == 9


@pytest.mark.parametrize(
    ("targets", "ignore", "found"),
    [
        (None, None, ["encoder.1", "encoder.3", "head"]),
        (["head"], None, ["head"]),
        (["encoder.*"], None, ["encoder.1", "encoder.3"]),
        (["re:.*[13]"], None, ["encoder.1", "encoder.3"]),
        (["Linear"], ["head"], ["encoder.1", "encoder.3"]),
        ("head", None, ["head"]),
        (None, ["re:encoder.*", "Embedding"], ["head"]),
    ],
)
def test_keys_choose_layers(targets, ignore, found):
    model = network()
    layers, skipped = find_layers(model, targets, ignore)
    assert list(layers) == found
    everything = {"encoder.0", "encoder.1", "encoder.3", "head", "names"}
    assert set(layers) | set(skipped) == everything
    assert not set(layers) & set(skipped)


def test_reasons_say_why():
    _, skipped = find_layers(network(), None, ["head"])
    assert skipped == {
        "encoder.0": "Bilinear has parameters, but no layer type is registered for it: call register_layer",
        "head": "ignored",
        "names": "Embedding looks up rows of its weight: there is no matrix product to prune",
    }


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_a_key_that_matches_nothing_names_its_neighbours(argument):
    with pytest.raises(ValueError, match=rf"{argument}: 'encodr.1' matches no layer.*'encoder.1'"):
        find_layers(network(), **{argument: ["encodr.1"]})


def test_no_layer_left_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="got none.*Bilinear has parameters"):
        find_layers(nn.Sequential(nn.Bilinear(2, 2, 1)))
    with pytest.raises(ValueError, match="no weight matrix"):
        find_layers(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


def test_tied_parametrized_lazy_and_attention_layers_are_skipped():
    model = nn.ModuleDict(
        {
            "tied": nn.Linear(4, 5, bias=False),
            "table": nn.Embedding(5, 4),
            "normed": parametrizations.weight_norm(nn.Linear(3, 3)),
            "lazy": nn.LazyLinear(3),
            "attention": nn.MultiheadAttention(4, 2),
            "plain": nn.Linear(3, 3),
        }
    )
    model["table"].weight = model["tied"].weight
    layers, skipped = find_layers(model)
    assert list(layers) == ["attention.in_proj", "attention.out_proj", "plain"]
    assert "shared (tied.weight, table.weight)" in skipped["tied"]
    assert "computed by a parametrization" in skipped["normed"]
    assert "not initialized" in skipped["lazy"]


def test_the_later_of_two_keys_wins():
    layers, _ = find_layers(network())
    chosen = match_options({"Linear": {"sparsity": 0.5}, "head": {"sparsity": 0.2, "refit": False}}, layers)
    assert chosen["encoder.1"] == {"sparsity": 0.5}
    assert chosen["head"] == {"sparsity": 0.2, "refit": False}
    with pytest.raises(ValueError, match="per_layer: 'haed' matches no layer"):
        match_options({"haed": {}}, layers)


def test_unusable_weights_are_refused():
    model = network()
    with torch.no_grad():
        model["head"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="head: expected finite weights"):
        find_layers(model)
    integer = nn.Linear(2, 2)
    integer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating-point weights, got torch.int8"):
        find_layers(nn.Sequential(integer))


def test_models_on_the_meta_device_are_refused():
    with pytest.raises(ValueError, match="weight: expected weights in memory"):
        check_model(nn.Linear(2, 2, device="meta"))
