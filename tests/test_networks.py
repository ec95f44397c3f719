"""Networks as people have them: torchvision's families, attention, shared and repeated modules, odd control flow."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_nettrim import Cardinality, Magnitude, trim
from lightning_nettrim.layers import find_layers


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


def linear_zeros(model, names):
    return sum(int((model.get_parameter(name) == 0).sum()) for name in names)


TORCHVISION = {
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x1_0": 64,
    "googlenet": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "resnet50": 64,
    "vit_b_16": 64,
    "vgg16_bn": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_layer_is_pruned_or_has_a_reason(name):
    models = pytest.importorskip("torchvision").models
    size = TORCHVISION[name]
    options = {"image_size": size} if name == "vit_b_16" else {"init_weights": True} if name == "googlenet" else {}
    model = getattr(models, name)(weights=None, num_classes=10, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)  # zeros would count as pruned
    x = torch.randn(4, 3, size, size)
    keys, buffers = list(model.state_dict()), {key: value.shape for key, value in model.state_dict().items()}
    start = time.perf_counter()
    result = trim(
        model, [x], sparsity=0.5, allocate="uniform", num_samples=64, importance="equal",
        solver=Cardinality(steps=6, parts=1) if name != "vgg16_bn" else Magnitude(), refit=name != "vgg16_bn",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    print(name, f"{seconds:.1f} s", len(result.reports), [(s.name, s.reason) for s in result.skipped])
    known = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    told = {report.name for report in result.reports} | {layer.name for layer in result.skipped}
    assert set(known.values()) <= told
    reached = {name for name in known.values() if not name.startswith(("aux1.", "aux2."))}
    assert {report.name for report in result.reports} >= reached - {layer.name for layer in result.skipped}
    assert all(layer.name.startswith("aux") or layer.name not in reached for layer in result.skipped)
    weights = [model.get_parameter(key) for key in result.masks]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.5 * total)
    assert list(model.state_dict()) == keys
    assert {key: value.shape for key, value in model.state_dict().items()} == buffers
    assert bool(outputs(model, x).isfinite().all())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert seconds < 300


class Attention(nn.Module):
    def __init__(self, cross=False, **options):
        super().__init__()
        self.cross, self.options = cross, options
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        memory = x[:, :3] if self.cross else x
        return self.head(x + self.attention(x, memory, memory, need_weights=False)[0])


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_answers_as_it_did(options):
    model, x = Attention(**options).eval(), torch.randn(60, 7, 16)
    before = copy.deepcopy(model)
    result = trim(model, [x], sparsity=0.6, num_samples=10**5)
    assert [report.name for report in result.reports] == ["attention.in_proj", "attention.out_proj", "head"]
    total = sum(model.get_parameter(key).numel() for key in result.masks)
    assert total == 3 * 16 * 16 + 16 * 16 + 16 * 5
    assert linear_zeros(model, result.masks) == round(0.6 * total)
    change = float((outputs(model, x) - outputs(before, x)).norm() / outputs(before, x).norm())
    assert change == pytest.approx(result.reports[-1].discrepancy, rel=1e-4)
    largest = copy.deepcopy(before)
    trim(largest, [x], sparsity=0.6, solver=Magnitude(), refit=False, allocate="uniform")
    assert change < 0.7 * float((outputs(largest, x) - outputs(before, x)).norm() / outputs(before, x).norm())


def test_the_inputs_of_the_last_matrix_of_an_attention_are_its_heads():
    from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
    from lightning_nettrim.calibration.recording import record

    model, x = Attention().double().eval(), torch.randn(5, 7, 16, dtype=torch.float64)
    layer = find_layers(model)[0]["attention.out_proj"]
    weight = model.attention.out_proj.weight
    with evaluation_mode(model):
        recording = record(model, {"o": layer}, [CalibrationBatch(x)], num_samples=10**5, seed=0)["o"]
    torch.testing.assert_close(layer.to_rows(recording.X, True)[0] @ layer.matrix()[0], recording.Z)
    assert model.attention.out_proj.weight is weight


def test_attention_to_something_else_is_listed_and_its_last_matrix_pruned():
    model = Attention(cross=True).eval()
    result = trim(model, [torch.randn(60, 7, 16)], sparsity=0.5)
    assert {report.name for report in result.reports} == {"attention.out_proj", "head"}
    assert "expected self-attention" in result.skipped[0].reason
    apart = nn.ModuleList([nn.MultiheadAttention(16, 4, kdim=8), nn.Linear(2, 2)])
    assert "separate weights" in find_layers(apart)[1]["0.in_proj"]


def test_torch_s_own_encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(40, 6, 16)
    before = copy.deepcopy(model)
    result = trim(model, [x], sparsity=0.5)
    assert len(result.reports) == 8
    assert not result.skipped
    assert linear_zeros(model, result.masks) == sum(m.numel() for m in result.masks.values()) // 2
    assert float((outputs(model, x) - outputs(before, x)).norm() / outputs(before, x).norm()) < 0.3
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_layers_are_listed_with_their_reason():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.GRUCell(3, 4), nn.Linear(2, 2)])
    _, skipped = find_layers(model)
    assert "LSTM is recurrent" in skipped["0"]
    assert "GRUCell is recurrent" in skipped["1"]


class Repeated(nn.Module):
    """One convolution at two resolutions, and two Linear modules with one weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        x = self.conv(F.max_pool2d(self.conv(x).relu(), 2)).relu()
        return self.b(self.a(x.mean((2, 3))).relu()).relu()


def test_repeated_and_shared_modules_are_one_problem_with_all_samples():
    model, x = Repeated().eval(), torch.randn(50, 3, 6, 6)
    result = trim(model, [x], sparsity=0.4, allocate="uniform", num_samples=10**6)
    assert [report.name for report in result.reports] == ["conv", "a"]
    assert [(layer.name, layer.reason) for layer in result.skipped] == [
        ("b", "it is the same layer as a and pruned with it")
    ]
    assert model.b.weight is model.a.weight
    assert int((model.conv.weight == 0).sum()) == round(0.4 * 81)
    from lightning_nettrim.calibration.batch import CalibrationBatch, evaluation_mode
    from lightning_nettrim.calibration.recording import record

    layers = find_layers(model)[0]
    with evaluation_mode(model):
        recordings = record(model, layers, [CalibrationBatch(x)], num_samples=10**6, seed=0)
    assert recordings["conv"].seen == 50 * (36 + 9)
    assert recordings["a"].seen == 2 * 50


def test_one_weight_with_two_biases_is_listed():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)])
    model[1].weight = model[0].weight
    layers, skipped = find_layers(model)
    assert list(layers) == ["2"]
    assert skipped["0"] == skipped["1"] == "its weight is shared (0.weight, 1.weight)"


class Sometimes(nn.Module):
    """Calls a layer only for some inputs; ``by`` decides which number says so."""

    def __init__(self, by):
        super().__init__()
        self.by, self.first, self.maybe, self.last = by, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.never = nn.Linear(6, 6)

    def forward(self, x):
        y = self.first(x).relu()
        if float(self.by(x, y)) > 0:
            y = self.maybe(y).relu()
        return self.last(y)


def test_a_layer_that_is_called_sometimes_is_pruned_on_what_it_saw():
    torch.manual_seed(1)
    batches = [torch.randn(20, 6) + (i % 2) for i in range(8)]
    model = Sometimes(lambda x, y: x.mean() - 0.5)
    before = copy.deepcopy(model).eval()
    result = trim(model, batches, sparsity=0.5, allocate="uniform")
    assert [report.name for report in result.reports] == ["first", "last", "maybe"]
    assert [(layer.name, layer.reason) for layer in result.skipped] == [("never", "never called in the forward pass")]
    for x in batches[:2]:
        change = (outputs(model, x) - outputs(before, x)).norm() / outputs(before, x).norm()
        assert float(change) < 0.6


def test_a_layer_whose_calls_the_pruning_changes_is_named():
    model = Sometimes(lambda x, y: 1 if bool((y == model.trained(x)).all()) else -1)
    trained = copy.deepcopy(model.first)
    model.trained = lambda x: trained(x).relu()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="maybe: expected to be called as in the trained network"):
        trim(model, [torch.randn(40, 6)], sparsity=0.5, ignore=["never"])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


class Scaled(nn.Linear):
    """A Linear that answers something else than its weights times its inputs."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_its_own_mathematics_is_listed():
    model = nn.Sequential(Scaled(5, 5), nn.ReLU(), nn.Linear(5, 2))
    result = trim(model, [torch.randn(50, 5)], sparsity=0.5)
    assert [report.name for report in result.reports] == ["2"]
    assert result.skipped[0].reason == "Scaled does not compute the product of its weights and inputs"


def test_an_input_size_that_the_network_refuses_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ValueError, match=r"got inputs of shapes \[\(2, 3, 9, 9\)\].*raised RuntimeError"):
        trim(model, [torch.randn(2, 3, 9, 9)], sparsity=0.5)


def test_a_relu_in_place_overwrites_nothing_that_was_recorded():
    x = torch.randn(40, 3, 8, 8)
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace),
            nn.Flatten(), nn.Linear(144, 3), nn.ReLU(inplace),
        ).eval()  # fmt: skip
        trim(model, [x.clone()], sparsity=0.5)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(dtype).eval()
    x = torch.randn(20, 3, 8, 8, dtype=dtype)
    result = trim(model, [x], sparsity=0.5)
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert linear_zeros(model, result.masks) == (216 + 288) // 2
    assert bool(outputs(model, x).isfinite().all())
