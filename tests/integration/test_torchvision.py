"""Detection and segmentation by torchvision's networks with random weights."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from trainers import LIGHTNING_WARNINGS, make_trainer

pytest.importorskip("torchvision")

from network_checks import check_pruned, snapshot  # noqa: E402
from torchvision.models import detection, segmentation  # noqa: E402

from lightning_nettrim import Cardinality, Magnitude, NetTrim, trim  # noqa: E402

pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.integration]

HALF = {"sparsity": 0.5, "allocate": "uniform", "max_rows": 512}
SIZES = ((64, 48), (40, 56), (48, 48))


def image_list(seed):
    """A list of images, the form that detectors take."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in SIZES]


def boxes():
    found = {"boxes": torch.tensor([[4.0, 5.0, 30.0, 28.0], [2.0, 2.0, 20.0, 35.0]]), "labels": torch.tensor([1, 2])}
    return [dict(found) for _ in SIZES]


def faster_rcnn():
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20,
    ).eval()  # fmt: skip


def ssd():
    return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()


DETECTORS = {
    "Faster R-CNN": (faster_rcnn, ["backbone.fpn.*", "rpn.*", "*.box_predictor.*"]),
    "SSDlite": (ssd, ["head.regression_head.module_list.[0-2].*"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "targets"), DETECTORS.values(), ids=DETECTORS.keys())
def test_a_detector_is_pruned_on_lists_of_images_of_several_sizes(make, targets):
    model = make()
    before = snapshot(model)
    result = trim(
        model, [image_list(0), image_list(1)], num_samples=32, solver=Cardinality(max_steps=5), targets=targets,
        forward=lambda model, batch: model(batch), **HALF,
    )  # fmt: skip
    check_pruned(model, before, result, 0.5)
    assert len(result.reports) > 5
    assert {layer.reason for layer in result.skipped} == {"not among the targets"}
    found = model(image_list(2))
    assert all(set(each) == {"boxes", "labels", "scores"} for each in found)


class Detector(pl.LightningModule):
    """Trains on images and boxes; has losses in training only, like torchvision's detectors."""

    def __init__(self):
        super().__init__()
        self.model = faster_rcnn().train()

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return sum(self.model(list(images), list(targets)).values())

    def validation_step(self, batch, batch_idx):
        images, _ = batch
        found = self.model(list(images))
        self.log("boxes", float(sum(len(each["boxes"]) for each in found)), batch_size=len(images))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def detection_loader(seed):
    rows = list(zip(image_list(seed) + image_list(seed + 1), boxes() + boxes(), strict=True))
    return DataLoader(rows, batch_size=3, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))


@pytest.mark.slow
def test_a_detector_is_pruned_in_a_trainer(tmp_path):
    callback = NetTrim(num_samples=32, targets=["*.fpn.*", "*.box_predictor.*"], solver=Magnitude(), **HALF)
    module = Detector()
    make_trainer(tmp_path, callback, max_epochs=1).fit(module, detection_loader(0), detection_loader(5))
    assert callback.result.sparsity == pytest.approx(0.5, abs=1e-3)
    names = {report.name.removeprefix("model.") for report in callback.result.reports}
    blocks = [f"backbone.fpn.{kind}_blocks.{i}.0" for kind in ("inner", "layer") for i in (0, 1)]
    assert names == {*blocks, "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"}
    assert set(callback.metrics["pruned"]) == {"boxes"}
    assert (tmp_path / "nettrim/pruned.ckpt").exists()


class Segmenter(pl.LightningModule):
    """Images and masks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def loss(self, batch):
        images, masks = batch
        return nn.functional.cross_entropy(self.model(images)["out"], masks)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def masked(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    rows = [(image, (image[0] > 0).long()) for image in images]
    return DataLoader(rows, batch_size=4)


SEGMENTERS = {
    "LR-ASPP": (segmentation.lraspp_mobilenet_v3_large, ["model.classifier.*", "model.backbone.1*"]),
    "DeepLab": (segmentation.deeplabv3_mobilenet_v3_large, ["model.backbone.[0-6].*"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "targets"), SEGMENTERS.values(), ids=SEGMENTERS.keys())
def test_a_segmenter_is_pruned_in_a_trainer(tmp_path, make, targets):
    module = Segmenter(make(weights=None, weights_backbone=None, num_classes=2))
    callback = NetTrim(num_samples=32, targets=targets, solver=Cardinality(max_steps=10), **HALF)
    make_trainer(tmp_path, callback, max_epochs=1).fit(module, masked(0), masked(1))
    assert len(callback.result.reports) >= 6
    for report in callback.result.reports:
        weight = module.get_submodule(report.name).weight
        assert abs(int((weight == 0).sum()) - weight.numel() / 2) <= 1
    assert callback.metrics["pruned"]["val_loss"] != callback.metrics["dense"]["val_loss"]
    (metrics,) = make_trainer(tmp_path).validate(module, masked(1), verbose=False)
    assert metrics == pytest.approx(callback.metrics["pruned"])


@pytest.mark.slow
def test_a_whole_segmenter_is_pruned_by_trim():
    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2).eval()
    before = snapshot(model)
    images = torch.stack([row[0] for row in masked(0).dataset])
    result = trim(model, [(images, torch.zeros(8))], num_samples=32, solver=Magnitude(), refit=False, **HALF)
    check_pruned(model, before, result, 0.5)
    assert result.skipped == ()
