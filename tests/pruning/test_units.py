"""Pruning of units: which are coupled, what they cost, which are kept, and what is refused."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from networks import copied_state, equal_states
from torch import nn
from unit_networks import NETWORKS, network

from lightning_nettrim import PruningConfig, compact, trim
from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.layers import find_layers
from lightning_nettrim.pruning.units.allocation import keep_within
from lightning_nettrim.pruning.units.costs import UnitCosts
from lightning_nettrim.pruning.units.graph import coupled_with, dependency_graph
from lightning_nettrim.pruning.units.groups import find_groups, rows_of_channels

EXPECTED = {
    "chain": {"0": (30, ["2"]), "2": (16, ["4"])},
    "flatten": {"0": (6, ["4"]), "4": (20, ["6"])},
    "residual": {"stem": (8, ["a", "c", "shortcut"]), "a": (8, ["b"]), "c": (12, ["d"]), "d": (12, ["head"])},
    "depthwise": {"first": (8, ["pointwise"]), "pointwise": (6, ["head"])},
    "grouped": {
        "first": (4, ["grouped"]),
        "grouped": (6, ["last", "squeeze"]),
        "squeeze": (4, ["excite"]),
        "last": (6, ["head"]),
    },
    "concatenation": {"left": (10, ["joint"]), "right": (6, ["joint"]), "joint": (12, ["head"])},
    "gated": {"gate": (16, ["down"])},
}


def groups_of(model, x):
    return find_groups(model, CalibrationBatch(x[:2]), find_layers(model)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_have_the_layers_that_read_their_units(name):
    model, x = network(name)
    before = copied_state(model)
    groups, skipped = groups_of(model, x)
    found = {group.name: (group.size, sorted(group.readers)) for group in groups.values()}
    assert found == EXPECTED[name]
    assert list(skipped.values()) == ["no layer reads its units"]
    assert equal_states(model, before)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_coupled_is_what_torch_pruning_finds(name):
    model, x = network(name)
    graph = dependency_graph(model, CalibrationBatch(x[:2]))
    for module in [m for m in graph.module2node if isinstance(m, nn.Linear | nn.Conv2d)]:
        pruner = graph.get_pruner_of_module(module)
        expected = graph.get_pruning_group(
            module, pruner.prune_out_channels, list(range(pruner.get_out_channels(module)))
        )
        found = [
            (item.module, item.computes, sorted(zip(item.channels, item.units, strict=True)))
            for item in coupled_with(graph, module)
        ]
        assert len(found) == len(expected.items)
        for item in expected.items:
            computes = graph.is_out_channel_pruning_fn(item.dep.handler)
            assert (item.dep.target.module, computes, sorted(zip(item.idxs, item.root_idxs, strict=True))) in found


def test_a_channel_after_flattening_has_an_input_for_each_position():
    model, x = network("flatten")
    groups, _ = groups_of(model, x)
    layers, _ = find_layers(model)
    assert torch.equal(rows_of_channels(layers["4"], groups["0"].readers["4"]), torch.arange(216).reshape(6, 36))


def test_a_reader_with_a_kernel_has_an_input_for_each_of_its_positions():
    model, x = network("residual")
    groups, _ = groups_of(model, x)
    group = next(group for group in groups.values() if "b" in group.readers)
    layers, _ = find_layers(model)
    assert torch.equal(rows_of_channels(layers["b"], group.readers["b"]), torch.arange(72).reshape(8, 9))


class Mixing(nn.Module):
    """A network whose hidden units are mixed before they are read."""

    def __init__(self, mix, hidden=None):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(20, 16), mix, hidden or nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.mix(self.first(x)))


class AddedParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return x + self.shift


class Attention(nn.Module):
    """Attention with such small weights that all tokens get nearly the same."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, std=1e-3)

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        return weights @ self.v(x)


def test_what_an_attention_score_is_computed_of_is_left_alone():
    torch.manual_seed(0)
    model = Mixing(Attention())
    groups, skipped = groups_of(model, torch.randn(4, 6, 20))
    assert list(groups) == ["first"]
    assert any("influence the output in other ways" in reason for reason in skipped.values())


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (nn.Softmax(-1), "influence the output in other ways"),
        (nn.LayerNorm(16), "LayerNorm, which does not process each unit on its own"),
        (nn.GroupNorm(4, 16), "GroupNorm, which does not process each unit on its own"),
        (AddedParameter(), "a parameter that belongs to no layer"),
    ],
)
def test_units_that_are_mixed_are_left_alone_with_a_reason(mix, reason):
    torch.manual_seed(0)
    model = Mixing(mix)
    before = copied_state(model)
    groups, skipped = groups_of(model, torch.randn(4, 20))
    assert not groups
    assert reason in skipped["first"]
    assert equal_states(model, before)


def test_a_unit_of_a_grouped_convolution_is_a_channel_of_each_of_its_groups():
    model, x = network("grouped")
    groups, _ = groups_of(model, x)
    layers, _ = find_layers(model)
    assert torch.equal(groups["first"].readers["grouped"], torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]]))
    assert torch.equal(groups["grouped"].producers["excite"][5], torch.tensor([5, 11]))
    rows = rows_of_channels(layers["grouped"], groups["first"].readers["grouped"][1:])
    assert torch.equal(rows, torch.arange(9, 36).reshape(3, 9))


class HalfGrouped(nn.Module):
    """A grouped convolution, of which one layer computes the inputs of one group only."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.grouped = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 1), nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(128, 4)

    def forward(self, x):
        return self.head(self.grouped(torch.cat([self.left(x), self.right(x[..., 1:-1, 1:-1])], 1)).flatten(1))


def test_units_of_some_groups_of_a_grouped_convolution_are_left_alone():
    groups, skipped = groups_of(HalfGrouped(), torch.randn(2, 1, 8, 8))
    assert list(groups) == ["grouped"]
    for name in ("left", "right"):
        assert skipped[name] == "grouped is a grouped convolution, of whose groups only some have its units"
    transposed = nn.ConvTranspose2d(8, 8, 3, groups=2)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), transposed, nn.Flatten(), nn.Linear(512, 4))
    _, skipped = groups_of(model, torch.randn(2, 1, 8, 8))
    assert skipped["0"] == skipped["1"] == "1 is a transposed convolution with groups"


def test_units_that_no_known_layer_computes_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(144, 2)).eval()
    groups, skipped = groups_of(model, torch.randn(2, 3, 8, 8))
    assert list(groups) == ["1"]
    assert skipped["0"] == "no layer that can be pruned computes its units"


def test_layers_that_the_user_ignores_keep_their_units():
    model, x = network("chain")
    with pytest.raises(ValueError, match="got none .*2: 2 is not pruned; 0: 2 is not pruned"):
        trim(model, x.split(64), pattern="units", sparsity=0.5, ignore=["2"])
    model, x = network("concatenation")
    result = trim(model, x.split(64), pattern="units", macs=0.8, ignore=["left"])
    dense = network("concatenation")[0]
    assert torch.equal(model.joint.weight[:, :10] != 0, dense.joint.weight[:, :10] != 0)
    assert any("units of left are all kept: left is not pruned" in note for note in result.notes)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_costs_are_those_of_the_compact_network(name, measure):
    model, x = network(name)
    groups, _ = groups_of(model, x)
    costs = UnitCosts(model, CalibrationBatch(x[:2]), groups)
    assert costs.of(costs.sizes, measure) == costs.total(measure)
    trim(model, x.split(64), pattern="units", **{measure: 0.6})
    result = compact(model, x[:2], batch_sizes=())
    kept = {name: count for name, (count, _) in result.report.units.items()}
    own = {"macs": result.report.after.macs, "parameters": result.report.after.parameters}[measure]
    assert costs.of(kept, measure) == pytest.approx(own)
    assert own <= 0.6 * costs.total(measure)
    assert own > 0.4 * costs.total(measure)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_is_smaller_than_that_of_units_chosen_by_the_norm_of_their_weights(name):
    model, x = network(name)
    dense, reference = copy.deepcopy(model), model(x)
    result = trim(model, x.split(64), pattern="units", sparsity=0.4)
    error = (model(x) - reference).norm()
    groups, _ = groups_of(dense, x)
    layers, _ = find_layers(dense)
    with torch.no_grad():
        for group in groups.values():
            weights = [dense.get_submodule(path).weight for path in group.producers]
            norms = sum(
                w[c.flatten()].reshape(group.size, -1).norm(dim=1)
                for w, c in zip(weights, group.producers.values(), strict=True)
            )
            dead = norms.argsort()[: round(0.4 * group.size)]
            for reader, channels in group.readers.items():
                layer = layers[reader]
                W = layer.to_matrix(layer.parameter.data).clone()
                W[:, rows_of_channels(layer, channels[dead]).flatten()] = 0
                layer.parameter.data.copy_(layer.from_matrix(W))
    assert error < 0.9 * (dense(x) - reference).norm()
    assert result.end_to_end_error < 1


def test_sparsity_is_the_fraction_of_units_and_numbers_are_rounded():
    model, x = network("chain")
    trim(model, x.split(64), pattern="units", sparsity=0.5, round_to=4)
    units = compact(model, x[:2], batch_sizes=()).report.units
    assert all(count % 4 == 0 or count == size for count, size in units.values())
    assert sum(count for count, _ in units.values()) <= 23


def test_a_linear_chain_of_low_rank_loses_nothing():
    """Ten of thirty hidden units are copies of others, so that a network without them is as good."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[20:] = parameter[:10]
    x = torch.randn(2000, 20)
    reference = model(x)
    trim(model, x.split(100), pattern="units", sparsity=1 / 3)
    assert (model[2].weight == 0).all(0).sum() == 10
    assert (model(x) - reference).norm() < 1e-2 * reference.norm()


@pytest.mark.parametrize("allocation", [0.9, 0.5, 0.2])
def test_the_budget_is_used_up(allocation):
    model, x = network("residual")
    groups, _ = groups_of(model, x)
    costs = UnitCosts(model, CalibrationBatch(x[:2]), groups)
    sizes = {name: group.size for name, group in groups.items()}
    kept = keep_within(costs, lambda name, count: (1 - count / sizes[name]) ** 2, ("macs", allocation), 1)
    limit = allocation * costs.total("macs")
    assert costs.of(kept, "macs") <= limit
    for name, count in kept.items():
        if count < costs.sizes[name]:
            assert costs.of({**kept, name: count + 1}, "macs") > limit


def test_a_search_finds_the_fewest_units_within_a_drop():
    model, x = network("chain")
    reference = model(x).detach()

    def metric():
        return float((model(x).detach() - reference).norm() / reference.norm())

    result = trim(model, x.split(64), pattern="units", max_drop=0.2, mode="min", metric=metric)
    assert len(result.trials) > 2
    assert 0 < metric() <= 0.2
    assert any(not trial.within for trial in result.trials)


def test_a_plan_of_units_prunes_to_the_same_network(tmp_path):
    model, x = network("residual")
    other = copy.deepcopy(model)
    plan = trim(copy.deepcopy(model), x.split(64), pattern="units", macs=0.5, dry_run=True).plan
    (tmp_path / "plan.yaml").write_text(plan)
    trim(model, x.split(64), pattern="units", macs=0.5)
    trim(other, x.split(64), plan=tmp_path / "plan.yaml")
    assert equal_states(model, copied_state(other))


def test_an_interrupted_run_is_resumed(tmp_path):
    model, x = network("residual")
    other, names = copy.deepcopy(model), []

    def interrupt(report):
        names.append(report.name)
        if len(names) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trim(model, x.split(64), pattern="units", macs=0.5, folder=tmp_path / "run", on_layer=interrupt)
    assert equal_states(model, copied_state(network("residual")[0]))
    resumed = trim(model, x.split(64), pattern="units", macs=0.5, folder=tmp_path / "run")
    trim(other, x.split(64), pattern="units", macs=0.5)
    assert any("interrupted run" in note for note in resumed.notes)
    assert equal_states(model, copied_state(other))


def test_a_budget_below_the_fewest_units_is_refused():
    model, x = network("chain")
    before = copied_state(model)
    with pytest.raises(ValueError, match=r"macs: expected at least 0\.0\d+, which is left with the fewest units"):
        trim(model, x.split(64), pattern="units", macs=0.001)
    assert equal_states(model, before)


def test_a_network_without_removable_units_is_refused():
    model = nn.Sequential(nn.Linear(20, 4))
    before = copied_state(model)
    with pytest.raises(ValueError, match="expected a group of units that can be removed, got none .0: no layer reads"):
        trim(model, [torch.randn(64, 20)], pattern="units", sparsity=0.5)
    assert equal_states(model, before)


def test_without_torch_pruning_it_is_named(monkeypatch):
    model, x = network("chain")
    before = copied_state(model)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch-pruning.*pip install lightning_nettrim\[compact\]"):
        trim(model, x.split(64), pattern="units", sparsity=0.5)
    assert equal_states(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.0}, r"macs: expected the fraction that is left, in \(0, 1\], got 0.0"),
        ({"parameters": 1.5}, r"parameters: expected the fraction that is left, in \(0, 1\], got 1.5"),
        (
            {"macs": 0.5, "parameters": 0.5},
            "expected one of sparsity, macs, parameters, latency and max_drop, got macs=0.5 and",
        ),
        ({"macs": 0.5, "sparsity": 0.5}, "got macs=0.5 and sparsity=0.5: choose one"),
        ({"epsilon": 0.5}, "expected one of sparsity, macs, parameters, latency and max_drop, got epsilon=0.5"),
        ({"macs": 0.5, "per_layer": {"0": {"sparsity": 0.5}}}, "per_layer: expected none with the pattern 'units'"),
        ({"macs": 0.5, "allocate": "uniform"}, "allocate: expected 'global' with the pattern 'units', got 'uniform'"),
        ({"macs": 0.5, "round_to": 0}, "round_to: expected at least 1, got 0"),
        ({"macs": 0.5, "pattern": "2:4"}, "macs: expected the pattern 'units', got macs=0.5"),
        ({"sparsity": 0.5, "round_to": 8, "pattern": "neuron"}, "round_to: expected the pattern 'units'"),
        (
            {"sparsity": 0.5, "pattern": "neuron", "per_layer": {"0": {"pattern": "units"}}},
            "other patterns than 'units'",
        ),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**{"pattern": "units"} | options)
