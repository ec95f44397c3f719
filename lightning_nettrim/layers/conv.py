"""Convolutions as matrices: a row of the input is the patch of one output position of one sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nettrim.layers.base import Layer, LayerCall


class Conv(Layer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with any stride, padding, dilation and groups.

    Patches are extracted at the selected positions only.
    """

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def groups(self) -> int:
        """Number of groups of channels."""
        return self.module.groups

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
        """The patches of the input and the channels of the output, one row for each output position of each sample.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            output: output of the call.
        """
        x, layer = args[0] if args else kwargs["input"], self.module
        output_size = tuple(output.shape[-len(layer.kernel_size) :])
        padded, stride = self._padded_input(_with_batch_dim(x.detach(), layer), output_size)

        def patches(positions: Tensor) -> Tensor:
            return _extract_patches(padded, positions, output_size, stride, layer.dilation, layer.kernel_size)

        return LayerCall(output.numel() // layer.out_channels, patches, lambda i: self.take_rows(output, i), output)

    def _padded_input(self, x: Tensor, output_size: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The padded input and the stride of the kernel on it, which give an output of the given size."""
        layer = self.module
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, _padding(layer), mode=mode), layer.stride

    def channels_second(self, output: Tensor) -> bool:
        """Whether the output has a batch dimension, in which case the second dimension is that of the channels."""
        return output.dim() == self.parameter.dim()

    def take_rows(self, output: Tensor, positions: Tensor) -> Tensor:
        """``(n, channels)``: rows of a tensor at some positions.

        Args:
            output: tensor with the shape of the layer's output.
            positions: ``(n,)`` indices into the samples times the output positions, of which the latter vary fastest.
        """
        flat = _with_batch_dim(output.detach(), self.module).flatten(2)  # (samples, channels, positions)
        positions = positions.to(flat.device)
        return flat[positions // flat.shape[2], :, positions % flat.shape[2]]


class ConvTranspose(Conv):
    """``nn.ConvTranspose1d``, ``nn.ConvTranspose2d`` and ``nn.ConvTranspose3d``, as convolutions of a dilated input."""

    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d  # type: ignore[assignment]

    @property
    def inputs(self) -> int:
        """N, the number of input channels of a group times the size of the kernel."""
        return self.module.in_channels // self.groups * math.prod(self.module.kernel_size)

    def _padded_input(self, x: Tensor, output_size: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The input with stride − 1 zeros between its values, padded; the stride on it is 1."""
        layer = self.module
        size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)]
        dilated = x.new_zeros(*x.shape[:2], *size)
        strided = [slice(None), slice(None), *(slice(None, None, int(s)) for s in layer.stride)]
        dilated[tuple(strided)] = x
        padding: list[int] = []
        for i, (length, output_length) in enumerate(zip(size, output_size, strict=True)):
            extent = layer.dilation[i] * (layer.kernel_size[i] - 1)
            before = extent - int(layer.padding[i])
            padding = [before, output_length + extent - length - before, *padding]
        return F.pad(dilated, padding), (1,) * len(output_size)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Convert a tensor with the shape of the weight parameter to ``(groups, N, M)``, with flipped kernels."""
        kernels = weight.reshape(self.groups, -1, self.outputs, math.prod(self.module.kernel_size)).flip(-1)
        return kernels.transpose(-2, -1).reshape(self.groups, self.inputs, self.outputs)

    def from_matrix(self, W: Tensor) -> Tensor:
        """Convert ``(groups, N, M)`` to the shape of the weight parameter; the inverse of `to_matrix`."""
        kernels = W.reshape(self.groups, -1, math.prod(self.module.kernel_size), self.outputs).transpose(-2, -1)
        return kernels.flip(-1).reshape(self.parameter.shape)


def _with_batch_dim(x: Tensor, layer: nn.Module) -> Tensor:
    """The tensor with a batch dimension, which is added to a single sample."""
    return x if x.dim() == layer.get_parameter("weight").dim() else x.unsqueeze(0)


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Padding before and after each spatial dimension, the last one first, as ``F.pad`` expects it."""
    padding: list[int] = []
    for i, (kernel, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        if layer.padding == "same":
            before = dilation * (kernel - 1) // 2
            after = dilation * (kernel - 1) - before
        else:
            before = after = 0 if layer.padding == "valid" else int(layer.padding[i])
        padding = [before, after, *padding]
    return padding


def _extract_patches(
    padded: Tensor,
    positions: Tensor,
    output_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    kernel: tuple[int, ...],
) -> Tensor:
    """``(n, channels·kernel size)``: patches of a padded input.

    Args:
        padded: ``(samples, channels, …)`` padded input.
        positions: ``(n,)`` indices into the samples times the output positions, of which the latter vary fastest.
        output_size: spatial size of the output.
        stride: stride of the kernel on the padded input.
        dilation: dilation of the kernel.
        kernel: size of the kernel.
    """
    flat, device = padded.flatten(2), padded.device
    positions = positions.to(device)
    sample, index = positions // math.prod(output_size), positions % math.prod(output_size)
    start, offsets, step = torch.zeros_like(index), torch.zeros(1, dtype=torch.long, device=device), 1
    for i in reversed(range(len(output_size))):  # the last dimension varies fastest
        start = start + index % output_size[i] * stride[i] * step
        index = index // output_size[i]
        along_dim = torch.arange(kernel[i], device=device) * dilation[i] * step
        offsets = (along_dim.unsqueeze(1) + offsets).flatten()
        step *= padded.shape[2 + i]
    patches = flat[sample.unsqueeze(1), :, start.unsqueeze(1) + offsets]  # (n, kernel size, channels)
    return patches.transpose(1, 2).flatten(1)
