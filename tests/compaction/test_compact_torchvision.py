"""Networks with the structures of torchvision's, made small: half of the units of each group can be removed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from networks import copied_state, equal_states
from torchvision.models import (
    ConvNeXt,
    DenseNet,
    MNASNet,
    MobileNetV3,
    RegNet,
    ShuffleNetV2,
    SqueezeNet,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams

from benchmarks.planting import plant_unread_units, randomize
from lightning_nettrim import compact, load_compact
from lightning_nettrim.calibration.batch import CalibrationBatch
from lightning_nettrim.layers import find_layers
from lightning_nettrim.pruning.units.groups import find_groups

CLASSES = 5


def mobilenet():
    """Depthwise convolutions and squeeze-excitation."""
    block = partial(InvertedResidualConfig, use_se=True, dilation=1, width_mult=1.0)
    first, second = block(8, 3, 16, 8, activation="RE", stride=1), block(8, 5, 24, 16, activation="HS", stride=2)
    return MobileNetV3([first, second], 32, num_classes=CLASSES)


def regnet():
    """Grouped convolutions and squeeze-excitation."""
    params = BlockParams([2, 1], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return RegNet(params, num_classes=CLASSES, stem_width=8)


NETWORKS = {
    "concatenation of all layers before": lambda: DenseNet(4, (2, 2), 8, 2, num_classes=CLASSES),
    "convolution as classifier": lambda: SqueezeNet("1_1", CLASSES),
    "depthwise": lambda: MNASNet(0.1, CLASSES),
    "squeeze-excitation": mobilenet,
    "grouped": regnet,
    "layer scale": lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=CLASSES),
    "attention": lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES),
}

KEPT = {
    "concatenation of all layers before": {"classifier": "no layer reads its units"},
    "convolution as classifier": {"classifier.1": "its units are an output of the network"},
    "depthwise": {"classifier.1": "no layer reads its units"},
    "squeeze-excitation": {"classifier.3": "no layer reads its units"},
    "grouped": {"fc": "no layer reads its units"},
    "layer scale": {
        "classifier.2": "no layer reads its units",
        "features.2.1": "features.3.0.block.2 is a LayerNorm, which does not process each unit on its own",
        "features.0.0": "features.0.1 is a LayerNorm2d, which does not process each unit on its own",
    },
    "attention": {
        "heads.head": "no layer reads its units",
        "encoder.layers.encoder_layer_1.mlp.3": (
            "encoder.ln is a LayerNorm, which does not process each unit on its own"
        ),
    },
}
"""Groups of which all units are kept, with the reasons."""


def made(name):
    torch.manual_seed(0)
    model, images = NETWORKS[name]().eval(), torch.randn(4, 3, 32, 32)
    randomize(model, images)
    return model, images


@pytest.mark.parametrize("name", NETWORKS)
def test_the_compact_network_computes_the_same_and_is_read_back_exactly(name, tmp_path):
    model, images = made(name)
    layers, _ = find_layers(model)
    groups, skipped = find_groups(model, CalibrationBatch(images[:2]), layers)
    assert skipped == KEPT[name]
    plant_unread_units(layers, groups, {key: torch.arange(0, group.size, 2) for key, group in groups.items()})
    outputs = model(images)
    result = compact(model, images, batch_sizes=())
    assert all(count == size // 2 for count, size in result.report.units.values())
    assert result.report.skipped == skipped
    assert (result.model(images) - outputs).norm() <= 1e-5 * outputs.norm()
    result.save(tmp_path / "compact.safetensors")
    loaded = load_compact(NETWORKS[name]().eval(), tmp_path / "compact.safetensors")
    assert equal_states(loaded, copied_state(result.model))
    assert torch.equal(loaded(images), result.model(images))


class ShiftedWindows(SwinTransformer):
    """Two stages of attention within windows, with the patches merged between them."""

    def __init__(self):
        super().__init__([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=CLASSES)


def test_what_torch_pruning_does_not_follow_is_left_alone_and_the_hidden_units_are_removed():
    torch.manual_seed(0)
    model, images = ShiftedWindows().eval(), torch.randn(4, 3, 32, 32)
    randomize(model, images)
    layers, _ = find_layers(model)
    groups, skipped = find_groups(model, CalibrationBatch(images[:2]), layers)
    assert {"features.1.0.mlp.0", "features.3.0.mlp.0"} <= set(groups)
    plant_unread_units(layers, groups, {key: torch.arange(0, group.size, 2) for key, group in groups.items()})
    outputs = model(images)
    result = compact(model, images, batch_sizes=())
    assert (result.model(images) - outputs).norm() <= 1e-5 * outputs.norm()


def test_the_channel_shuffle_is_left_alone():
    torch.manual_seed(0)
    model, images = ShuffleNetV2([2, 1, 1], [8, 16, 24, 32, 64], CLASSES).eval(), torch.randn(4, 3, 32, 32)
    randomize(model, images)
    layers, _ = find_layers(model)
    groups, skipped = find_groups(model, CalibrationBatch(images[:2]), layers)
    print(groups.keys(), skipped)
    assert "Torch-Pruning does not find what is coupled with its units" in skipped.values()
    plant_unread_units(layers, groups, {key: torch.arange(0, group.size, 2) for key, group in groups.items()})
    outputs = model(images)
    result = compact(model, images, batch_sizes=())
    assert result.report.units["conv5.0"] == (32, 64)
    assert (result.model(images) - outputs).norm() <= 1e-5 * outputs.norm()
