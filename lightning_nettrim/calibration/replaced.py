"""Forward passes in which the inputs or the outputs of modules are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nettrim.layers import Layer


@contextmanager
def constant_outputs(layers: Mapping[str, Layer], values: Mapping[str, Tensor]) -> Iterator[None]:
    """A `with` in which some outputs of layers have the same value for all inputs and positions.

    Args:
        layers: ``{name: layer}``.
        values: ``{name: (groups·M,)}``, NaN where the output is not replaced.
    """

    def hook(layer: Layer, own: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def replaced(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            shaped = _along_channels(layer, own.to(output), output)
            return torch.where(shaped.isnan(), output, shaped)

        return replaced

    with ExitStack() as stack:
        for name, own in values.items():
            stack.callback(layers[name].module.register_forward_hook(hook(layers[name], own)).remove)
        yield


@contextmanager
def mean_inputs(layers: Mapping[str, Layer]) -> Iterator[dict[str, Tensor]]:
    """A `with` that yields what layers receive: ``{name: (channels,)}`` means over inputs and positions, in float64.

    Args:
        layers: ``{name: layer}``.
    """
    means: dict[str, Tensor] = {}

    def hook(name: str, layer: Layer) -> Callable[..., None]:
        def received(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter((*args, *kwargs.values())))
            means[name] = x.detach().double().movedim(_channel_dim(layer, x), 0).flatten(1).mean(1).cpu()

        return received

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.module.register_forward_pre_hook(hook(name, layer), with_kwargs=True).remove)
        yield means


@contextmanager
def synthetic_inputs(layers: Mapping[str, Layer], radii: Mapping[str, float], seed: int) -> Iterator[None]:
    """A `with` in which the inputs of layers are random, with a norm up to a radius for each output position.

    Directions and norms are uniformly distributed. A convolution reads several positions, which share the radius.

    Args:
        layers: ``{name: layer}``.
        radii: ``{name: maximum norm of the inputs of one output position}``.
        seed: of the random numbers.
    """

    def hook(layer: Layer, radius: float, generator: torch.Generator) -> Callable[..., Any]:
        def noise(x: Tensor) -> Tensor:
            dim = _channel_dim(layer, x)
            direction = torch.randn(x.shape, generator=generator).to(x)
            positions = max(layer.groups * layer.inputs / x.shape[dim], 1)
            norms = direction.norm(dim=dim, keepdim=True).clamp(min=torch.finfo(direction.dtype).tiny)
            lengths = torch.rand(norms.shape, generator=generator).to(x)
            return direction * (radius / positions**0.5) * lengths / norms

        def replaced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (noise(args[0]), *args[1:]), kwargs
            name, x = next(iter(kwargs.items()))
            return args, kwargs | {name: noise(x)}

        return replaced

    with ExitStack() as stack:
        for i, (name, radius) in enumerate(radii.items()):
            generator = torch.Generator().manual_seed(seed + i)
            own = hook(layers[name], radius, generator)
            stack.callback(layers[name].module.register_forward_pre_hook(own, with_kwargs=True).remove)
        yield


def _along_channels(layer: Layer, values: Tensor, output: Tensor) -> Tensor:
    """``(groups·M,)`` values in a shape that broadcasts to the layer's output."""
    dim = _channel_dim(layer, output)
    return values.reshape([-1 if i == dim else 1 for i in range(output.dim())])


def _channel_dim(layer: Layer, x: Tensor) -> int:
    """The dimension of an input or output that holds the channels: the last one before those of a kernel."""
    return x.dim() - layer.parameter.dim() + 1
