"""What follows a layer: the program built is the one written by hand, and it is worth solving."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_nettrim import ADMM, Cardinality, Magnitude, trim
from lightning_nettrim.calibration.sampling import sample_inputs
from lightning_nettrim.core.activation import Rectifier
from lightning_nettrim.layers import find_layers
from lightning_nettrim.layers.context import LayerContext
from lightning_nettrim.layers.folding import FoldedLayer
from lightning_nettrim.pruning.plan import Budget, choose
from lightning_nettrim.pruning.pruner import Pruner
from lightning_nettrim.pruning.rehearsal import Rehearsal
from lightning_nettrim.pruning.session import Settings


class Block(nn.Module):
    """conv → BatchNorm (→ + residual) → activation, and something behind it."""

    def __init__(self, residual, activation=F.relu, bias=False, affine=True):
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

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.residual:
            y = y + self.shortcut(x)
        return self.head(self.activation(y))


def pruner(model, x, penalize_bias=False, **budget):
    held = sample_inputs(model, [x], 10**5, 0)
    plan = choose(model, held, Budget(**({"sparsity": 0.6} | budget)))
    return Pruner(model, plan, held, Settings("cascade", None, 10**5, 0, penalize_bias, "equal", True))


def posed(model, x, name="conv", trained=True, **options):
    pruning = pruner(model, x, **options)
    recording = pruning.activations.recordings(name)[name]
    return pruning.pose(name, recording, pruning.plan.budgets[name], trained)


def test_an_allocation_goes_by_the_trained_weights_whatever_is_pruned_now():
    model, x = Block(False).eval(), torch.randn(40, 4, 6, 6)
    rehearsal = Rehearsal(pruner(model, x))
    before = rehearsal.budgets("magnitude", 0.7)
    rehearsal.pruner.prune(rehearsal.budgets("uniform", 0.9))
    assert rehearsal.budgets("magnitude", 0.7) == before


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_the_program_is_the_one_written_by_hand(residual, bias):
    model, x = Block(residual, bias=bias).eval(), torch.randn(5, 4, 6, 6)
    problem = posed(model, x)
    with torch.no_grad():
        norm = model.norm
        a = norm.weight / (norm.running_var + norm.eps).sqrt()
        c = norm.bias - a * norm.running_mean + (a * model.conv.bias if bias else 0)
        rows = F.unfold(x, 3).mT.flatten(0, 1)
        X = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        W = torch.cat([(model.conv.weight.flatten(1) * a[:, None]).T, c[None]])
        R = model.shortcut(x).flatten(2).mT.flatten(0, 1)
        Y = model.activation(norm(model.conv(x)) + (model.shortcut(x) if residual else 0)).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(problem.X[0], X)
    torch.testing.assert_close(problem.W[0], W)
    torch.testing.assert_close(problem.Y[0], Y, rtol=1e-5, atol=1e-5)
    assert torch.equal(problem.Omega, problem.Y > 0)
    assert (problem.offset is not None) == residual
    if residual:
        torch.testing.assert_close(problem.offset[0], R)
        torch.testing.assert_close(problem.center[0], Y - R, rtol=1e-5, atol=1e-5)
    assert problem.penalty.tolist() == [1.0] * 36 + [0.0]
    torch.testing.assert_close(problem.response(problem.W), problem.Y, rtol=1e-4, atol=1e-5)


def test_the_cascade_answers_to_the_pruned_residual_and_stays_feasible():
    model, x = Block(True).eval(), torch.randn(5, 4, 6, 6)
    pruning = pruner(model, x, epsilon=0.05, sparsity=None)
    with torch.no_grad():
        model.shortcut.weight.mul_(0.9)
        R = model.shortcut(x).flatten(2).mT.flatten(0, 1)
    pruning.solver = ADMM()
    problem = pruning.pose("conv", pruning.activations.recordings("conv")["conv"], pruning.plan.budgets["conv"], False)
    torch.testing.assert_close(problem.offset[0], R)
    assert float(violation(problem, problem.W)) <= 1e-6


class Blind(Cardinality):
    """Is given the layer alone, as if nothing followed it."""

    behind: ClassVar[bool] = False


@pytest.mark.parametrize(
    "activation", [F.relu, F.relu6, lambda u: F.hardtanh(u, -1, 0.5), lambda u: F.leaky_relu(u, 0.1)]
)
@pytest.mark.parametrize("residual", [False, True])
def test_behind_the_norm_is_closer_than_in_front_of_it(residual, activation):
    model, x = Block(residual, activation).eval(), torch.randn(60, 4, 8, 8)
    errors = {}
    for name, solver in {"behind": Cardinality(), "in front": Blind()}.items():
        network = copy.deepcopy(model)
        refit = name == "behind"
        result = trim(network, [x], sparsity=0.7, targets=["conv"], solver=solver, refit=refit, num_samples=4000)
        with torch.no_grad():
            got, wanted = (
                m.activation(m.norm(m.conv(x)) + (m.shortcut(x) if residual else 0)) for m in (network, model)
            )
        errors[name] = float((got - wanted).norm() / wanted.norm())
        assert list(network.state_dict()) == list(model.state_dict())
        assert int((network.conv.weight == 0).sum()) == round(0.7 * 216)
        if name == "behind":
            assert result.reports[0].relative_error == pytest.approx(errors[name], rel=0.1)
            assert result.reports[0].discrepancy == pytest.approx(result.reports[0].relative_error, rel=1e-3)
    assert errors["behind"] < 0.97 * errors["in front"]


@pytest.mark.parametrize("solver", [None, Magnitude()])
def test_statistics_are_those_of_the_pruned_network_and_its_answers_stay(solver):
    x = torch.randn(30, 4, 8, 8)
    base = Block(True).eval()
    networks = [copy.deepcopy(base) for _ in range(2)]
    for network, recalibrate in zip(networks, (True, False), strict=True):
        trim(network, [x], sparsity=0.6, allocate="uniform", solver=solver, recalibrate_batchnorm=recalibrate)
    moved, kept = networks
    with torch.no_grad():
        torch.testing.assert_close(moved(x), kept(x), rtol=1e-4, atol=1e-4)
        seen = moved.conv(x)
    torch.testing.assert_close(moved.norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.norm.running_var, seen.transpose(0, 1).flatten(1).var(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(kept.norm.running_var, base.norm.running_var)
    assert not torch.equal(kept.norm.bias, base.norm.bias)


def test_a_norm_that_no_solution_is_behind_is_re_estimated():
    model, x = Block(False).eval(), torch.randn(30, 4, 8, 8)
    before = copy.deepcopy(model)
    trim(model, [x], sparsity=0.6, targets=["conv"], solver=Magnitude(), refit=False)
    with torch.no_grad():
        seen = model.conv(x)
    torch.testing.assert_close(model.norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.norm.weight, before.norm.weight)
    assert torch.equal(model.norm.bias, before.norm.bias)
    kept = model.conv.weight != 0
    assert torch.equal(model.conv.weight[kept], before.conv.weight[kept])


@pytest.mark.parametrize(
    ("bias", "affine", "penalize"), [(True, False, False), (False, False, False), (True, True, True)]
)
def test_the_shift_goes_where_there_is_room_for_it(bias, affine, penalize):
    model, x = Block(False, bias=bias, affine=affine).eval(), torch.randn(30, 4, 8, 8)
    before = copy.deepcopy(model)
    result = trim(model, [x], sparsity=0.5, targets=["conv"], penalize_bias=penalize, recalibrate_batchnorm=False)
    with torch.no_grad():
        got, wanted = (m.activation(m.norm(m.conv(x))) for m in (model, before))
    assert result.reports[0].relative_error == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {"conv.weight"} | ({"conv.bias"} if bias else set())
    assert result.reports[0].zeros == round(0.5 * (216 + 6 * penalize))


def test_channels_that_a_norm_shuts_off_are_pruned_to_the_exact_count():
    model, x = Block(False).eval(), torch.randn(30, 4, 8, 8)
    with torch.no_grad():
        model.norm.weight[2:4] = 0
    before = copy.deepcopy(model)
    trim(model, [x], sparsity=0.5, targets=["conv"], recalibrate_batchnorm=False)
    assert int((model.conv.weight == 0).sum()) == 108
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert torch.equal(model.norm.bias[2:4], before.norm.bias[2:4])
    with torch.no_grad():
        model.norm.weight.zero_()
    trim(model, [x], sparsity=0.7, targets=["conv"])
    assert int((model.conv.weight == 0).sum()) == round(0.7 * 216)


def test_a_norm_that_two_layers_share_is_no_part_of_a_solution():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(5, 4), nn.Linear(5, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.a(x)).relu() + self.norm(self.b(x)).relu()

    model, x = Shared().eval(), torch.randn(200, 5)
    before = model.norm.bias.clone()
    plan = choose(model, sample_inputs(model, [x], 10**5, 0), Budget(sparsity=0.5))
    assert {name: str(flow) for name, flow in plan.contexts.items()} == {"a": "linear", "b": "linear"}
    trim(model, [x], sparsity=0.5)
    assert torch.equal(model.norm.bias, before)


@pytest.mark.parametrize(("activation", "factor"), [(nn.ReLU6(), 6), (nn.Hardtanh(-0.5, 0.5), 1)])
def test_two_bounds_are_certified(activation, factor):
    model = nn.Sequential(nn.Linear(12, 8), activation, nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(factor)
    result = trim(model, [torch.randn(400, 12)], epsilon=0.1)
    for report in result.reports:
        assert report.status == "CONVERGED"
        assert 0 <= report.duality_gap <= 1e-3
        assert report.violation <= 1e-3


def test_prelu_has_a_slope_for_each_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 0.1, 0.5, 1.0]))
    problem = posed(model, torch.randn(4, 3, 6, 6), name="0")
    assert problem.rectifier.slope.flatten().tolist() == pytest.approx([1e-6, 0.1, 0.5, 1.0])
    torch.testing.assert_close(problem.response(problem.W), problem.Y, rtol=1e-4, atol=1e-5)
    result = trim(model, [torch.randn(40, 3, 6, 6)], sparsity=0.5)
    assert 0 < result.reports[0].relative_error < 1
    linear = posed(model, torch.randn(4, 3, 6, 6), name="0", epsilon=0.1, sparsity=None)
    assert linear.Omega is None
    torch.testing.assert_close(linear.response(linear.W), linear.Y, rtol=1e-4, atol=1e-5)


def test_an_answer_leaves_the_recording_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    model[1].running_var.mul_(1e-4)
    folded = FoldedLayer.create(find_layers(model)[0]["0"], LayerContext(1, "1", 1, Rectifier()), model, False)
    Z, R = torch.randn(100, 6), torch.randn(100, 6)
    before = Z.clone(), R.clone()
    first = folded.response(Z, R)
    assert torch.equal(folded.response(Z, R), first)
    assert torch.equal(Z, before[0])
    assert torch.equal(R, before[1])


def test_every_reader_of_a_layer_is_found():
    class Two(nn.Module):
        """Two layers read the first one, after a residual sum."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            h = self.a(x).relu()
            k = (self.b(h) + h).relu()
            return self.c(k) * self.d(k)

    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(100, 6)
    pruning = pruner(model, x)
    found = pruning.activations.importance(pruning.weights())
    assert set(found) == {"a", "b"}
    square = sum(layer.weight.detach().square().sum(0) for layer in (model.c, model.d))
    expected = (square / square.mean()).clamp(min=1e-2).sqrt()
    torch.testing.assert_close(found["b"].flatten(), expected)
