"""Convolutions as matrices: a row is the patch that one position of one image sees. The only unfold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nettrim.layers.base import Layer, LayerCall


class Conv(Layer):
    """``nn.Conv1d``, ``2d`` and ``3d`` of any geometry; of all patches only those asked for are ever taken."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def groups(self) -> int:
        """Of channels."""
        return self.module.groups

    @property
    def inputs(self) -> int:
        """Channels of a group times the kernel's size."""
        return self.parameter[0].numel()

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
        """Patches of the input as the kernel walks over it, one for each position of the output."""
        x, layer = args[0] if args else kwargs["input"], self.module
        places = tuple(output.shape[-len(layer.kernel_size) :])
        walked, stride = self._walked(_batched(x.detach(), layer), places)

        def patches(positions: Tensor) -> Tensor:
            return _patches(walked, positions, places, stride, layer.dilation, layer.kernel_size)

        return LayerCall(output.numel() // layer.out_channels, patches, lambda i: self.take_rows(output, i), output)

    def _walked(self, x: Tensor, places: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """What the kernel walks over to these places, and by what steps: the padded input."""
        layer = self.module
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, _sides(layer), mode=mode), layer.stride

    def channels_second(self, output: Tensor) -> bool:
        """Always, where there is a dimension of images."""
        return output.dim() == self.parameter.dim()

    def take_rows(self, output: Tensor, positions: Tensor) -> Tensor:
        """``(n, channels)`` at positions that count images first, then places."""
        flat = _batched(output.detach(), self.module).flatten(2)  # (images, channels, places)
        positions = positions.to(flat.device)
        return flat[positions // flat.shape[2], :, positions % flat.shape[2]]


class ConvTranspose(Conv):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``: a convolution of the input with zeros between its values."""

    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d  # type: ignore[assignment]

    @property
    def inputs(self) -> int:
        """Channels of a group times the kernel's size."""
        return self.module.in_channels // self.groups * math.prod(self.module.kernel_size)

    def _walked(self, x: Tensor, places: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The input with stride − 1 zeros between its values, padded, in single steps."""
        layer = self.module
        size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *size)
        apart = [slice(None), slice(None), *(slice(None, None, int(s)) for s in layer.stride)]
        spread[tuple(apart)] = x
        sides: list[int] = []
        for i, (length, place) in enumerate(zip(size, places, strict=True)):
            reach = layer.dilation[i] * (layer.kernel_size[i] - 1)
            before = reach - int(layer.padding[i])
            sides = [before, place + reach - length - before, *sides]
        return F.pad(spread, sides), (1,) * len(places)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """``(groups, N, M)``; the kernel is turned round."""
        kernels = weight.reshape(self.groups, -1, self.outputs, math.prod(self.module.kernel_size)).flip(-1)
        return kernels.transpose(-2, -1).reshape(self.groups, self.inputs, self.outputs)

    def from_matrix(self, W: Tensor) -> Tensor:
        """`to_matrix` turned round."""
        kernels = W.reshape(self.groups, -1, math.prod(self.module.kernel_size), self.outputs).transpose(-2, -1)
        return kernels.flip(-1).reshape(self.parameter.shape)


def _batched(x: Tensor, layer: nn.Module) -> Tensor:
    """With a dimension of images, also where there is one image only."""
    return x if x.dim() == layer.get_parameter("weight").dim() else x.unsqueeze(0)


def _sides(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """What is padded before and after each dimension, the last one first, as `F.pad` takes it."""
    sides: list[int] = []
    for i, (kernel, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        if layer.padding == "same":
            before = dilation * (kernel - 1) // 2
            after = dilation * (kernel - 1) - before
        else:
            before = after = 0 if layer.padding == "valid" else int(layer.padding[i])
        sides = [before, after, *sides]
    return sides


def _patches(
    padded: Tensor,
    positions: Tensor,
    places: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    kernel: tuple[int, ...],
) -> Tensor:
    """``(n, channels·kernel)``: what the kernel covers at some positions of a padded ``(images, channels, …)``."""
    flat, device = padded.flatten(2), padded.device
    positions = positions.to(device)
    image, place = positions // math.prod(places), positions % math.prod(places)
    corner, offsets, step = torch.zeros_like(place), torch.zeros(1, dtype=torch.long, device=device), 1
    for i in reversed(range(len(places))):  # the last dimension lies densest
        corner = corner + place % places[i] * stride[i] * step
        place = place // places[i]
        along = torch.arange(kernel[i], device=device) * dilation[i] * step
        offsets = (along.unsqueeze(1) + offsets).flatten()
        step *= padded.shape[2 + i]
    covered = flat[image.unsqueeze(1), :, corner.unsqueeze(1) + offsets]  # (n, kernel, channels)
    return covered.transpose(1, 2).flatten(1)
