"""Outputs of layers that are kept between forward passes: equal results, fewer calls, and nothing stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_nettrim import Cardinality, trim
from lightning_nettrim.calibration.output_cache import OutputCache
from lightning_nettrim.layers import find_layers
from lightning_nettrim.layers.context import LayerContext
from tests.networks import AttentionNetwork, ConvBlock, SharedLayers, conv1d_network, equal_states


class Batch:
    """Identifies a batch."""


class Counting(nn.Linear):
    """A linear layer that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def chain(relu=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(Counting(6, 8), nn.BatchNorm1d(8), relu(), Counting(8, 5), relu(), Counting(5, 3)).eval()


def cache_of(model, capacity=1e9, batchnorms=None, calls=1):
    layers = {name: layer for name, layer in find_layers(model)[0].items() if name in ("0", "3", "5", "a", "b")}
    return OutputCache(model, layers, {name: LayerContext(calls) for name in layers}, batchnorms or {}, capacity)


def calls_of(model):
    counted = [layer for layer in model.modules() if isinstance(layer, Counting)]
    counts = [layer.calls for layer in counted]
    for layer in counted:
        layer.calls = 0
    return counts


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "computed"),
    [("0.weight", [1, 1, 1]), ("0.bias", [1, 1, 1]), ("1.running_mean", [0, 1, 1]), ("3.weight", [0, 1, 1]),
     ("5.bias", [0, 0, 1])],
)  # fmt: skip
def test_only_the_layers_that_depend_on_a_changed_tensor_are_computed_again(name, computed):
    model, batch, x = chain(), Batch(), torch.randn(4, 6)
    cache = cache_of(model, batchnorms={"1": "0"})
    for expected in ([1, 1, 1], [0, 0, 0]):
        with cache.reused(batch):
            model(x)
        assert calls_of(model) == expected
    (dict(model.named_parameters()) | dict(model.named_buffers()))[name].mul_(1.5)
    with cache.reused(batch):
        output = model(x)
    assert calls_of(model) == computed
    assert torch.equal(output, model(x))


@torch.no_grad()
def test_a_tensor_of_no_layer_concerns_all_of_them():
    model, batch, x = chain(), Batch(), torch.randn(4, 6)
    cache = cache_of(model)
    for _ in range(2):
        with cache.reused(batch):
            model(x)
        model[1].running_var.add_(1)
        assert calls_of(model) == [1, 1, 1]


def test_a_buffer_may_have_been_made_in_inference_mode():
    """As those that a module registers in its forward pass, in a validation by a Trainer."""
    torch.manual_seed(0)
    model, x = chain(), torch.randn(64, 6)
    with torch.inference_mode():
        model.register_buffer("scale", torch.ones(3))
    result = trim(model, [x], sparsity=0.5, allocate="uniform", solver=Cardinality(max_steps=12))
    assert result.sparsity == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
def test_operations_in_place_do_not_change_what_is_kept():
    model, batch, x = chain(lambda: nn.ReLU(inplace=True)), Batch(), torch.randn(4, 6)
    expected, cache = model(x), cache_of(model)
    for _ in range(3):
        with cache.reused(batch):
            assert torch.equal(model(x), expected)


@torch.no_grad()
def test_batches_are_kept_apart_and_dropped_with_their_objects():
    model, batches, xs = chain(), [Batch(), Batch()], torch.randn(2, 4, 6)
    cache = cache_of(model)
    for _ in range(2):
        for i, x in enumerate(xs):
            with cache.reused(batches[i]):
                output = model(x)
            assert torch.equal(output, model(x))
    assert cache.size == 2 * 4 * (8 + 5 + 3) * 4
    batches.clear()
    assert cache.size == 0


@torch.no_grad()
def test_the_layers_that_are_cheapest_to_compute_are_dropped_beyond_the_capacity():
    model, batch, x = chain(), Batch(), torch.randn(4, 6)
    cache = cache_of(model, capacity=4 * (5 + 3) * 4)
    with cache.reused(batch):
        model(x)
    assert calls_of(model) == [1, 1, 1]
    with cache.reused(batch):
        model(x)
    assert calls_of(model) == [1, 0, 0]
    assert cache.size == cache.capacity


def test_gradients_are_those_of_the_whole_network():
    model, batch, x = chain(), Batch(), torch.randn(4, 6)
    cache = cache_of(model)
    for _ in range(2):
        with cache.reused(batch):
            model(x).sum().backward()
    assert calls_of(model) == [2, 2, 2]
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_an_output_that_depends_on_later_layers_is_not_kept():
    """In some batches the layer that is first in the plan reads the one that is last."""

    class Reordered(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = Counting(4, 4), Counting(4, 4)

        def forward(self, x):
            return self.a(self.b(x))

    model, batch, x = Reordered(), Batch(), torch.randn(3, 4)
    cache = cache_of(model)
    for _ in range(2):
        model.b.weight.mul_(2)
        with cache.reused(batch):
            output = model(x)
        assert torch.equal(output, model(x))


@torch.no_grad()
def test_layers_that_are_called_several_times_are_computed():
    model, batch, x = chain(), Batch(), torch.randn(4, 6)
    cache = cache_of(model, calls=2)
    for _ in range(2):
        with cache.reused(batch):
            model(x)
    assert calls_of(model) == [2, 2, 2]
    assert cache.size == 0


@torch.no_grad()
def test_the_forwards_of_modules_are_restored():
    model, batch = chain(), Batch()
    own = model[3].forward = lambda x: nn.functional.linear(x, model[3].weight)
    cache = cache_of(model)
    with pytest.raises(RuntimeError), cache.reused(batch):
        model(torch.randn(4, 7))
    assert model[3].forward is own
    assert "forward" not in vars(model[0])


NETWORKS = {
    "convolutions and Linear": (conv1d_network, (16,)),
    "residual sum": (lambda: ConvBlock(True).eval(), (4, 6, 6)),
    "attention": (lambda: AttentionNetwork().eval(), (7, 16)),
    "shared layers": (lambda: SharedLayers().eval(), (3, 6, 6)),
}


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("network", NETWORKS)
def test_pruned_networks_are_equal_with_and_without_it(network, scheme, monkeypatch):
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    model, batches, kept = make(), torch.randn(64, *shape).split(16), []
    pruned = [copy.deepcopy(model), copy.deepcopy(model)]
    options = {"sparsity": 0.6, "scheme": scheme, "solver": Cardinality(max_steps=12)}
    keep = OutputCache._keep
    monkeypatch.setattr(OutputCache, "_keep", lambda self, *arguments: (keep(self, *arguments), kept.append(self.size)))
    trim(pruned[0], batches, **options)
    assert (max(kept, default=0) > 0) == (network != "shared layers")
    monkeypatch.setattr(OutputCache, "_keep", lambda *arguments: None)
    trim(pruned[1], batches, **options)
    assert equal_states(*pruned)
