"""Networks of timm with random weights: properties of all pruned networks, and smaller errors than by magnitude."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

timm = pytest.importorskip("timm")

from network_checks import by_magnitude, changed, check_pruned, error, snapshot  # noqa: E402

from lightning_nettrim import Cardinality, Magnitude, trim  # noqa: E402

pytestmark = pytest.mark.integration

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}
SMALL = {
    "test_resnet": {},
    "regnetx_002": {},
    "mobilenetv3_small_050": {},
    "test_efficientnet": {},
    "mobilevit_xxs": {},
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 4, "depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2),
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 64)},
    "mixer": {},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (32, 64, 64, 64)},
    "test_nfnet": {},
}  # fmt: skip
GENERALIZES = {
    "test_resnet", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224", "convnext_atto",
}  # fmt: skip
"""Networks whose error is smaller than by magnitude also on other images, with so few images and random weights."""

LARGE = {"regnetx_002", "mobilevit_xxs", "mobilenetv3_small_050", "test_resnet", "resnetv2_50", "test_efficientnet"}
"""Networks that take many seconds."""

INPUTS = 256
"""Calibration images, of which fewer are enough where no error on other images is compared."""


def images(count, size, seed):
    """Smooth images, whose neighboring pixels are correlated."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") + 0.1 * fine


def network(name, size=None):
    """A network with random weights and estimated BatchNorm statistics, and the size of its images."""
    options = SMALL[name]
    size = size or options.get("img_size", 32)
    if name == "mixer":  # whose smallest model is large
        model = timm.models.mlp_mixer.MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=64)
    else:
        model = timm.create_model(name, pretrained=False, num_classes=5, **options)
    heads = model.get_classifier()
    with torch.no_grad():
        for head in heads if isinstance(heads, tuple) else [heads]:
            head.weight.normal_(std=0.05)  # some are zero as made
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = None
        for batch in images(INPUTS, size, seed=1).split(64):
            model.train()(batch)
    return model.eval(), size


def run(model, inputs):
    return model(inputs)


def half(model, batches, **options):
    solver = Cardinality(max_steps=10)
    return trim(
        model, batches, **({"sparsity": 0.5, "allocate": "uniform", "max_rows": 512, "solver": solver} | options)
    )


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in SMALL])
def test_a_network_is_pruned_by_half(name):
    model, size = network(name)
    count = INPUTS if name in GENERALIZES else INPUTS // 4
    seen, others = images(count, size, seed=1), images(64, size, seed=2)
    with torch.no_grad():
        trained = model(seen), model(others)
    before, dense = snapshot(model), copy.deepcopy(model)
    result = half(model, seen.split(64), num_samples=count)
    check_pruned(model, before, result, 0.5)
    magnitude = by_magnitude(dense, [report.name for report in result.reports], 0.5)
    assert error(model, trained[0], seen, run) < error(magnitude, trained[0], seen, run)
    if name in GENERALIZES:
        assert error(model, trained[1], others, run) < error(magnitude, trained[1], others, run)


def reasons(result):
    return {layer.name: layer.reason for layer in result.skipped}


def test_a_qkv_that_is_used_by_a_function_is_skipped_for_that_reason():
    model, size = network("eva02_tiny_patch14_224")
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear)
    result = half(model, [images(64, size, 1)], num_samples=64)
    assert reasons(result) == {
        "blocks.0.attn.qkv": "its weight is used by an operation outside its own forward, which hooks do not see"
    }
    assert not bool((model.blocks[0].attn.qkv.weight == 0).any())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_tokens_and_positions_are_not_pruned(name):
    model, size = network(name)
    bare = {key: value.detach().clone() for key, value in model.named_parameters() if "." not in key}
    assert {"cls_token", "pos_embed"} <= set(bare)
    result = half(model, [images(64, size, 1)], num_samples=64, solver=Magnitude())
    assert result.skipped == ()
    assert not set(bare) & {report.name for report in result.reports}
    assert all(torch.equal(value, model.get_parameter(key)) for key, value in bare.items())


def test_convolutions_that_standardize_their_weights_are_skipped():
    model, size = network("test_nfnet")
    result = half(model, [images(64, size, 1)], num_samples=64, solver=Magnitude())
    standardized = {key for key, module in model.named_modules() if "StdConv2d" in type(module).__name__}
    assert len(standardized) == 25
    assert set(reasons(result)) == standardized
    assert set(reasons(result).values()) == {"ScaledStdConv2d does not compute the product of its weights and inputs"}
    assert any("of the values in weight matrices are in layers that can be pruned" in note for note in result.notes)


def test_statistics_do_not_change_without_recalibrate_batchnorm():
    model, size = network("mobilenetv3_small_050")
    before = snapshot(model)
    half(model, [images(64, size, 1)], num_samples=64, solver=Magnitude(), refit=False, recalibrate_batchnorm=False)
    names = changed(before, model.state_dict())
    assert len(names) == 54
    assert all(
        name.endswith("weight") and before.state[name].dim() == 4 or name == "classifier.weight" for name in names
    )


def test_targets_and_ignore_leave_other_layers_unchanged():
    model, size = network("convnext_atto")
    before = snapshot(model)
    result = half(model, [images(64, size, 1)], num_samples=64, targets=["*.mlp.*"], ignore=["re:stages\\.0.*"])
    pruned = [f"stages.{i}.blocks.0.mlp.fc{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert [report.name for report in result.reports] == pruned
    names = {f"{name}.{key}" for name in pruned for key in ("weight", "bias")}
    assert set(changed(before, model.state_dict())) <= names
    assert reasons(result)["head.fc"] == "not among the targets"
    assert reasons(result)["stages.0.blocks.0.mlp.fc1"] == "ignored"


def test_images_with_labels_are_passed_without_the_labels():
    model, size = network("test_resnet")
    x = images(64, size, 1)
    other = copy.deepcopy(model)
    half(model, [x], num_samples=64, solver=Magnitude())
    half(other, [(x, torch.zeros(64, dtype=torch.long))], num_samples=64, solver=Magnitude())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_tuples_are_refused_if_forward_accepts_one_element_or_more():
    model, size = network("vit_tiny_patch16_224")
    x, before = images(64, size, 1), snapshot(model)
    labeled = [(x, torch.zeros(64, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"could take one element or more: yield the input alone .*, or pass forward="):
        half(model, labeled, num_samples=64)
    assert changed(before, model.state_dict()) == []
    result = half(model, labeled, num_samples=64, solver=Magnitude(), forward=lambda model, batch: model(batch[0]))
    check_pruned(model, before, result, 0.5)
