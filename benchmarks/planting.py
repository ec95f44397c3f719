"""Networks with random weights, in which units that no layer reads are planted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_nettrim.layers import Layer
from lightning_nettrim.pruning.units.groups import UnitGroup, rows_of_channels


def plant_unread_units(
    layers: Mapping[str, Layer], groups: Mapping[str, UnitGroup], units: Mapping[str, Tensor]
) -> None:
    """Set all weights to zero by which layers read some units.

    Args:
        layers: of the network.
        groups: of the network.
        units: ``{group: (n,)}`` indices of its units.
    """
    for name, indices in units.items():
        for reader, channels in groups[name].readers.items():
            layer = layers[reader]
            W = layer.to_matrix(layer.parameter.data).clone()
            W[:, rows_of_channels(layer, channels[indices]).flatten()] = 0
            layer.parameter.data.copy_(layer.from_matrix(W))


@torch.no_grad()
def randomize(model: nn.Module, images: Tensor) -> None:
    """Give a network weights as after training, as far as compaction is concerned.

    Parameters that are initialized with constants get random values, so that nothing is multiplied by zero or by one,
    and the statistics of BatchNorm become those of the images, so that activations neither vanish nor explode.

    Args:
        model: the network in evaluation mode.
        images: a batch.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif parameter.dim() == 1 or name.endswith("layer_scale"):
            parameter.uniform_(0.5, 1.5)
        elif not bool(parameter.any()):
            parameter.normal_(std=0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = None
    if norms:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
