"""Selection of layers by keys, and the reasons for the others."""

from __future__ import annotations

import pytest
import torch
from networks import SharedLayers
from torch import nn
from torch.nn.utils import parametrizations

from lightning_nettrim.layers import check_model, find_layers, match_options


def network():
    encoder = nn.Sequential(nn.Bilinear(2, 3, 2), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 2), "names": nn.Embedding(5, 4)})


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
def test_keys_select_layers(targets, ignore, found):
    model = network()
    layers, skipped = find_layers(model, targets, ignore)
    assert list(layers) == found
    everything = {"encoder.0", "encoder.1", "encoder.3", "head", "names"}
    assert set(layers) | set(skipped) == everything
    assert not set(layers) & set(skipped)


def test_every_other_layer_has_a_reason():
    _, skipped = find_layers(network(), None, ["head"])
    assert skipped == {
        "encoder.0": "Bilinear has parameters, but no layer type is registered for it: call register_layer",
        "head": "ignored",
        "names": "Embedding looks up rows of its weight: there is no matrix product to prune",
    }


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_a_key_that_matches_nothing_gets_suggestions(argument):
    with pytest.raises(ValueError, match=rf"{argument}: 'encodr.1' matches no layer.*'encoder.1'"):
        find_layers(network(), **{argument: ["encodr.1"]})


def test_no_layer_left_is_an_error_with_the_reasons():
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


def test_the_later_of_two_keys_takes_precedence():
    layers, _ = find_layers(network())
    chosen = match_options({"Linear": {"sparsity": 0.5}, "head": {"sparsity": 0.2, "refit": False}}, layers)
    assert chosen["encoder.1"] == {"sparsity": 0.5}
    assert chosen["head"] == {"sparsity": 0.2, "refit": False}
    with pytest.raises(ValueError, match="per_layer: 'haed' matches no layer"):
        match_options({"haed": {}}, layers)


def test_weights_that_cannot_be_pruned_are_refused():
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


def test_recurrent_layers_are_skipped_with_their_reason():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.GRUCell(3, 4), nn.Linear(2, 2)])
    _, skipped = find_layers(model)
    assert "LSTM is recurrent" in skipped["0"]
    assert "GRUCell is recurrent" in skipped["1"]


def test_modules_that_share_weight_and_bias_are_one_layer():
    layers, skipped = find_layers(SharedLayers())
    assert list(layers) == ["conv", "a"]
    assert [alias.name for alias in layers["a"].aliases] == ["b"]
    assert skipped == {"b": "it is the same layer as a and pruned with it"}


def test_one_weight_with_two_biases_is_skipped():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)])
    model[1].weight = model[0].weight
    layers, skipped = find_layers(model)
    assert list(layers) == ["2"]
    assert skipped["0"] == skipped["1"] == "its weight is shared (0.weight, 1.weight)"
