"""A fit that ends with pruning and recovery."""

import json

import torch
import yaml
from trainers import CLI_WARNINGS, Net, half, make_trainer, train_data, val_data

from lightning_nettrim import Distillation

pytestmark = CLI_WARNINGS


def test_the_loss_is_recognized_in_the_step_and_the_report_has_the_recovery(tmp_path):
    callback = half(recover=Distillation(max_steps=40, lr=1e-2, check_every=10))
    make_trainer(tmp_path, callback).fit(model := Net(), train_data(), val_data())
    result = callback.result
    assert result.recovery.loss == "kl+mse"
    assert result.recovery.loss_after <= result.recovery.loss_before
    report = json.loads((callback.folder / "report.json").read_text())
    assert report["recovery"]["loss"] == "kl+mse"
    assert report["total"]["end_to_end_error"] == result.end_to_end_error
    assert report["arguments"]["recover"]["class_path"] == "lightning_nettrim.pruning.recovery.Distillation"
    saved = torch.load(callback.folder / "pruned.ckpt", weights_only=True)["state_dict"]
    for name, mask in result.masks.items():
        assert not bool(saved[name][~mask].any())
        assert torch.equal(saved[name], model.state_dict()[name])


def test_it_is_configured_in_yaml(tmp_path):
    from lightning.pytorch.cli import LightningArgumentParser

    from lightning_nettrim import NetTrim

    parser = LightningArgumentParser()
    parser.add_subclass_arguments(NetTrim, "callback")
    config = """
    callback:
      class_path: lightning_nettrim.NetTrim
      init_args:
        sparsity: 0.5
        recover: {class_path: lightning_nettrim.Distillation, init_args: {loss: mse, scope: block, max_steps: 7}}
    """
    parsed = parser.instantiate_classes(parser.parse_object(yaml.safe_load(config)))
    assert parsed.callback.config.recover == Distillation(loss="mse", scope="block", max_steps=7)
