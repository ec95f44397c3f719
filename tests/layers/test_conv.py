"""Convolutions as matrices: rows of any geometry, and the same solution as for a layer that is unfolded by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_nettrim import Cardinality, LayerProblem, Unstructured, refit, solve, trim
from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
from lightning_nettrim.calibration.recording import record
from lightning_nettrim.layers import find_layers

GEOMETRIES = {
    "1d": (nn.Conv1d, (4, 6, 3), {}),
    "1d, stride": (nn.Conv1d, (4, 6, 4), {"stride": 3}),
    "2d": (nn.Conv2d, (3, 5, 3), {}),
    "pointwise": (nn.Conv2d, (6, 5, 1), {}),
    "oblong": (nn.Conv2d, (3, 4, (2, 3)), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "stride": (nn.Conv2d, (3, 5, 3), {"stride": 2}),
    "padding": (nn.Conv2d, (3, 5, 3), {"padding": 1}),
    "same, odd": (nn.Conv2d, (3, 5, 3), {"padding": "same"}),
    "same, even": (nn.Conv2d, (3, 5, 4), {"padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, (3, 5, 3), {"padding": "valid"}),
    "reflect": (nn.Conv2d, (3, 5, 3), {"padding": 2, "padding_mode": "reflect"}),
    "replicate": (nn.Conv2d, (3, 5, 3), {"padding": (1, 2), "padding_mode": "replicate"}),
    "circular": (nn.Conv2d, (3, 5, 3), {"padding": "same", "padding_mode": "circular"}),
    "dilation": (nn.Conv2d, (3, 5, 3), {"dilation": 2, "padding": 2}),
    "groups": (nn.Conv2d, (6, 4, 3), {"groups": 2, "stride": 2}),
    "depthwise": (nn.Conv2d, (6, 6, 3), {"groups": 6, "padding": 1}),
    "multiplied depthwise": (nn.Conv2d, (4, 8, 3), {"groups": 4}),
    "no bias": (nn.Conv2d, (3, 5, 3), {"bias": False}),
    "3d": (nn.Conv3d, (2, 4, 2), {"stride": (1, 2, 1), "padding": (1, 0, 1), "groups": 2}),
    "transposed 1d": (nn.ConvTranspose1d, (4, 5, 3), {"stride": 2}),
    "transposed 2d": (nn.ConvTranspose2d, (3, 4, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed, dilated": (nn.ConvTranspose2d, (4, 6, (2, 3)), {"stride": (3, 1), "dilation": (1, 2), "groups": 2}),
    "transposed, much padding": (nn.ConvTranspose2d, (3, 4, 2), {"padding": 3}),
    "transposed 3d": (nn.ConvTranspose3d, (2, 2, 2), {"stride": 2, "bias": False}),
}


def module(name):
    kind, sizes, options = GEOMETRIES[name]
    return kind(*sizes, **options, dtype=torch.float64)


def images(layer, count=3):
    size = (9, 8, 7) if len(layer.kernel_size) < 3 else (5, 4, 5)
    return torch.randn(count, layer.in_channels, *size[: len(layer.kernel_size)], dtype=torch.float64)


def by_hand(layer, x):
    """``(groups, P, N)`` inputs, each by a convolution with a single weight of one, and ``(groups, N, M)`` weights."""
    G = layer.groups
    alone = copy.deepcopy(layer)
    alone.bias = None
    with torch.no_grad():
        weight = layer.weight.unflatten(0, (G, -1))  # (G, outputs, inputs, *kernel), or inputs first if transposed
        if layer.transposed:
            weight = weight.transpose(1, 2)
        W = weight.flatten(2).mT
        X = []
        for n in range(W.shape[1]):
            one = torch.zeros_like(weight).flatten(2)
            one[:, 0, n] = 1
            one = one.reshape(weight.shape)
            alone.weight = nn.Parameter((one.transpose(1, 2) if layer.transposed else one).flatten(0, 1))
            X.append(alone(x).movedim(1, -1).unflatten(-1, (G, -1))[..., 0].flatten(0, -2))
    return torch.stack(X, -1).movedim(1, 0), W


@pytest.mark.parametrize("name", GEOMETRIES)
def test_rows_times_the_matrix_are_the_convolution(name):
    net = nn.Sequential(module(name))
    x = images(net[0])
    layer = find_layers(net)[0]["0"]
    with evaluation_mode(net):
        recording = record(net, {"0": layer}, [CalibrationBatch(p) for p in x.split(2)], num_samples=10**6, seed=0)["0"]
    X, W = layer.to_rows(recording.X, layer.bias is not None), layer.matrix()
    with torch.no_grad():
        Z = net(x).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(layer.to_columns(Z), X @ W, rtol=0, atol=1e-12)
    assert torch.equal(layer.to_columns(Z), layer.to_columns(recording.Z))
    for key, value in layer.to_parameters(W).items():
        assert torch.equal(value, net.get_parameter(key))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_solution_is_that_of_the_unfolded_layer(name):
    net = nn.Sequential(module(name), nn.ReLU())
    x = images(net[0], 12 if net[0].transposed else 40)
    X, W = by_hand(net[0], x)
    G, _, M = W.shape
    penalty = None
    if net[0].bias is not None:
        X = torch.cat([X, torch.ones_like(X[..., :1])], -1)
        W = torch.cat([W, net[0].bias.detach().reshape(G, 1, M)], 1)
        penalty = torch.ones_like(X[0, 0])
        penalty[-1] = 0
    X, W = X.detach(), W.detach()
    Y = (X @ W).relu()
    problem = LayerProblem(X, Y, W, sparsity=0.6, Omega=Y > 0, penalty=penalty, groups=G)
    solver = Cardinality(max_steps=40)
    expected = refit(problem, solve(problem, solver).W, cg_steps=10, rtol=3e-3)
    result = trim(net, [x], sparsity=0.6, allocate="uniform", solver=solver, num_samples=10**6)
    _, found = by_hand(net[0], x[:1])
    inputs = found.shape[1]
    assert torch.equal(found != 0, expected[:, :inputs] != 0)
    torch.testing.assert_close(found, expected[:, :inputs], rtol=0, atol=1e-6)
    if penalty is not None:
        torch.testing.assert_close(net[0].bias.detach(), expected[:, -1].flatten(), rtol=0, atol=1e-6)
    weight = net[0].weight
    assert int((weight == 0).sum()) == round(0.6 * weight.numel()) == result.reports[0].zeros
    error = float((problem.response(expected) - Y).detach().norm() / Y.detach().norm())
    assert result.reports[0].local_error == pytest.approx(error, rel=1e-6)


def test_patches_are_sampled_uniformly_over_images_and_positions():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
    images = torch.arange(40 * 25.0).reshape(40, 1, 5, 5)
    counts = torch.zeros(1000)
    layers = find_layers(net)[0]
    with evaluation_mode(net):
        for seed in range(200):
            recording = record(net, layers, [CalibrationBatch(p) for p in images.split(7)], num_samples=100, seed=seed)[
                "0"
            ]
            assert tuple(recording.X.shape) == (100, 1)
            assert recording.total_rows == 1000
            counts[recording.X.flatten().long()] += 1
    for sums in (counts.reshape(40, 25).sum(1), counts.reshape(40, 25).sum(0)):
        chi_squared = float(((sums - sums.mean()) ** 2 / sums.mean()).sum())
        assert chi_squared < 1.9 * len(sums)


def test_an_image_without_a_batch_dimension():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    layer = find_layers(net)[0]["0"]
    x = torch.randn(3, 8, 8)
    with evaluation_mode(net):
        recording = record(net, {"0": layer}, [CalibrationBatch(x)], num_samples=10**6, seed=0)["0"]
        expected = net(x).flatten(1).T
    torch.testing.assert_close(layer.to_rows(recording.X, True)[0] @ layer.matrix()[0], expected)


@pytest.mark.parametrize("pattern", ["unstructured", "per_neuron", "1:3", "neuron", "2x3"])
def test_groups_share_the_zeros_of_a_layer_in_every_pattern(pattern):
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.ReLU())
    budget = {} if ":" in pattern else {"sparsity": 0.5}
    trim(net, [torch.randn(20, 8, 6, 6)], pattern=pattern, allocate="uniform", num_samples=2000, **budget)
    weight = net[0].weight.detach().flatten(1)
    kept = weight != 0
    if pattern == "unstructured":
        assert int(kept.sum()) == 72
        assert len(kept.reshape(4, -1).sum(1).unique()) > 1
    elif pattern == "per_neuron":
        assert kept.sum(1).tolist() == [9] * 8
    elif pattern == "1:3":
        assert bool((kept.reshape(-1, 3).sum(1) == 1).all())
    elif pattern == "neuron":
        assert sorted(kept.sum(1).tolist()) == [0] * 4 + [18] * 4
    else:
        blocks = kept.reshape(4, 2, 6, 3).transpose(1, 2).flatten(2).sum(-1)
        assert sorted(blocks.flatten().tolist()) == [0] * 12 + [6] * 12


def test_groups_are_the_blocks_of_a_block_diagonal_matrix():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2, 300, 6, generator=generator, dtype=torch.float64)
    W = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    W[1] *= 0.3
    Y = (X @ W).relu()
    problem = LayerProblem(X, Y, W, sparsity=0.5, Omega=Y > 0, groups=2)
    solution = solve(problem, Cardinality()).W
    assert int((solution != 0).sum()) == 24
    assert int((solution[0] != 0).sum()) > int((solution[1] != 0).sum())
    whole = torch.block_diag(*W)
    mask = torch.block_diag(*torch.ones_like(W)).bool()
    wide = torch.cat([X[0], X[1]], 1)
    flat = LayerProblem(wide, (wide @ whole).relu(), whole, sparsity=1 - 24 / whole.numel())
    flat = replace(flat, Omega=flat.Y > 0, pattern=Unstructured())
    whole_fitted = refit(flat, solve(flat, Cardinality()).W)
    by_group = refit(problem, solution)
    assert not bool((whole_fitted[~mask] != 0).any())
    assert torch.equal(whole_fitted != 0, torch.block_diag(*by_group) != 0)


def test_groups_with_inputs_of_zero_share_the_zeros_as_well():
    net = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU())
    x = torch.randn(20, 6, 6, 6)
    x[:, 2:4] = 0
    trim(net, [x], sparsity=0.5, allocate="uniform")
    assert int((net[0].weight == 0).sum()) == 27
    assert bool(net[0].weight.isfinite().all())


def test_a_grouped_convolution_is_pruned_within_an_epsilon():
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)),
        torch.randn(100, 8, 6, 6),
    )
    with torch.no_grad():
        dense = net[:2](x)
        result = trim(net, [x], epsilon=0.2, solver=Cardinality(max_steps=60), targets=["0"], max_rows=10**6)
        error = float((net[:2](x) - dense).norm() / dense.norm())
    (report,) = result.reports
    assert report.fallback == ""
    assert 0.1 < report.sparsity < 0.9
    assert error == pytest.approx(report.local_error, rel=1e-4)
    assert error <= 0.2
