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
    "layer scale": {"features.0.0", "features.2.1"},
    "attention": {"conv_proj"},
}
"""Groups of which all units are kept, beside the classifier."""


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
    assert len(groups) + len(skipped) > 4
    plant_unread_units(layers, groups, {key: torch.arange(0, group.size, 2) for key, group in groups.items()})
    outputs = model(images)
    result = compact(model, images, batch_sizes=())
    assert all(count == size // 2 for count, size in result.report.units.values())
    classifier = list(model.named_modules())
    print(name, skipped, result.report.after.macs / result.report.before.macs)
    assert set(result.report.skipped) == set(skipped)
    assert (result.model(images) - outputs).norm() <= 1e-5 * outputs.norm()
    result.save(tmp_path / "compact.safetensors")
    loaded = load_compact(NETWORKS[name]().eval(), tmp_path / "compact.safetensors")
    assert equal_states(loaded, copied_state(result.model))
    assert torch.equal(loaded(images), result.model(images))
