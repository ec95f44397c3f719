"""Registry of the `Layer` class for each class of modules."""

from __future__ import annotations

from torch import nn

from lightning_nettrim.layers.attention import InProjection
from lightning_nettrim.layers.base import Layer
from lightning_nettrim.layers.conv import Conv, ConvTranspose
from lightning_nettrim.layers.linear import Linear, TransposedLinear

_TYPES: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
    nn.ConvTranspose1d: ConvTranspose,
    nn.ConvTranspose2d: ConvTranspose,
    nn.ConvTranspose3d: ConvTranspose,
    nn.MultiheadAttention: InProjection,
}

_NAMES: dict[str, type[Layer]] = {"transformers.pytorch_utils.Conv1D": TransposedLinear}
"""Layer types for classes of optional packages, by qualified name."""


def register_layer(module_type: type[nn.Module], layer_type: type[Layer]) -> None:
    """Register a layer type for the modules of a class and its subclasses, so that they can be pruned.

    A later registration of the same class replaces an earlier one. For a module, the first class in its method
    resolution order that is registered is used.

    Args:
        module_type: subclass of `torch.nn.Module`.
        layer_type: subclass of `Layer`.

    Raises:
        TypeError: if an argument is not such a subclass.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type: expected a subclass of torch.nn.Module, got {module_type!r}")
    if not (isinstance(layer_type, type) and issubclass(layer_type, Layer)):
        raise TypeError(f"layer_type: expected a subclass of Layer, got {layer_type!r}")
    _TYPES[module_type] = layer_type


def layer_type_of(module: nn.Module) -> type[Layer] | None:
    """The `Layer` class that is registered for a module; ``None`` if there is none."""
    for cls in type(module).__mro__:
        if cls in _TYPES:
            return _TYPES[cls]
        if (name := f"{cls.__module__}.{cls.__name__}") in _NAMES:
            return _NAMES[name]
    return None
