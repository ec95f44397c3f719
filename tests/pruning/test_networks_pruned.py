"""Whole networks: torchvision's families, attention, shared and repeated modules, data-dependent control flow."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import AttentionNetwork, SharedLayers, count_hooks, equal_states
from torch import nn

from lightning_nettrim import Cardinality, Magnitude, trim


def outputs(model, x):
    """The outputs in evaluation mode."""
    with torch.no_grad():
        return model.eval()(x)


def relative_change(model, before, x):
    """‖output − output before‖ / ‖output before‖."""
    return float((outputs(model, x) - outputs(before, x)).norm() / outputs(before, x).norm())


def count_zeros(model, names):
    return sum(int((model.get_parameter(name) == 0).sum()) for name in names)


def small_vgg(models):
    """With 64 hidden units."""
    model = models.vgg16_bn(num_classes=10)
    model.classifier[0], model.classifier[3], model.classifier[6] = (
        nn.Linear(512 * 7 * 7, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 10),
    )
    return model


TORCHVISION = {
    "resnet": lambda models: models.resnet18(num_classes=10),
    "mobilenet_v2": lambda models: models.mobilenet_v2(num_classes=10),
    "mobilenet_v3": lambda models: models.mobilenet_v3_small(num_classes=10),
    "shufflenet_v2": lambda models: models.shufflenet_v2_x1_0(num_classes=10),
    "googlenet": lambda models: models.googlenet(num_classes=10, init_weights=True),
    "densenet": lambda models: models.DenseNet(16, (3, 3, 3, 3), 32, num_classes=10),
    "efficientnet": lambda models: models.efficientnet_b0(num_classes=10),
    "convnext": lambda models: models.ConvNeXt(
        [models.convnext.CNBlockConfig(n, m, 1) for n, m in ((32, 64), (64, 96), (96, 128), (128, None))],
        num_classes=10,
    ),
    "resnet with bottlenecks": lambda models: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10),
    "vit": lambda models: models.VisionTransformer(32, 16, 3, 4, 64, 128, num_classes=10),
    "vgg": small_vgg,
}
"""Torchvision's architectures, some with fewer blocks or channels than its smallest one."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_layer_of_a_torchvision_network_is_pruned_or_skipped_with_a_reason(name):
    model = TORCHVISION[name](pytest.importorskip("torchvision").models).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)  # zeros would count as pruned
    x = torch.randn(4, 3, 32, 32)
    keys, shapes = list(model.state_dict()), {key: value.shape for key, value in model.state_dict().items()}
    result = trim(
        model, [x], sparsity=0.5, allocate="uniform", num_samples=64, importance="equal",
        solver=Cardinality(max_steps=2, row_parts=1) if name != "vgg" else Magnitude(), refit=name != "vgg",
    )  # fmt: skip
    known = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    listed = {report.name for report in result.reports} | {layer.name for layer in result.skipped}
    assert set(known.values()) <= listed
    reached = {name for name in known.values() if not name.startswith(("aux1.", "aux2."))}
    assert {report.name for report in result.reports} >= reached - {layer.name for layer in result.skipped}
    assert all(layer.name.startswith("aux") or layer.name not in reached for layer in result.skipped)
    weights = [model.get_parameter(key) for key in result.masks]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.5 * total)
    assert list(model.state_dict()) == keys
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert bool(outputs(model, x).isfinite().all())
    assert count_hooks(model) == 0


# --- attention


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_the_output_of_an_attention_changes_less_than_by_magnitude_pruning(options):
    model, x = AttentionNetwork(**options).eval(), torch.randn(60, 7, 16)
    before = copy.deepcopy(model)
    result = trim(model, [x], sparsity=0.6, num_samples=10**5)
    assert [report.name for report in result.reports] == ["attention.in_proj", "attention.out_proj", "head"]
    total = sum(model.get_parameter(key).numel() for key in result.masks)
    assert total == 3 * 16 * 16 + 16 * 16 + 16 * 5
    assert count_zeros(model, result.masks) == round(0.6 * total)
    change = relative_change(model, before, x)
    assert change == pytest.approx(result.reports[-1].end_to_end_error, rel=1e-4)
    assert change == pytest.approx(result.end_to_end_error, rel=1e-4)
    by_magnitude = copy.deepcopy(before)
    trim(by_magnitude, [x], sparsity=0.6, solver=Magnitude(), refit=False, allocate="uniform")
    assert change < 0.7 * relative_change(by_magnitude, before, x)


def test_of_an_attention_to_other_tokens_only_the_last_matrix_is_pruned():
    model = AttentionNetwork(cross=True).eval()
    result = trim(model, [torch.randn(60, 7, 16)], sparsity=0.5)
    assert {report.name for report in result.reports} == {"attention.out_proj", "head"}
    assert "expected self-attention" in result.skipped[0].reason


def test_the_transformer_encoder_of_pytorch():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(40, 6, 16)
    before = copy.deepcopy(model)
    result = trim(model, [x], sparsity=0.5)
    assert len(result.reports) == 8
    assert not result.skipped
    assert count_zeros(model, result.masks) == sum(m.numel() for m in result.masks.values()) // 2
    assert relative_change(model, before, x) < 0.3
    assert torch.backends.mha.get_fastpath_enabled()


# --- shared modules and control flow


def test_repeated_and_shared_modules_are_one_layer():
    model, x = SharedLayers().eval(), torch.randn(50, 3, 6, 6)
    result = trim(model, [x], sparsity=0.4, allocate="uniform", num_samples=10**6)
    assert [report.name for report in result.reports] == ["conv", "a"]
    assert [(layer.name, layer.reason) for layer in result.skipped] == [
        ("b", "it is the same layer as a and pruned with it")
    ]
    assert model.b.weight is model.a.weight
    assert int((model.conv.weight == 0).sum()) == round(0.4 * 81)


class Conditional(nn.Module):
    """Calls a layer only if a function of the input and of the first response is positive."""

    def __init__(self, condition):
        super().__init__()
        self.condition, self.first, self.maybe = condition, nn.Linear(6, 6), nn.Linear(6, 6)
        self.last, self.never = nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x):
        y = self.first(x).relu()
        if float(self.condition(x, y)) > 0:
            y = self.maybe(y).relu()
        return self.last(y)


def test_a_layer_that_is_called_for_some_batches_is_pruned_on_their_inputs():
    torch.manual_seed(1)
    batches = [torch.randn(20, 6) + (i % 2) for i in range(8)]
    model = Conditional(lambda x, y: x.mean() - 0.5)
    before = copy.deepcopy(model).eval()
    result = trim(model, batches, sparsity=0.5, allocate="uniform")
    assert [report.name for report in result.reports] == ["first", "last", "maybe"]
    assert [(layer.name, layer.reason) for layer in result.skipped] == [("never", "never called in the forward pass")]
    for x in batches[:2]:
        assert relative_change(model, before, x) < 0.6


def test_a_layer_that_is_no_longer_called_after_pruning_is_named():
    model = Conditional(lambda x, y: 1 if bool((y == model.trained(x)).all()) else -1)
    trained = copy.deepcopy(model.first)
    model.trained = lambda x: trained(x).relu()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="maybe: expected 40 rows as in the trained network, got 0"):
        trim(model, [torch.randn(40, 6)], sparsity=0.5, ignore=["never"])
    assert equal_states(model, state)
    assert count_hooks(model) == 0


class Scaled(nn.Linear):
    """A Linear that computes twice the product of its weights and inputs."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_that_computes_something_else_is_skipped():
    model = nn.Sequential(Scaled(5, 5), nn.ReLU(), nn.Linear(5, 2))
    result = trim(model, [torch.randn(50, 5)], sparsity=0.5)
    assert [report.name for report in result.reports] == ["2"]
    assert result.skipped[0].reason == "Scaled does not compute the product of its weights and inputs"


def test_an_input_size_that_the_network_does_not_take_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ValueError, match=r"got inputs of shapes \[\(2, 3, 9, 9\)\].*raised RuntimeError"):
        trim(model, [torch.randn(2, 3, 9, 9)], sparsity=0.5)


def test_a_relu_in_place_does_not_overwrite_what_is_recorded():
    x = torch.randn(40, 3, 6, 6)
    networks = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace),
            nn.Flatten(), nn.Linear(64, 3), nn.ReLU(inplace),
        ).eval()  # fmt: skip
        trim(model, [x.clone()], sparsity=0.5, allocate="epsilon")
        networks.append(model)
    assert equal_states(*networks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(dtype).eval()
    x = torch.randn(20, 3, 8, 8, dtype=dtype)
    result = trim(model, [x], sparsity=0.5)
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert count_zeros(model, result.masks) == (216 + 288) // 2
    assert bool(outputs(model, x).isfinite().all())


def test_a_batchnorm_after_the_activation_is_part_of_the_next_layers_inputs():
    """Its statistics are those of the pruned layer's response, and its scale and shift stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 16, 5), nn.ReLU(), nn.BatchNorm1d(16), nn.MaxPool1d(2), nn.Conv1d(16, 8, 3), nn.ReLU(),
        nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    x = torch.randn(300, 3, 14)
    with torch.no_grad():
        for _ in range(20):
            model(x)
    dense = copy.deepcopy(model.eval())
    result = trim(model, x.split(50), sparsity=0.6, allocate="uniform")
    with torch.no_grad():
        first, second = model[:2](x), model[3:6](model[:3](x))
        reference = dense[:2](x)
    for norm, response in ((2, first), (6, second)):
        variance, mean = torch.var_mean(response, (0, 2))
        torch.testing.assert_close(model[norm].running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[norm].running_var, variance, rtol=1e-4, atol=1e-5)
        assert torch.equal(model[norm].weight, dense[norm].weight)
        assert torch.equal(model[norm].bias, dense[norm].bias)
    error = float((first - reference).norm() / reference.norm())
    assert result.reports[0].local_error == pytest.approx(error, rel=1e-4)
